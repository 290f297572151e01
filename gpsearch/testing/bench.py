"""What a check works with: the profiler, models for it to run, and the times it says they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gpsearch.cell import HLSTM
from gpsearch.profiling import DeviceFacts, DeviceProfiler, Host, facts_of
from gpsearch.profiling.device import CAPABILITIES

Workload = tuple[nn.Module, tuple[Tensor, ...]]
"""A model and the arguments of one call."""

FEATURES, CLASSES = 8, 5


class Sequences(nn.Module):
    """Tells the class of a sequence ``[B, T, 8]``: an LSTM or H-LSTM, and an affine map."""

    def __init__(self, hidden: int, gates: bool) -> None:
        super().__init__()
        self.layers: nn.Module = nn.LSTM(FEATURES, hidden, batch_first=True)
        if gates:
            self.layers = HLSTM(FEATURES, hidden, batch_first=True, gate_hidden=(hidden,))
        self.output = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores ``[B, 5]``."""
        scores: Tensor = self.output(self.layers(x)[0][:, -1])
        return scores


def workload(
    steps: int = 10, hidden: int = 32, batch: int = 1, seed: int = 0, gates: bool = False
) -> Workload:
    """Return a model and an example; the same arguments give the same weights and numbers.

    An LSTM, and an H-LSTM if it has ``gates``: what is timed should start in one stroke, so that
    the time of its steps is the device's and not that of the host's loop.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Sequences(hidden, gates).eval(), (torch.randn(batch, steps, FEATURES),)


@dataclass
class Bench:
    """One profiler under examination."""

    profiler: DeviceProfiler
    host: Host = field(default_factory=Host)
    workload: Callable[..., Workload] = workload
    """Called as `workload` is; for a device that cannot run its models."""

    @cached_property
    def facts(self) -> DeviceFacts:
        """What the profiler says of its device."""
        return self.profiler.probe()

    @cached_property
    def lacking(self) -> dict[str, str]:
        """Which capabilities the profiler does not declare, and why not."""
        unavailable = dict(facts_of(self.profiler).unavailable)
        if "latency_s" in unavailable:  # it runs nothing at all
            return dict.fromkeys(CAPABILITIES, unavailable["latency_s"]) | unavailable
        return unavailable

    def loaded(self, **sizes: int) -> Any:
        """Return the handle of a workload of these sizes."""
        return self.profiler.load(*self.workload(**sizes))

    def best(self, handles: Sequence[Any], rounds: int) -> list[float]:
        """Return the least seconds of each handle's calls, one after the other in turn.

        The least, since on a busy machine most calls may be interrupted.
        """
        one_round = list(range(len(handles)))
        self.profiler.run(handles, one_round)  # the first call may compile
        seconds = self.profiler.run(handles, one_round * rounds)
        return [min(seconds[i :: len(handles)]) for i in one_round]
