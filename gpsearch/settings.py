"""What a study is asked to do: the flags of ``gpsearch run`` as one record, kept as config.toml."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpsearch.candidate import record, refuse_unknown
from gpsearch.errors import UserError
from gpsearch.files import read_toml, toml_literal
from gpsearch.objectives import Constraint, Objective, constraint, estimated, objectives

SAMPLERS = ("tpe", "nsga2", "random")
HIGHEST_SEED = 2**63 - 1
"""TOML's and torch's whole numbers have 64 bits."""


@dataclass(frozen=True)
class Settings:
    """The flags of ``gpsearch run``.

    Raises:
        ValueError: A value is out of its range; names the key.
        UserError: An objective or constraint cannot be understood.
    """

    task: str = "speech"
    """Task, by its name among the installed ones."""
    space: str = "hlstm"
    """Search space: a built-in one's name, or a path to a TOML file. ``gpsearch run`` takes the
    task's own where none is given."""
    device: str = "cpu"
    """Profiler of the target device: a name, or module:Class."""
    budget: int = 20
    """Finished trials in the folder in all, also after a resume; baselines count."""
    objectives: str = "error,latency,flops"
    """What to minimise: error and at least one of the costs, separated by commas."""
    constraint: tuple[str, ...] = ()
    """Upper limits, such as "latency_ms<=5"."""
    data: str = ""
    """The task's data; empty is what the package carries."""
    timeout: str = ""
    """Stop after this long, such as "90m" or "2h"; resumable. Empty never stops."""
    seed: int = 0
    """Of the proposals, the weights, the data order."""
    sampler: str = "tpe"
    """How candidates are proposed: "tpe", "nsga2" or "random"."""
    epochs: int = 0
    """Epochs of every training; 0 leaves them to the space."""
    estimate_energy: float = 0.0
    """Power of the device at work, in W: energy is then not measured but estimated as this times
    the latency, and marked so. 0, the default, estimates nothing."""
    threads: int = 1
    """Threads that train. Networks of this size train fastest on one: two on a busy machine of two
    cores took six times as long. Latency is always measured on one."""

    def __post_init__(self) -> None:
        objectives(self.objectives)
        for text in self.constraint:
            constraint(text)
        parse_seconds(self.timeout)
        for name, least in (("budget", 1), ("seed", 0), ("epochs", 0), ("threads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)} should be {least} or more")
        if self.seed > HIGHEST_SEED:
            raise ValueError(f"seed = {self.seed} should be {HIGHEST_SEED} or less")
        if not 0 <= self.estimate_energy < math.inf:
            raise ValueError(f"estimate-energy = {self.estimate_energy} should be a power in W")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler = {self.sampler!r} is not one of {', '.join(SAMPLERS)}")

    @property
    def goals(self) -> tuple[Objective, ...]:
        """The objectives, parsed."""
        goals = objectives(self.objectives)
        return tuple(map(estimated, goals)) if self.estimate_w else goals

    @property
    def estimate_w(self) -> float | None:
        """The power by which energy is estimated; None if it is measured."""
        return float(self.estimate_energy) or None

    @property
    def limits(self) -> tuple[Constraint, ...]:
        """The constraints, parsed."""
        return tuple(constraint(text) for text in self.constraint)

    @property
    def columns(self) -> set[str]:
        """The columns that objectives and constraints need."""
        return {goal.column for goal in self.goals} | {limit.column for limit in self.limits}

    @property
    def data_path(self) -> Path | None:
        """The task's data, if not the package's."""
        return Path(self.data) if self.data else None

    @property
    def timeout_s(self) -> float:
        """The time limit in seconds; infinite if there is none."""
        return parse_seconds(self.timeout)

    def to_toml(self) -> str:
        """Return the settings as ``config.toml``: a key a flag."""
        rows = dataclasses.asdict(self)
        return "".join(f"{key} = {toml_literal(value)}\n" for key, value in rows.items())

    @classmethod
    def read(cls, path: Path) -> tuple[dict[str, Any], str | None]:
        """Read the keys that a config file sets, and the results folder if it names one.

        Raises:
            UserError: The file is unreadable, or a key or value is wrong.
        """
        rows = read_toml(path)
        refuse_unknown(rows, ["out", *(f.name for f in dataclasses.fields(cls))], f"{path}:")
        out = rows.pop("out", None)
        if not isinstance(out, str | None):
            raise UserError(f"{path}: out = {out!r} should be of type str")
        limits = rows.get("constraint", [])
        if not isinstance(limits, list) or not all(isinstance(limit, str) for limit in limits):
            raise UserError(f'{path}: constraint = {limits!r} should be like ["params<=1e5"]')
        rows["constraint"] = tuple(limits)
        record(cls, rows, f"{path}:")
        return rows, out

    @classmethod
    def of(cls, rows: dict[str, Any]) -> Settings:
        """Build settings from flags.

        Raises:
            UserError: A value is out of its range.
        """
        try:
            return cls(**rows)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"--{error}") from error


def parse_seconds(text: str) -> float:
    """Return the seconds of "45s", "90m" or "2h" (a bare number is seconds); "" is infinite.

    Raises:
        UserError: It has another form, or is not positive.
    """
    if not text:
        return float("inf")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise UserError(f'--timeout: {text!r} should look like "45s", "90m" or "2h"')
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
