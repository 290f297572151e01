"""The wheel holds every file of every folder, and works where there is no checkout."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "gpsearch": "gpsearch",
    "profilers": "gpsearch/profilers",
    "search_spaces": "gpsearch/search_spaces",
}
"""Where each folder of the repository lies in the wheel."""

DISTRIBUTIONS = {**packages_distributions(), "pynvml": ["nvidia-ml-py"]}
"""Which distributions hold each importable package; an extra's may not be installed."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel offline, from a copy: a build leaves folders beside its sources."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", cwd=source)
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a folder of its own."""
    site = tmp_path_factory.mktemp("site")
    python("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel)
    return site


def python(*arguments: str | Path, cwd: Path | None = None, site: Path | None = None) -> str:
    """Run Python and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(site)} if site else None
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_and_no_other(wheel: Path) -> None:
    here = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    there = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert there == here


def test_the_wheel_carries_its_licence_and_those_of_its_data(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    licences = {name.partition(".dist-info/licenses/")[2] for name in names} - {""}
    data = "gpsearch/tasks/data"
    assert licences == {"LICENSE", f"{data}/AN4-LICENSE", f"{data}/TATOEBA-LICENSE"}
    assert "gpsearch/py.typed" in names


def test_every_package_that_is_imported_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = chain(project["dependencies"], *project["optional-dependencies"].values())
    declared = {canonicalize_name(Requirement(text).name) for text in needed}
    undeclared = {
        package
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if "templates" not in path.parts  # packages of their own
        for package in imported(path) - sys.stdlib_module_names - {"gpsearch"}
        if not declared
        & {canonicalize_name(name) for name in DISTRIBUTIONS.get(package, [package])}
    }
    assert undeclared == set()


def imported(path: Path) -> set[str]:
    """Return the top-level packages that a file imports, also within its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_the_installed_package_imports_its_plug_ins_from_anywhere(
    site: Path, tmp_path: Path
) -> None:
    code = "import gpsearch.profilers.cpu as cpu, gpsearch; print(cpu.__file__, gpsearch.__file__)"
    printed = python("-c", code, cwd=tmp_path, site=site)
    assert printed.split() == [
        str(site / "gpsearch" / "profilers" / "cpu.py"),
        str(site / "gpsearch" / "__init__.py"),
    ]


def test_the_installed_command_lists_what_came_with_it(site: Path, tmp_path: Path) -> None:
    assert "hlstm" in python("-m", "gpsearch", "spaces", cwd=tmp_path, site=site)
    assert "cpu" in python("-m", "gpsearch", "devices", cwd=tmp_path, site=site)
