"""The paper's comparison as a table, a csv and a picture; every figure with its spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from gpsearch.files import write_atomically, write_text
from gpsearch.report.picture import COLOURS, INK, literally, plain, plain_log
from gpsearch.reproduce import CLAIMS, Reproduction
from gpsearch.study import Row

Value = Callable[[Row], float]


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        name: Its head.
        value: From a finished row to its value, in the column's unit.
        digits: Behind the point.
        fewer: Whether the first row's value over this one's is shown, too.
    """

    name: str
    value: Value
    digits: int
    fewer: bool = False

    def cell(self, rows: Sequence[Row], first: Sequence[Row]) -> str:
        """Return mean (lowest-highest) of the seeds, and how many times less than the first row.

        That is by the seeds of both; where there are none yet, it is not said.
        """
        values = [self.value(row) for row in rows]
        text = f"{mean(values):,.{self.digits}f}"
        if min(values) != max(values):
            text += f" ({min(values):,.{self.digits}f}-{max(values):,.{self.digits}f})"
        seeds = {row["seed"] for row in rows} & {row["seed"] for row in first}
        if self.fewer and seeds:
            own, of_first = (
                mean(self.value(row) for row in some if row["seed"] in seeds)
                for some in (rows, first)
            )
            text += f", {of_first / own:.2f}x"
        return text


def columns(row: Row) -> list[Column]:
    """Return the table's columns for rows like this one."""
    metric = row["metric"]
    scale, unit = (100, " %") if row["metric_unit"] == "%" else (1, "")
    digits = 1 if unit else 3
    name = metric.upper()
    return [
        Column(f"dev {name}{unit}", lambda r: r[f"dev_{metric}"] * scale, digits),
        Column(f"test {name}{unit}", lambda r: r[f"test_{metric}"] * scale, digits),
        Column("non-zero weights", lambda r: r["params_nonzero"], 0, fewer=True),
        Column("weights", lambda r: r["params"], 0),
        Column("effective MFLOP", lambda r: r["flops_effective"] / 1e6, 2, fewer=True),
        Column("dense MFLOP", lambda r: r["flops_dense"] / 1e6, 2),
        Column("latency ratio", lambda r: r["latency_ratio"], 3),
    ]


def table(found: Reproduction) -> str:
    """Return the comparison in Markdown, with the abstract's words and what differs here."""
    by_name = _by_name(found)
    if not by_name:
        return "no row is finished yet\n"
    first = by_name.get(next(iter(found.candidates)), [])
    shown = columns(next(iter(by_name.values()))[0])
    heads = ["row", "candidate", "seeds", *(column.name for column in shown)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, rows in by_name.items():
        cells = [name, found.candidates[name].in_short(), str(len(rows))]
        cells += [column.cell(rows, first) for column in shown]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*_head(found), "", *lines]) + "\n"


def _head(found: Reproduction) -> list[str]:
    one = found.comparison
    claim = CLAIMS.get(one.task)
    said = [f"The paper's abstract: {claim}.", ""] if claim else []
    data = Path(one.data).name if one.data else "the data in the package"
    space = Path(one.space).stem
    return [
        *said,
        f"Here: space {space} ({one.scale} scale), {data}, latency on {one.device}, one "
        "inference at a time, beside the first row's dense network in plain torch; mean "
        "(lowest-highest) of the seeds; x: times less than the first row.",
    ]


def write_rows(found: Reproduction) -> None:
    """Rewrite table.md, rows.csv and table.png of a comparison, each atomically."""
    import pandas as pd

    rows = found.rows()
    write_text(found.folder / "table.md", table(found))
    write_text(found.folder / "rows.csv", pd.DataFrame(rows).to_csv(index=False))
    if rows:
        draw_rows(found, found.folder / "table.png")


@literally
def draw_rows(found: Reproduction, path: Path) -> None:
    """Draw the error on the test split against non-zero weights and against latency."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(11, 5.2), layout=layout)
    panels = (
        ("params_nonzero", 1e-6, "non-zero weights (million)"),
        ("latency_ratio", 1.0, "latency / first row's in plain torch"),
    )
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, (column, scale, name) in zip((left, right), panels, strict=True):
        for index, (row, rows) in enumerate(_by_name(found).items()):
            costs = [scale * one[column] for one in rows]
            _draw_row(axes, found, row, costs, [one["test_error"] for one in rows], index)
        axes.set_xlabel(name, color=INK)
        plain_log(axes)
        plain(axes)
        axes.grid(color="#e6e9ec", lw=0.8)
        axes.set_axisbelow(True)
    metric = found.rows()[0]["metric"].upper()
    left.set_ylabel(f"error on the test split (by {metric}; down is better)", color=INK)
    title = f"{found.comparison.task}, {found.comparison.scale} scale: the paper's rows"
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, weight="bold", color=INK)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  frameon=False, fontsize=9, labelcolor=INK)  # fmt: skip
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=160))


def _draw_row(
    axes: Any,
    found: Reproduction,
    name: str,
    xs: Sequence[float],
    ys: Sequence[float],
    index: int,
) -> None:
    """Draw a row's mean, and its seeds as faint points."""
    candidate = found.candidates[name]
    colour = COLOURS.get(candidate.schedule.name, "black")
    marker = "Do^svPX*"[index % 8]
    axes.plot(xs, ys, marker, ms=4, color=colour, alpha=0.35, lw=0)
    axes.plot(mean(xs), mean(ys), marker, ms=9, color=colour, lw=0, label=name.replace("_", " "))


def _by_name(found: Reproduction) -> dict[str, list[Row]]:
    """Return the finished rows by their names, in the order of the space."""
    rows = found.rows()
    named = {name: [row for row in rows if row["row"] == name] for name in found.candidates}
    return {name: own for name, own in named.items() if own}
