"""Joules per inference, from a cumulative counter read at the edges of long windows.

A counter moves in steps (RAPL about every 1 ms, NVML about every 100 ms). So its period is
measured first, windows span many periods, and both edges of a window lie right after a step, with
the device at work throughout; in between the counter is left alone, since some lose energy when
they are read too often. Windows begin after random delays: several boards look at their power for
a quarter of each period only.

Whatever cannot be right is refused, with its reason: a counter that falls, stands still, says
more than the board can draw or may have wrapped around unseen; windows that disagree; a device
that others use too. Where a sensor tells the power besides, one window more at work is held against
it: whichever of the two is wrong, the energy is not known. So is the last window idle, for the net
energy and the idle power. Never 0, never a guess.

Source: facts on NVML from Yang et al., "Accurate and convenient energy measurements for GPUs"
(SC'24, arXiv 2312.02741); aligning to steps from Haehnel et al. (2012).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gpsearch.profiling.device import DeviceFacts
from gpsearch.profiling.intervals import mean_of_five, quantile
from gpsearch.profiling.quantity import Kind, Quantity

WINDOWS = 5
PERIODS_A_WINDOW = 50
SHORTEST_WINDOW_S = 1.0
LONGEST_WINDOW_S = 30.0
FROZEN_S = 2.0
"""A counter that stands still for so long is broken."""
IDLE_DRIFT = 0.20
SPREAD = 0.05
"""Half of the windows' 95 % interval, as a fraction, above which they say nothing."""
OVER_LIMIT = 1.10
"""Boards overshoot their power limit a little, and counters are right to about 5 %."""
MOST_W = 1000.0
"""More than any counter's socket draws: how soon a counter can wrap around."""
SENSED = 20
"""Readings of the power sensor in a window that is held against the counter."""
DISAGREEMENT = 0.25
"""How far apart their mean powers may be, as a fraction of the larger: faulty counters were seen at
0.4 and beyond, sound ones within the 10 % that boards are right to."""
_POLL_S = 0.001
_POLLS_A_PERIOD = 50

ReadEnergy = Callable[[], tuple[float, float]]
ReadPower = Callable[[], float]


class CounterError(RuntimeError):
    """The counter cannot be trusted; the message becomes the reason of an unavailable value."""


@dataclass(frozen=True)
class Work:
    """Something done again and again inside a window: inferences, or waiting."""

    do: Callable[[int], object]
    """Does it so many times."""
    step_s: float
    """About how long one time takes."""


@dataclass(frozen=True)
class Window:
    """What the counter said of some steps of work."""

    seconds: float
    joules: float
    steps: int
    sensor_w: float | None = None
    """Mean power by a sensor, where there is one."""

    @property
    def watts(self) -> float:
        """Mean power by the counter."""
        return self.joules / self.seconds

    @property
    def contradiction(self) -> str:
        """How counter and sensor disagree; "" if they do not."""
        if self.sensor_w is None:
            return ""
        apart = abs(self.watts - self.sensor_w) / max(self.watts, self.sensor_w)
        said = f"the counter says {self.watts:.3g} W and the power sensor {self.sensor_w:.3g} W"
        return said if apart > DISAGREEMENT else ""


@dataclass(frozen=True)
class Windows:
    """All that one measurement saw."""

    period_s: float
    before: Window
    busy: Sequence[Window]
    after: Window
    sensed: Window | None = None
    """One more at work, beside the power sensor."""

    @property
    def idle_w(self) -> float:
        """Mean power without work, from before and after it."""
        return (self.before.watts + self.after.watts) / 2

    @property
    def idle_fault(self) -> str:
        """Why that is not known; "" if it is."""
        return f"idle, {self.after.contradiction}" if self.after.contradiction else ""

    @property
    def gross_j(self) -> list[float]:
        """Joules per inference, of each window: all that the counter's scope drew."""
        return [window.joules / window.steps for window in self.busy]

    @property
    def net_j(self) -> list[float]:
        """Joules per inference above what the device would have drawn without work."""
        return [(one.joules - self.idle_w * one.seconds) / one.steps for one in self.busy]

    @property
    def spread(self) -> float:
        """Half of the 95 % interval of the gross energy, as a fraction."""
        mean, (low, high) = mean_of_five(self.gross_j)
        return (high - low) / 2 / mean


def measure_energy(
    read: ReadEnergy,
    inference: Work,
    facts: DeviceFacts,
    sleep: Callable[[float], None],
    seed: int,
    disturbances: Callable[[], Sequence[str]] = lambda: (),
    read_power: ReadPower | None = None,
) -> tuple[dict[str, Quantity], list[str]]:
    """Return energy per inference, gross and net, and power; and what casts doubt on them (flags).

    ``energy_j`` is gross: all that the counter's scope drew while inferences ran back to back.

    Args:
        read: The counter: (clock in s, cumulative J).
        inference: Runs inferences.
        facts: Names the counter, its scope and its limits.
        sleep: Leaves the device idle for so many seconds.
        seed: Of the short random delays that keep windows out of step with periodic noise.
        disturbances: Says who else uses the device at this moment, or what slows it down.
        read_power: The power sensor, in W, where there is one besides the counter.
    """
    rng = random.Random(seed)
    sensor = read_power if read_power and _watts(read_power) else None
    try:
        windows = _Scene(read, inference, facts, sleep, rng, disturbances, sensor).trusted()
    except (OSError, RuntimeError, ValueError) as error:
        reason = f"{facts.energy_method or 'energy counter'}: {error}"
        return unavailable(reason), []
    return _quantities(windows, facts), _flags(windows)


def unavailable(reason: str) -> dict[str, Quantity]:
    """Return the energies that could not be had, and why."""
    return {name: Quantity.unavailable("J", reason) for name in ("energy_j", "energy_net_j")}


def _quantities(windows: Windows, facts: DeviceFacts) -> dict[str, Quantity]:
    method, scope, model = facts.energy_method, facts.energy_scope, facts.energy_model

    def read(unit: str, value: float, ci95: tuple[float, float] | None, n: int) -> Quantity:
        kind: Kind = "estimated" if model else "measured"
        return Quantity(value, unit, kind, ci95, n, method, scope, model or None)

    net, interval = mean_of_five(windows.net_j)
    unknown = why_not = windows.idle_fault
    if not why_not and net <= 0:
        why_not = f"it drew {windows.idle_w:.3g} W idle, and no more at work"
    return {
        "energy_j": read("J", *mean_of_five(windows.gross_j), WINDOWS),
        "energy_net_j": (
            Quantity.unavailable("J", why_not) if why_not else read("J", net, interval, WINDOWS)
        ),
        "power_avg_w": read("W", *mean_of_five([one.watts for one in windows.busy]), WINDOWS),
        "power_idle_w": (
            Quantity.unavailable("W", unknown) if unknown else read("W", windows.idle_w, None, 2)
        ),
        "energy_period_s": Quantity(windows.period_s, "s", "measured", None, 5, method, scope),
    }


@dataclass(frozen=True)
class _Scene:
    """The arguments of `measure_energy`, and a power sensor that has answered."""

    read: ReadEnergy
    inference: Work
    facts: DeviceFacts
    sleep: Callable[[float], None]
    rng: random.Random
    disturbances: Callable[[], Sequence[str]]
    sensor: ReadPower | None

    def trusted(self) -> Windows:
        """Return windows that agree, at the second attempt if not at the first.

        Raises:
            CounterError: The counter is broken, or the device is disturbed both times.
        """
        fault = ""
        for _ in range(2):
            faults = list(self.disturbances())
            windows = self._windows()
            faults += [one for one in self.disturbances() if one not in faults]
            if windows.spread > SPREAD:
                wide = f"±{windows.spread:.1%}, at most ±{SPREAD:.0%} is accepted"
                faults.append(f"{WINDOWS} windows disagree by {wide}")
            if windows.sensed and windows.sensed.contradiction:
                faults.append(f"at work, {windows.sensed.contradiction}: one of them is wrong")
            fault = "; ".join(faults)
            if not fault:
                return windows
        raise CounterError(f"{fault} (tried twice); measure again when the device is free")

    def _windows(self) -> Windows:
        """Measure idle, at work and idle again."""
        read, inference, sleep = self.read, self.inference, self.sleep
        idle = Work(lambda steps: sleep(steps * _POLL_S), _POLL_S)
        period_s = counter_period_s(read, idle)
        window_s = min(LONGEST_WINDOW_S, max(SHORTEST_WINDOW_S, PERIODS_A_WINDOW * period_s))
        poll_s = max(_POLL_S, period_s / _POLLS_A_PERIOD)
        before = window(read, idle, window_s, poll_s)
        window(read, inference, window_s, poll_s)  # brings the device to its steady power
        busy = []
        for _ in range(WINDOWS):
            sleep(self.rng.uniform(0, period_s))
            busy.append(_plausible(window(read, inference, window_s, poll_s), self.facts))
        # In a window of its own, since readings of the sensor keep the device waiting.
        sensed = window(read, inference, window_s, poll_s, self.sensor) if self.sensor else None
        sleep(window_s)  # cools down
        after = window(read, idle, window_s, poll_s, self.sensor)
        return Windows(period_s, before, busy, after, sensed)


def counter_period_s(read: ReadEnergy, idle: Work) -> float:
    """Return the median time between two steps of the counter."""
    steps_at = [_at_step(read, idle, _POLL_S)[0] for _ in range(6)]
    return quantile([b - a for a, b in pairwise(steps_at)])


def window(
    read: ReadEnergy,
    work: Work,
    seconds: float,
    poll_s: float,
    sensor: ReadPower | None = None,
) -> Window:
    """Do ``work`` for about ``seconds`` between two steps of the counter.

    Raises:
        CounterError: The counter did not rise, or its clock did not.
    """
    start_s, start_j, _ = _at_step(read, work, poll_s)
    steps = math.ceil(seconds / work.step_s)
    sensor_w = _sensed(work, steps, sensor)
    end_s, end_j, more = _at_step(read, work, poll_s)
    if end_j <= start_j:
        raise CounterError(f"the counter fell from {start_j:.6g} J to {end_j:.6g} J")
    if end_s <= start_s:
        raise CounterError(f"the counter's clock went from {start_s:.6g} s to {end_s:.6g} s")
    return Window(end_s - start_s, end_j - start_j, steps + more, sensor_w)


def _sensed(work: Work, steps: int, sensor: ReadPower | None) -> float | None:
    """Do the work; return the mean of power readings spread over it, if none of them failed."""
    if sensor is None:
        work.do(steps)
        return None
    readings, parts = list[float | None](), min(steps, SENSED)
    for part in range(parts):
        work.do(steps * (part + 1) // parts - steps * part // parts)
        readings.append(_watts(sensor))
    known = [watts for watts in readings if watts is not None]
    return sum(known) / parts if len(known) == parts else None


def _watts(sensor: ReadPower) -> float | None:
    """Return what the sensor says; None if that is no power."""
    try:
        watts = float(sensor())
    except (OSError, RuntimeError, TypeError, ValueError):
        return None
    return watts if 0 < watts < math.inf else None


def _at_step(read: ReadEnergy, work: Work, poll_s: float) -> tuple[float, float, int]:
    """Work until the counter steps; return (clock in s, cumulative J, times the work was done)."""
    chunk = max(1, round(poll_s / work.step_s))
    most = max(2, math.ceil(FROZEN_S / (chunk * work.step_s)))
    _, before = _finite(read())
    for polls in range(1, most + 1):
        work.do(chunk)
        clock_s, joules = _finite(read())
        if joules < before:
            raise CounterError(f"the counter fell from {before:.6g} J to {joules:.6g} J")
        if joules > before:
            return clock_s, joules, polls * chunk
    raise CounterError(f"the counter stood still for {FROZEN_S:g} s")


def _finite(reading: Any) -> tuple[float, float]:
    """Return what a stranger's counter says, or refuse what is no pair of numbers."""
    try:
        clock_s, joules = (float(one) for one in reading)
    except (TypeError, ValueError):
        raise CounterError(f"the counter reads {reading!r}, not its clock (s) and J") from None
    if not (math.isfinite(clock_s) and math.isfinite(joules)):
        raise CounterError(f"the counter reads {joules} J at {clock_s} s")
    return clock_s, joules


def _plausible(seen: Window, facts: DeviceFacts) -> Window:
    """Return the window, or refuse it: more power than there can be, or time for a hidden wrap."""
    limit_w, wrap_j = facts.power_limit_w, facts.energy_wrap_j
    if limit_w is not None and seen.watts > OVER_LIMIT * limit_w:
        raise CounterError(f"{seen.watts:.0f} W is above the device's limit of {limit_w:.0f} W")
    if wrap_j is not None and seen.seconds > wrap_j / 2 / MOST_W:
        raise CounterError(
            f"a window of {seen.seconds:.3g} s is too long for a counter that starts again at "
            f"{wrap_j:.4g} J: it may have done so unseen"
        )
    return seen


def _flags(windows: Windows) -> list[str]:
    flags = [windows.idle_fault] if windows.idle_fault else []
    drift = windows.after.watts / windows.before.watts - 1
    if abs(drift) > IDLE_DRIFT:
        flags += [f"idle power changed by {drift:+.0%} over the energy reading"]
    return flags
