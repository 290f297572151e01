"""Two fronts in one picture: a panel a cost, what is the same network joined by a line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpsearch.files import write_atomically
from gpsearch.objectives import Objective
from gpsearch.report.comparison import Comparison
from gpsearch.report.picture import (
    FAINT,
    INK,
    NUMBERED,
    Point,
    is_wide,
    label,
    literally,
    plain,
    plain_log,
    points,
    staircase,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDES = (("#2a7f9e", 9.5, 3.2), ("#d1495b", 5.5, 1.2))
"""Colour, markers' size and line's width of the first results and of the second, which are drawn
over them: where the two agree, both are still seen."""
STRAY = 1.3
"""Errors up to so many times the worst on either front are shown."""


@literally
def draw_comparison(found: Comparison, path: Path) -> None:
    """Draw both fronts, error against every cost they share."""
    figure = comparison_figure(found)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=160))


def comparison_figure(found: Comparison) -> Figure:
    """Return what `draw_comparison` saves."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    costs = found.costs
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(max(7.4, 5.2 * len(costs)), 5.4), layout=layout)
    for index, goal in enumerate(costs):
        axes = figure.add_subplot(1, len(costs), index + 1)
        _draw_panel(axes, found, goal)
        if index == 0:
            axes.set_ylabel(f"{found.first.error} on the development split (%)", color=INK)
    volumes = found.hypervolumes()
    stay = len(found.on(first=True, second=True))
    line = (
        f"{stay} on both fronts, {len(found.pairs)} pairs by {found.by}; "
        f"hypervolume A {volumes[0]:.3f}, B {volumes[1]:.3f}"
    )
    figure.suptitle("Two fronts side by side\n", x=0.012, ha="left", fontsize=13, weight="bold",
                    color=INK)  # fmt: skip
    figure.text(0.012, 1 - 0.46 / figure.get_figheight(), line, fontsize=9.5, color=FAINT)
    figure.legend(handles=_legend(found), loc="outside lower center", ncols=3, frameon=False,
                  fontsize=9, labelcolor=INK)  # fmt: skip
    return figure


def _draw_panel(axes: Any, found: Comparison, goal: Objective) -> None:
    shown = [
        {point.trial: point for point in points(results, goal)}
        for results in (found.first, found.second)
    ]
    axes.grid(color="#e6e9ec", lw=0.8)
    axes.set_axisbelow(True)
    for pair in _pairs_of_interest(found):
        ends = [points_of[trial] for points_of, trial in zip(shown, pair, strict=True)
                if trial in points_of]  # fmt: skip
        axes.plot([p.x for p in ends], [p.error for p in ends], color=FAINT, lw=0.8, zorder=1)
    for style, points_of in zip(SIDES, shown, strict=True):
        _draw_side(axes, list(points_of.values()), *style)
    for number, one in shown[1].items():
        numbered = found.by == "trial" and len(found.second.front) <= NUMBERED
        if numbered and one.rank == "front":
            label(axes, one, str(number), (5, 5), "left", FAINT)
    _scale(axes, [point for side in shown for point in side.values()])
    axes.set_xlabel(f"{goal.label} ({goal.unit})", color=INK)
    plain(axes)


def _pairs_of_interest(found: Comparison) -> list[tuple[int, int]]:
    """Return the pairs on at least one front."""
    neither = set(found.on(first=False, second=False))
    return [pair for pair in found.pairs if pair not in neither]


def _draw_side(axes: Any, shown: list[Point], colour: str, size: float, width: float) -> None:
    """Draw one side: its front filled and joined to a staircase, the others faint and hollow."""
    for point in shown:
        on_front = point.rank == "front"
        ends = [[point.below], [point.above]] if point.below or point.above else None
        axes.errorbar(
            point.x, point.error, xerr=ends, fmt="o", ms=size * (1 if on_front else 0.7),
            color=colour,
            mfc=colour if on_front else "white", mec=colour, alpha=1.0 if on_front else 0.35,
            elinewidth=1.2, capsize=2.5, zorder=4 if on_front else 3,
        )  # fmt: skip
    if steps := staircase(shown):
        axes.step(*zip(*steps, strict=True), where="post", color=colour, lw=width,
                  alpha=0.6, zorder=2)  # fmt: skip


def _scale(axes: Any, shown: list[Point]) -> None:
    """Leave out errors far above both fronts, and let wide costs have a logarithmic axis."""
    axes.margins(x=0.08, y=0.08)
    errors = [point.error for point in shown if point.rank == "front"]
    if errors and max(point.error for point in shown) > STRAY * max(errors) > 0:
        axes.set_ylim(min(errors) - 0.1 * (max(errors) - min(errors) + 1), STRAY * max(errors))
    if is_wide(shown):
        plain_log(axes)


def _legend(found: Comparison) -> list[Any]:
    from matplotlib.lines import Line2D

    def mark(text: str, **style: Any) -> Line2D:
        return Line2D([], [], label=text, **{"marker": "o", "ms": 6.5, **style})

    named = [
        mark(f"{letter}: {one.name} ({one.device}), front", color=colour, ms=size, lw=width)
        for letter, one, (colour, size, width) in zip(
            "AB", (found.first, found.second), SIDES, strict=True
        )
    ]
    joined = "the same network" if found.by == "trial" else "the same candidate"
    return [
        *named,
        mark("off its front", color=FAINT, mfc="white", ls=""),
        mark(f"{joined} in both", color=FAINT, marker="", lw=0.8),
    ]
