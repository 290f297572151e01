"""Tasks: what a candidate is trained to do. Found by name in the entry points `gpsearch.tasks`."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from gpsearch.candidate import Architecture, Training
from gpsearch.errors import UserError


@runtime_checkable
class Task(Protocol):
    """What the search needs of a task; `gpsearch.tasks.speech` is the model to copy."""

    name: str
    metric: str
    """What `error` is called in the tables, such as "wer"; lower is better."""

    def build(self, architecture: Architecture) -> nn.Module:
        """Return a fresh model of this shape, initialised from torch's global generator."""

    def prunable(self, name: str) -> bool:
        """Say of a parameter's dotted name whether grow-and-prune may touch it."""

    def batches(self, training: Training, epoch: int, seed: int) -> Iterable[Any]:
        """Yield one epoch of training batches; the same (epoch, seed) gives the same batches."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the scalar loss of one batch."""

    def evaluate(self, model: nn.Module, split: str = "dev") -> dict[str, float]:
        """Return the metrics on ``split`` ("dev" or "test"), `metric` among them, as fractions."""

    def example(self) -> tuple[Tensor, ...]:
        """Return the arguments of one inference as a user has it (batch 1), fixed for all time."""


def find(name: str, data: Path | None = None) -> Task:
    """Load the task called ``name``, on its own data or on ``data``.

    Raises:
        UserError: No such task is installed, or its data is unusable.
    """
    installed = {entry.name: entry for entry in entry_points(group="gpsearch.tasks")}
    if name not in installed:
        known = ", ".join(sorted(installed)) or "none"
        raise UserError(f"no task called {name!r}; installed: {known}")
    task: Task = installed[name].load()(data)
    return task
