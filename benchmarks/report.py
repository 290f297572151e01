"""What a benchmark leaves: a table on the screen and in a file, its rows as CSV, and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.interleaved import Ratio
from benchmarks.machine import description
from gpsearch.files import write_atomically, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
BAR, PALE, WHISKER = "#2a7f9e", "#8b949e", "#22272e"


class Column(NamedTuple):
    """A column of the table: the row's key, the title above it, and how a value is written."""

    key: str
    title: str
    text: Callable[[Any], str] = str


def number(digits: int, scale: float = 1, unit: str = "") -> Callable[[float], str]:
    """Return what writes a number with so many digits behind the point."""
    return lambda value: f"{value * scale:.{digits}f}{unit}"


def ratio_text(ratio: Ratio) -> str:
    """Write a ratio with its interval: "1.32 [1.30, 1.35]"."""
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}"
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def table(rows: Sequence[Row], columns: Sequence[Column], group: str = "") -> str:
    """Return the rows as text, under a line for each value of ``group``; what is None is "-"."""
    cells = [
        ["-" if row.get(c.key) is None else c.text(row[c.key]) for c in columns] for row in rows
    ]
    titles = [column.title for column in columns]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    lines = [_line(titles, widths)]
    last = None
    for row, texts in zip(rows, cells, strict=True):
        if group and row[group] != last:
            last = row[group]
            lines += ["", last]
        lines.append(_line(texts, widths))
    return "\n".join(lines)


def _line(texts: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(texts, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(t.rjust(w) for t, w in rest)]).rstrip()


def csv_text(rows: Sequence[Row]) -> str:
    """Return the rows as CSV; a ratio takes three columns, what is None an empty cell."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Ratio):
            ends = {"": value.value, "_lo": value.low, "_hi": value.high}
            flat |= {key + end: one and f"{one:.5g}" for end, one in ends.items()}
        else:
            flat[key] = f"{value:.5g}" if isinstance(value, float) else value
    return flat


def append_row(path: Path, row: Row) -> None:
    """Add a row to a CSV file that grows as a long benchmark goes on; begin it with the keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of such a file; none if it is not there yet."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def head(title: str, notes: Mapping[str, str], machine: Mapping[str, str] | None = None) -> str:
    """Return the lines above a table: what it shows, how, and on what machine (if None, this)."""
    facts = {**notes, **(description() if machine is None else machine)}
    return "\n".join([title, "", *(f"{name + ':':14} {text}" for name, text in facts.items())])


def save(
    out: Path, name: str, text: str, rows: Sequence[Row], draw: Callable[[Figure], None]
) -> None:
    """Print the text, and write ``name``.txt, .csv and .png into a folder."""
    write_text(out / f"{name}.csv", csv_text(rows))
    save_text(out, name, text, draw)


def save_text(out: Path, name: str, text: str, draw: Callable[[Figure], None]) -> None:
    """Print the text, and write ``name``.txt and .png beside the rows that are there."""
    from matplotlib.figure import Figure

    print(text)
    write_text(out / f"{name}.txt", text + "\n")
    figure = Figure(layout="constrained")
    draw(figure)
    write_atomically(out / f"{name}.png", lambda path: figure.savefig(path, dpi=110, format="png"))
    print(f"\nwritten: {out / name}.txt, .csv, .png")


def bars(axes: Axes, labels: Sequence[str], ratios: Sequence[Ratio], colours: Any = BAR) -> None:
    """Draw horizontal bars, the first on top, each with its number and its interval."""
    values = [ratio.value for ratio in ratios]
    errors = [
        [value - (r.low or value) for value, r in zip(values, ratios, strict=True)],
        [(r.high or value) - value for value, r in zip(values, ratios, strict=True)],
    ]
    axes.barh(labels, values, xerr=errors, color=colours, ecolor=WHISKER, height=0.7)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    for place, ratio in enumerate(ratios):
        axes.annotate(
            f" {ratio.value:.3g}", (ratio.high or ratio.value, place), va="center", fontsize=7
        )
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
