from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import count, groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpsearch.profilers.cpu import CpuProfiler  # type: ignore[import-not-found]
from torch import nn

from gpsearch.cell import HLSTMCell
from gpsearch.kernels.native import available, description, native
from gpsearch.profiling import Host, check, measure, stored_bytes
from gpsearch.profiling.rapl import PerfEvents, Sources, Surroundings
from gpsearch.testing import ProfilerConformance
from tests.test_rapl import zone


def test_with_a_counter_energy_is_available(tmp_path: Path) -> None:
    zone(tmp_path, "0", "package-0", 2_500_000, span=10_000_000)
    cpu = CpuProfiler(sources=Sources((tmp_path,)))
    facts = cpu.probe()
    assert facts.unavailable == {}
    assert (facts.energy_method, facts.energy_scope) == ("rapl:package-0", "socket")
    assert facts.energy_wrap_j == 10
    clock_s, joules = cpu.read_energy()
    assert clock_s > 0
    assert joules == 2.5


def test_without_a_counter_energy_is_unavailable_with_the_reason(tmp_path: Path) -> None:
    cpu = CpuProfiler(sources=Sources((tmp_path,), tmp_path, PerfEvents(), Surroundings(tmp_path)))
    reason = cpu.probe().unavailable["energy_j"]
    assert "no RAPL counter" in reason
    with pytest.raises(RuntimeError, match="no RAPL counter"):
        cpu.read_energy()


def test_the_fingerprint_names_all_that_speed_depends_on() -> None:
    fingerprint = CpuProfiler(threads=2).probe().fingerprint
    assert fingerprint["threads"] == "2"
    assert fingerprint["torch"] == torch.__version__
    assert all(fingerprint.values())
    kernels = fingerprint["kernels in C"]
    assert description().startswith(kernels) if native() else kernels == "none"


@pytest.mark.parametrize("chosen", ["off", "portable"])
def test_other_kernels_make_another_fingerprint(
    chosen: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = CpuProfiler().probe().fingerprint
    request.addfinalizer(native.cache_clear)
    monkeypatch.setenv("GPSEARCH_KERNELS", chosen)
    if chosen != "off" and chosen not in available():
        pytest.skip("the kernels were not built")
    native.cache_clear()
    kernels = {"off": "none"}.get(chosen, chosen)
    assert CpuProfiler().probe().fingerprint == {**usual, "kernels in C": kernels}


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
    # Calls that another process disturbs are run again, then or after the others.
    ran = [one for one, _ in groupby(seen)]
    assert ran[:3] == [("b", False, 1), ("a", False, 1), ("b", False, 1)]
    assert set(ran) == set(ran[:3])
    assert len(seconds) == 3
    assert min(seconds) > 0
    assert all(model.training for model in models)
    assert torch.get_num_threads() == threads


def test_work_runs_every_call_once_even_where_each_is_preempted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[bool] = []

    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ran.append(torch.is_inference_mode_enabled())
            return x

    preemptions = count()
    monkeypatch.setattr(
        "resource.getrusage", lambda who: SimpleNamespace(ru_nivcsw=next(preemptions))
    )
    cpu = CpuProfiler()
    handle = cpu.load(Counting(), (torch.zeros(1),))
    cpu.run([handle], [0])
    assert len(ran) > 1
    ran.clear()
    cpu.work(handle, 5)
    assert ran == [True] * 5


def test_peak_memory_is_weights_example_and_what_lives_beside_them() -> None:
    cpu = CpuProfiler()
    model = nn.Sequential(nn.Linear(100, 1000, bias=False), nn.Linear(1000, 10, bias=False))
    handle = cpu.load(model, (torch.zeros(1, 100),))
    floats = 100 * 1000 + 1000 * 10 + 100 + 1000 + 10
    # A few buffers of the matrix product's own may come on top.
    assert 4 * floats <= cpu.peak_memory(handle) <= 4 * floats * 1.05


def test_a_state_may_be_among_the_arguments() -> None:
    cpu, state = CpuProfiler(), (torch.zeros(1, 4), torch.zeros(1, 4))
    handle = cpu.load(HLSTMCell(3, 4, gate_hidden=(2,)), (torch.ones(1, 3), state))
    assert len(cpu.run([handle], [0, 0])) == 2
    assert [one.shape for one in cpu.outputs(handle)] == [(1, 4), (1, 4)]
    assert cpu.peak_memory(handle) > stored_bytes(*handle) > 4 * (3 + 4 + 4)


def test_a_real_model_is_about_as_fast_as_itself(tmp_path: Path) -> None:
    model, example = nn.LSTM(16, 32), (torch.zeros(20, 1, 16),)
    reading = check(CpuProfiler(), model, example, host=Host(locks=tmp_path, recovery_s=0.0))
    assert reading["latency_ratio"].value == pytest.approx(1, abs=0.2)


def test_a_larger_model_takes_longer(tmp_path: Path) -> None:
    reading = measure(
        CpuProfiler(),
        nn.Linear(2000, 2000),
        (torch.zeros(1, 2000),),
        reference=nn.Linear(2000, 20),
        max_seconds=0.3,
        host=Host(locks=tmp_path, recovery_s=0.0),
    )
    assert reading["latency_ratio"].number > 2
    assert reading["peak_memory_bytes"].number > 4 * 2000 * 2000


DRAWS_30_WATTS = """
import os, sys, time
while os.getppid() > 1:
    with open(sys.argv[1] + ".fresh", "w") as file:
        file.write(str(int(30e6 * time.monotonic()) % 262_143_328_850))
    os.replace(sys.argv[1] + ".fresh", sys.argv[1])
    time.sleep(0.002)
"""


@pytest.fixture(scope="module")
def powercap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A powercap tree whose counter goes on as a real one does."""
    root = tmp_path_factory.mktemp("powercap")
    counter = zone(root, "0", "package-0", 0, span=262_143_328_850) / "energy_uj"
    with subprocess.Popen([sys.executable, "-c", DRAWS_30_WATTS, str(counter)]) as meter:
        yield root
        meter.kill()


class TestConformance(ProfilerConformance):
    @pytest.fixture
    def profiler(self, powercap: Path) -> CpuProfiler:
        return CpuProfiler(sources=Sources((powercap,)))
