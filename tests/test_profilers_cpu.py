from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpsearch.profilers.cpu import (  # type: ignore[import-not-found]
    CpuProfiler,
    Rapl,
    _remedy,
)
from torch import nn

from gpsearch.profiling import Host, check, measure


def zone(root: Path, number: str, name: str, microjoules: int, span: int = 1_000_000) -> Path:
    """Write one RAPL zone as the kernel shows it."""
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    return folder


def test_rapl_adds_up_the_sockets_and_nothing_twice(tmp_path: Path) -> None:
    zone(tmp_path, "0", "package-0", 300_000)
    zone(tmp_path, "0:0", "core", 200_000)
    zone(tmp_path, "0:1", "dram", 100_000)
    zone(tmp_path, "1", "package-1", 400_000)
    zone(tmp_path, "2", "psys", 900_000)
    rapl = Rapl(tmp_path)
    assert rapl.why_not() is None
    assert rapl.names == ["package-0", "package-1"]
    assert rapl.joules() == pytest.approx(0.7)


def test_rapl_goes_on_where_a_counter_wraps_around(tmp_path: Path) -> None:
    first = zone(tmp_path, "0", "package-0", 900_000)
    second = zone(tmp_path, "1", "package-1", 100_000)
    rapl = Rapl(tmp_path)
    start = rapl.joules()
    (first / "energy_uj").write_text("50000")  # 0.9 J -> 1 J = 0 -> 0.05 J
    (second / "energy_uj").write_text("120000")
    assert rapl.joules() - start == pytest.approx(0.15 + 0.02)
    (first / "energy_uj").write_text("40000")  # and once more around
    assert rapl.joules() - start == pytest.approx(0.15 + 0.99 + 0.02)


def test_a_machine_without_rapl_says_so(tmp_path: Path) -> None:
    why_not = CpuProfiler(powercap=tmp_path / "absent").probe().unavailable["energy_j"]
    assert "a virtual machine, a container" in why_not


def test_a_counter_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    (zone(tmp_path, "0", "package-0", 0) / "energy_uj").unlink()
    assert "RAPL cannot be read" in CpuProfiler(powercap=tmp_path).probe().unavailable["energy_j"]


def test_a_counter_whose_wrap_cannot_be_told_is_not_used(tmp_path: Path) -> None:
    (zone(tmp_path, "0", "package-0", 0) / "max_energy_range_uj").write_text("")
    assert "RAPL cannot be read" in CpuProfiler(powercap=tmp_path).probe().unavailable["energy_j"]


def test_a_counter_for_root_only_comes_with_the_command_that_opens_it(tmp_path: Path) -> None:
    why_not = _remedy(tmp_path, PermissionError(13, "Permission denied"))
    assert f"sudo chmod a+r {tmp_path}/intel-rapl:*/energy_uj" in why_not


def test_with_a_counter_energy_is_available(tmp_path: Path) -> None:
    zone(tmp_path, "0", "package-0", 2_500_000)
    cpu = CpuProfiler(powercap=tmp_path)
    facts = cpu.probe()
    assert facts.unavailable == {}
    assert (facts.energy_method, facts.energy_scope) == ("rapl:package-0", "socket")
    clock_s, joules = cpu.read_energy()
    assert clock_s > 0
    assert joules == 2.5


def test_the_fingerprint_names_all_that_speed_depends_on() -> None:
    fingerprint = CpuProfiler(threads=2).probe().fingerprint
    assert fingerprint["threads"] == "2"
    assert fingerprint["torch"] == torch.__version__
    assert all(fingerprint.values())


def test_models_run_in_the_given_order_as_copies_in_evaluation_mode() -> None:
    seen: list[tuple[str, bool, int]] = []

    class Noting(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.name, self.training, torch.get_num_threads()))
            assert torch.is_inference_mode_enabled()
            return x + 1

    cpu, threads = CpuProfiler(), torch.get_num_threads()
    models = [Noting("a"), Noting("b")]
    handles = [cpu.load(model, (torch.zeros(1),)) for model in models]
    seconds = cpu.run(handles, [1, 0, 1])
    assert seen == [("b", False, 1), ("a", False, 1), ("b", False, 1)]
    assert len(seconds) == 3
    assert min(seconds) > 0
    assert all(model.training for model in models)
    assert torch.get_num_threads() == threads


def test_peak_memory_is_weights_example_and_what_lives_beside_them() -> None:
    cpu = CpuProfiler()
    model = nn.Sequential(nn.Linear(100, 1000, bias=False), nn.Linear(1000, 10, bias=False))
    handle = cpu.load(model, (torch.zeros(1, 100),))
    floats = 100 * 1000 + 1000 * 10 + 100 + 1000 + 10
    # A few buffers of the matrix product's own may come on top.
    assert 4 * floats <= cpu.peak_memory(handle) <= 4 * floats * 1.05


def test_a_real_model_is_about_as_fast_as_itself(tmp_path: Path) -> None:
    model, example = nn.LSTM(16, 32), (torch.zeros(20, 1, 16),)
    reading = check(CpuProfiler(), model, example, host=Host(locks=tmp_path))
    assert reading["latency_ratio"].value == pytest.approx(1, abs=0.2)


def test_a_larger_model_takes_longer(tmp_path: Path) -> None:
    reading = measure(
        CpuProfiler(),
        nn.Linear(2000, 2000),
        (torch.zeros(1, 2000),),
        reference=nn.Linear(2000, 20),
        max_seconds=0.3,
        host=Host(locks=tmp_path),
    )
    assert reading["latency_ratio"].number > 2
    assert reading["peak_memory_bytes"].number > 4 * 2000 * 2000
