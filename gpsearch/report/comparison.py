"""Two fronts side by side: who stays, how alike the ranks are, how much each one covers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from gpsearch import learned
from gpsearch.candidate import Architecture
from gpsearch.errors import UserError
from gpsearch.files import read_json
from gpsearch.objectives import OBJECTIVES, Objective
from gpsearch.pareto import hypervolume
from gpsearch.report.results import Results
from gpsearch.report.tables import printed
from gpsearch.study import Row

MARGIN = 1.1
"""The hypervolumes' common reference point: the worst cost on either front, times this."""
RATIO = Objective("latency_ratio", "latency_ratio", "latency ratio", "1", 1.0, "measured")
"""Latencies against the reference model that ran in turns with each: free of the machine's drift
between the two measurements, which latencies themselves are not."""
FEWEST = 3
"""Fewer pairs have no rank correlation."""


@dataclass(frozen=True)
class Comparison:
    """Two fronts that may be compared; make one with `Comparison.of`."""

    first: Results
    second: Results
    """At the first's speed, where both are of one machine and latencies relative to one model."""
    goals: tuple[Objective, ...]
    """The objectives of both, with values of one kind and protocol."""
    pairs: tuple[tuple[int, int], ...]
    """Trials that are the same network or candidate, complete in both."""
    by: str
    """What the pairs are the same of: "trial" or "candidate"."""

    @classmethod
    def of(cls, first: Results, second: Results) -> Comparison:
        """Pair two results: networks of one study by trial, those of two studies by candidate.

        Raises:
            UserError: A front is empty, or the two are of different tasks, data, objectives, kinds
                of values or protocols.
        """
        for one in (first, second):
            if not one.front:
                raise UserError(f"{one.folder}: has no front to compare")
        goals = _common_goals(first, second)
        _refuse_other_data(first, second)
        if first.machine and first.machine == second.machine and _share_reference(first, second):
            # Else the machine's mood alone, between the two, would move one front.
            second = dataclasses.replace(second, speed_s=first.reference_s)
        same = _study(first) == _study(second)
        pairs = _by_trial(first, second) if same else _by_candidate(first, second)
        return cls(first, second, goals, tuple(pairs), "trial" if same else "candidate")

    @property
    def costs(self) -> list[Objective]:
        """The objectives but the error."""
        return [goal for goal in self.goals if goal.name != "error"]

    def on(self, *, first: bool, second: bool) -> list[tuple[int, int]]:
        """Return the pairs on the first front or not, on the second or not; best error first."""
        on_first, on_second = set(self.first.front), set(self.second.front)
        wanted = (first, second)
        found = [(a, b) for a, b in self.pairs if (a in on_first, b in on_second) == wanted]
        return sorted(found, key=lambda pair: (self.first.rows[pair[0]]["error"], pair))

    def alone(self) -> tuple[list[int], list[int]]:
        """Return the members of each front that have no counterpart in the other results."""
        paired = [{pair[side] for pair in self.pairs} for side in (0, 1)]
        return (
            [trial for trial in self.first.front if trial not in paired[0]],
            [trial for trial in self.second.front if trial not in paired[1]],
        )

    def values(self, goal: Objective) -> Float[np.ndarray, "n 2"]:
        """Return a cost of every pair that has it on both sides, in its column's unit."""
        sides = [
            (
                self.first.at_one_speed(a).get(goal.column),
                self.second.at_one_speed(b).get(goal.column),
            )
            for a, b in self.pairs
        ]
        known = [side for side in sides if None not in side]
        return np.array(known, dtype=float).reshape(len(known), 2)

    def ranked(self) -> list[Objective]:
        """Return what ranks are compared of: the goals, and the paired ratio beside latency."""
        latency = any(goal.name == "latency" for goal in self.goals)
        ratio = latency and _share_reference(self.first, self.second)
        return [*self.goals, *([RATIO] if ratio else [])]

    def hypervolumes(self) -> tuple[float, float]:
        """Return the share that each front dominates of the box up to the common reference."""
        fronts = [_costs(one, self.goals) for one in (self.first, self.second)]
        worst = np.nanmax(np.concatenate(fronts), axis=0) * MARGIN
        scaled = [costs / np.where(worst > 0, worst, 1) for costs in fronts]
        corner = np.ones(len(self.goals))
        return hypervolume(scaled[0], corner), hypervolume(scaled[1], corner)


def spearman(values: Float[np.ndarray, "n 2"]) -> float | None:
    """Return Spearman's rho of two columns, ties at their mean rank; None where it has none."""
    ranks = np.stack([_ranks(column) for column in values.T])
    if len(values) < FEWEST or (ranks.std(axis=1) == 0).any():
        return None
    return float(np.corrcoef(ranks)[0, 1])


def kendall(values: Float[np.ndarray, "n 2"]) -> float | None:
    """Return Kendall's tau-b of two columns, which allows for ties; None where it has none."""
    signs = [np.sign(column[:, None] - column[None]) for column in values.T]
    pairs = [float((one * one).sum()) for one in signs]
    if len(values) < FEWEST or 0 in pairs:
        return None
    return float((signs[0] * signs[1]).sum() / np.sqrt(pairs[0] * pairs[1]))


def comparison_text(found: Comparison) -> str:
    """Return a comparison as tables for people."""
    return "".join([_heads(found), "\n", _members(found), "\n", _agreement(found)])


# The parts of the text


def _heads(found: Comparison) -> str:
    lines = [
        f"{letter}  {one.folder}  on {one.device}: {len(one.front)} on the front"
        for letter, one in zip("AB", (found.first, found.second), strict=True)
    ]
    lines += [f"{len(found.pairs)} pairs, matched by {found.by}"]
    volumes = found.hypervolumes()
    share = f", B/A {volumes[1] / volumes[0]:.3f}" if volumes[0] else ""
    goals = ", ".join(goal.name for goal in found.goals)
    lines += [f"hypervolume of {goals}: A {volumes[0]:.4f}, B {volumes[1]:.4f}{share}"]
    lines += ["  (share of the box up to 1.1 times the worst cost on either front)"]
    return "".join(f"{line}\n" for line in lines)


def _members(found: Comparison) -> str:
    """Return the table of all who are on a front."""
    from rich.table import Table

    first, second = found.first, found.second
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("front", *(("trial",) if found.by == "trial" else ("A", "B"))):
        table.add_column(name, justify="left" if name == "front" else "right")
    table.add_column("candidate")
    for goal in found.goals:
        for letter in "AB":
            table.add_column(f"{letter} {goal.name}\n{goal.unit}", justify="right")
    for label, a, b in _labelled(found):
        sides = ((first, a), (second, b))
        numbers = dict.fromkeys(trial for _, trial in sides if trial is not None)
        trials = list(numbers) if found.by == "trial" else [a, b]
        name = next(one.candidates[trial] for one, trial in sides if trial is not None).in_short()
        cells = [_cell(one, trial, goal) for goal in found.goals for one, trial in sides]
        table.add_row(label, *("" if t is None else str(t) for t in trials), name, *cells)
    return printed(table, 200)


def _labelled(found: Comparison) -> list[tuple[str, int | None, int | None]]:
    """Return all members of the fronts, each with where it is."""
    lone = found.alone()
    return [
        *(("A and B", a, b) for a, b in found.on(first=True, second=True)),
        *(("A only", a, b) for a, b in found.on(first=True, second=False)),
        *(("B only", a, b) for a, b in found.on(first=False, second=True)),
        *(("A alone", a, None) for a in lone[0]),
        *(("B alone", None, b) for b in lone[1]),
    ]


def _agreement(found: Comparison) -> str:
    """Return the table of rank correlations."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("ranks of")
    for name in ("pairs", "Spearman", "Kendall", "median B/A"):
        table.add_column(name, justify="right")
    for goal in found.ranked():
        values = found.values(goal)
        positive = values[(values > 0).all(axis=1)]
        change = f"{np.median(positive[:, 1] / positive[:, 0]):.3f}" if len(positive) else "-"
        name = f"latency / that of {_reference(found.first)}" if goal is RATIO else goal.name
        ranks = [_number(spearman(values)), _number(kendall(values))]
        table.add_row(name, str(len(values)), *ranks, change)
    return printed(table, 200)


def _cell(results: Results, trial: int | None, goal: Objective) -> str:
    value = None if trial is None else results.at_one_speed(trial).get(goal.column)
    return "" if value is None else f"{value * goal.scale:.4g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# What may be compared


def _common_goals(first: Results, second: Results) -> tuple[Objective, ...]:
    if first.metric != second.metric:
        raise UserError(
            f"{first.folder} and {second.folder}: their errors are {first.metric} and "
            f"{second.metric}, which do not compare; give two studies of one task"
        )
    goals = tuple(goal for goal in first.goals if goal in second.goals)
    if len(goals) < 2 or OBJECTIVES["error"] not in goals:
        names = [",".join(goal.name for goal in one.goals) for one in (first, second)]
        raise UserError(
            f"{first.folder} and {second.folder}: their objectives {names[0]} and {names[1]} "
            "share no cost; there is no front to compare"
        )
    for goal in goals:
        _refuse_other_origin(first, second, goal)
    return goals


def _refuse_other_data(first: Results, second: Results) -> None:
    """Refuse errors on different data or tasks, where that was noted."""
    a, b = (learned.read(Path(_study(one))) for one in (first, second))
    if a is None or b is None:
        return
    # Where a task does not tell its data, their place does; where one alone was told, nothing does.
    alike = bool(a.digest) == bool(b.digest)
    if a.task != b.task or (alike and (a.digest or a.data) != (b.digest or b.data)):
        raise UserError(
            f"{first.folder} and {second.folder}: their data differ, and errors on other data do "
            "not compare"
        )


def _refuse_other_origin(first: Results, second: Results, goal: Objective) -> None:
    """Refuse values that never share one front: of another kind, scope or protocol."""
    if goal.name == "error":
        return
    a, b = _origins(first, goal), _origins(second, goal)
    if len(a | b) > 1:
        raise UserError(
            f"{goal.name} is {' and '.join(sorted(a))} in {first.folder}, "
            f"{' and '.join(sorted(b))} in {second.folder}; such values do not compare: "
            "measure one front again with `gpsearch remeasure`"
        )


def _origins(results: Results, goal: Objective) -> set[str]:
    """Return how a cost of the front was got, in words; unknown where no reading was kept."""
    found = set()
    for trial in results.front:
        if reading := _reading(results, trial):
            one = reading["quantities"][goal.column]
            if one["kind"] == "analytic":
                found.add("analytic")
            else:
                scope = f", {one['scope']}" if one["scope"] else ""
                found.add(f"{one['kind']} ({reading['protocol']}{scope})")
    return found


def _reading(results: Results, trial: int) -> Row | None:
    path = results.folder / "trials" / str(trial) / "reading.json"
    return read_json(path, "quantities", "protocol", "reference") if path.exists() else None


def _reference(results: Results) -> str | None:
    """Return the name of the model that latencies are relative to."""
    reading = _reading(results, results.front[0])
    return reading["reference"] if reading else None


def _share_reference(first: Results, second: Results) -> bool:
    """Tell whether the latencies of both are relative to one model."""
    same = _reference(first) == _reference(second) is not None
    return same and _referred_to(first) == _referred_to(second)


def _referred_to(results: Results) -> Architecture | None:
    """Return the network, of which latencies take an untrained one."""
    name = _reference(results)
    named = (row["trial"] for row in results.rows if row.get("baseline") == name)
    trial = next(named, None)
    return None if trial is None else results.candidates[trial].architecture


def _study(results: Results) -> str:
    """Return the folder of the study whose networks these are."""
    folder = results.folder.resolve()
    return str(folder.parents[1] if results.again else folder)


def _by_trial(first: Results, second: Results) -> list[tuple[int, int]]:
    return [(trial, trial) for trial in first.complete if trial in set(second.complete)]


def _by_candidate(first: Results, second: Results) -> list[tuple[int, int]]:
    places = {second.candidates[trial]: trial for trial in reversed(second.complete)}
    found = [(trial, places.get(first.candidates[trial])) for trial in first.complete]
    return [(a, b) for a, b in found if b is not None]


def _costs(results: Results, goals: Sequence[Objective]) -> Float[np.ndarray, "n m"]:
    rows = [results.at_one_speed(trial) for trial in results.front]
    return np.array([[row.get(goal.column) for goal in goals] for row in rows], dtype=float)


def _ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    below = (values[None] < values[:, None]).sum(axis=1)
    equal = (values[None] == values[:, None]).sum(axis=1)
    ranks: Float[np.ndarray, " n"] = below + (equal + 1) / 2
    return ranks
