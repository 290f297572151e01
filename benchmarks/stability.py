"""How stable the paired latency ratio is while 0 to 3 other processes burn the processors.

    python -m benchmarks stability [--seconds 1.0]

Two fixed models, nn.LSTM(64, 128) and nn.LSTM(64, 96), one utterance of 50 steps, one thread;
before every reading 0, 1, 2 or 3 busy loops are started, at random. `pair` measures the one against
the other, `same` the first against itself. A row is appended after every reading, so that a run
that was interrupted goes on, on the same machine, which the table names. A quarter to half an hour.

What is wanted: coefficient of variation of `pair` <= 1 % over 30 readings; `same` within 1 +- 2 %
in 99 of 100.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.machine import description
from benchmarks.options import RESULTS
from benchmarks.report import BAR, PALE, append_row, head, read_rows, save_text
from gpsearch.errors import UserError
from gpsearch.profiling import AA_GATE, DeviceProfiler, find, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READINGS = {"pair": 30, "same": 100}
CV = 0.01


@contextmanager
def competitors(count: int) -> Iterator[None]:
    """Keep so many processes busy."""
    busy = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in busy:
            one.kill()
            one.wait()


def reading(device: DeviceProfiler, what: str, count: int, seconds: float) -> dict[str, object]:
    """Measure once beside ``count`` busy processes and return the row."""
    torch.manual_seed(0)
    model, example = nn.LSTM(64, 128), (torch.randn(50, 1, 64),)
    reference = nn.LSTM(64, 96) if what == "pair" else model
    started_s = time.monotonic()
    with competitors(count):
        found = measure(device, model, example, reference=reference, max_seconds=seconds)
    ratio = found["latency_ratio"]
    low, high = ratio.ci95 or (None, None)
    return {
        "what": what,
        "competitors": count,
        "ratio": ratio.value,
        "low": low,
        "high": high,
        "n": ratio.n,
        "latency_ms": found["latency_s"].number * 1e3,
        "wall_s": round(time.monotonic() - started_s, 2),
        "flags": "; ".join(found.flags),
    }


def run(out: Path, seconds: float, limit_s: float) -> int:
    """Take the readings that are not there yet, in random order, until the time is over.

    Returns:
        How many were taken.
    """
    device, deadline_s = find("cpu"), time.monotonic() + limit_s
    done = [row["what"] for row in read_rows(out)]
    todo = [what for what, n in READINGS.items() for _ in range(n - done.count(what))]
    chance = random.Random(len(done))
    chance.shuffle(todo)
    for taken, what in enumerate(todo):
        if time.monotonic() > deadline_s:
            return taken
        append_row(out, reading(device, what, chance.randrange(4), seconds))
    return len(todo)


def machine_of(path: Path) -> dict[str, str]:
    """Return what a table says of the machine that its readings were taken on, if there is one."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    said = {name: words.strip() for name, _, words in (s.partition(":") for s in text.splitlines())}
    return {name: said[name] for name in description() if name in said}


def table(rows: Sequence[dict[str, str]]) -> str:
    """Return what the readings come to, by the number of busy processes and in all."""
    lines = ["what  busy  readings  ratio (lowest to highest)  CV of ratio  CV of plain median"]
    for what in READINGS:
        for count in ("0", "1", "2", "3", "all"):
            some = [r for r in rows if r["what"] == what and count in (r["competitors"], "all")]
            if len(some) < 2:
                continue
            ratios, plain = _column(some, "ratio"), _column(some, "latency_ms")
            spread = f"{statistics.mean(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})"
            lines.append(
                f"{what:4}  {count:>4}  {len(some):8}  {spread:>25}  {_cv(ratios):11.2%}"
                f"  {_cv(plain):18.1%}"
            )
    same = _column([row for row in rows if row["what"] == "same"], "ratio")
    inside = sum(abs(ratio - 1) <= AA_GATE for ratio in same)
    lines.append(f"\nsame: {inside} of {len(same)} within 1 +- {AA_GATE:.0%}")
    return "\n".join(lines)


def _column(rows: Sequence[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def _cv(values: list[float]) -> float:
    return statistics.stdev(values) / statistics.mean(values)


def _draw(figure: Figure, rows: Sequence[dict[str, str]]) -> None:
    figure.set_size_inches(8, 3.2)
    titles = {"pair": "one model against another", "same": "a model against itself"}
    for axes, (what, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        ratios = _column([row for row in rows if row["what"] == what], "ratio")
        middle = statistics.median(ratios) if what == "pair" else 1
        axes.axhspan(middle * (1 - AA_GATE), middle * (1 + AA_GATE), color=PALE, alpha=0.15)
        chance = random.Random(0)
        for row in (row for row in rows if row["what"] == what):
            place = int(row["competitors"]) + chance.uniform(-0.15, 0.15)
            axes.plot(place, float(row["ratio"]), "o", color=BAR, markersize=3, alpha=0.6)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(4))
        axes.set_xlim(-0.5, 3.5)
        axes.set_xlabel("busy processes", fontsize=8)
        axes.set_ylabel(f"latency ratio; the band is ± {AA_GATE:.0%}", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)


def main(arguments: list[str]) -> None:
    """Take the readings that are missing, and write what they all come to."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks stability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "benchmarks", help="folder")
    parser.add_argument("--seconds", type=float, default=1.0, help="time on the device, a reading")
    parser.add_argument("--limit", type=float, default=2400.0, help="stop after so many seconds")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    flags = parser.parse_args(arguments)
    readings = flags.out / "stability.csv"
    taken = 0 if flags.table else run(readings, flags.seconds, flags.limit)
    rows = read_rows(readings)
    if not {"pair", "same"} <= {row["what"] for row in rows}:
        raise UserError(f"{readings} has no readings of both kinds yet: run without --table")
    notes = {"wanted": f"CV of pair <= {CV:.0%}; same within 1 +- {AA_GATE:.0%} in 99 of 100"}
    machine = description() if taken else machine_of(flags.out / "stability.txt")
    text = f"{head('Stability of the latency ratio', notes, machine)}\n\n{table(rows)}"
    save_text(flags.out, "stability", text, lambda figure: _draw(figure, rows))
