"""Tasks: what a candidate is trained to do. Found by name in the entry points `gpsearch.tasks`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from gpsearch.candidate import Architecture, Training
from gpsearch.errors import UserError, line_of
from gpsearch.profiling import from_anywhere
from gpsearch.schedule import Schedule

Split = Literal["train", "dev", "test"]
"""Training; every decision of a search; the last word on its front."""

TAKEN = (
    "trial", "state", "p:*", "latency_*", "energy_*", "power_*", "peak_memory_*", "flops_*",
    "params", "params_nonzero", "weight_bytes", "on_front", "candidate", "baseline", "feasible",
    "violation", "reason", "flags", "train_s", "metric", "metric_unit", "test_*", "*_fewer",
)  # fmt: skip
"""The columns of a study's tables, which would overwrite a task's metric of such a name."""


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
        fraction says ``unit = ""``. `TAKEN` has the names that no metric can have.
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


def build(task: Task, architecture: Architecture) -> nn.Module:
    """Return a task's fresh model of this shape.

    Raises:
        UserError: The task cannot build it.
    """
    with telling(task.name, "cannot build a network"):
        model: Any = task.build(architecture)
    if not isinstance(model, nn.Module):
        raise UserError(f"{_method(task, 'build')} should return a torch.nn.Module, not {model!r}")
    return model


def error(task: Task, metrics: Mapping[str, float]) -> float:
    """Return what is minimised (see `Task.evaluate`)."""
    return float(metrics.get("error", metrics[task.metric]))


def metrics(task: Task, model: nn.Module, split: Split) -> dict[str, float]:
    """Return a model's metrics on a split, as files can hold them.

    Raises:
        UserError: They are not what `Task.evaluate` should return.
    """
    found: Any = task.evaluate(model, split)
    wish = f"{_method(task, 'evaluate')} should return a dict with a number for {task.metric!r}"
    if not isinstance(found, Mapping):
        raise UserError(f"{wish}, not a {type(found).__name__}")
    if task.metric not in found:
        raise UserError(f"{wish}, not for {', '.join(map(repr, found)) or 'nothing'} alone")
    _refuse_taken(task, found)
    try:
        return {name: float(value) for name, value in found.items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"{wish}, and nothing but single numbers: {line_of(error)}") from error


def scores(task: Task, model: nn.Module, split: Split = "dev") -> dict[str, float]:
    """Return a model's metrics on a split, the error among them."""
    found = metrics(task, model, split)
    return found | {"error": error(task, found)}


def unit(task: Task) -> str:
    """Return "%" where a task's metric is a fraction, and "" where it is a score of its own."""
    return str(getattr(task, "unit", "%"))


def is_fraction(error: float, metric: float, unit: str) -> bool:
    """Say whether an error is a fraction: its metric is one, or it is made of the metric."""
    return unit == "%" or error != metric


def score_texts(metrics: Mapping[str, float], task: Task) -> dict[str, str]:
    """Return a task's metrics for people: "31.20%", or "0.450" where one is no fraction.

    Beside a score that an error is made of, such as CIDEr-D, the others are fractions.
    """
    others = is_fraction(error(task, metrics), metrics[task.metric], unit(task))
    own = task.metric if unit(task) != "%" else None
    plain = {name for name in metrics if not others or (own and name.startswith(own))}
    return {n: f"{value:.3f}" if n in plain else f"{value:.2%}" for n, value in metrics.items()}


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
        name: A name of `installed`; or ``module:Class``, importable from the current folder; or
            ``path/to/file.py:Class``, which may import what lies beside it.
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
    _refuse_taken(task, [task.metric])
    with telling(name, "gives no example"):
        example = task.example()
    if not isinstance(example, tuple):
        kind = type(example).__name__
        raise UserError(f"{_method(task, 'example')} should return a tuple, (x,), not a {kind}")


def _method(task: Any, name: str) -> str:
    """Name a method of a task where a user finds it."""
    return f"task {task.name!r}: {type(task).__name__}.{name}"


def _refuse_taken(task: Task, names: Iterable[str]) -> None:
    """Refuse metrics that would share a column of ``trials.csv`` with something else.

    Raises:
        UserError: There is one, or a name that is no text.
    """
    for name in names:
        if not isinstance(name, str) or any(fnmatchcase(name, one) for one in TAKEN):
            raise UserError(
                f"task {task.name!r}: {type(task).__name__} calls a metric {name!r}; choose a name "
                f"that is no other column of trials.csv, none of {', '.join(TAKEN)}"
            )


def _kind(name: str) -> Any:
    """Return a task's class."""
    entries = {entry.name: entry for entry in entry_points(group="gpsearch.tasks")}
    module, colon, kind = from_anywhere(name).rpartition(":")
    if name not in entries and not colon:
        known = ", ".join(sorted(entries)) or "none"
        raise UserError(
            f"no task called {name!r}; installed: {known} (or give module:Class or file.py:Class)"
        )
    with telling(name, "cannot be loaded"):
        return getattr(_module(name, module), kind) if colon else entries[name].load()


def _module(name: str, module: str) -> ModuleType:
    """Import a task's module, by its own name or by its file's.

    A file is imported as the module that it is in its folder, so that models which were pickled
    are of the same classes whenever it is loaded.

    Raises:
        UserError: It is not there, or another module has its name.
    """
    file = Path(module) if module.endswith(".py") else None
    if file and not file.is_file():
        raise UserError(f"task {name!r}: there is no file {file}; give its path from this folder")
    folder, module = (str(file.parent), file.stem) if file else ("", module)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python file` and `python -m` have it
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if file or not error.name or not f"{module}.".startswith(f"{error.name}."):
            raise  # it is there, and imports what is not
        raise UserError(
            f"task {name!r} cannot be loaded: {line_of(error)}; call from the folder where that "
            "lies, or give its file: path/to/file.py:Class"
        ) from error
    if file and getattr(found, "__file__", None) != str(file):
        raise UserError(f"task {name!r}: Python has another module {module}; rename {file.name}")
    return found


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
