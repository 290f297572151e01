"""What a study found: trials.csv, the front as table, csv and json, pictures; two side by side."""

from __future__ import annotations

from gpsearch.files import write_text
from gpsearch.report.comparison import Comparison, comparison_text
from gpsearch.report.paired import draw_comparison
from gpsearch.report.picture import draw_html, draw_png
from gpsearch.report.results import Results
from gpsearch.report.rows import table, write_rows
from gpsearch.report.stairs import draw_staircase
from gpsearch.report.tables import front_rows, front_text, trials

__all__ = [
    "Comparison",
    "Results",
    "comparison_text",
    "draw_comparison",
    "draw_html",
    "draw_png",
    "draw_staircase",
    "front_rows",
    "front_text",
    "table",
    "trials",
    "write",
    "write_rows",
]


def write(results: Results) -> None:
    """Rewrite every table and picture of a results folder, each atomically."""
    folder = results.folder
    write_text(folder / "trials.csv", trials(results).to_csv(index=False))
    write_text(folder / "pareto.csv", front_text(results, "csv"))
    write_text(folder / "pareto.json", front_text(results, "json"))
    if results.complete:
        draw_png(results, folder / "pareto.png")
        draw_html(results, folder / "pareto.html")
