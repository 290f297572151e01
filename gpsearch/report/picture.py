"""The front as a picture: a panel for every cost, with the error on the other axis."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from gpsearch.files import write_atomically, write_text
from gpsearch.objectives import Objective
from gpsearch.report.results import Results
from gpsearch.report.tables import cost_text, interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")

COLOURS = {
    "gp": "#d1495b", "gmp": "#e09f3e", "set": "#4f9d69", "rigl": "#2a7f9e",
    "selfish": "#8d5a97", "dense": "#46505a",
}  # fmt: skip
"""A colour a schedule; others are black."""
INK, FAINT, FRONT = "#22272e", "#8b949e", "#22272e"
MANY = 300.0
"""Costs that are so many times apart have a tick a decade, others three."""
NUMBERED = 14
"""The front's members carry their trial's number up to so many."""


@dataclass(frozen=True)
class Point:
    """A complete trial in one panel, in the axes' units."""

    trial: int
    x: float
    error: float
    below: float
    """From ``x`` down to the end of its 95 % interval."""
    above: float
    schedule: str
    cell: str
    """"LSTM" or "H-LSTM"."""
    rank: str
    """"front", "dominated" or "infeasible"."""
    baseline: str


def points(results: Results, goal: Objective) -> list[Point]:
    """Return the complete trials that have this cost."""
    members = set(results.front)
    found = []
    for trial in results.complete:
        row, candidate = results.at_one_speed(trial), results.candidates[trial]
        if (value := row.get(goal.column)) is None:
            continue
        low, high = interval(row, goal) or (value, value)
        rank = "front" if trial in members else "dominated"
        found.append(
            Point(
                trial,
                value * goal.scale,
                row["error"] * 100,
                max(0.0, value - low) * goal.scale,
                max(0.0, high - value) * goal.scale,
                candidate.schedule.name,
                "H-LSTM" if candidate.architecture.gate_depth else "LSTM",
                rank if results.feasible(trial) else "infeasible",
                str(row.get("baseline") or ""),
            )
        )
    return found


def staircase(shown: list[Point]) -> list[tuple[float, float]]:
    """Return the least error that the front offers at every cost, as a line's corners."""
    steps: list[tuple[float, float]] = []
    for point in sorted((p for p in shown if p.rank == "front"), key=lambda p: (p.x, p.error)):
        if not steps or point.error < steps[-1][1]:
            steps.append((point.x, point.error))
    return steps


def is_wide(shown: list[Point]) -> bool:
    """Say whether the costs span more than a factor of ten, and so want a logarithmic axis."""
    values = [point.x for point in shown]
    return bool(values) and max(values) > 10 * min(values) > 0


def ceiling(results: Results) -> float | None:
    """Return the error in % above which trials are left out, so that failures flatten nothing."""
    of_interest = [results.rows[i]["error"] for i in {*results.front, *results.baselines}]
    top = 130 * max(of_interest, default=0.0)
    highest = 100 * max((results.rows[i]["error"] for i in results.complete), default=0.0)
    return top if 0 < top < highest else None


def titles(results: Results) -> tuple[str, str]:
    """Return the picture's title and the line below it."""
    complete, members = len(results.complete), len(results.front)
    trials = "1 trial" if len(results.rows) == 1 else f"{len(results.rows)} trials"
    line = f"{trials}, {complete} complete, {members} on the front"
    if results.again:
        line = f"{complete} members of the front measured again, {members} still on it"
    if (top := ceiling(results)) is not None:
        above = sum(results.rows[i]["error"] * 100 > top for i in results.complete)
        line += f"; {above} above {top:.0f} % not shown"
    return f"{results.name}: error against cost on {results.device}", line


# Matplotlib


def literally(draw: Callable[P, None]) -> Callable[P, None]:
    """Let a function draw names as they are: a dollar in a folder's name begins no formula."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> None:
        import matplotlib

        with matplotlib.rc_context({"text.parse_math": False}):
            draw(*args, **kwargs)

    return drawn


@literally
def draw_png(results: Results, path: Path) -> None:
    """Draw error against every cost: front, dominated trials, baselines, error bars."""
    figure = png_figure(results)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=160))


def png_figure(results: Results) -> Figure:
    """Return what `draw_png` saves."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    costs = results.costs
    columns = len(costs) if len(costs) <= 3 else (len(costs) + 1) // 2
    lines = -(-len(costs) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(max(6.4, 4.6 * columns), 4.4 * lines + 0.9), layout=layout)
    for index, goal in enumerate(costs):
        axes = figure.add_subplot(lines, columns, index + 1)
        _draw_panel(axes, results, goal)
        if index % columns == 0:
            axes.set_ylabel(f"{results.error} on the development split (%)", color=INK)
    title, line = titles(results)
    figure.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=13, weight="bold", color=INK)
    figure.text(0.012, 1 - 0.46 / figure.get_figheight(), line, fontsize=9.5, color=FAINT)
    handles = _legend(results)
    rows = -(-len(handles) // (5 * columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // rows),
                  frameon=False, columnspacing=1.4, fontsize=9, labelcolor=INK,
                  handletextpad=0.4)  # fmt: skip
    return figure


def _draw_panel(axes: Any, results: Results, goal: Objective) -> None:
    shown = points(results, goal)
    axes.grid(color="#e6e9ec", lw=0.8)
    axes.set_axisbelow(True)
    for point in shown:
        _draw_point(axes, point, numbered=len(results.front) <= NUMBERED)
    baselines = [point for point in shown if point.baseline]
    for point in baselines:
        axes.plot(point.x, point.error, "o", ms=15, mfc="none", mec=INK, mew=1.1, zorder=5)
        offset = (0, 11 if _has_room_above(point, baselines) else -17)
        label(axes, point, point.baseline.replace("_", " "), offset, "center", INK)
    if steps := staircase(shown):
        axes.step(*zip(*steps, strict=True), where="post", color=FRONT, lw=1.1, zorder=2)
    for limit in results.limits:
        if limit.column == goal.column:
            axes.axvline(limit.limit * goal.scale, color=INK, lw=1, ls=(0, (4, 3)), zorder=1)
    _scale(axes, results, shown)
    axes.set_xlabel(f"{goal.label} ({goal.unit})", color=INK)
    plain(axes)


def _has_room_above(point: Point, baselines: Sequence[Point]) -> bool:
    """Tell whether the next baseline above is farther away than the next below."""
    gaps = [other.error - point.error for other in baselines if other is not point]
    above = min((gap for gap in gaps if gap >= 0), default=math.inf)
    below = min((-gap for gap in gaps if gap < 0), default=math.inf)
    return above >= below


def plain(axes: Any) -> None:
    """Give axes the house's quiet ticks and frame."""
    axes.tick_params(colors=INK, which="both", labelsize=9, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c3c9cf")


def plain_log(axes: Any) -> None:
    """Make the costs' axis logarithmic, with ticks that read as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axes.dataLim.intervalx
    few = high > MANY * low > 0
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if few else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_point(axes: Any, point: Point, *, numbered: bool) -> None:
    colour, on_front = COLOURS.get(point.schedule, "black"), point.rank == "front"
    strength = 1.0 if on_front or point.baseline else 0.3
    ends = [[point.below], [point.above]] if point.below or point.above else None
    axes.errorbar(
        point.x, point.error, xerr=ends,
        fmt="o" if point.cell == "H-LSTM" else "s", ms=8 if on_front else 6, color=colour,
        mfc="none" if point.rank == "infeasible" else colour, mec="white" if on_front else colour,
        mew=0.9, alpha=strength, elinewidth=1.2, capsize=2.5, zorder=4 if on_front else 3,
    )  # fmt: skip
    if on_front and numbered and not point.baseline:
        label(axes, point, str(point.trial), (5, 5), "left", FAINT)


def label(
    axes: Any, point: Point, text: str, offset: tuple[int, int], align: str, colour: str
) -> None:
    """Write a text beside a point, legible on any ground."""
    from matplotlib.patheffects import withStroke

    axes.annotate(text, (point.x, point.error), xytext=offset, textcoords="offset points",
                  ha=align, fontsize=8, color=colour, zorder=6, clip_on=True,
                  path_effects=[withStroke(linewidth=2.5, foreground="white")])  # fmt: skip


def _scale(axes: Any, results: Results, shown: list[Point]) -> None:
    """Set the axes' scales: linear, or logarithmic with ticks that read as plain numbers."""
    axes.margins(x=0.14, y=0.12)
    if (top := ceiling(results)) is not None:
        lowest = min(point.error for point in shown) if shown else 0.0
        axes.set_ylim(lowest - 0.1 * (top - lowest), top)
    if is_wide(shown):
        plain_log(axes)


def _legend(results: Results) -> list[Any]:
    from matplotlib.lines import Line2D

    def mark(label: str, **style: Any) -> Line2D:
        default: dict[str, Any] = {"ls": "", "marker": "o", "ms": 7}
        return Line2D([], [], label=label, **default | style)

    shown = [point for goal in results.costs for point in points(results, goal)]
    names = [name for name in COLOURS if name in {point.schedule for point in shown}]
    handles = [mark(name, color=COLOURS[name], marker="D", ms=6) for name in names]
    handles += [
        mark("H-LSTM", mfc="none", color=INK),
        mark("LSTM", marker="s", mfc="none", color=INK),
    ]
    handles += [mark("front", marker="", ls="-", color=FRONT)]
    handles += [mark("dominated", color=FAINT, alpha=0.5, ms=6)]
    if any(point.rank == "infeasible" for point in shown):
        handles += [mark("breaks a constraint", color=FAINT, mfc="none", ms=6)]
    return [*handles, mark("baseline", color=INK, mfc="none", ms=11)]


# Plotly


def draw_html(results: Results, path: Path) -> None:
    """Draw the same as a page that opens offline; hovering over a point shows its candidate."""
    figure = html_figure(results)
    page = figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False})
    write_text(path, page)


def html_figure(results: Results) -> Any:
    """Return what `draw_html` saves: plotly's figure."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    costs = results.costs
    figure = make_subplots(cols=len(costs), shared_yaxes=True, horizontal_spacing=0.04)
    named: set[str] = set()
    for column, goal in enumerate(costs, 1):
        shown = points(results, goal)
        for trace in _traces(results, shown):
            trace["showlegend"] = trace["name"] not in named
            named.add(trace["name"])
            figure.add_trace(go.Scatter(trace), row=1, col=column)
        figure.update_xaxes(
            _log_axis(shown) if is_wide(shown) else {},
            title_text=f"{goal.label} ({goal.unit})",
            col=column,
        )
        for limit in results.limits:
            if limit.column == goal.column:
                figure.add_vline(limit.limit * goal.scale, line_dash="dash", line_width=1,
                                 line_color=INK, row=1, col=column)  # fmt: skip
    title, line = titles(results)
    figure.update_yaxes(title_text=f"{results.error} on the development split (%)", col=1)
    if (top := ceiling(results)) is not None:
        figure.update_yaxes(range=[0, top])
    figure.update_layout(
        template="plotly_white", font={"color": INK}, margin={"t": 90, "b": 60},
        title={"text": f"<b>{title}</b><br><sup>{line}</sup>"},
        legend={"title": {"text": "schedule, cell"}}, hoverlabel={"align": "left"},
    )  # fmt: skip
    return figure


def _log_axis(shown: list[Point]) -> dict[str, Any]:
    values = [point.x for point in shown]
    return {"type": "log", "dtick": 1 if max(values) > MANY * min(values) else "D2"}


def _traces(results: Results, shown: list[Point]) -> list[dict[str, Any]]:
    """Return a panel's traces: the staircase, a group a schedule and cell, the baselines' rings."""
    steps = staircase(shown)
    traces: list[dict[str, Any]] = [
        {"x": [x for x, _ in steps], "y": [y for _, y in steps], "mode": "lines", "name": "front",
         "line": {"shape": "hv", "color": FRONT, "width": 1.2}, "hoverinfo": "skip"}
    ]  # fmt: skip
    for kind in dict.fromkeys((p.schedule, p.cell) for p in sorted(shown, key=_order)):
        group = [p for p in shown if (p.schedule, p.cell) == kind]
        traces.append(_markers(results, group, ", ".join(kind)))
    rings = [p for p in shown if p.baseline]
    traces.append(
        {"x": [p.x for p in rings], "y": [p.error for p in rings], "name": "baseline",
         "mode": "markers+text", "text": [p.baseline.replace("_", " ") for p in rings],
         "textposition": ["bottom center" if i % 2 else "top center" for i in range(len(rings))],
         "hoverinfo": "skip",
         "marker": {"symbol": "circle-open", "size": 19, "color": INK}}
    )  # fmt: skip
    return [trace | {"legendgroup": trace["name"]} for trace in traces]


def _markers(results: Results, group: list[Point], name: str) -> dict[str, Any]:
    shape = "circle" if group[0].cell == "H-LSTM" else "square"
    colour = COLOURS.get(group[0].schedule, "black")
    trace: dict[str, Any] = {
        "x": [p.x for p in group], "y": [p.error for p in group], "name": name, "mode": "markers",
        "hovertext": [_hover(results, p) for p in group],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {
            "color": colour,
            "symbol": [shape + "-open" * (p.rank == "infeasible") for p in group],
            "size": [12 if p.rank == "front" else 9 for p in group],
            "opacity": [1.0 if p.rank == "front" or p.baseline else 0.3 for p in group],
            "line": {"color": "white", "width": 1},
        },
    }  # fmt: skip
    if any(p.above for p in group):
        trace["error_x"] = {"type": "data", "array": [p.above for p in group], "symmetric": False,
                            "arrayminus": [p.below for p in group], "thickness": 1.2}  # fmt: skip
    return trace


def _order(point: Point) -> tuple[int, str]:
    return list(COLOURS).index(point.schedule) if point.schedule in COLOURS else 99, point.cell


def _hover(results: Results, point: Point) -> str:
    """Return what hovering over a trial shows: candidate, results and every parameter."""
    row = results.at_one_speed(point.trial)
    lines = [f"<b>trial {point.trial}</b> {point.baseline.replace('_', ' ')} ({point.rank})"]
    lines += [results.candidates[point.trial].in_short()]
    for split, what in (("dev", ""), ("test", " on the test split")):
        if results.score(row, split) is not None:
            lines += [f"{results.metric}{what} {results.score_text(row, split)}{results.unit}"]
    for goal in results.costs:
        fewer = results.fewer(point.trial, goal)
        ratio = f", {fewer:.3g}x fewer" if fewer else ""
        lines += [f"{goal.label} {cost_text(row, goal)} {goal.unit}{ratio}"]
    params = {name[2:]: value for name, value in row.items() if name.startswith("p:")}
    lines += [f"{k} = {v:.4g}" if isinstance(v, float) else f"{k} = {v}" for k, v in params.items()]
    return "<br>".join(lines)
