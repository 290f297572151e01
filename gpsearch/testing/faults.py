"""A profiler whose energy counter is broken in a known way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from gpsearch.profiling import DeviceFacts, DeviceProfiler, Host

CALL_S, CALL_J, IDLE_W, TICK_S = 0.02, 1.0, 10.0, 0.02
"""What a call takes, what nothing takes, and how often the counter is renewed."""

Reading = tuple[float, float]


class SpoiltMeter:
    """The author's profiler in a time of its own, so that a fault of minutes shows at once.

    Models are really loaded and run, and the counter is really read; but every call is said to
    take `CALL_S` and `CALL_J`, and what the counter says is made up from that, then spoilt.

    Args:
        profiler: The author's.
        spoil: Takes a true (clock in s, cumulative J) and returns a broken one, or raises.
    """

    def __init__(self, profiler: DeviceProfiler, spoil: Callable[[float, float], Reading]) -> None:
        self._profiler, self._spoil = profiler, spoil
        self.api_version = profiler.api_version
        self._clock_s = self._joules = self._shown_j = 0.0
        self._ticks = 0

    def probe(self) -> DeviceFacts:
        """Return the author's facts, under a name of their own, and without their limits."""
        facts = self._profiler.probe()
        unlimited = replace(facts, energy_wrap_j=None, power_limit_w=None)
        return replace(unlimited, name=f"{facts.name} spoilt")

    def load(self, model: nn.Module, example: tuple[Any, ...]) -> Any:
        """Load on the author's device."""
        return self._profiler.load(model, example)

    def run(self, handles: Sequence[Any], schedule: Sequence[int]) -> list[float]:
        """Run on the author's device, in made-up time."""
        self._profiler.run(handles, schedule)
        for _ in schedule:
            self._pass(CALL_S, CALL_J)
        return [CALL_S] * len(schedule)

    def read_energy(self) -> Reading:
        """Read the author's counter, and return what a broken one would."""
        self._profiler.read_energy()  # type: ignore[attr-defined]
        return self._spoil(self._clock_s, self._shown_j)

    def close(self) -> None:
        """The author's device stays open."""

    def host(self, host: Host) -> Host:
        """Return a machine on which this time passes."""
        return replace(host, clock=lambda: self._clock_s, sleep=self._sleep)

    def _sleep(self, seconds: float) -> None:
        self._pass(seconds, IDLE_W * seconds)

    def _pass(self, seconds: float, joules: float) -> None:
        end_s = self._clock_s + seconds
        if (ticks := int(end_s / TICK_S + 1e-9)) > self._ticks:
            share = (ticks * TICK_S - self._clock_s) / seconds
            self._ticks, self._shown_j = ticks, self._joules + share * joules
        self._clock_s, self._joules = end_s, self._joules + joules
