"""Joules per inference, from a cumulative counter read at the edges of long windows.

A counter moves in steps (RAPL about every 1 ms, NVML about every 100 ms). So its period is
measured first, windows span many periods, and both edges of a window lie right after a step, with
the device at work throughout; in between the counter is left alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from gpsearch.profiling.device import DeviceFacts
from gpsearch.profiling.intervals import mean_of_five, quantile
from gpsearch.profiling.quantity import Quantity

WINDOWS = 5
PERIODS_A_WINDOW = 50
SHORTEST_WINDOW_S = 1.0
LONGEST_WINDOW_S = 30.0
"""Well under half the time in which the fastest known counter wraps around (about 4 minutes)."""
FROZEN_S = 2.0
"""A counter that stands still for so long is broken."""
IDLE_DRIFT = 0.20
SPREAD = 0.05
_POLL_S = 0.001

ReadEnergy = Callable[[], tuple[float, float]]


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


def measure_energy(
    read: ReadEnergy, inference: Work, facts: DeviceFacts, sleep: Callable[[float], None], seed: int
) -> tuple[dict[str, Quantity], list[str]]:
    """Return energy per inference and idle power, and what casts doubt on them.

    The energy is gross: all that the counter's scope drew while inferences ran back to back.

    Args:
        read: The counter: (clock in s, cumulative J).
        inference: Runs inferences.
        facts: Names the counter and its scope.
        sleep: Leaves the device idle for so many seconds.
        seed: Of the short random delays that keep windows out of step with periodic noise.
    """
    try:
        idle_w, joules = _windows(read, inference, sleep, random.Random(seed))
    except (OSError, RuntimeError) as error:
        reason = f"{facts.energy_method or 'energy counter'}: {error}"
        return {"energy_j": Quantity.unavailable("J", reason)}, []
    value, ci95 = mean_of_five(joules)
    method, scope = facts.energy_method, facts.energy_scope
    idle = sum(idle_w) / 2
    return {
        "energy_j": Quantity(value, "J", "measured", ci95, len(joules), method, scope),
        "power_idle_w": Quantity(idle, "W", "measured", None, 2, method, scope),
    }, _doubts(idle_w, value, ci95)


def _windows(
    read: ReadEnergy, inference: Work, sleep: Callable[[float], None], rng: random.Random
) -> tuple[tuple[float, float], list[float]]:
    """Return idle power before and after, in W, and joules per inference of each window."""
    idle = Work(lambda steps: sleep(steps * _POLL_S), _POLL_S)
    period_s = counter_period_s(read, idle)
    window_s = min(LONGEST_WINDOW_S, max(SHORTEST_WINDOW_S, PERIODS_A_WINDOW * period_s))
    before = window(read, idle, window_s)
    window(read, inference, window_s)  # brings the device to its steady power
    joules = []
    for _ in range(WINDOWS):
        sleep(rng.uniform(0, period_s))
        busy = window(read, inference, window_s)
        joules.append(busy.joules / busy.steps)
    sleep(window_s)  # cools down
    after = window(read, idle, window_s)
    return (before.joules / before.seconds, after.joules / after.seconds), joules


def counter_period_s(read: ReadEnergy, idle: Work) -> float:
    """Return the median time between two steps of the counter."""
    steps_at = [_at_step(read, idle)[0] for _ in range(6)]
    return quantile([b - a for a, b in pairwise(steps_at)])


def window(read: ReadEnergy, work: Work, seconds: float) -> Window:
    """Do ``work`` for about ``seconds`` between two steps of the counter."""
    start_s, start_j, _ = _at_step(read, work)
    steps = math.ceil(seconds / work.step_s)
    work.do(steps)
    end_s, end_j, more = _at_step(read, work)
    return Window(end_s - start_s, end_j - start_j, steps + more)


def _at_step(read: ReadEnergy, work: Work) -> tuple[float, float, int]:
    """Work until the counter steps; return (clock in s, cumulative J, times the work was done)."""
    _, before = read()
    for steps in range(1, max(2, math.ceil(FROZEN_S / work.step_s)) + 1):
        work.do(1)
        clock_s, joules = read()
        if joules < before:
            raise CounterError(f"the counter fell from {before} J to {joules} J")
        if joules > before:
            return clock_s, joules, steps
    raise CounterError(f"the counter stood still for {FROZEN_S:g} s")


def _doubts(idle_w: tuple[float, float], value: float, ci95: tuple[float, float]) -> list[str]:
    half_width, drift = (ci95[1] - ci95[0]) / 2 / value, idle_w[1] / idle_w[0] - 1
    doubts = []
    if abs(drift) > IDLE_DRIFT:
        doubts.append(f"idle power changed by {drift:+.0%} over the energy reading")
    if half_width > SPREAD:
        doubts.append(f"energy spread of ±{half_width:.1%} over {WINDOWS} windows")
    return doubts
