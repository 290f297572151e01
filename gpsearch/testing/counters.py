"""Checks of a profiler's joules and bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import count, pairwise
from typing import Any

from gpsearch.profiling import measure
from gpsearch.profiling.energy import CounterError, Work, counter_period_s
from gpsearch.testing.bench import Bench
from gpsearch.testing.checks import CheckFailed, check
from gpsearch.testing.faults import CALL_J, SpoiltMeter

WORK_S = 0.3
"""Of the shorter of two stretches of work; the longer is three times as long."""
PERIODS = 2
"""So many of the counter's fit into the shorter stretch at least, however slow it is."""
WATTS = (1e-3, 1e4)
"""What one device draws at work: from a microcontroller to a rack."""


@check("peak_memory_bytes")
def memory_grows_with_the_model(bench: Bench) -> None:
    """Peak memory is a number of bytes, and a model of sixty-four times the weights needs more."""
    meter: Any = bench.profiler
    small, large = (meter.peak_memory(bench.loaded(hidden=hidden)) for hidden in (32, 256))
    if not (isinstance(small, int) and 0 < small < large):
        raise CheckFailed(f"peak_memory() gave {small!r} and, for a larger model, {large!r} bytes")


@check("energy_j")
def the_counter_never_falls(bench: Bench) -> None:
    """Clock and joules are finite, not negative, and never fall."""
    meter: Any = bench.profiler
    handle, reads = bench.loaded(), []
    for _ in range(20):
        reads.append(meter.read_energy())
        bench.profiler.run([handle], [0] * 5)
    if not all(math.isfinite(clock_s) and 0 <= joules < math.inf for clock_s, joules in reads):
        raise CheckFailed(f"read_energy() gave {reads[0]}; (clock in s, cumulative J) is wanted")
    for before, after in pairwise(reads):
        if after[0] <= before[0]:
            raise CheckFailed(f"the counter's clock went from {before[0]} s to {after[0]} s")
        if after[1] < before[1]:
            raise CheckFailed(f"the counter fell from {before[1]} J to {after[1]} J")


@check("energy_j")
def the_counters_clock_is_in_seconds(bench: Bench) -> None:
    """The counter's clock goes as fast as the host's."""
    meter: Any = bench.profiler
    start_s, (before_s, _) = time.perf_counter(), meter.read_energy()
    time.sleep(0.3)
    took_s, said_s = time.perf_counter() - start_s, meter.read_energy()[0] - before_s
    if not 0.5 <= said_s / took_s <= 2:
        raise CheckFailed(f"the counter's clock went on by {said_s:.3g} s in {took_s:.3g} s")


@check("energy_j")
def joules_grow_with_the_work(bench: Bench) -> None:
    """Three times the window holds about three times the joules, at no absurd power."""
    handle, work_s = bench.loaded(steps=50), max(WORK_S, PERIODS * _period_s(bench))
    few, many = _work(bench, handle, work_s), _work(bench, handle, 3 * work_s)
    if few[1] <= 0 or many[1] <= 0:
        raise CheckFailed(f"the counter stood still while the device worked for {few[0]:.2g} s")
    at_first, later = few[1] / few[0], many[1] / many[0]
    if not WATTS[0] <= later <= WATTS[1]:
        raise CheckFailed(f"the device drew {later:.3g} W; joules are wanted, not mJ, uJ or Wh")
    if not 1 / 3 <= later / at_first <= 3:
        raise CheckFailed(f"the same work drew {at_first:.3g} W, and then {later:.3g} W")


def _period_s(bench: Bench) -> float:
    """Return how often the counter is renewed; one that is too slow for the engine fails."""
    meter: Any = bench.profiler
    idle = Work(lambda ms: bench.host.sleep(ms / 1000), 0.001)
    try:
        return counter_period_s(meter.read_energy, idle)
    except CounterError as error:
        raise CheckFailed(str(error)) from error


def _work(bench: Bench, handle: Any, seconds: float) -> tuple[float, float]:
    """Return the counter's seconds and joules while the device worked for at least so long."""
    meter: Any = bench.profiler
    calls = math.ceil(WORK_S / 10 / bench.best([handle], 5)[0])
    worked_s, (start_s, start_j) = 0.0, meter.read_energy()
    while worked_s < seconds:
        worked_s += sum(bench.profiler.run([handle], [0] * calls))
    end_s, end_j = meter.read_energy()
    return end_s - start_s, end_j - start_j


# What follows holds the engine, on this profiler, to a value that is right or absent with a reason.


def _denied(clock_s: float, joules: float) -> tuple[float, float]:
    raise PermissionError("energy_uj: permission denied")


def _lost(reads: count[int]) -> Callable[[float, float], tuple[float, float]]:
    def spoil(clock_s: float, joules: float) -> tuple[float, float]:
        if next(reads) > 200:
            raise RuntimeError("the meter is gone")
        return clock_s, joules

    return spoil


def _read(bench: Bench, spoil: Callable[[float, float], tuple[float, float]]) -> str | None:
    """Return why the engine reads no energy; None if it does. A wrong value fails the check."""
    meter = SpoiltMeter(bench.profiler, spoil)
    energy = measure(
        meter, *bench.workload(steps=2), energy=True, max_seconds=2.0, host=meter.host(bench.host)
    )["energy_j"]
    if energy.value is None:
        return energy.reason or "for no reason"
    if abs(energy.value / CALL_J - 1) > 0.05:
        raise CheckFailed(f"{energy.value:.3g} J were read of a call that took {CALL_J:g} J")
    return None


@check("energy_j")
def known_joules_are_read(bench: Bench) -> None:
    """A counter that works is read right."""
    why_not = _read(bench, lambda clock_s, joules: (clock_s, joules))
    if why_not:
        raise CheckFailed(f"a counter that works was not read: {why_not}")


@check("energy_j")
def a_counter_that_wraps_is_no_value(bench: Bench) -> None:
    """A counter that begins anew every 100 J."""
    _read(bench, lambda clock_s, joules: (clock_s, joules % 100))


@check("energy_j")
def a_stale_counter_is_no_value(bench: Bench) -> None:
    """A counter that is renewed every quarter of a minute."""
    _read(bench, lambda clock_s, joules: (clock_s, joules - joules % 750))


@check("energy_j")
def a_frozen_counter_is_no_value(bench: Bench) -> None:
    """A counter or a clock that stands still."""
    _unavailable(bench, lambda clock_s, joules: (clock_s, 7.0))
    _unavailable(bench, lambda clock_s, joules: (7.0, joules))


@check("energy_j")
def a_falling_counter_is_no_value(bench: Bench) -> None:
    """A counter that runs backwards."""
    _unavailable(bench, lambda clock_s, joules: (clock_s, -joules))


@check("energy_j")
def a_counter_of_nan_is_no_value(bench: Bench) -> None:
    """A counter that gives no numbers."""
    _unavailable(bench, lambda clock_s, joules: (clock_s, math.nan))
    _unavailable(bench, lambda clock_s, joules: (clock_s, math.inf))


@check("energy_j")
def a_counter_that_is_denied_is_no_value(bench: Bench) -> None:
    """A counter that may not be read, and one that is lost halfway."""
    _unavailable(bench, _denied)
    _unavailable(bench, _lost(count()))


def _unavailable(bench: Bench, spoil: Callable[[float, float], tuple[float, float]]) -> None:
    if _read(bench, spoil) is None:
        raise CheckFailed("a counter that cannot be read right gave a value")
