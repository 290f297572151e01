"""Energy by Zeus, of stand-ins of its objects: right, or absent with a reason, and never its 0."""

from __future__ import annotations

import math
import queue
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from gpsearch.profilers.cpu import CpuProfiler  # type: ignore[import-not-found]

from gpsearch.profiling import DeviceFacts, Reading, measure
from gpsearch.profiling.rapl import PerfEvents, Sources, Surroundings
from gpsearch.profiling.zeus import AmdBoard, Chip, SocMeter, ZeusError
from tests.fakes import FakeDevice, FakeModel
from tests.test_rapl import zone


@dataclass
class JetsonMeasurement:
    """In mJ, as Zeus returns it; a board without such a rail has None."""

    cpu_energy_mj: float | None = None
    gpu_energy_mj: float | None = None
    total_energy_mj: float | None = None


@dataclass
class AppleMeasurement:
    """In mJ, as far as it is used."""

    cpu_total_mj: int | None = None
    gpu_mj: int | None = None


class Soc:
    """Zeus' object for a chip, which gives this answer, or raises it."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, 0

    def get_total_energy_consumption(self) -> Any:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Sampled(FakeDevice):
    """A Jetson: its power is sampled every 0.1 s and when it is asked for, and added up.

    As in Zeus, a question is answered with the sum until the last sample, before the next one.
    """

    counted = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.watts, self.sampled_s, self.total_mj, self.questions = self.idle_w, 0.0, 0.0, 0
        self.meter = SocMeter(self, clock=lambda: self.clock_s)

    def get_total_energy_consumption(self) -> JetsonMeasurement:
        self.questions += 1
        answer = JetsonMeasurement(total_energy_mj=self.total_mj)
        self._sample(self.clock_s)
        return answer

    def probe(self) -> DeviceFacts:
        return replace(super().probe(), energy_method=self.meter.method)

    def read_energy(self) -> tuple[float, float]:
        return self.clock_s, self.meter.joules()

    def _sample(self, at_s: float) -> None:
        self.total_mj += self.counted * 1e3 * self.watts * (at_s - self.sampled_s)
        self.sampled_s = at_s

    def _pass(self, seconds: float, joules: float) -> None:
        self.watts = joules / seconds
        end_s = self.clock_s + seconds
        while self.sampled_s + 0.1 <= end_s:
            self._sample(self.sampled_s + 0.1)
        self.clock_s = end_s


class Unwired(Sampled):
    """Its sensor reads 0 mW, and Zeus adds that up."""

    counted = 0.0


class Counting(FakeDevice):
    """An Apple chip: a counter of whole mJ that stands for a model of the chip."""

    def __init__(self) -> None:
        super().__init__(tick_s=0.001)
        self.meter = SocMeter(self)

    def get_total_energy_consumption(self) -> AppleMeasurement:
        return AppleMeasurement(cpu_total_mj=int(self.shown_j * 1e3))

    def probe(self) -> DeviceFacts:
        return replace(super().probe(), energy_model=self.meter.model)

    def read_energy(self) -> tuple[float, float]:
        return self.clock_s, self.meter.joules()


def read(device: FakeDevice, tmp_path: Path) -> Reading:
    """Measure a model that draws 30 W for 2 ms; the device draws 10 W while idle."""
    return measure(device, FakeModel(0.002, 0.06), (), energy=True, host=device.host(tmp_path))


# ---- systems on a chip


def test_a_jetsons_samples_add_up_to_known_joules(tmp_path: Path) -> None:
    device = Sampled()
    reading = read(device, tmp_path)
    energy = reading["energy_j"]
    assert energy.value == pytest.approx(0.06, rel=0.01)
    assert (energy.kind, energy.method) == ("measured", "zeus:INA3221, a sample every 0.1 s")
    assert reading["energy_net_j"].value == pytest.approx(0.04, rel=0.02)
    # Each step of the sum is a sample, so windows are long enough for many of them.
    assert reading["energy_period_s"].value == pytest.approx(0.1, abs=0.003)
    assert device.questions < 200


def test_an_apple_chips_joules_are_estimated(tmp_path: Path) -> None:
    energy = read(Counting(), tmp_path)["energy_j"]
    assert energy.value == pytest.approx(0.06, rel=0.01)
    assert energy.kind == "estimated"
    assert str(energy.reason).startswith("Apple's model of its chip, not a sensor")


def test_zeus_silent_zero_is_no_energy(tmp_path: Path) -> None:
    reading = read(Unwired(), tmp_path)
    for name in ("energy_j", "energy_net_j"):
        assert reading[name].value is None
        assert str(reading[name].reason).endswith("the counter stood still for 2 s")


@pytest.mark.parametrize(
    ("answer", "part", "joules", "scope"),
    [
        (JetsonMeasurement(1000, 2000, 7500), "cpu", 7.5, "board"),
        (JetsonMeasurement(1000, 2000, 7500), "gpu", 7.5, "board"),
        (JetsonMeasurement(1000, 2000), "cpu", 1.0, "rail"),
        (JetsonMeasurement(1000, 2000), "gpu", 2.0, "rail"),
        (AppleMeasurement(cpu_total_mj=2500, gpu_mj=9000), "cpu", 2.5, "cores"),
    ],
)
def test_millijoules_of_the_best_counter_become_joules(
    answer: Any, part: str, joules: float, scope: str
) -> None:
    meter = SocMeter(Soc(answer), part)
    assert meter.joules() == joules
    assert (meter.scope, meter.wrap_j, meter.power_limit_w()) == (scope, None, None)
    assert meter.method.startswith("zeus:")
    assert bool(meter.model) is (scope == "cores")
    assert meter.disturbances(ours=True) == []
    with pytest.raises(RuntimeError, match="no power sensor"):
        meter.watts()
    meter.close()


def test_a_sum_over_samples_is_asked_for_no_oftener_than_it_is_taken() -> None:
    clock, soc = Clock(), Soc(JetsonMeasurement(total_energy_mj=0.0))
    meter = SocMeter(soc, clock=clock)
    before = soc.asked
    soc.answer = JetsonMeasurement(total_energy_mj=1000.0)
    clock.now_s = 0.09
    assert (meter.joules(), soc.asked - before) == (0.0, 0)
    clock.now_s = 0.11
    assert (meter.joules(), soc.asked - before) == (1.0, 2)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (JetsonMeasurement(), r"Zeus tells no energy of this chip's cpu \(none of total_energy_mj"),
        (AppleMeasurement(gpu_mj=9000), "Zeus tells no energy of this chip's cpu"),
        (None, "Zeus tells no energy of this chip's cpu"),
        (JetsonMeasurement(total_energy_mj=math.nan), "Zeus says nan for total_energy_mj"),
        (ValueError("No SoC is available."), "ValueError: No SoC is available"),
        (AttributeError("no such method"), "AttributeError: no such method"),
        (queue.Empty(), "does not answer: its sensor is gone, or the script"),
    ],
)
def test_a_chip_that_says_nothing_has_a_reason(answer: Any, reason: str) -> None:
    with pytest.raises(ZeusError, match=reason):
        SocMeter(Soc(answer))


@pytest.mark.parametrize("answer", [JetsonMeasurement(), OSError("gone"), None])
def test_a_counter_that_goes_away_is_an_error_and_no_zero(answer: Any) -> None:
    clock, soc = Clock(), Soc(JetsonMeasurement(total_energy_mj=5.0))
    meter = SocMeter(soc, clock=clock)
    soc.answer, clock.now_s = answer, 1.0
    with pytest.raises(ZeusError, match=r"Zeus says None for total_energy_mj|OSError: gone"):
        meter.joules()


def test_a_process_that_answers_too_late_is_not_asked_again() -> None:
    clock, soc = Clock(), Soc(JetsonMeasurement(total_energy_mj=5.0))
    meter = SocMeter(soc, clock=clock)
    soc.answer, clock.now_s = queue.Empty(), 1.0
    with pytest.raises(ZeusError, match="does not answer"):
        meter.joules()
    soc.answer, asked = JetsonMeasurement(total_energy_mj=6.0), soc.asked
    with pytest.raises(ZeusError, match="does not answer"):
        meter.joules()
    assert soc.asked == asked


# ---- which machines it helps


def raising(error: Exception) -> Callable[[], Any]:
    """Return what raises this when it is called."""

    def raises() -> Any:
        raise error

    return raises


def jetson(root: Path, get_soc: Callable[[], Any]) -> Chip:
    """Return a Jetson, as its files tell."""
    (root / "etc").mkdir(parents=True, exist_ok=True)
    (root / "etc" / "nv_tegra_release").touch()
    return Chip("Linux", "aarch64", root, get_soc)


def apple(root: Path, get_soc: Callable[[], Any]) -> Chip:
    """Return an Apple chip."""
    return Chip("Darwin", "arm64", root, get_soc)


def no_rapl(root: Path) -> Sources:
    """Return where no counter is."""
    return Sources((root / "powercap",), root / "power", PerfEvents(), Surroundings(root))


def test_the_processors_energy_comes_by_zeus_where_there_is_no_rapl(tmp_path: Path) -> None:
    soc = Soc(JetsonMeasurement(total_energy_mj=7500.0))
    cpu = CpuProfiler(sources=no_rapl(tmp_path), chip=jetson(tmp_path, lambda: soc))
    assert soc.asked == 0  # asking may start a process: not before it is needed
    facts = cpu.probe()
    assert facts.unavailable == {}
    assert (facts.energy_scope, facts.energy_model) == ("board", "")
    assert facts.energy_method == "zeus:INA3221, a sample every 0.1 s"
    assert cpu.read_energy()[1] == 7.5


def test_an_apple_chips_energy_is_no_objective(tmp_path: Path) -> None:
    soc = Soc(AppleMeasurement(cpu_total_mj=2500))
    facts = CpuProfiler(sources=no_rapl(tmp_path), chip=apple(tmp_path, lambda: soc)).probe()
    assert facts.unavailable == {}
    assert "Apple calls such values estimated" in str(facts.why_not("energy_j"))


def test_rapl_comes_first(tmp_path: Path) -> None:
    zone(tmp_path / "powercap", "0", "package-0", 300_000)
    chip = jetson(tmp_path, raising(AssertionError("not to be asked")))
    facts = CpuProfiler(sources=no_rapl(tmp_path), chip=chip).probe()
    assert (facts.energy_method, facts.energy_scope) == ("rapl:package-0", "socket")


@pytest.mark.parametrize(("here", "name"), [(jetson, "a Jetson"), (apple, "an Apple chip")])
def test_a_machine_that_zeus_knows_is_told_what_to_install(
    tmp_path: Path, here: Callable[..., Chip], name: str
) -> None:
    missing = here(tmp_path, raising(ModuleNotFoundError("No module named 'zeus'")))
    reason = CpuProfiler(sources=no_rapl(tmp_path), chip=missing).probe().unavailable["energy_j"]
    remedy = "which is missing: pip install 'zeus>=0.16'"
    assert reason == f"the energy of {name} is read by Zeus, {remedy}"
    # As it is where Zeus is there, but not what it needs on this chip.
    blind = here(tmp_path, raising(LookupError("No observable SoC was found.")))
    reason = str(blind.meter("no RAPL"))
    assert f"does not know {name} here (LookupError: No observable SoC was found.)" in reason
    assert "pip install 'zeus>=0.16'" in reason


@pytest.mark.parametrize(
    ("system", "machine"),
    [("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "x86_64"), ("Windows", "AMD64")],
)
def test_other_machines_hear_nothing_of_zeus(tmp_path: Path, system: str, machine: str) -> None:
    chip = Chip(system, machine, tmp_path, raising(AssertionError("not to be asked")))
    assert chip.meter("no RAPL counter") == "no RAPL counter"


# ---- AMD's GPUs


class Gpu:
    """Zeus' object for an AMD GPU; a question whose answer is an exception raises it."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {
            "supports_get_total_energy_consumption": True,
            "get_total_energy_consumption": 2500,
            "get_average_power_usage": 90_000,
            "get_instant_power_usage": 95_000,
            "get_power_management_limit": 300_000,
            **answers,
        }

    def __getattr__(self, question: str) -> Callable[[], Any]:
        answer = self.answers[question]
        return raising(answer) if isinstance(answer, Exception) else lambda: answer


class Gpus:
    """Zeus' object for all of them."""

    def __init__(self, *gpus: Gpu) -> None:
        self.gpus = list(gpus)


def board(*gpus: Gpu, index: int = 0, **environment: str) -> AmdBoard:
    """Return one of these boards."""
    return AmdBoard(index, len(gpus), lambda: Gpus(*gpus), environment)


NO = RuntimeError("not supported on this AMD GPU")


def test_an_amd_boards_numbers_become_joules_and_watts() -> None:
    one = board(Gpu(), Gpu(get_total_energy_consumption=7500), index=1, HIP_VISIBLE_DEVICES="0,2")
    assert (one.joules(), one.watts(), one.power_limit_w()) == (7.5, 90.0, 300.0)
    assert (one.method, one.scope) == ("zeus:amdsmi energy count", "board")
    assert board(Gpu(get_average_power_usage=NO)).watts() == 95.0


def test_an_amd_board_may_lack_power_and_limit() -> None:
    lacking = board(
        Gpu(get_average_power_usage=NO, get_instant_power_usage=NO, get_power_management_limit=NO)
    )
    with pytest.raises(RuntimeError, match="RuntimeError: not supported on this AMD GPU"):
        lacking.watts()
    assert lacking.power_limit_w() is None
    assert board(Gpu(get_power_management_limit=0)).power_limit_w() is None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: board(Gpu(supports_get_total_energy_consumption=False)),
            "Zeus refuses this board's energy counter: it contradicts the board's power",
        ),
        (lambda: board(Gpu(), ROCR_VISIBLE_DEVICES="1"), "use HIP_VISIBLE_DEVICES"),
        (lambda: AmdBoard(0, 2, lambda: Gpus(Gpu()), {}), "Zeus sees 1 AMD GPUs and torch 2"),
        (lambda: AmdBoard(0, 1, Gpus, {}), "Zeus sees 0 AMD GPUs and torch 1"),
        (
            lambda: AmdBoard(0, 1, raising(ValueError("invalid literal: 'GPU-1'")), {}),
            "Zeus finds no AMD GPU \\(ValueError: invalid literal",
        ),
        (lambda: AmdBoard(0, 1, raising(ZeusError("see to ROCm")), {}), "^see to ROCm$"),
        (lambda: board(Gpu(get_total_energy_consumption=None)).joules(), "Zeus says None"),
        (lambda: board(Gpu(get_total_energy_consumption="N/A")).joules(), "Zeus says N/A"),
        (lambda: board(Gpu(get_total_energy_consumption=NO)).joules(), "cannot read this board"),
    ],
)
def test_an_amd_board_that_cannot_be_told_has_a_reason(
    make: Callable[[], object], reason: str
) -> None:
    with pytest.raises(ZeusError, match=reason):
        make()


def test_an_amd_boards_user_is_told_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"of an AMD GPU .*: pip install 'zeus>=0\.16'"):
        AmdBoard(0, 1, raising(ModuleNotFoundError("No module named 'zeus'")), {})
