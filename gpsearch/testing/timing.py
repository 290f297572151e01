"""Checks of a profiler's seconds."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable

from gpsearch.profiling import AA_GATE, Reading, measure
from gpsearch.testing.bench import Bench
from gpsearch.testing.checks import CheckFailed, check

_LONGEST_S = 2.0
_WIDEST = 0.1
"""An interval that is wider tells nothing about 1."""
_APART = 1.25
"""A long call lasts at least so many times a short one; what lies closer is noise."""


@check("latency_s", tries=3)
def seconds_fit_into_the_clock(bench: Bench) -> None:
    """A device says no more seconds than went by while it ran."""
    handle = bench.loaded(steps=50)
    bench.profiler.run([handle], [0])
    start_s = time.perf_counter()
    said_s = sum(bench.profiler.run([handle], [0] * 5))
    took_s = time.perf_counter() - start_s
    if said_s > 1.05 * took_s:
        wish = "seconds are wanted, not milliseconds or microseconds"
        raise CheckFailed(f"run() said {said_s:.3g} s for calls that took {took_s:.3g} s; {wish}")


@check("latency_s", tries=3)
def ten_times_the_steps_take_ten_times_as_long(bench: Bench) -> None:
    """Seconds grow with the work: half to twice tenfold, for one length of a sequence at least."""
    ratios = []
    for steps in (20, 100, 500):  # a fixed cost of every call hides the work of short ones
        handles = [bench.loaded(steps=steps), bench.loaded(steps=10 * steps)]
        short_s, long_s = bench.best(handles, 5)
        ratios.append(long_s / short_s)
        if 5 <= ratios[-1] <= 20:
            return
        if long_s > _LONGEST_S:
            break
    raise CheckFailed(f"10 x the steps took {_list(ratios)} x the time; about 10 is wanted")


@check("latency_s", tries=3)
def run_waits_for_the_device(bench: Bench) -> None:
    """Seconds last until the output is there: with a batch large enough, they grow.

    The steps alone do not tell: starting more of them takes longer, even if nobody waits.
    """
    ratios: list[float] = []
    one = bench.loaded(steps=2, hidden=256)
    for batch in (64, 512, 4096, 32768):
        # In turn: a call that nobody waits for slows down all that come after it, alike.
        pair = [one, bench.loaded(steps=2, hidden=256, batch=batch)]
        one_s, many_s = bench.best(pair, 3)
        ratios.append(many_s / one_s)
        if ratios[-1] >= 3:  # once more, and longer: on a busy machine three may be interrupted
            one_s, many_s = bench.best(pair, 9)
            if many_s >= 3 * one_s:
                return
        if many_s > _LONGEST_S:
            break
    raise CheckFailed(
        f"batches of 64 and more took {_list(ratios)} x the time of one sequence: run() must wait "
        "until the output is there before it reads the clock"
    )


@check("latency_s", tries=3)
def the_schedule_is_kept(bench: Bench) -> None:
    """Every time is that of the handle that was due."""
    handles = [bench.loaded(steps=5), bench.loaded(steps=1000)]
    schedule = [0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 0]
    # Each alone, where no schedule can be mistaken: with times of the schedule itself, what
    # lies between is noise once all of them are those of one handle.
    short_s, long_s = (bench.best([one], 5)[0] for one in handles)
    seconds = bench.profiler.run(handles, schedule * 10)
    best = [min(seconds[i :: len(schedule)]) for i in range(len(schedule))]
    middle_s = max((short_s * long_s) ** 0.5, _APART * short_s)
    strays = sum((s > middle_s) != bool(i) for i, s in zip(schedule, best, strict=True))
    if strays > len(schedule) // 4:  # on a busy machine one may be interrupted every time
        raise CheckFailed(f"{strays} of {len(schedule)} times are not those of the handle due")


@check("latency_s", tries=4)
def a_model_is_as_fast_as_itself(bench: Bench) -> None:
    """The ratio of two equal models is 1, or the device cannot rank models."""
    reading = _itself(bench, 5, 0.6)
    ratio = reading["latency_ratio"]
    low, high = ratio.ci95 or (0.0, math.inf)
    if low > 1 + AA_GATE or high < 1 - AA_GATE or high - low > _WIDEST:
        wish = "; ".join([f"1 ± {AA_GATE} is wanted", *reading.flags])
        took = f"a model took {ratio.number:.3g} x ({low:.3g} to {high:.3g}) the time of itself"
        raise CheckFailed(f"{took}; {wish}")


@check("latency_s")
def readings_survive_json(bench: Bench) -> None:
    """What the engine reads on the device comes back from reading.json as it was."""
    reading = _itself(bench, 2, 0.1)
    if Reading.from_dict(json.loads(json.dumps(reading.to_dict()))) != reading:
        raise CheckFailed("a reading comes back from JSON changed; use plain str and float")


def _itself(bench: Bench, steps: int, max_seconds: float) -> Reading:
    model, example = bench.workload(steps=steps)
    return measure(
        bench.profiler, model, example, reference=model, reference_name="itself",
        precision=AA_GATE, max_seconds=max_seconds, host=bench.host,
    )  # fmt: skip


def _list(numbers: Iterable[float]) -> str:
    return ", ".join(f"{one:.3g}" for one in numbers)
