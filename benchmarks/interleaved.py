"""Calls timed side by side: in one process, in turn, and compared round by round.

A machine that others use too is now fast and now slow; two calls of the same round meet it in about
the same mood, so their ratio holds still where their times do not. The clock is the processor time
of this thread: what it waits for a core is not counted, what others leave in the caches is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpsearch.profiling.intervals import quantile, quantile_interval

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"processor": time.thread_time, "wall": time.perf_counter}
FEWEST_ROUNDS = 6
"""With fewer the median has no 95 % interval."""


class Ratio(NamedTuple):
    """The median of the rounds' ratios, and its 95 % interval (None where the rounds are few)."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Timings:
    """Seconds of every call, round by round."""

    seconds: Mapping[str, list[float]]

    def median_s(self, name: str) -> float:
        """Return the median of one call's times."""
        return quantile(self.seconds[name])

    def ratio(self, name: str, to: str) -> Ratio:
        """Return by how many times ``name`` takes as long as ``to``."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        ratios = [one / other for one, other in pairs]
        return Ratio(quantile(ratios), *(quantile_interval(ratios) or (None, None)))


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Clock = time.thread_time,
    *,
    warm_up: int = 2,
) -> Timings:
    """Time every call once a round; each round begins with another one.

    Args:
        calls: By name.
        rounds: How many times each is timed.
        clock: Returns seconds.
        warm_up: Untimed rounds before.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm_up, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = clock()
            calls[name]()
            spent = clock() - started
            if turn >= 0:
                seconds[name].append(spent)
    return Timings(seconds)
