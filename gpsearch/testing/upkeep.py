"""Checks of a profiler's long life: it goes on after an error, stays as it was, and ends well."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gpsearch.testing.bench import Bench
from gpsearch.testing.checks import CheckFailed, check


class _Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("this model always fails")


@check("latency_s")
def errors_are_told_and_recovered_from(bench: Bench) -> None:
    """A model that fails is an error, not a time; and the next one runs as if nothing had been."""
    _, example = bench.workload()
    try:
        seconds = bench.profiler.run([bench.profiler.load(_Raising(), example)], [0])
    except Exception:
        bench.profiler.run([bench.loaded()], [0])
    else:
        raise CheckFailed(f"a model whose forward raises was given the time {seconds}")


@check("latency_s")
def the_second_time_is_like_the_first(bench: Bench) -> None:
    """A model that is loaded anew takes its time again."""
    handles: list[Any] = []
    least_s: list[float] = []
    for _ in range(3):
        handles.append(bench.loaded(steps=20))
        least_s += bench.best(handles[-1:], 15)
    for pause_s in (0.5, 1.0, 1.5):  # other work may have lain on all of one model's calls
        if max(least_s) > 3 * min(least_s):
            bench.host.sleep(pause_s)
            again_s = [bench.best([one], 15)[0] for one in handles]
            least_s = [min(pair) for pair in zip(least_s, again_s, strict=True)]
    if max(least_s) > 3 * min(least_s):
        spread = f"{min(least_s):.3g} s to {max(least_s):.3g} s"
        raise CheckFailed(f"one model, loaded three times, took {spread} a call")


@check()
def closes_twice(bench: Bench) -> None:
    """A profiler can be closed again: who cleans up does not know who did so before."""
    bench.profiler.close()
    bench.profiler.close()
