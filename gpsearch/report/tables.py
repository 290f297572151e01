"""Trials and front as tables: for people, as csv and as json."""

from __future__ import annotations

import io
import shutil
from typing import TYPE_CHECKING

from gpsearch.files import json_text
from gpsearch.objectives import SLOWDOWN, Objective
from gpsearch.report.results import COSTS, Results
from gpsearch.study import Row

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

MEASURED = (
    "latency_s", "latency_lo_s", "latency_hi_s", "latency_ratio", "energy_j", "flops_dense",
    "flops_effective", "params", "params_nonzero", "weight_bytes", "on_front",
)  # fmt: skip
NOTES = (
    "candidate", "baseline", "feasible", "violation", "reason", "flags", "train_s", "metric",
    "metric_unit",
)  # fmt: skip
"""Columns of trials.csv behind the measured ones."""
ALWAYS = ("latency", "flops", "params")
"""Costs that the table shows even if they are no objectives."""
WIDEST = 10_000
"""Characters that no line of a table has: room to measure how many it needs."""


def trials(results: Results) -> pd.DataFrame:
    """Return ``trials.csv`` as a frame: a row a trial; an unavailable value is missing."""
    return _frame([{**row, **_judgement(results, trial)} for trial, row in enumerate(results.rows)])


def front_rows(results: Results) -> list[Row]:
    """Return the front's rows: as measured at the end where they were, with ratios to the baseline.

    A ``..._fewer`` column says how many times less of a cost the trial has than the first baseline.
    """
    return [
        {
            **results.row(trial),
            **_judgement(results, trial),
            **{f"{goal.column}_fewer": results.fewer(trial, goal) for goal in COSTS},
        }
        for trial in results.front
    ]


def _judgement(results: Results, trial: int) -> Row:
    return {
        "on_front": trial in results.front,
        "candidate": results.candidates[trial].in_short(),
        "feasible": results.feasible(trial),
        "violation": results.violation(trial),
    }


def front_text(results: Results, form: str) -> str:
    """Return the front as "table", "csv" or "json"."""
    if form == "json":
        return json_text(front_rows(results))
    if form == "csv":
        return str(_frame(front_rows(results)).to_csv(index=False))
    return _table(results) + _notes(results)


def _frame(rows: list[Row]) -> pd.DataFrame:
    """Return rows as a frame, in the order of columns that users hold on to."""
    import pandas as pd

    given = list(dict.fromkeys(name for row in rows for name in row))
    parameters = sorted(name for name in given if name.startswith("p:"))
    known = {"trial", "state", "error", *parameters, *MEASURED, *NOTES}
    # The task's own metrics are what is neither known nor of the measuring.
    metrics = [name for name in given if name not in known and not _of_measuring(name)]
    others = [name for name in given if name not in known and name not in metrics]
    order = ["trial", "state", *parameters, "error", *metrics, *MEASURED, *NOTES, *others]
    # Whole numbers with gaps stay whole numbers, and gaps become empty cells.
    return pd.DataFrame(rows, columns=order).convert_dtypes()


def _of_measuring(name: str) -> bool:
    return name.startswith(("latency_", "energy_", "power_", "test_")) or name.endswith(
        ("_bytes", "_fewer")
    )


def _table(results: Results) -> str:
    """Return the front and the baselines as a table for people."""
    from rich.table import Table

    tested = any("test_error" in results.row(trial) for trial in results.front)
    chosen = {goal.name: goal for goal in results.goals}
    costs = [chosen.get(g.name, g) for g in COSTS if g.name in ALWAYS or g.name in chosen]
    title = f"Pareto front of {results.folder}, measured on {results.device}"
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title, title_justify="left")
    table.add_column("")
    table.add_column("trial", justify="right")
    table.add_column("candidate", min_width=24)
    for split in ("dev", "test") if tested else ("dev",):
        table.add_column(f"{split}\n{results.metric} {results.unit}".rstrip(), justify="right")
    for goal in costs:
        table.add_column(f"{goal.title}\n{goal.unit}", justify="right")
        table.add_column("x\nfewer", justify="right")
    for trial in results.front:
        table.add_row(*_cells(results, trial, costs, tested), end_section=True)
    if off := [trial for trial in results.baselines if trial not in results.front]:
        table.add_row()
        for trial in off:
            table.add_row(*_cells(results, trial, costs, tested))
    return printed(table, max(140, shutil.get_terminal_size().columns))


def printed(table: Table, width: int) -> str:
    """Return a table as plain text; names in it stay as they are.

    Only the candidates wrap. Where that is not enough the table is wider than ``width``: a figure
    that is cut off reads as another one.
    """
    from rich.console import Console
    from rich.measure import Measurement

    out = io.StringIO()
    console = Console(
        file=out, width=WIDEST, highlight=False, markup=False, emoji=False, color_system=None
    )
    for column in (one for one in table.columns if one.header != "candidate"):
        cells = (column.header, *column.cells)
        sizes = [Measurement.get(console, console.options, cell) for cell in cells]
        # A column that must not wrap still counts as no wider than its longest word.
        column.no_wrap, column.min_width = True, max(size.maximum for size in sizes)
    least = Measurement.get(console, console.options, table).minimum
    console.print(table, width=max(width, least))
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def _cells(results: Results, trial: int, costs: list[Objective], tested: bool) -> list[str]:
    row, baseline = results.at_one_speed(trial), results.rows[trial].get("baseline")
    name = results.candidates[trial].in_short()
    cells = ["*" if trial in results.front else "", str(trial)]
    cells += [f"{name}  [{baseline}]" if baseline else name]
    splits = ("dev", "test") if tested else ("dev",)
    cells += [results.score_text(row, split) for split in splits]
    for goal in costs:
        cells += [cost_text(row, goal), _times(results.fewer(trial, goal))]
    return cells


def cost_text(row: Row, goal: Objective) -> str:
    """Return a cost in its unit, with half its 95 % interval if it has one; "-" if unavailable."""
    value = row.get(goal.column)
    if value is None:
        return "-"
    if ends := interval(row, goal):
        half_width = (ends[1] - ends[0]) / 2
        return f"{_rounded(value * goal.scale, 3)} ±{_rounded(half_width * goal.scale, 1)}"
    return _rounded(value * goal.scale, 3)


def _rounded(value: float, digits: int) -> str:
    """Return a value with so many digits at least, and without an exponent if it is large."""
    return f"{value:,.0f}" if value >= 10**digits - 0.5 else f"{value:.{digits}g}"


def interval(row: Row, goal: Objective) -> tuple[float, float] | None:
    """Return the ends of a cost's 95 % interval, if it has one."""
    ends = row.get("latency_lo_s"), row.get("latency_hi_s")
    if goal.name != "latency" or ends[0] is None or ends[1] is None:
        return None
    return float(ends[0]), float(ends[1])


def _notes(results: Results) -> str:
    """Return the lines below the table."""
    rows, lines = results.rows, [""]
    if (first := results.reference) is not None:
        lines += [f"* on the front; x fewer: against trial {first}, {rows[first]['baseline']}"]
        if any(row.get("latency_ratio") for row in rows):
            whose = "its" if first == 0 else f"{rows[0]['baseline']}'s"
            lines += [
                f"latencies are compared with that of {whose} network before compaction, and shown "
                "at the speed at which this takes what it usually took"
            ]
            if not any(row.get(SLOWDOWN) for row in rows):  # an older study's
                lines[-1] += ", but judged by the seconds measured: a member may seem dominated"
    if any(trial in results.finals for trial in results.front):
        lines += ["latencies of the front are those measured again at the end, in fresh processes"]
    states = [row["state"] for row in rows]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    told = "; reasons in trials.csv" if {"gated", "failed"} & set(states) else ""
    trials = f"{len(rows)} trial{'s' * (len(rows) > 1)}: {', '.join(counts)}{told}"
    lines += [trials if rows else "no trial is finished"]
    if results.limits and results.complete:
        lines += [_constraints(results)]
    lines += [f"{name}: unavailable, {reason}" for name, reason in results.unavailable().items()]
    return "".join(f"{line}\n" for line in lines)


def _constraints(results: Results) -> str:
    """Say how many trials met the constraints, and what came nearest if none did."""
    texts = " and ".join(limit.text for limit in results.limits)
    met = sum(map(results.feasible, results.complete))
    line = f"{met} of {len(results.complete)} complete trials meet {texts}"
    excess = {trial: results.violation(trial) for trial in results.complete}
    known = {trial: value for trial, value in excess.items() if value is not None}
    if met or not known:
        return line
    best = min(known, key=lambda trial: known[trial])
    what = results.candidates[best].in_short()
    return f"{line}; nearest is trial {best} ({what}), {known[best]:.0%} above a limit"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}x" if value < 100 else f"{value:.0f}x"
