"""The house keeps its shape: what may import what, what is public, what is tested where."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import gpsearch
from gpsearch.space import Space, built_in

ROOT = Path(__file__).parents[1]

FLOORS = (
    {"errors", "computed"},
    {"files", "kernels"},
    {"inference", "dropout"},
    {"gated", "exporting"},
    {"cell", "blocks", "mask", "schedule", "pareto", "profiling"},
    {"quantize", "stream"},
    {"candidate", "groups", "grow", "prune", "compact_units", "flops", "formats", "objectives"},
    {"block_masks", "unit_masks"},
    {"compact", "growprune", "space", "tasks"},
    {"train", "settings", "sampling", "learned"},
    {"staircase"},
    {"study"},
    {"deploy"},
    {"remeasured", "reproduce"},
    {"search", "report", "progress"},
    {"testing"},
    {"cli"},
    {"__init__", "__main__"},
)
"""Lowest first. A module imports from strictly lower floors; a package's parts, one another."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OPEN_TO_PLUGINS = {"profiling", "errors"}

SEEN_THROUGH = {
    "__init__": "test_layout",
    "cli.plugin": "test_plugin",
    "cli": "test_cli",
    "__main__": "test_packaging",
    "errors": "test_cli",
    "gated": "test_cell",
    "inference": "test_decode",
    "kernels.decode": "test_decode",
    "kernels.native": "test_native",
    "kernels.tiles": "test_tiles",
    "kernels": "test_kernels",
    "compact_units": "test_compact",
    "report": "test_report",
    "report.comparison": "test_comparison",
    "report.stairs": "test_staircase",
    "report.paired": "test_comparison",
    "profiling": "test_profiling",
    "profiling.energy": "test_energy",
    "profiling.host": "test_host",
    "profiling.rapl": "test_rapl",
    "profiling.zeus": "test_zeus",
    "space": "test_space",
    "exporting.agent": "test_agent",
    "exporting.onnx": "test_profilers_onnx",
    "exporting": "test_exporting",
    "testing": "test_testing",
    "profilers.cpu": "test_profilers_cpu",
    "profilers.gpu": "test_profilers_gpu",
    "profilers.remote": "test_profilers_remote",
    "profilers.onnx": "test_profilers_onnx",
    "profilers.pt2": "test_profilers_pt2",
}
"""Modules, or packages as a whole, without a test file of their own name: the one they have."""
OF_THE_WHOLE = {
    "test_benchmarks", "test_layout", "test_packaging", "test_plugin_install", "test_readme",
}  # fmt: skip
"""Test files of no single module."""

HEAVY = (
    "fvcore", "h5py", "jiwer", "matplotlib", "onnx", "onnxruntime", "optuna", "pandas", "plotly",
    "pycocoevalcap", "sacrebleu", "sacremoses", "scipy", "sentencepiece", "soundfile", "soxr",
)  # fmt: skip


def rooms() -> Iterator[str]:
    """Yield the names in gpsearch/, modules and packages alike."""
    for path in (ROOT / "gpsearch").iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists():
            yield path.stem


def engine() -> list[Path]:
    """Return the engine's files; what a plug-in begins as is none of them."""
    found = sorted((ROOT / "gpsearch").rglob("*.py"))
    return [path for path in found if "templates" not in path.parts]


def modules() -> Iterator[str]:
    """Yield the dotted names of all modules, those of the engine without "gpsearch."."""
    for path in sorted([*engine(), *ROOT.glob("profilers/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[1:] if parts[0] == "gpsearch" else parts
        if path.name != "__init__.py" or parts == ("__init__",):
            yield ".".join(parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and room of every import from gpsearch, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package in ("gpsearch", "profilers", "search_spaces"):
                room = rest.partition(".")[0] if package == "gpsearch" else package
                yield node.lineno, room


def test_every_room_has_a_floor() -> None:
    assert sorted(rooms()) == sorted(FLOOR)


def test_the_engine_imports_downwards_only_and_never_a_plug_in() -> None:
    wrong = []
    for path in engine():
        room, *inner = path.relative_to(ROOT / "gpsearch").with_suffix("").parts
        for line, other in imports(path):
            downwards = FLOOR.get(other, len(FLOORS)) < FLOOR[room]
            if not downwards and not (inner and other == room):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {other}")
    assert wrong == []


def test_plug_ins_import_the_profiling_contract_only() -> None:
    wrong = [
        f"{path.name}:{line} imports {other}"
        for path in sorted((ROOT / "profilers").rglob("*.py"))
        for line, other in imports(path)
        if other not in OPEN_TO_PLUGINS
    ]
    assert wrong == []


def test_the_public_names_are_complete_and_sorted() -> None:
    public = [*gpsearch._HOMES, "Unsupported", "UserError", "__version__"]
    assert gpsearch.__all__ == sorted(public, key=_constants_classes_functions)
    assert set(gpsearch.__all__) <= set(dir(gpsearch))
    assert all(getattr(gpsearch, name) for name in gpsearch.__all__)
    assert not hasattr(gpsearch, "no_such_name")


def test_the_function_compact_hides_its_module_but_does_not_block_it() -> None:
    from gpsearch.compact import compact

    assert inspect.isfunction(gpsearch.compact)
    assert gpsearch.compact is compact
    assert isinstance(sys.modules["gpsearch.compact"], ModuleType)


def test_the_map_in_the_package_docstring_names_every_module_once() -> None:
    assert gpsearch.__doc__
    mapped = [line.split()[0] for line in gpsearch.__doc__.splitlines() if line.startswith("    ")]
    assert sorted(mapped) == sorted(set(rooms()) - {"__init__", "__main__"})


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import gpsearch", ("torch", "numpy", *HEAVY)),
        ("import gpsearch.compact; gpsearch.compact.__code__  # the function", HEAVY),
    ],
)
def test_imports_are_light(code: str, absent: tuple[str, ...]) -> None:
    code += f"\nimport sys; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_module_has_its_test_and_every_test_its_module() -> None:
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert tests == {mirror(module) for module in modules()} | OF_THE_WHOLE


def mirror(module: str) -> str:
    room = module.partition(".")[0]
    return SEEN_THROUGH.get(module) or SEEN_THROUGH.get(room) or f"test_{module.split('.')[-1]}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("search_spaces/*.toml")), ids=lambda p: p.stem)
def test_every_search_space_is_listed_and_can_be_read(path: Path) -> None:
    assert path.stem in built_in()
    assert Space.read(path.stem).baselines()


def _constants_classes_functions(name: str) -> tuple[bool, bool, str]:
    """Sort as ruff's RUF022 does: CONSTANTS, then Classes, then the rest."""
    return (not name.isupper(), not name[0].isupper(), name)
