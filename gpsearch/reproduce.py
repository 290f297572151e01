"""The rows of the paper's comparison, trained and measured here, row by row and seed by seed.

A row is a candidate that a space names under [rows]; what the others are compared with is its
first. Every (row, seed) is a folder ``rows/NAME/SEED``. It is trained once it has ``model.pt`` and
measured once it has ``row.json``: a kill loses at most an epoch, and whoever deletes ``row.json``
has the network measured again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from gpsearch import learned, profiling, tasks
from gpsearch.candidate import Candidate, record
from gpsearch.compact import compact
from gpsearch.deploy import (
    check_reference,
    columns,
    load_model,
    plain_network,
    read_costs,
    save_model,
)
from gpsearch.errors import UserError
from gpsearch.files import (
    ENVIRONMENT,
    locked,
    make_folder,
    read_json,
    read_toml,
    refuse_others,
    refuse_strangers,
    toml_literal,
    write_json,
    write_text,
)
from gpsearch.kernels.memory import keep_freed_memory
from gpsearch.profiling import Host
from gpsearch.space import Space
from gpsearch.study import Row, environment
from gpsearch.tasks import Task
from gpsearch.train import Epoch, grow_and_prune

CLAIMS = {
    "speech": "19.4x fewer parameters and 37.4 % less latency; another model: WER 12.9 -> 8.7 % "
    "(DeepSpeech2, AN4)",
    "translation": "10.8x fewer parameters and 14.2 % less latency; another model: BLEU 30.02 -> "
    "30.98 (seq2seq, IWSLT14 De-En)",
    "captioning": "38.7x fewer parameters, 45.5x fewer FLOPs, 4.5x less latency; another model: "
    "CIDEr-D +2.8 % (NeuralTalk, MSCOCO)",
}
"""What the abstract says (Dai, Yin, Jha; IEEE TC 2020); no two of its figures are of one model."""


@dataclass(frozen=True)
class Comparison:
    """What is reproduced, as ``config.toml`` keeps it."""

    task: str
    """The task's name."""
    space: str
    """The search space that names the rows."""
    scale: str
    """"small" or "paper"."""
    data: str = ""
    """The task's data; empty is what the package carries."""
    device: str = "cpu"
    """Where latency is measured."""
    seeds: int = 3
    """Trainings of every row."""
    epochs: int = 0
    """Epochs of every training; 0 leaves them to the space."""

    @property
    def data_path(self) -> Path | None:
        """The task's data, if not the package's."""
        return Path(self.data) if self.data else None


@runtime_checkable
class Listener(Protocol):
    """Told what happens."""

    def row_begins(self, name: str, seed: int, candidate: Candidate) -> None:
        """A row's training begins, or goes on."""

    def epoch_ends(self, epoch: Epoch, epochs: int) -> None:
        """It has trained for one more epoch."""

    def row_ends(self, row: Row) -> None:
        """It is trained and measured."""


class Reproduction:
    """One comparison and its folder.

    Args:
        folder: With ``config.toml`` and the space, as `begin` left them.

    Raises:
        UserError: It is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = read_toml(folder / "config.toml")
        self.comparison = record(Comparison, rows, f"{folder / 'config.toml'}:")
        space = Space.read(str(folder / "space.toml"))
        epochs = self.comparison.epochs
        self.candidates = (space.override(epochs=epochs) if epochs else space).row_candidates()

    @classmethod
    def begin(cls, folder: Path, comparison: Comparison) -> Reproduction:
        """Begin in a new folder, or go on in one that was begun with the same words.

        Raises:
            UserError: The folder holds a study, a training or another comparison or cannot be
                written, or the space names no rows.
        """
        refuse_others(folder, "reproduction")
        refuse_strangers(folder)
        space = Space.read(comparison.space)
        space.row_candidates()
        if comparison.space.endswith(".toml"):
            comparison = replace(comparison, space=str(Path(comparison.space).resolve()))
        make_folder(folder)
        with locked(folder):
            if any((folder / name).exists() for name in ("rows", "rows.csv")):
                _refuse_another(folder, comparison, space)
            else:  # what failed before its first row can be begun again, in other words
                write_json(folder / ENVIRONMENT, environment())
                write_text(folder / "space.toml", space.text)
            rows = asdict(comparison).items()
            text = "".join(f"{key} = {toml_literal(value)}\n" for key, value in rows)
            write_text(folder / "config.toml", text)
        return cls(folder)

    def run(self, listener: Listener, only: Sequence[str] = ()) -> Iterator[Row]:
        """Train and measure what is left, a seed of all rows at a time; yield every row as it ends.

        Args:
            listener: Told what happens.
            only: Names of rows; the others are left for later. Empty takes all.

        Raises:
            UserError: A name, the task, its data or the device cannot be used.
            TrainingFailed: A training diverged or ran out of memory.
        """
        unknown = set(only) - self.candidates.keys()
        if unknown:
            known = ", ".join(self.candidates)
            raise UserError(f"--row {sorted(unknown)[0]}: no such row; there are: {known}")
        task = tasks.find(self.comparison.task, self.comparison.data_path)
        with profiling.closing(profiling.find(self.comparison.device)) as device:
            check_reference(device, self._reference(task), task)
        keep_freed_memory()
        with locked(self.folder):
            if Reproduction(self.folder).comparison != self.comparison:
                raise UserError(f"{self.folder}: was begun anew meanwhile; choose another --out")
            learned.keep(self.folder, self.comparison.task, task, self.comparison.data_path)
            for seed in range(self.comparison.seeds):
                for name, candidate in self.candidates.items():
                    if (not only or name in only) and not self._path(name, seed).exists():
                        listener.row_begins(name, seed, candidate)
                        row = self._row(name, seed, task, listener)
                        write_json(self._path(name, seed), row)
                        listener.row_ends(row)
                        yield row

    def rows(self) -> list[Row]:
        """Return what is finished, in the order of the rows and seeds."""
        paths = (self._path(n, s) for n in self.candidates for s in range(self.comparison.seeds))
        keys = "row", "seed", "metric", "metric_unit", "test_error"
        return [read_json(path, *keys) for path in paths if path.exists()]

    def _row(self, name: str, seed: int, task: Task, listener: Listener) -> Row:
        """Train one row, measure it beside the first, and score it on both splits."""
        candidate, folder = self.candidates[name], self._path(name, seed).parent
        epochs = candidate.training.epochs
        write_text(folder / "candidate.toml", candidate.to_toml())
        torch.manual_seed(seed)
        with profiling.closing(profiling.find(self.comparison.device)) as device:
            facts = profiling.facts_of(device)
            if not (folder / "model.pt").exists():
                with Host().sharing() as pause:  # while another study measures here
                    model = grow_and_prune(
                        tasks.build(task, candidate.architecture), task, candidate.schedule,
                        candidate.training, folder=folder, seed=seed, pause=pause,
                        device=facts.torch_device,
                        listener=lambda epoch: listener.epoch_ends(epoch, epochs),
                    )  # fmt: skip
                weights = candidate.deployment.weights
                small = compact(model.cpu(), weights=weights, here=facts.here)
                save_model(small, folder / "model.pt")
            deployed = compact(load_model(folder / "model.pt"), here=facts.here)
            first = next(iter(self.candidates))
            reading = read_costs(
                device, deployed, task, reference=self._reference(task), reference_name=first
            )
        write_json(folder / "reading.json", reading.to_dict())
        scores: dict[str, Any] = {}
        with Host().sharing():
            for split in ("dev", "test"):
                metrics = tasks.scores(task, deployed, split)
                scores |= {f"{split}_{metric}": value for metric, value in metrics.items()}
        for metric, value in scores.items():
            if not math.isfinite(value):
                raise UserError(f"{name}, seed {seed}: {metric} is {value}, which has no mean")
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        about = {"row": name, "seed": seed, "metric": task.metric, "metric_unit": tasks.unit(task)}
        return about | scores | columns(reading) | {"flags": "; ".join(reading.flags)}

    def _reference(self, task: Task) -> torch.nn.Module:
        return plain_network(next(iter(self.candidates.values())), task)

    def _path(self, name: str, seed: int) -> Path:
        return self.folder / "rows" / name / str(seed) / "row.json"


def _refuse_another(folder: Path, comparison: Comparison, space: Space) -> None:
    """Refuse to go on in other words than it was begun with; only seeds may become more or fewer.

    Raises:
        UserError: The words differ, or the space's file has changed since.
    """
    before = asdict(Reproduction(folder).comparison)
    for key, now in asdict(comparison).items():
        if key != "seeds" and now != before[key]:
            then = before[key] or "absent"
            raise UserError(
                f"{folder}: holds another comparison, with --{key} {then} and not "
                f"{now or 'absent'}; choose another --out"
            )
    kept = (folder / "space.toml").read_text(encoding="utf-8")
    if comparison.space.endswith(".toml") and space.text != kept:
        raise UserError(
            f"{folder}: {comparison.space} is no longer as it was then (space.toml there); choose "
            "another --out"
        )
