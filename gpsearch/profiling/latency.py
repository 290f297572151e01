"""Timing single calls, the candidate's between the reference's, until the answer is sharp enough.

On a shared machine a median drifts by tens of percent between two moments. The ratio of a call to
the two reference calls right beside it hardly does, which is why nothing is timed in blocks.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpsearch.errors import UserError
from gpsearch.profiling.device import DeviceFacts, DeviceProfiler
from gpsearch.profiling.intervals import quantile, quantile_interval
from gpsearch.profiling.quantity import Quantity
from gpsearch.profiling.strangers import told

TURNS = ((0, 1, 0, 1, 0), (1, 0, 1, 0, 1))
"""Candidate (0) and reference (1) alternate, so that every call finds the caches as the other model
left them (else equal models of 3 MB came out 1.1 apart). The first call of a turn does not count.
Which turn comes next is left to chance: whatever place in a turn is better or worse off, both
models are there equally often, and turns of about a time slice do not keep in step with the
scheduler. (With a fixed order equal models came out 1.5 % apart, in 24 readings beside ten busy
processes.)"""
ENOUGH = 64
"""Turns of every reading that has the time; then 128, 256 and so on while it is not sharp."""
MOST = 4096
FEWEST = 6
"""Fewer have no 95 % interval of the median."""
SHORTEST_S = 0.5
"""Time on the device, so that fast models are not judged by one lucky moment."""
DRIFT = 0.10
_CHUNK = 16
_SETTLED = 0.05
_WARM_UP_BLOCKS = 20


@dataclass(frozen=True)
class Timing:
    """The calls of one reading, in seconds."""

    turns: list[tuple[list[float], list[float]]]
    """The candidate's calls of each turn, and the reference's; none of these if it is alone."""
    precision: float
    max_seconds: float
    settled: bool

    @property
    def candidate(self) -> list[float]:
        """The candidate's calls."""
        return [call for calls, _ in self.turns for call in calls]

    @property
    def reference(self) -> list[float]:
        """The reference's calls; none without a reference."""
        return [call for _, calls in self.turns for call in calls]

    @property
    def ratios(self) -> list[float]:
        """The candidate's calls of each turn over the reference's beside them."""
        return [sum(calls) / sum(beside) for calls, beside in self.turns if beside]

    @property
    def half_width(self) -> float:
        """Half the 95 % interval of what the reading is for, as a fraction of it."""
        samples = self.ratios or self.candidate
        interval = quantile_interval(samples)
        return (interval[1] - interval[0]) / 2 / quantile(samples) if interval else math.inf

    @property
    def drift(self) -> float:
        """Change of the reference (or the candidate, alone) from the first third to the last."""
        calls = self.reference or self.candidate
        third = max(1, len(calls) // 3)
        return quantile(calls[-third:]) / quantile(calls[:third]) - 1

    def faults(self, reference_s: float | None = None) -> list[str]:
        """Return what is wrong with these times, which makes the reading unstable; else nothing.

        Args:
            reference_s: What the reference took at other times, which these are compared with.
        """
        strayed = self._strayed(reference_s)
        n, wide = len(self.turns), self.half_width > self.precision
        checks = {
            "the warm-up did not settle": not self.settled,
            f"only {n} of {ENOUGH} turns fitted into {self.max_seconds:g} s": n < ENOUGH,
            f"interval of ±{self.half_width:.1%}, {self.precision:.1%} wanted": wide,
            f"speed drifted by {self.drift:+.0%} within the reading": abs(self.drift) > DRIFT,
            f"the reference took {strayed:+.0%} against other readings": abs(strayed) > DRIFT,
        }
        return [fault for fault, is_there in checks.items() if is_there]

    def _strayed(self, reference_s: float | None) -> float:
        """Return the change of the reference against other readings."""
        if not self.reference or not reference_s:
            return 0.0
        return quantile(self.reference) / reference_s - 1


def timed(device: DeviceProfiler, handles: Sequence[Any], schedule: Sequence[int]) -> list[float]:
    """Run the schedule and return the seconds of each call.

    Raises:
        UserError: The profiler returned something else.
        RuntimeError: It failed, in whatever way.
    """
    found: Any = told(device, device.run)(handles, schedule)
    try:
        seconds = [float(call) for call in found]  # of numpy, say, which JSON cannot hold
    except (TypeError, ValueError):
        seconds = []
    if len(seconds) != len(schedule) or not all(0 < call < math.inf for call in seconds):
        raise UserError(
            f"profiler {type(device).__name__}: run() must return one positive time in seconds "
            f"for each of the {len(schedule)} calls asked for; mend the profiler"
        )
    return seconds


def time_calls(
    device: DeviceProfiler, handles: Sequence[Any], precision: float, max_seconds: float
) -> Timing:
    """Warm up, then time calls until the interval is narrow or the time on the device is over.

    Args:
        device: Where the handles are loaded.
        handles: The candidate, and then the reference if there is one.
        precision: Wanted half-width of the 95 % interval, as a fraction.
        max_seconds: Time on the device, the warm-up (at most a quarter more) aside.
    """
    kinds = TURNS if len(handles) == 2 else ((0,),)
    turn_s, settled = _warm_up(device, handles, kinds[0], max_seconds / 4)
    timing = Timing([], precision, max_seconds, settled)
    spent_s, enough, rng = 0.0, ENOUGH, random.Random(0)
    while True:
        fitting = int((max_seconds - spent_s) / turn_s)
        turns = [rng.choice(kinds) for _ in range(min(_CHUNK, max(1, fitting)))]
        seconds = timed(device, handles, list(itertools.chain(*turns)))
        spent_s += sum(seconds)
        calls = iter(seconds)
        timing.turns.extend(
            _counted(turn, list(itertools.islice(calls, len(turn)))) for turn in turns
        )
        n = len(timing.turns)
        sharp = timing.half_width <= precision and spent_s >= SHORTEST_S
        if n >= enough and (sharp or n >= MOST):
            return timing
        # Looking only at doublings keeps the interval honest: each look is a chance to be lucky.
        enough = enough * 2 if n >= enough else enough
        if n >= FEWEST and spent_s + turn_s > max_seconds:
            return timing


def quantities(timing: Timing, facts: DeviceFacts) -> dict[str, Quantity]:
    """Return what the timing says, under the names of the results.

    Intervals are of the noise within this reading (see `quantile_interval`): another process, or
    another day, may well lie outside.
    """
    summarised = {
        "latency_s": (timing.candidate, 0.5),
        "latency_p90_s": (timing.candidate, 0.9),
    }
    if timing.reference:
        summarised |= {
            "latency_ratio": (timing.ratios, 0.5),
            "latency_reference_s": (timing.reference, 0.5),
        }
    found = {
        name: Quantity(
            quantile(samples, q),
            "1" if name == "latency_ratio" else "s",
            "measured",
            quantile_interval(samples, q),
            len(samples),
            facts.latency_method,
            "device",
        )
        for name, (samples, q) in summarised.items()
    }
    alone = Quantity.unavailable("1", "measured without a reference model")
    return {"latency_ratio": alone} | found


def _warm_up(
    device: DeviceProfiler, handles: Sequence[Any], turn: tuple[int, ...], limit_s: float
) -> tuple[float, bool]:
    """Run until a block is no longer faster than the one before; return (seconds a turn, did it).

    Devices warm up from slow to fast; a device that slows down is told by `Timing.drift`.
    """
    spent_s = turn_s = sum(timed(device, handles, turn))
    for _ in range(_WARM_UP_BLOCKS):
        turns = min(_CHUNK, max(1, int(limit_s / 4 / turn_s)))
        seconds = timed(device, handles, turn * turns)
        spent_s += sum(seconds)
        starts = range(0, len(seconds), len(turn))
        before_s, turn_s = turn_s, quantile([sum(seconds[i : i + len(turn)]) for i in starts])
        if turn_s >= (1 - _SETTLED) * before_s:
            return turn_s, True
        if spent_s > limit_s:
            break
    return turn_s, False


def _counted(turn: tuple[int, ...], seconds: list[float]) -> tuple[list[float], list[float]]:
    """Return the calls of a turn that count: the candidate's and the reference's."""
    if len(turn) == 1:
        return seconds, []
    second, third = seconds[1::2], seconds[2::2]
    return (second, third) if turn[1] == 0 else (third, second)
