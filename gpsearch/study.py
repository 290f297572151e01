"""A study's results folder: settings, Optuna's storage, one folder a trial, and a lock.

A trial enters the storage only when it is finished, in one transaction, with its row of
``trials.csv`` as a user attribute. Until then it is ``trials/N``: its proposal and its checkpoint.
A kill at any moment therefore loses no finished trial, and the unfinished one goes on.
"""

from __future__ import annotations

import platform
import shlex
import statistics
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from gpsearch import learned
from gpsearch.candidate import Candidate
from gpsearch.errors import UserError
from gpsearch.files import (
    ENVIRONMENT,
    locked,
    make_folder,
    read_json,
    read_toml,
    refuse_others,
    refuse_strangers,
    write_json,
    write_text,
)
from gpsearch.objectives import (
    SLOWDOWN,
    Constraint,
    Objective,
    cost,
    first_reference_s,
    slowdown,
)
from gpsearch.profiling import DeviceFacts
from gpsearch.sampling import Proposal, refuse_other_choices
from gpsearch.settings import Settings
from gpsearch.space import Space
from gpsearch.staircase import snapped

if TYPE_CHECKING:
    import optuna

Row = dict[str, Any]
LIBRARIES = ("gpsearch", "torch", "optuna", "numpy", "pandas", "fvcore")


class Study:
    """The results folder of one study.

    Args:
        folder: An existing results folder.

    Raises:
        UserError: It is no results folder, or a file of it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.toml").exists():
            raise UserError(f"{folder}: no results folder (it has no config.toml)")
        if (folder / "rows.csv").exists() or "scale" in read_toml(folder / "config.toml"):
            table = folder / "table.md"
            raise UserError(f"{folder}: no search, but what `gpsearch reproduce` left; see {table}")
        self.settings = Settings.of(Settings.read(folder / "config.toml")[0])

    @classmethod
    def create(cls, folder: Path, settings: Settings) -> Study:
        """Start a study in a new folder.

        Raises:
            UserError: The folder holds a study, a reproduction or a training, another process works
                there, or it cannot be written.
        """
        refuse_others(folder, "study")
        if any((folder / name).exists() for name in ("trials/0", "study.db")):
            raise UserError(
                f"{folder}: holds a study already; continue it with `{how_to_resume(folder)}`, "
                "or choose another --out"
            )
        refuse_strangers(folder)
        _nameable(folder.resolve())
        space, config = snapped(Space.read(settings.space), settings), settings.to_toml()
        make_folder(folder / "trials")
        with locked(folder):  # one that has just begun has no trial to be known by
            write_json(folder / ENVIRONMENT, environment())
            write_text(folder / "space.toml", space.text)
            write_text(folder / "config.toml", config)
            (folder / learned.FILE).unlink(missing_ok=True)  # of a start that came to nothing
        return cls(folder)

    @property
    def space(self) -> Space:
        """The space as it was when the study began."""
        space = Space.read(str(self.folder / "space.toml"))
        return space.override(epochs=self.settings.epochs) if self.settings.epochs else space

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes out; see `gpsearch.files.locked`."""
        return locked(self.folder)

    def trial_folder(self, number: int) -> Path:
        """Return the folder of a trial."""
        return self.folder / "trials" / str(number)

    def storage(self) -> optuna.Study:
        """Return Optuna's study, opened once; it can be looked at with optuna-dashboard.

        Raises:
            UserError: study.db is damaged.
        """
        return self._opened

    @cached_property
    def _opened(self) -> optuna.Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        name, storage = "gpsearch", f"sqlite:///{_nameable(self._path.resolve())}"
        try:
            try:  # writes nothing: others may read a folder, too
                return optuna.load_study(study_name=name, storage=storage)
            except KeyError:  # a new one
                goals = self.settings.goals
                study = optuna.create_study(
                    study_name=name, storage=storage, directions=["minimize"] * len(goals)
                )
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    study.set_metric_names([goal.column for goal in goals])
                return study
        except Exception as error:
            raise UserError(
                f"{self._path}: cannot be opened ({type(error).__name__}); "
                "restore it from a backup, or start again in another folder"
            ) from error

    @property
    def _path(self) -> Path:
        return self.folder / "study.db"

    def refuse_changes(self) -> None:
        """Refuse to go on where finished trials and new ones would not compare.

        Raises:
            UserError: config.toml has other objectives by now, or another way to their energy, or
                space.toml other choices.
        """
        if not (finished := self.finished()):
            return
        columns, before = [one.column for one in self.settings.goals], self.storage().metric_names
        if before and before != columns:
            raise UserError(
                f"{self.folder / 'config.toml'}: the finished trials were judged by "
                f"{', '.join(before)}, not by {', '.join(columns)}; bring those objectives back, "
                "or begin in another folder"
            )
        watts = self.settings.estimate_w
        now = f"estimated at {watts:g} W" if watts else "measured"
        others = {_energy_by(row) for row in self.rows()} - {None, now}
        if others and "energy_j" in self.settings.columns:
            raise UserError(
                f"{self.folder / 'config.toml'}: the finished trials' energy was {others.pop()}, "
                f"and would now be {now}; bring estimate_energy back, or begin in another folder"
            )
        refuse_other_choices(finished, self.space)

    def finished(self) -> list[optuna.trial.FrozenTrial]:
        """Return the finished trials - complete, gated and failed ones - in order.

        Raises:
            UserError: study.db is damaged, or lost.
        """
        trials = self.storage().trials if self._path.exists() else []  # to read makes no storage
        finished = [trial for trial in trials if trial.state.is_finished()]
        if not finished and self._has_finished():
            raise UserError(
                f"{self._path}: holds no trial, though some are finished; "
                "restore it from a backup, or start again in another folder"
            )
        return finished

    def _has_finished(self) -> bool:
        """Say whether the other files tell of a finished trial.

        A first trial that is killed leaves all that a finished one does, but its row.
        """
        table = self.folder / "trials.csv"
        lines = table.read_bytes().splitlines() if table.exists() else []
        return len(lines) > 1 or self.trial_folder(1).exists()

    def rows(self) -> list[Row]:
        """Return the finished trials' rows, as in ``trials.csv``."""
        return [trial.user_attrs["row"] for trial in self.finished()]

    def reference_s(self, fingerprint: Mapping[str, str]) -> float | None:
        """Return what the reference model usually took on the device of this fingerprint, in s."""

        def is_of_it(row: Row) -> bool:
            path = self.trial_folder(row["trial"]) / "reading.json"
            own = read_json(path, "fingerprint")["fingerprint"] if path.exists() else None
            return bool(own == dict(fingerprint))

        rows = [row for row in self.rows() if row.get("latency_reference_s")]
        taken = [row["latency_reference_s"] for row in rows if is_of_it(row)]
        return statistics.median(taken) if taken else None

    def slowdown(self, costs: Row) -> Row:
        """Return a reading's `SLOWDOWN` as a column, against the study's first reading.

        There is none in a study that began without: its trials go on being judged alike.
        """
        before = [row for row in self.rows() if row["state"] == "complete"]
        if any(SLOWDOWN not in row for row in before):
            return {}
        return {SLOWDOWN: slowdown(costs, first_reference_s([*before, costs]))}

    def finals(self) -> dict[int, Row]:
        """Return what was measured of the front's members at the end, by trial."""
        found = sorted((self.folder / "trials").glob("*/final.json"))
        numbered = [path for path in found if path.parent.name.isdecimal()]  # no "1 (copy)"
        return {int(path.parent.name): read_json(path) for path in numbered}

    def save_final(self, number: int, row: Row) -> None:
        """Keep what was measured of a member of the final front."""
        write_json(self.trial_folder(number) / "final.json", row)

    def save_proposal(self, number: int, proposal: Proposal) -> None:
        """Keep what the trial in hand is, so that it goes on after a kill."""
        folder = self.trial_folder(number)
        write_text(folder / "candidate.toml", proposal.candidate.to_toml())
        write_json(folder / "proposal.json", proposal.params)

    def candidate(self, number: int) -> Candidate:
        """Return a trial's candidate."""
        return Candidate.read(self.trial_folder(number) / "candidate.toml")

    def saved_proposal(self, number: int) -> dict[str, Any] | None:
        """Return the parameters of the trial in hand, if it had begun."""
        path = self.trial_folder(number) / "proposal.json"
        return read_json(path) if path.exists() else None

    def saved_fingerprint(self) -> dict[str, str] | None:
        """Return the fingerprint of the device that the study was last measured on."""
        path = self.folder / "device.json"
        if not path.exists():
            return None
        fingerprint: dict[str, str] = read_json(path, "fingerprint")["fingerprint"]
        return fingerprint

    def save_facts(self, facts: DeviceFacts) -> None:
        """Write device.json."""
        write_json(self.folder / "device.json", facts_row(facts))

    def add(
        self,
        proposal: Proposal,
        row: Row,
        goals: tuple[Objective, ...],
        limits: tuple[Constraint, ...],
    ) -> None:
        """Enter a finished trial, in one transaction.

        Raises:
            OSError: study.db cannot be written.
        """
        import optuna

        states = optuna.trial.TrialState
        state = {"complete": states.COMPLETE, "gated": states.PRUNED, "failed": states.FAIL}
        complete = row["state"] == "complete"
        # What a gated trial leaves unmeasured is not held against it.
        known = [limit for limit in limits if complete or limit.column in row]
        violations = {limit.text: min(limit.violation(row), 1e9) for limit in known}
        judged = [value for goal in goals if (value := cost(row, goal)) is not None]
        trial = optuna.trial.create_trial(
            state=state[row["state"]],
            values=judged if complete else None,
            params=proposal.params,
            distributions=proposal.distributions,
            # optuna-dashboard 0.21 reads constraints from the user attributes only.
            user_attrs={"row": row, "constraints": list(violations.values())},
            system_attrs=proposal.system_attrs,
            constraints=violations if row["state"] != "failed" else None,
        )
        try:
            self.storage().add_trial(trial)
        except optuna.exceptions.StorageInternalError as error:
            raise OSError(f"{self._path}: cannot be written (is the disk full?)") from error

    def sweep(self, keep: set[int]) -> None:
        """Delete checkpoints of finished trials, and the models of trials not in ``keep``."""
        for number in range(len(self.finished())):
            folder = self.trial_folder(number)
            for path in [folder / "checkpoint.pt", *folder.glob(".*.tmp*")]:
                path.unlink(missing_ok=True)
            if number not in keep:
                (folder / "model.pt").unlink(missing_ok=True)

    def extend(self, budget: int | None, timeout: str | None = None) -> None:
        """Give a study that goes on another budget or time limit (none, unless given again).

        Raises:
            UserError: The new budget is below what is finished already.
        """
        done = len(self.finished())
        if budget is not None and budget < done:
            raise UserError(f"--budget {budget}: {done} trials are finished already")
        changes = {"budget": budget or self.settings.budget, "timeout": timeout or ""}
        self.settings = Settings.of({**vars(self.settings), **changes})
        write_text(self.folder / "config.toml", self.settings.to_toml())


def how_to_resume(folder: Path) -> str:
    """Return the command by which a user goes on with a study."""
    return shlex.join(["gpsearch", "resume", str(folder)])


def _nameable(path: Path) -> Path:
    """Return a path that can stand in the address of a database.

    Raises:
        UserError: It cannot.
    """
    if set("?{}") & set(str(path)) or unquote(str(path)) != str(path):
        raise UserError(
            f"{path}: no study can lie under a name with ?, {{, }} or %xx; give another"
        )
    return path


def _energy_by(row: Row) -> str | None:
    """Return how a trial's energy was got; None where it has none."""
    if row.get("energy_j") is None:
        return None
    if row.get("energy_kind") != "estimated":
        return "measured"
    return f"estimated at {row['energy_j'] / row['latency_s']:g} W"


def facts_row(facts: DeviceFacts) -> dict[str, Any]:
    """Return what ``device.json`` holds."""
    rows = {**vars(facts), "fingerprint": dict(facts.fingerprint)}
    return {**rows, "unavailable": dict(facts.unavailable)}


def environment() -> dict[str, Any]:
    """Return with what results are made, for environment.json."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in LIBRARIES},
        "flops": "1 multiply-add = 2 FLOPs, matrix products only",
    }
