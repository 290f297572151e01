from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpsearch.profilers.gpu import GpuProfiler, Nvml  # type: ignore[import-not-found]
from torch import nn

from gpsearch.errors import UserError
from gpsearch.profiling import DeviceFacts, Host, Reading, check, find, measure
from gpsearch.profiling.host import WAITING
from gpsearch.testing import ProfilerConformance
from tests.fakes import FakeDevice, FakeModel


class Process:
    """As NVML lists one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid


class Library:
    """NVIDIA's library, as far as it is used, for one board called GPU-1 among others.

    Args:
        millijoules: What the board has drawn; None where it does not count.
        milliwatts: What it draws; None where it does not tell.
        mig, limit_mw, slowed: What it answers; None where the board does not support the question.
        pids: Of the processes that compute there.
    """

    NVML_DEVICE_MIG_ENABLE = 1

    class NVMLError(Exception):
        pass

    def __init__(
        self,
        millijoules: int | None = 0,
        *,
        milliwatts: int | None = None,
        mig: int | None = 0,
        limit_mw: int | None = 300_000,
        slowed: int | None = 0,
        pids: Sequence[int] = (),
    ) -> None:
        self.millijoules, self.milliwatts = millijoules, milliwatts
        self.mig, self.limit_mw = mig, limit_mw
        self.slowed, self.pids, self.is_open = slowed, list(pids), False

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1":
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMigMode(self, board: str) -> list[int]:
        return [self._answer(self.mig)] * 2

    def nvmlDeviceGetTotalEnergyConsumption(self, board: str) -> int:
        return self._answer(self.millijoules)

    def nvmlDeviceGetPowerUsage(self, board: str) -> int:
        return self._answer(self.milliwatts)

    def nvmlDeviceGetEnforcedPowerLimit(self, board: str) -> int:
        return self._answer(self.limit_mw)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, board: str) -> int:
        return self._answer(self.slowed)

    def nvmlDeviceGetComputeRunningProcesses(self, board: str) -> list[Process]:
        return [Process(pid) for pid in self.pids]

    def _answer(self, answer: int | None) -> int:
        if answer is None:
            raise self.NVMLError("Not Supported")
        return answer


class Absent(Library):
    def nvmlInit(self) -> None:
        raise self.NVMLError("NVML Shared Library Not Found")


class Jetson(Library):
    """It opens, and then supports nothing."""

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        raise self.NVMLError("Not Supported")


STEPS_S = (0.1003, 0.0996, 0.1001, 0.1000, 0.0994, 0.1007, 0.0999)
"""Times between the steps of a board's counter, in the style of an A100's; again and again."""


class Replayed(FakeDevice):
    """A board whose counter steps as `STEPS_S` tells and sees the last moment of each step only.

    Args:
        library: What it answers otherwise.
        factor: How much of the energy its counter counts.
        sensed: How much of the power its sensor shows.
    """

    def __init__(
        self, library: Library | None = None, factor: float = 1.0, sensed: float = 1.0
    ) -> None:
        super().__init__(idle_w=62.0)
        self.sensed, self.library = sensed, library or Library(pids=[os.getpid()])
        self.nvml = Nvml(self.library, "GPU-1")
        self.factor, self.next_s, self.shown_j = factor, STEPS_S[0], 123_456.789

    def probe(self) -> DeviceFacts:
        facts = replace(super().probe(), energy_method="nvml.total_energy")
        return replace(facts, power_limit_w=self.nvml.power_limit_w())

    def read_energy(self) -> tuple[float, float]:
        self.library.millijoules = round(self.shown_j * 1e3)
        return self.clock_s, self.nvml.joules()

    def read_power(self) -> float:
        watts: float = self.nvml.watts()
        return watts

    def disturbances(self) -> list[str]:
        found: list[str] = self.nvml.disturbances(ours=True)
        return found

    def _pass(self, seconds: float, joules: float) -> None:
        self.library.milliwatts = round(self.sensed * 1e3 * joules / seconds)
        end_s = self.clock_s + seconds
        while self.next_s <= end_s:
            self.shown_j += self.factor * STEPS_S[self.ticks % 7] * joules / seconds
            self.ticks += 1
            self.next_s += STEPS_S[self.ticks % 7]
        self.clock_s = end_s


def read(device: Replayed, tmp_path: Path) -> Reading:
    """Measure a model that draws 250 W for 2 ms."""
    return measure(device, FakeModel(0.002, 0.5), (), energy=True, host=device.host(tmp_path))


def test_a_boards_energy_is_read_from_its_steps(tmp_path: Path) -> None:
    reading = read(Replayed(), tmp_path)
    assert reading["energy_j"].value == pytest.approx(0.5, rel=0.005)
    assert reading["energy_net_j"].value == pytest.approx(0.5 - 62 * 0.002, rel=0.01)
    assert reading["energy_period_s"].value == pytest.approx(0.1, abs=0.002)
    assert reading.flags == []


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (lambda: Replayed(factor=2), "500 W is above the device's limit of 300 W"),
        (lambda: Replayed(factor=0), "the counter stood still for 2 s"),
        (lambda: Replayed(factor=-1), "the counter fell from"),
        (
            lambda: Replayed(factor=0.6),
            "at work, the counter says 150 W and the power sensor 250 W",
        ),
        (
            lambda: Replayed(sensed=0.5),
            "at work, the counter says 250 W and the power sensor 125 W",
        ),
        (lambda: Replayed(Library(pids=[os.getpid(), 7])), r"1 other process\(es\) .*\(of 7\)"),
        (lambda: Replayed(Library(pids=[6, 7])), r"1 other process\(es\) on the board"),
        (lambda: Replayed(Library(slowed=0x20)), "it is too hot"),
    ],
)
def test_a_board_that_cannot_be_trusted_gives_a_reason(
    tmp_path: Path, device: Callable[[], Replayed], reason: str
) -> None:
    energy = read(device(), tmp_path)["energy_j"]
    assert energy.value is None
    assert re.search(f"^nvml.total_energy: .*{reason}", str(energy.reason))


@pytest.mark.parametrize(
    ("library", "ours", "disturbances"),
    [
        (Library(pids=[os.getpid()]), True, []),
        (Library(pids=[4711]), True, []),  # this process, as it is called outside the container
        (Library(pids=[]), True, []),  # a container that lists none
        (Library(pids=[4711]), False, ["1 other process(es) on the board (of 4711)"]),
        (Library(slowed=0x04), True, []),  # at its power limit, as every busy board
        (Library(slowed=0x80), True, ["the power supply slows it down"]),
        (Library(slowed=None), True, []),
    ],
)
def test_who_disturbs_a_board(library: Library, ours: bool, disturbances: list[str]) -> None:
    assert Nvml(library, "GPU-1").disturbances(ours=ours) == disturbances


@pytest.mark.parametrize(
    ("pids", "disturbances"),
    [
        ([os.getpid(), 6], []),
        ([os.getpid(), 6, 7], ["1 other process(es) on the board (of 7)"]),
        ([os.getpid(), 7], ["1 other process(es) on the board (of 7)"]),
        ([4711, 4712], []),  # both, as they are called outside the container
        ([4711, 4712, 4713], ["1 other process(es) on the board (of 4711, 4712, 4713)"]),
    ],
)
def test_a_study_that_waits_for_its_reading_disturbs_no_board(
    pids: list[int], disturbances: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WAITING, "6")
    assert Nvml(Library(pids=pids), "GPU-1").disturbances(ours=True) == disturbances


@pytest.mark.parametrize("mig", [0, None])
def test_nvmls_millijoules_become_joules(mig: int | None) -> None:
    library = Library(2500, mig=mig)
    nvml = Nvml(library, "GPU-1")
    assert nvml.joules() == 2.5
    assert nvml.power_limit_w() == 300
    nvml.close()
    assert not library.is_open


def test_a_boards_power_is_read_in_watts_or_said_to_be_unknown() -> None:
    assert Nvml(Library(milliwatts=61_500), "GPU-1").watts() == 61.5
    with pytest.raises(RuntimeError, match="no power of this board: Not Supported"):
        Nvml(Library(milliwatts=None), "GPU-1").watts()


def test_of_eight_boards_only_one_is_counted() -> None:
    class Eight(Library):
        """Board n has drawn n kJ; only its UUID tells it from the others."""

        def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
            return uuid

        def nvmlDeviceGetTotalEnergyConsumption(self, board: str) -> int:
            return 1_000_000 * int(board.removeprefix("GPU-"))

    assert [Nvml(Eight(), f"GPU-{n}").joules() for n in range(8)] == [1e3 * n for n in range(8)]


def test_a_board_without_a_limit_has_none() -> None:
    assert Nvml(Library(limit_mw=None), "GPU-1").power_limit_w() is None


def test_a_board_without_a_counter_says_so() -> None:
    with pytest.raises(RuntimeError, match="no total energy on this board: Not Supported"):
        Nvml(Library(None), "GPU-1").joules()


@pytest.mark.parametrize(
    ("library", "uuid", "reason"),
    [
        (Library(), "GPU-2", "NVML does not answer for GPU-2: Not Found"),
        (Absent(), "GPU-1", "NVML does not answer for GPU-1: NVML Shared Library Not Found"),
        (Jetson(), "GPU-1", "NVML does not answer for GPU-1: Not Supported"),
        (Library(mig=1), "GPU-1", "split by MIG, and no slice has its own counter"),
    ],
)
def test_a_board_that_cannot_be_asked_says_why(library: Library, uuid: str, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        Nvml(library, uuid)


@pytest.mark.parametrize("argument", ["0", "1", "GPU-5a3f0c1e-0000-1111-2222-333344445555"])
def test_one_of_several_devices_is_named_by_number_or_uuid(argument: str) -> None:
    gpu = find(f"gpu:{argument}")
    assert gpu.probe().name == f"gpu:{argument}"


@pytest.mark.parametrize("argument", ["", "first", "-1", "GPU-x"])
def test_what_names_no_device_is_a_mistake(argument: str) -> None:
    with pytest.raises(UserError, match="neither a number such as 1 nor a UUID"):
        find(f"gpu:{argument}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_everything_is_unavailable_with_the_reason() -> None:
    facts = GpuProfiler().probe()
    assert facts.torch_device == "cuda"
    assert facts.unavailable.keys() == {"latency_s", "energy_j", "peak_memory_bytes"}
    assert all("torch sees no CUDA device" in reason for reason in facts.unavailable.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_times_models_and_tells_their_memory(tmp_path: Path) -> None:
    gpu = GpuProfiler()
    model, example = nn.LSTM(16, 32), (torch.zeros(20, 1, 16),)
    reading = check(gpu, model, example, host=Host(locks=tmp_path))
    gpu.close()
    assert reading["latency_ratio"].value == pytest.approx(1, abs=0.2)
    assert reading["peak_memory_bytes"].number > sum(one.nbytes for one in model.parameters())
    assert reading.fingerprint["processor"] == torch.cuda.get_device_name(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_energy_is_repeatable_and_grows_with_the_work(tmp_path: Path) -> None:
    pytest.importorskip("pynvml")
    gpu, host = GpuProfiler(), Host(locks=tmp_path)
    reason = gpu.probe().unavailable.get("energy_j")
    if reason:
        pytest.skip(reason)
    joules = []
    for steps in (50, 50, 100):
        example = (torch.zeros(steps, 1, 256),)
        reading = measure(gpu, nn.LSTM(256, 512), example, energy=True, host=host)
        joules.append(reading["energy_j"].number)
    gpu.close()
    assert joules[1] == pytest.approx(joules[0], rel=0.05)
    assert joules[2] == pytest.approx(2 * joules[0], rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestConformance(ProfilerConformance):
    @pytest.fixture
    def profiler(self) -> GpuProfiler:
        return GpuProfiler()
