"""Search spaces: TOML files that say which candidates there are, and which are the baselines.

Every key of a candidate's four tables may stand in a space, and is one of

    layers = 2                                            fixed
    activation = ["relu", "tanh"]                         one of these
    hidden_size = { low = 32, high = 160, step = 8 }      a range; also log = true, default = 128
    gate_width = { low = 8, high = 64, step = 8, snap = "device" }   a range; latency steps' ends

and what is absent keeps the default of its record. A key of [schedule] holds for every schedule
that has it (or for those named by only = ["gp", "gmp"]), one of [schedule.gp] for gp alone. Keys
that mean nothing for a candidate - the width of hidden layers where there are none - are not
suggested, so that a model-based sampler does not learn from noise. Where a width snaps, the edges
of the device's steps stand in a table [snapped], which a study writes into its own copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpsearch.candidate import Architecture, Candidate, Deployment, Training
from gpsearch.errors import UserError
from gpsearch.files import slug
from gpsearch.space.file import SpaceFile, built_in, of_schedule
from gpsearch.space.values import Choice, Fixed, Keys, Parameter, Range, Trial

__all__ = ["Choice", "Fixed", "Parameter", "Range", "Space", "Trial", "built_in"]

OF_HIDDEN_LAYERS = {"gate_width", "activation", "gate_direct", "gate_norm", "gate_dropout"}
"""Keys that only mean something where the gates have hidden layers."""


@dataclass(frozen=True)
class Space:
    """A set of candidates; make one with `Space.read`."""

    where: str
    """The file, for messages."""
    text: str
    """The file's content."""
    parameters: Mapping[Keys, Parameter]
    """What every key may be."""
    overrides: Mapping[str, Mapping[str, Any]]
    """What the baselines have other than the parameters' defaults, by the parameters' names."""
    rows: Mapping[str, Mapping[str, Any]]
    """The same for the rows of the paper's comparison ([rows.NAME]), which a search ignores."""

    @classmethod
    def read(cls, name_or_path: str) -> Space:
        """Read a space: a built-in one by its name, or any by its path, which ends in .toml.

        Raises:
            UserError: There is no such space, or it has a mistake: names file and line.
        """
        return cls._of(SpaceFile.read(name_or_path))

    @classmethod
    def _of(cls, file: SpaceFile) -> Space:
        parameters = file.parameters()
        baselines, rows = file.baselines(parameters), file.overrides("rows", parameters)
        return cls(file.where, file.text, parameters, baselines, rows)

    @property
    def unsnapped(self) -> dict[str, tuple[int, int, int]]:
        """Low, high and step of the widths that snap to steps which are not known yet."""
        ranges = {one.key: one.values for one in self.parameters.values()}
        return {
            key: (one.low, one.high, one.step)
            for key, one in ranges.items()
            if isinstance(one, Range) and one.snap
        }

    def with_edges(self, edges: Mapping[str, Sequence[int]], where: str) -> Space:
        """Return the space with the right edges of a device's steps written into its text.

        Args:
            edges: By the width's key.
            where: Whose steps they are, for the comment beside them.
        """
        rows = "".join(f"{key} = {list(widths)}\n" for key, widths in edges.items())
        comment = " ".join(f"Right edges of the latency steps {where}".split())
        text = f"{self.text.rstrip()}\n\n[snapped]\n# {comment}\n{rows}"
        return self._of(SpaceFile.parse(self.where, text))

    def override(self, *, epochs: int) -> Space:
        """Return the space with a fixed number of epochs for every candidate, baselines too.

        Raises:
            UserError: ``epochs`` is below 1.
        """
        if epochs < 1:
            raise UserError(f"--epochs: {epochs} should be 1 or more")
        fixed = Parameter(("training", "epochs"), Fixed(epochs))
        kept = [
            {
                name: {key: value for key, value in changes.items() if key != fixed.name}
                for name, changes in table.items()
            }
            for table in (self.overrides, self.rows)
        ]
        parameters = {**self.parameters, fixed.keys: fixed}
        return replace(self, parameters=parameters, overrides=kept[0], rows=kept[1])

    def suggest(self, trial: Trial) -> Candidate:
        """Build the candidate that a trial proposes, asking it for nothing that has no meaning."""
        tables = {
            "architecture": self._architecture(trial),
            "schedule": self._schedule(trial),
            "training": self._record(trial, "training", Training),
            "deployment": self._record(trial, "deployment", Deployment),
        }
        return Candidate.from_dict(tables, self.where)

    def candidate(self, params: Mapping[str, Any]) -> Candidate:
        """Build the candidate with these Optuna parameters; what is absent takes its default."""
        return self.suggest(_Chosen({**self._defaults(), **params}))

    def baselines(self) -> dict[str, dict[str, Any]]:
        """Return each baseline's Optuna parameters; the first one is what all are compared with."""
        found = {}
        for name, rows in self.overrides.items():
            trial = _Chosen({**self._defaults(), **rows})
            self.suggest(trial)
            found[name] = trial.params
        return found

    def defaults(self, chosen: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the Optuna parameters of the candidate that has every default, but for some."""
        trial = _Chosen({**self._defaults(), **(chosen or {})})
        self.suggest(trial)
        return trial.params

    def baseline_candidates(self) -> dict[str, Candidate]:
        """Return the baselines."""
        return {name: self.candidate(rows) for name, rows in self.overrides.items()}

    def row_candidates(self) -> dict[str, Candidate]:
        """Return the rows of the paper's comparison; the others are compared with the first.

        Raises:
            UserError: The space has none, or one whose name is none for a folder.
        """
        if not self.rows:
            raise UserError(f"{self.where}: has no [rows.NAME]; `gpsearch reproduce` needs them")
        for name in self.rows:
            if slug(name) != name or not name.strip("."):
                raise UserError(f"{self.where}: [rows.{name!r}] is no name for a folder")
        return {name: self.candidate(changes) for name, changes in self.rows.items()}

    def _defaults(self) -> dict[str, Any]:
        return {one.name: one.values.default for one in self.parameters.values()}

    def _architecture(self, trial: Trial) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for field in dataclasses.fields(Architecture):
            so_far = Architecture(**rows)
            if field.name in OF_HIDDEN_LAYERS and so_far.gate_depth == 0:
                continue
            if field.name == "merge" and not so_far.bidirectional:
                continue
            rows |= self._value(trial, "architecture", field.name)
        return rows

    def _schedule(self, trial: Trial) -> dict[str, Any]:
        rows = {"name": "dense"} | self._value(trial, "schedule", "name")
        for one in of_schedule(self.parameters, rows["name"]):
            rows[one.key] = one.values.suggest(trial, one.name)
        return rows

    def _record(self, trial: Trial, table: str, kind: type[Any]) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for field in dataclasses.fields(kind):
            rows |= self._value(trial, table, field.name)
        return rows

    def _value(self, trial: Trial, table: str, key: str) -> dict[str, Any]:
        one = self.parameters.get((table, key))
        return {} if one is None else {key: one.values.suggest(trial, one.name)}


class _Chosen:
    """A trial that proposes what it is told, and remembers what it was asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.params: dict[str, Any] = {}

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        return int(self._value(name))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        return float(self._value(name))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._value(name)

    def _value(self, name: str) -> Any:
        self.params[name] = self.values[name]
        return self.params[name]
