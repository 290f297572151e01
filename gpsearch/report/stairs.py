"""The latency staircase as a picture: every width with its interval, and the steps' right edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpsearch.files import write_atomically
from gpsearch.report.picture import FAINT, INK, literally, plain
from gpsearch.staircase import Staircase

WIDTH, EDGE = "#2a7f9e", "#d1495b"
NAMES = {
    "hidden_size": "hidden size (state units of a layer)",
    "gate_width": "gate width (units of each gate's hidden layers)",
}


@literally
def draw_staircase(stairs: Staircase, path: Path) -> None:
    """Draw a finished staircase."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(max(7.4, 0.16 * len(stairs.steps)), 5.2), layout=layout)
    axes = figure.add_subplot()
    _draw_steps(axes, stairs)
    _draw_edges(axes, stairs)
    key, base = stairs.sweep.key, stairs.subject.architecture
    axes.set_xlabel(NAMES[key], color=INK)
    axes.set_ylabel(f"latency / latency at {key} {base[key]}", color=INK)
    axes.margins(x=0.04, y=0.1)
    axes.grid(color="#e6e9ec", lw=0.8)
    axes.set_axisbelow(True)
    plain(axes)
    _head(figure, stairs)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=160))


def _draw_steps(axes: Any, stairs: Staircase) -> None:
    """Draw what was measured; what is unstable is hollow."""
    groups = {
        "a width, with its 95 % interval": [s for s in stairs.steps if s.stable],
        "an unstable reading (staircase.csv says why)": [s for s in stairs.steps if not s.stable],
    }
    for (name, group), fill in zip(groups.items(), (WIDTH, "white"), strict=True):
        if group:
            ends = [
                [s.latency_ratio - s.latency_ratio_lo for s in group],
                [s.latency_ratio_hi - s.latency_ratio for s in group],
            ]
            axes.errorbar(
                [s.width for s in group], [s.latency_ratio for s in group], yerr=ends, fmt="o",
                ms=4.5, color=WIDTH, mfc=fill, elinewidth=1, capsize=2, zorder=3, label=name,
            )  # fmt: skip


def _draw_edges(axes: Any, stairs: Staircase) -> None:
    """Draw each step as a line at the latency of its right edge."""
    ratio = {step.width: step.latency_ratio for step in stairs.steps}
    for edge in stairs.edges:
        start = _start(stairs, edge)
        axes.plot([start, edge], [ratio[edge]] * 2, color=EDGE, lw=2.2, alpha=0.6, zorder=2)
    axes.plot(stairs.edges, [ratio[edge] for edge in stairs.edges], ">", ms=8, color=EDGE,
              mec="white", zorder=4, label="right edge of a step")  # fmt: skip


def _start(stairs: Staircase, edge: int) -> int:
    """Return the first of the widths that lie on an edge's step one after the other up to it."""
    widths = sorted(width for width in stairs.snapped if width <= edge)
    others = [width for width in widths if stairs.snapped[width] != edge]
    return min(width for width in widths if width > max(others, default=-1))


def _head(figure: Any, stairs: Staircase) -> None:
    subject, base = stairs.subject, stairs.subject.architecture
    other = "gate_width" if stairs.sweep.key == "hidden_size" else "hidden_size"
    ms = [step.latency_s * 1e3 for step in stairs.steps]
    shape = f"{base['layers']} layers, gate depth {base['gate_depth']}, {other} {base[other]}"
    line = f"{subject.task}, one inference ({min(ms):.3g} to {max(ms):.3g} ms); {shape}"
    below = "\n".join([line, *filter(None, [subject.fingerprint.get("processor")])])
    figure.suptitle(f"Latency staircase of {stairs.sweep.key} on {subject.device}\n\n", x=0.012,
                    ha="left", fontsize=13, weight="bold", color=INK)  # fmt: skip
    figure.text(
        0.012, 1 - 0.33 / figure.get_figheight(), below, va="top", fontsize=9.5, color=FAINT
    )
