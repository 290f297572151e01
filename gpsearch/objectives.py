"""What a search minimises and what it must keep below: objectives and constraints, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpsearch.errors import UserError
from gpsearch.pareto import non_dominated


@dataclass(frozen=True)
class Objective:
    """Something to minimise.

    Attributes:
        name: What the user calls it.
        column: Its column in ``trials.csv``.
        label: How an axis is called, without the unit.
        unit: The unit on an axis.
        scale: From the column's SI unit to `unit`.
        kind: The `gpsearch.profiling.Quantity.kind` a value must have to be compared.
    """

    name: str
    column: str
    label: str
    unit: str
    scale: float
    kind: str

    @property
    def timed(self) -> bool:
        """Whether a slow spell of the machine makes it larger; a counter counts what was used."""
        return self.name == "latency" or self.kind == "estimated"

    @property
    def title(self) -> str:
        """The name, and with it what a reader must not take for measured."""
        return f"estimated {self.name}" if self.kind == "estimated" else self.name


SLOWDOWN = "latency_slowdown"
"""The column of `slowdown`; trials without it are judged by what was measured."""

OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("error", "error", "error", "%", 100.0, "measured"),
        Objective("latency", "latency_s", "latency of one inference", "ms", 1e3, "measured"),
        Objective("energy", "energy_j", "energy of one inference", "mJ", 1e3, "measured"),
        Objective("flops", "flops_effective", "FLOPs of one inference", "MFLOP", 1e-6, "analytic"),
        Objective("params", "params_nonzero", "non-zero parameters", "thousand", 1e-3, "analytic"),
        Objective("memory", "weight_bytes", "bytes of the weights", "kB", 1e-3, "analytic"),
    )
}

_LIMITS = {
    "error": ("error", 1.0),
    "latency_s": ("latency_s", 1.0),
    "latency_ms": ("latency_s", 1e-3),
    "latency_us": ("latency_s", 1e-6),
    "energy_j": ("energy_j", 1.0),
    "energy_mj": ("energy_j", 1e-3),
    "flops": ("flops_effective", 1.0),
    "mflops": ("flops_effective", 1e6),
    "flops_dense": ("flops_dense", 1.0),
    "params": ("params_nonzero", 1.0),
    "memory_bytes": ("weight_bytes", 1.0),
    "memory_kb": ("weight_bytes", 1e3),
}


@dataclass(frozen=True)
class Constraint:
    """An upper limit of one column, such as ``latency_ms<=5``."""

    text: str
    column: str
    limit: float

    def violation(self, row: Mapping[str, Any]) -> float:
        """Return by what share of the limit ``row`` is above it; 0 or less is feasible.

        A value that could not be measured is infinitely above.
        """
        value = row.get(self.column)
        if value is None or math.isnan(value):
            return math.inf
        return float(value) / self.limit - 1


def objectives(names: str) -> tuple[Objective, ...]:
    """Parse a comma-separated list of objectives; "error" must be one of at least two.

    Raises:
        UserError: A name is unknown or doubled, or the list is too short.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in OBJECTIVES:
            raise UserError(f"--objectives: {name!r} is none of {', '.join(OBJECTIVES)}")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"--objectives: {names!r} names an objective twice")
    if "error" not in chosen or len(chosen) < 2:
        raise UserError(f"--objectives: {names!r} should be error and at least one cost")
    return tuple(OBJECTIVES[name] for name in chosen)


def estimated(goal: Objective) -> Objective:
    """Return the objective as it is where energy is estimated, and not measured."""
    if goal.name != "energy":
        return goal
    return replace(goal, label=f"estimated {goal.label}", kind="estimated")


def constraint(text: str) -> Constraint:
    """Parse a constraint such as ``latency_ms<=5`` or ``params<=100e3``.

    Raises:
        UserError: It has another form, an unknown name or a limit that is no positive number.
    """
    match = re.fullmatch(r"\s*(\w+)\s*<=\s*(\S+)\s*", text)
    if match is None:
        raise UserError(f'--constraint: {text!r} should look like "latency_ms<=5"')
    name, number = match.groups()
    if name.lower() not in _LIMITS:
        raise UserError(f"--constraint: {name!r} is none of {', '.join(_LIMITS)}")
    column, unit = _LIMITS[name.lower()]
    try:
        limit = float(number) * unit
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise UserError(f"--constraint: the limit {number!r} in {text!r} is no positive number")
    return Constraint(text.strip(), column, limit)


def refuse_percentages(limits: Sequence[Constraint]) -> None:
    """Refuse a limit of an error that is a fraction which every network meets: 20 for 0.2.

    Raises:
        UserError: There is one.
    """
    for limit in limits:
        if limit.column == "error" and limit.limit > 1:
            raise UserError(f"--constraint: the error in {limit.text!r} is a fraction: 0.2 is 20 %")


def slowdown(row: Mapping[str, Any], reference_s: float | None) -> float | None:
    """Return how many times longer a row's calls took than at another reading's speed.

    A candidate and the reference model run in turns, so that a slow spell of the machine hits both,
    and ``latency_ratio`` is free of it. A row's latency over its slowdown is this ratio times
    ``reference_s``: latencies so brought to one speed compare as their ratios do.

    Args:
        row: Holds a reading.
        reference_s: What the reference model took in the other reading, in s.

    Returns:
        1 at equal speed; None where the one or the other was measured without a reference.
    """
    ratio = row.get("latency_ratio")
    return float(row["latency_s"]) / (ratio * reference_s) if ratio and reference_s else None


def first_reference_s(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Return what the reference model took in the first of some readings, in s, if in any."""
    return next(filter(None, (row.get("latency_reference_s") for row in rows)), None)


def cost(row: Mapping[str, Any], goal: Objective) -> float | None:
    """Return what a row is judged by: what takes time, as if the machine were never slower."""
    value = row.get(goal.column)
    slower = (row.get(SLOWDOWN) if goal.timed else None) or 1.0
    return None if value is None else float(value) / slower


def front(
    rows: Sequence[Mapping[str, Any]],
    goals: Sequence[Objective],
    limits: Sequence[Constraint] = (),
) -> list[int]:
    """Return the places of the rows on the Pareto front: complete, feasible and not dominated."""
    costs = np.array(
        [[cost(row, goal) if feasible(row, limits) else None for goal in goals] for row in rows],
        dtype=float,  # None becomes NaN
    ).reshape(len(rows), len(goals))
    return [int(i) for i in np.flatnonzero(non_dominated(costs))]


def feasible(row: Mapping[str, Any], limits: Sequence[Constraint]) -> bool:
    """Say whether a row is complete and meets every constraint."""
    return row.get("state") == "complete" and all(limit.violation(row) <= 0 for limit in limits)
