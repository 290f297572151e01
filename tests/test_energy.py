"""Energy: known joules are read right, and every fault that others report is refused or flagged.

The table `FAULTS` names each fault of counters, boards and machines, with a device that has it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpsearch.profiling import DeviceFacts, Reading, measure
from gpsearch.profiling.energy import SENSED, Work, counter_period_s, measure_energy
from gpsearch.profiling.rapl import Rapl
from tests.fakes import FakeDevice, FakeModel

JOULES = 0.5


def read(device: FakeDevice, tmp_path: Path, seconds: float = 0.002) -> Reading:
    """Measure a model that takes half a joule; the device draws 10 W while idle."""
    model, reference = FakeModel(seconds, JOULES), FakeModel(0.001)
    return measure(device, model, (), reference=reference, energy=True, host=device.host(tmp_path))


@pytest.mark.parametrize("tick_s", [0.001, 0.02, 0.1])
@pytest.mark.parametrize("seconds", [0.0003, 0.002, 0.25])
def test_known_joules_are_read_within_a_hundredth(
    tmp_path: Path, tick_s: float, seconds: float
) -> None:
    reading = read(FakeDevice(tick_s=tick_s), tmp_path, seconds)
    energy = reading["energy_j"]
    assert energy.value == pytest.approx(JOULES, rel=0.01)
    assert (energy.unit, energy.n, energy.method, energy.scope) == ("J", 5, "counter", "board")
    assert reading["power_idle_w"].value == pytest.approx(10, rel=0.01)
    assert reading["power_avg_w"].value == pytest.approx(JOULES / seconds, rel=0.01)
    assert reading["energy_period_s"].value == pytest.approx(tick_s, abs=0.0011)
    assert reading.flags == [] or "turns fitted" in reading.flags[0]


class Repeating(FakeDevice):
    """Every call is preempted and timed again, and takes its joules each time."""

    def run(self, handles: Sequence[FakeModel], schedule: Sequence[int]) -> list[float]:
        again = [index for index in schedule for _ in range(2)]
        return super().run(handles, again)[::2]

    def work(self, handle: FakeModel, calls: int) -> None:
        super().run([handle], [0] * calls)


def test_joules_are_of_calls_that_are_not_repeated(tmp_path: Path) -> None:
    assert read(Repeating(), tmp_path)["energy_j"].value == pytest.approx(JOULES, rel=0.01)


def test_net_energy_is_what_is_above_idle(tmp_path: Path) -> None:
    # 0.5 J in 2 ms, of which the device would have drawn 10 W x 2 ms anyway
    assert read(FakeDevice(), tmp_path)["energy_net_j"].value == pytest.approx(0.48, rel=0.01)


def test_work_that_draws_no_more_than_idle_has_gross_energy_only(tmp_path: Path) -> None:
    reading = read(FakeDevice(idle_w=300), tmp_path)
    assert reading["energy_j"].value == pytest.approx(JOULES, rel=0.01)
    assert "idle, and no more at work" in str(reading["energy_net_j"].reason)


@pytest.mark.parametrize("factor", [2, 8])
def test_energy_grows_with_the_work(tmp_path: Path, factor: int) -> None:
    device = FakeDevice()
    model = FakeModel(0.002 * factor, JOULES * factor)
    reading = measure(device, model, (), energy=True, host=device.host(tmp_path))
    assert reading["energy_j"].value == pytest.approx(factor * JOULES, rel=0.01)


def test_the_period_of_the_counter_is_measured() -> None:
    device = FakeDevice(tick_s=0.1)
    idle = Work(lambda steps: device.sleep(steps * 0.001), 0.001)
    assert counter_period_s(device.read_energy, idle) == pytest.approx(0.1, abs=0.002)


def test_energy_is_measured_only_on_request(tmp_path: Path) -> None:
    device = FakeDevice()
    reading = measure(device, FakeModel(0.002), (), host=device.host(tmp_path))
    assert reading["energy_j"].reason == reading["energy_net_j"].reason == "not asked for"


def test_an_estimate_is_marked_as_one_and_has_no_interval(tmp_path: Path) -> None:
    device = FakeDevice()
    host = device.host(tmp_path)
    joules = measure(device, FakeModel(0.002), (), estimate_w=15.0, host=host)["energy_j"]
    assert joules.value == pytest.approx(0.03)
    assert (joules.kind, joules.ci95, joules.n) == ("estimated", None, 0)
    assert joules.reason == "not measured: 15 W, as asked for, times the latency"


# ---- faults of counters


class Silent(FakeDevice):
    def read_energy(self) -> tuple[float, float]:
        return self.clock_s, 0.0


class Nothing(FakeDevice):
    def read_energy(self) -> tuple[float, float]:
        return self.clock_s, None  # type: ignore[return-value]


class Stale(FakeDevice):
    """The counter is renewed every quarter of a minute."""

    def __init__(self) -> None:
        super().__init__(tick_s=15.0)


class Freezing(FakeDevice):
    def read_energy(self) -> tuple[float, float]:
        return self.clock_s, min(self.shown_j, 500.0)


class Falling(FakeDevice):
    def read_energy(self) -> tuple[float, float]:
        return self.clock_s, -self.shown_j


class StartedAgain(FakeDevice):
    """The driver was loaded anew in the middle of a window."""

    def read_energy(self) -> tuple[float, float]:
        return self.clock_s, self.shown_j if self.clock_s < 12.4 else self.shown_j / 100


class NoNumber(FakeDevice):
    def read_energy(self) -> tuple[float, float]:
        return self.clock_s, self.shown_j if self.clock_s < 12.4 else math.nan


class StandingClock(FakeDevice):
    def read_energy(self) -> tuple[float, float]:
        return min(self.clock_s, 5.0), self.shown_j


class Unplugged(FakeDevice):
    def read_energy(self) -> tuple[float, float]:
        if self.clock_s > 12:
            raise OSError("the meter is gone")
        return super().read_energy()


class Sensed(FakeDevice):
    """A sensor tells the power besides: rightly, while the counter counts ``counted`` of it.

    Args:
        at_work, idle: What the counter counts of each joule.
    """

    def __init__(self, at_work: float = 1.0, idle: float = 1.0) -> None:
        super().__init__()
        self.at_work, self.idle, self.watts, self.asked = at_work, idle, self.idle_w, 0

    def read_power(self) -> float:
        self.asked += 1
        return self.watts

    def _pass(self, seconds: float, joules: float) -> None:
        self.watts = joules / seconds
        super()._pass(seconds, joules * (self.idle if self.watts == 10 else self.at_work))


class CountingHalf(Sensed):
    """187 J where the power readings add up to 327 J, as somebody saw."""

    def __init__(self) -> None:
        super().__init__(at_work=187 / 327)


class CountingTenfold(Sensed):
    def __init__(self) -> None:
        super().__init__(at_work=10.0)


class NoSensor(Sensed):
    """The sensor has no answer: nothing is known against the counter."""

    answer: float | Exception | None = None

    def read_power(self) -> float:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


class LosingWhenPolled(FakeDevice):
    """Every read takes 30 mJ from the next step, as on an RTX 4090: 6 % if it never ended."""

    lost_j = taken_j = last_j = 0.0

    def __init__(self) -> None:
        super().__init__(idle_w=50)

    def read_energy(self) -> tuple[float, float]:
        self.lost_j += 0.03
        if self.shown_j > self.last_j:
            self.last_j, self.taken_j = self.shown_j, self.lost_j
        return self.clock_s, self.last_j - self.taken_j


class SeeingAQuarter(FakeDevice):
    """At every step of 100 ms the counter looks at the last 25 ms only, as A100 and H100 do."""

    def _pass(self, seconds: float, joules: float) -> None:
        end_s = self.clock_s + seconds
        while (self.ticks + 1) * self.tick_s <= end_s:
            self.ticks += 1
            seen_s = min(0.025, self.ticks * self.tick_s - self.clock_s)
            self.shown_j += self.tick_s * joules / seconds if seen_s else 0.0
        self.clock_s, self.joules = end_s, self.joules + joules


class Wrapping(FakeDevice):
    """A 32-bit counter at 2**-16 J as powercap shows it, which wraps within a window."""

    def __init__(self, root: Path, span_uj: int = 65_536_000_000, start_uj: int = 0) -> None:
        super().__init__(tick_s=0.001)
        self.span_uj, self.start_uj, self.zone = span_uj, start_uj, root / "intel-rapl:0"
        self.zone.mkdir()
        (self.zone / "name").write_text("package-0\n")
        (self.zone / "max_energy_range_uj").write_text(f"{span_uj}\n")
        self._show()
        self.rapl = Rapl(root)

    def _show(self) -> None:
        microjoules = (self.start_uj + round(self.shown_j * 1e6)) % self.span_uj
        (self.zone / "energy_uj").write_text(f"{microjoules}\n")

    def probe(self) -> DeviceFacts:
        return replace(super().probe(), energy_wrap_j=self.rapl.wrap_j)

    def read_energy(self) -> tuple[float, float]:
        self._show()
        return self.clock_s, self.rapl.joules()


# ---- faults of boards and machines


class OverItsLimit(FakeDevice):
    def probe(self) -> DeviceFacts:
        return replace(super().probe(), power_limit_w=200.0)  # it shows 250 W


class Shared(FakeDevice):
    def disturbances(self) -> Sequence[str]:
        return ["1 other process(es) on the board (of 4711)"]


class Throttled(FakeDevice):
    def disturbances(self) -> Sequence[str]:
        return ["it is too hot, and the driver slows it down"] if self.clock_s > 12 else []


class BrieflyShared(FakeDevice):
    def disturbances(self) -> Sequence[str]:
        return ["1 other process(es) on the board (of 4711)"] if 2 < self.clock_s < 20 else []


class Restless(FakeDevice):
    """Others draw a different power in every window."""

    def _pass(self, seconds: float, joules: float) -> None:
        super()._pass(seconds, joules * (1 + math.sin(self.clock_s) ** 2))


class WarmingUp(FakeDevice):
    """Its idle power rises by half."""

    def sleep(self, seconds: float) -> None:
        self.idle_w = 10 if self.clock_s < 10 else 15
        super().sleep(seconds)


FAULTS: dict[str, tuple[type[FakeDevice], str]] = {
    "a zero for a counter that is not there": (Silent, "the counter stood still for 2 s"),
    "none for a counter that is not there": (Nothing, "the counter reads .*None"),
    "a counter that is renewed too seldom": (Stale, "the counter stood still for 2 s"),
    "a counter that freezes": (Freezing, "the counter stood still for 2 s"),
    "negative energy": (Falling, "the counter fell from"),
    "a counter that starts again from 0": (StartedAgain, "the counter fell from"),
    "no number": (NoNumber, "the counter reads nan J"),
    "a clock that stands still": (StandingClock, "the counter's clock went from 5 s to 5 s"),
    "a meter that goes away": (Unplugged, "the meter is gone"),
    "more power than there can be": (OverItsLimit, "250 W is above the device's limit of 200 W"),
    "other processes on the board": (Shared, r"1 other process\(es\) on the board .* twice"),
    "throttling": (Throttled, r"it is too hot.*\(tried twice\)"),
    "a counter below the power readings": (
        CountingHalf,
        "at work, the counter says 143 W and the power sensor 250 W: one of them is wrong",
    ),
    "a counter above the power readings": (
        CountingTenfold,
        r"the counter says 2.5e\+03 W and the power sensor 250 W: one of them is wrong",
    ),
    "windows that disagree": (Restless, r"5 windows disagree by ±\d+\.\d%, at most ±5%"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_counter_gives_a_reason_and_no_number(tmp_path: Path, fault: str) -> None:
    device, reason = FAULTS[fault]
    reading = read(device(), tmp_path)
    for name in ("energy_j", "energy_net_j"):
        assert reading[name].value is None
        assert re.search(f"^counter: .*{reason}", str(reading[name].reason))
    assert not {"power_avg_w", "power_idle_w"} & reading.quantities.keys()


RIGHT: dict[str, type[FakeDevice]] = {
    "a counter that loses energy when it is polled": LosingWhenPolled,
    "a board that sees a quarter of the time": SeeingAQuarter,
    "another process that ends": BrieflyShared,
}


@pytest.mark.parametrize("fault", RIGHT)
def test_a_fault_that_can_be_undone_leaves_the_right_value(tmp_path: Path, fault: str) -> None:
    assert read(RIGHT[fault](), tmp_path)["energy_j"].value == pytest.approx(JOULES, rel=0.02)


def test_a_sensor_that_agrees_changes_nothing_and_is_left_alone_in_the_windows_that_count(
    tmp_path: Path,
) -> None:
    device = Sensed()
    reading = read(device, tmp_path)
    assert reading["energy_j"].value == pytest.approx(JOULES, rel=0.01)
    assert reading["energy_net_j"].value == pytest.approx(0.48, rel=0.01)
    assert reading.flags == []
    assert device.asked == 1 + 2 * SENSED  # at first, in one window at work, and in one idle


def test_a_contradiction_that_passes_is_measured_again(tmp_path: Path) -> None:
    class OffAtFirst(Sensed):
        def read_power(self) -> float:
            return 2 * super().read_power() if self.asked <= SENSED else super().read_power()

    device = OffAtFirst()
    reading = read(device, tmp_path)
    assert reading["energy_j"].value == pytest.approx(JOULES, rel=0.01)
    assert device.asked == 1 + 2 * 2 * SENSED


@pytest.mark.parametrize("answer", [None, 0.0, -5.0, math.nan, RuntimeError("Not Supported")])
def test_a_sensor_without_an_answer_says_nothing_against_the_counter(
    tmp_path: Path, answer: float | Exception | None
) -> None:
    device = NoSensor()
    device.answer = answer
    assert read(device, tmp_path)["energy_j"].value == pytest.approx(JOULES, rel=0.01)


def test_a_counter_that_is_wrong_when_idle_has_gross_energy_only_and_a_flag(tmp_path: Path) -> None:
    reading = read(Sensed(idle=187 / 327), tmp_path)
    assert reading["energy_j"].value == pytest.approx(JOULES, rel=0.01)
    why_not = "idle, the counter says 5.72 W and the power sensor 10 W"
    assert reading["energy_net_j"].reason == reading["power_idle_w"].reason == why_not
    assert reading.flags == [why_not]


def test_a_counter_that_wraps_around_within_a_window_leaves_the_right_value(tmp_path: Path) -> None:
    # 250 W for some 10 s bring it from 500 J below its end to well above 0.
    device = Wrapping(tmp_path, start_uj=65_536_000_000 - 500_000_000)
    assert read(device, tmp_path)["energy_j"].value == pytest.approx(JOULES, rel=0.01)
    assert device.shown_j > 1000


def test_a_counter_that_may_have_wrapped_around_unseen_is_refused(tmp_path: Path) -> None:
    reason = read(Wrapping(tmp_path, span_uj=100_000_000), tmp_path)["energy_j"].reason
    assert "too long for a counter that starts again at 100 J" in str(reason)


def test_idle_power_that_changed_is_flagged(tmp_path: Path) -> None:
    assert read(WarmingUp(), tmp_path).flags == [
        "idle power changed by +50% over the energy reading"
    ]


def test_other_processes_are_flagged_on_the_latency_too(tmp_path: Path) -> None:
    device = Shared()
    reading = measure(device, FakeModel(0.002), (), host=device.host(tmp_path))
    assert reading.flags == [
        "measured twice, since the first reading was doubtful",
        "1 other process(es) on the board (of 4711)",
    ]


def test_a_machine_that_is_busy_during_the_energy_reading_is_flagged(tmp_path: Path) -> None:
    class Crowded(FakeDevice):
        """Tasks wait for a processor from the first reading of the counter on."""

        def read_energy(self) -> tuple[float, float]:
            pressure.write_text(f"some avg10=0.00 total={round(self.clock_s * 1e6)}\n")
            return super().read_energy()

    pressure = tmp_path / "pressure" / "cpu"
    pressure.parent.mkdir()
    pressure.write_text("some avg10=0.00 total=0\n")
    device = Crowded()
    host = replace(device.host(tmp_path), proc=tmp_path)
    reading = measure(device, FakeModel(0.002, JOULES), (), energy=True, host=host)
    (flag,) = reading.flags
    assert flag.startswith("over the energy reading, tasks waited for a processor")


def test_joules_of_a_model_are_estimated_with_the_reason_and_an_interval(tmp_path: Path) -> None:
    class Modelled(FakeDevice):
        def probe(self) -> DeviceFacts:
            return replace(super().probe(), energy_model="the vendor's model, not a sensor")

    facts, reading = Modelled().probe(), read(Modelled(), tmp_path)
    for name in ("energy_j", "energy_net_j", "power_avg_w", "power_idle_w"):
        assert reading[name].kind == "estimated"
        assert reading[name].reason == "the vendor's model, not a sensor"
    assert reading["energy_j"].value == pytest.approx(JOULES, rel=0.01)
    assert str(facts.why_not("energy_j")).startswith("the vendor's model, not a sensor; ")
    assert facts.why_not("latency_s") is None
    unplugged = replace(facts, unavailable={"energy_j": "unplugged"})
    assert unplugged.why_not("energy_j") == "unplugged"


def test_a_device_that_knows_of_no_counter_says_why(tmp_path: Path) -> None:
    device = FakeDevice(unavailable={"energy_j": "a virtual machine"})
    assert read(device, tmp_path)["energy_j"].reason == "a virtual machine"


class Scripted:
    """A counter that shows these joules, one after the other, and then the last for ever."""

    def __init__(self, joules: list[float], watts: float) -> None:
        self.joules, self.watts, self.clock_s = joules, watts, 0.0

    def read_power(self) -> float:
        return self.watts

    def read(self) -> tuple[float, float]:
        shown = self.joules.pop(0) if len(self.joules) > 1 else self.joules[0]
        return self.clock_s, shown

    def sleep(self, seconds: float) -> None:
        self.clock_s += seconds


@settings(max_examples=40)
@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=30)
    | st.lists(st.floats(0, 1e3), min_size=30, max_size=200).map(sorted),
    st.floats(-10, 1e4) | st.just(math.nan),
)
def test_whatever_is_shown_no_energy_is_zero_or_negative_or_nan(
    joules: list[float], watts: float
) -> None:
    meter = Scripted(joules, watts)
    work = Work(lambda steps: meter.sleep(steps * 0.1), 0.1)
    facts = DeviceFacts("odd", {}, energy_method="counter")
    found, _ = measure_energy(meter.read, work, facts, meter.sleep, 0, read_power=meter.read_power)
    for quantity in found.values():
        assert quantity.value is None or 0 < quantity.value < math.inf
        assert quantity.reason or quantity.kind == "measured"


@pytest.mark.parametrize("answer", [None, 5, (1.0,), ("a", "b")])
def test_what_is_no_reading_of_a_counter_is_a_reason(tmp_path: Path, answer: Any) -> None:
    class Odd(FakeDevice):
        def read_energy(self) -> Any:
            return answer

    assert "not its clock (s) and J" in str(read(Odd(), tmp_path)["energy_j"].reason)


def test_joules_of_numpy_survive_json(tmp_path: Path) -> None:
    class Numpy(FakeDevice):
        def read_energy(self) -> Any:
            return tuple(np.float64(one) for one in super().read_energy())

    reading = read(Numpy(), tmp_path)
    assert reading["energy_j"].value is not None
    assert {type(one.value) for one in reading.quantities.values()} <= {float, type(None)}
