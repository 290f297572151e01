"""A device whose latencies, joules and clock are known exactly; no test waits for real time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from gpsearch.profiling import API_VERSION, DeviceFacts, Host


class FakeModel(nn.Module):
    """Takes so many seconds and joules a call on a `FakeDevice`."""

    def __init__(self, seconds: float, joules: float = 1.0) -> None:
        super().__init__()
        self.seconds, self.joules = seconds, joules


class FakeDevice:
    """Runs `FakeModel`s on a clock of its own.

    Args:
        slowdown: Factor on the seconds of the n-th call, from 0.
        idle_w: Power while nothing runs.
        tick_s: Period of the energy counter; 0 for one that never moves.
        unavailable: As in `DeviceFacts`.
    """

    api_version = API_VERSION

    def __init__(
        self,
        slowdown: Callable[[int], float] = lambda call: 1.0,
        idle_w: float = 10.0,
        tick_s: float = 0.1,
        unavailable: Mapping[str, str] | None = None,
    ) -> None:
        self.slowdown, self.idle_w, self.tick_s = slowdown, idle_w, tick_s
        self.unavailable = unavailable or {}
        self.clock_s = self.joules = self.shown_j = 0.0
        self.calls = self.ticks = 0

    def probe(self) -> DeviceFacts:
        return DeviceFacts(
            "fake",
            {"processor": "made up"},
            unavailable=self.unavailable,
            latency_method="script",
            energy_method="counter",
            energy_scope="board",
        )

    def load(self, model: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
        return model

    def run(self, handles: Sequence[FakeModel], schedule: Sequence[int]) -> list[float]:
        return [self._call(handles[index]) for index in schedule]

    def read_energy(self) -> tuple[float, float]:
        return self.clock_s, self.shown_j

    def close(self) -> None:
        pass

    def sleep(self, seconds: float) -> None:
        self._pass(seconds, self.idle_w * seconds)

    def host(self, locks: Path) -> Host:
        """Return a machine of this clock, whose load is not known."""
        absent = locks / "absent"
        return Host(lambda: self.clock_s, self.sleep, absent, absent, locks)

    def _call(self, model: FakeModel) -> float:
        seconds = model.seconds * self.slowdown(self.calls)
        self.calls += 1
        self._pass(seconds, model.joules)
        return seconds

    def _pass(self, seconds: float, joules: float) -> None:
        """Let time pass; the counter shows the energy drawn up to its last tick."""
        end_s = self.clock_s + seconds
        while self.tick_s and (self.ticks + 1) * self.tick_s <= end_s:
            self.ticks += 1
            share = (self.ticks * self.tick_s - self.clock_s) / seconds
            self.shown_j = self.joules + share * joules
        self.clock_s, self.joules = end_s, self.joules + joules
