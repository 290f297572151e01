"""Tasks: what a candidate is trained to do. Found by name in the entry points `gpsearch.tasks`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from gpsearch.candidate import Architecture, Training
from gpsearch.errors import UserError, line_of
from gpsearch.schedule import Schedule

Split = Literal["train", "dev", "test"]
"""Training; every decision of a search; the last word on its front."""


@runtime_checkable
class Task(Protocol):
    """What the search needs of a task; `gpsearch.tasks.speech` is the model to copy.

    It may also have a ``digest``, by which other data is noticed: see `digest_of`; where what it is
    made of changes, ``older_digests`` keeps the folders that began with another.
    """

    name: str
    metric: str
    """What the tables show, such as "wer" or "bleu"; see `evaluate`."""
    notes: tuple[str, ...]
    """What was decided for the user while loading the data, to be told at the start."""

    def build(self, architecture: Architecture) -> nn.Module:
        """Return a fresh model of this shape, initialised from torch's global generator."""

    def prunable(self, name: str) -> bool:
        """Say of a parameter's dotted name whether grow-and-prune may touch it."""

    def batches(self, training: Training, epoch: int, seed: int) -> Iterable[Any]:
        """Yield one epoch of training batches; the same (epoch, seed) gives the same batches."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the scalar loss of one batch."""

    def evaluate(self, model: nn.Module, split: Split = "dev") -> dict[str, float]:
        """Return the metrics on ``split`` ("dev" or "test"), `metric` among them, as fractions.

        What is minimised is the metric; or, where higher is better, "error", which then has to be
        among them as 1 - metric, or as what else falls towards 0. A task whose metric is no
        fraction says ``unit = ""``.
        """

    def example(self) -> tuple[Tensor, ...]:
        """Return the arguments of one inference as a user has it (batch 1), fixed for all time."""


_METHODS = ("build", "prunable", "batches", "loss", "evaluate", "example")


@runtime_checkable
class Embedding(Protocol):
    """A task whose models have embeddings, which a schedule may prune or leave alone."""

    def embeds(self, name: str) -> bool:
        """Say of a parameter's dotted name whether it is an embedding or an output layer."""


@runtime_checkable
class Showing(Protocol):
    """A task that lets a reader judge what a model does."""

    def show(self, model: nn.Module, split: Split = "dev", n: int = 5) -> list[str]:
        """Return ``n`` examples of a split, each as some lines: what is read, wanted, given."""


def prunable(task: Task, schedule: Schedule) -> Callable[[str], bool]:
    """Return what says of a parameter's dotted name whether this schedule may touch it."""
    if schedule.embeddings and isinstance(task, Embedding):
        return lambda name: task.prunable(name) or task.embeds(name)
    return task.prunable


def error(task: Task, metrics: Mapping[str, float]) -> float:
    """Return what is minimised (see `Task.evaluate`)."""
    return float(metrics.get("error", metrics[task.metric]))


def metrics(task: Task, model: nn.Module, split: Split) -> dict[str, float]:
    """Return a model's metrics on a split, as files can hold them."""
    return {name: float(value) for name, value in task.evaluate(model, split).items()}


def scores(task: Task, model: nn.Module, split: Split = "dev") -> dict[str, float]:
    """Return a model's metrics on a split, the error among them."""
    found = metrics(task, model, split)
    return found | {"error": error(task, found)}


def unit(task: Task) -> str:
    """Return "%" where a task's metric is a fraction, and "" where it is a score of its own."""
    return str(getattr(task, "unit", "%"))


def score_text(name: str, value: float, task: Task) -> str:
    """Return one of a task's metrics for people: "31.20%", or "0.450" where it is no fraction."""
    own = name.startswith(task.metric) and unit(task) != "%"
    return f"{value:.3f}" if own else f"{value:.2%}"


def signatures(task: Task) -> dict[str, str]:
    """Return how a task's metrics are computed, by metric, as far as it tells."""
    return dict(getattr(task, "signatures", {}))


def digest(task: Task) -> str:
    """Return what tells a task's data from other data: its attribute ``digest``, or nothing."""
    return str(getattr(task, "digest", ""))


def known_digests(task: Task) -> set[str]:
    """Return a task's `digest`, and those that older versions told of the same data."""
    return {digest(task), *getattr(task, "older_digests", ())}


def digest_of(parts: Iterable[object]) -> str:
    """Return a digest of data, part by part, by what each is when printed."""
    found = hashlib.sha256()
    for part in parts:
        found.update(repr(part).encode() + b"\n")
    return found.hexdigest()[:16]


def default_space(name: str) -> str:
    """Return the search space that goes with a task: what its class has as ``space``.

    Raises:
        UserError: There is no such task, or it cannot be imported.
    """
    return str(getattr(_kind(name), "space", "hlstm"))


def space_of(name: str, scale: str) -> str:
    """Return the search space of a task at a scale: "small", its own, or "paper".

    Raises:
        UserError: There is no such task or scale, or the task has no space at the paper's size.
    """
    if scale not in ("small", "paper"):
        raise UserError(f"--scale {scale!r} is none of small, paper")
    found = default_space(name) if scale == "small" else getattr(_kind(name), "paper_space", None)
    if found is None:
        raise UserError(f"task {name!r} names no space at the paper's size; give one by --space")
    return str(found)


def installed() -> dict[str, str]:
    """Return the installed tasks' names, each with what its class says of itself."""
    found = {}
    for entry in sorted(entry_points(group="gpsearch.tasks")):
        try:
            found[entry.name] = (entry.load().__doc__ or "").strip().partition("\n")[0]
        except (Exception, SystemExit) as error:  # a broken plug-in must not hide the others
            found[entry.name] = f"unusable: {type(error).__name__}: {error}"
    return found


def find(name: str, data: Path | None = None) -> Task:
    """Load a task, on its own data or on ``data``.

    Args:
        name: A name of `installed`, or ``module:Class``, importable from the current folder.
        data: Where the user's data is; None takes the task's own.

    Raises:
        UserError: There is no such task, it cannot be imported, or lacks what a `Task` has, or its
            data is unusable.
    """
    with telling(name, "cannot be loaded"):
        task: Task = _kind(name)(data)
        _check_task(name, task)
    return task


def _check_task(name: str, task: Any) -> None:
    """Refuse a stranger's class that is no task, before all trainings.

    Raises:
        UserError: Says what it lacks.
    """
    lacking = [one for one in ("name", "metric", "notes") if not hasattr(task, one)]
    lacking += [one for one in _METHODS if not callable(getattr(task, one, None))]
    if lacking:
        raise UserError(f"task {name!r} lacks {', '.join(lacking)} (see gpsearch.tasks.Task)")
    notes = task.notes
    if not isinstance(notes, tuple | list) or not all(isinstance(one, str) for one in notes):
        raise UserError(f"task {name!r}: notes should be a tuple of lines, not {notes!r}")


def _kind(name: str) -> Any:
    """Return a task's class."""
    entries = {entry.name: entry for entry in entry_points(group="gpsearch.tasks")}
    module, colon, kind = name.partition(":")
    if name not in entries and not colon:
        known = ", ".join(sorted(entries)) or "none"
        raise UserError(f"no task called {name!r}; installed: {known} (or give module:Class)")
    if colon and "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` has it
    with telling(name, "cannot be loaded"):
        return getattr(import_module(module), kind) if colon else entries[name].load()


@contextmanager
def telling(name: str, what: str) -> Iterator[None]:
    """Say in one line of whatever a stranger's task raises which task it was, and what it did.

    Raises:
        UserError: In place of it.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"task {name!r} {what}: {line_of(error)}") from error
