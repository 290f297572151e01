"""How stable the paired latency ratio is while 0 to 3 other processes burn the processors.

    python -m benchmarks.latency_stability --out results/benchmarks/latency-stability.csv
    python -m benchmarks.latency_stability --table

Two fixed models, nn.LSTM(64, 128) and nn.LSTM(64, 96), one utterance of 50 steps, one thread;
before every reading 0, 1, 2 or 3 busy loops are started, at random. `pair` measures the one against
the other, `same` the first against itself. A row is appended after every reading.

What is wanted: coefficient of variation of `pair` <= 1 % over 30 readings; `same` within 1 +- 2 %
in 99 of 100.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from gpsearch.profiling import AA_GATE, DeviceProfiler, find, measure

READINGS = {"pair": 30, "same": 100}
CV = 0.01
COLUMNS = ("what", "competitors", "ratio", "low", "high", "n", "latency_ms", "wall_s", "flags")


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


def run(out: Path, seconds: float, limit_s: float) -> None:
    """Take the readings that are not there yet, in random order, until the time is over."""
    device, deadline_s = find("cpu"), time.monotonic() + limit_s
    done = [row["what"] for row in rows_of(out)]
    todo = [what for what, n in READINGS.items() for _ in range(n - done.count(what))]
    chance = random.Random(len(done))
    chance.shuffle(todo)
    for what in todo:
        if time.monotonic() > deadline_s:
            return
        append(out, reading(device, what, chance.randrange(4), seconds))


def append(out: Path, row: dict[str, object]) -> None:
    """Add a row to the table, and its head if it is the first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = not out.exists()
    with out.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def rows_of(out: Path) -> list[dict[str, str]]:
    """Return the rows written so far."""
    return list(csv.DictReader(out.open(encoding="utf-8"))) if out.exists() else []


def table(out: Path) -> str:
    """Return what the readings come to, and whether that is what is wanted."""
    rows = rows_of(out)
    pair = [row for row in rows if row["what"] == "pair"]
    ratios = [float(row["ratio"]) for row in pair]
    plain = [float(row["latency_ms"]) for row in pair]
    same = [float(row["ratio"]) for row in rows if row["what"] == "same"]
    inside = sum(abs(ratio - 1) <= AA_GATE for ratio in same)
    return "\n".join(
        [
            f"pair: CV of the ratio {_cv(ratios):.2%} over {len(ratios)} readings "
            f"(wanted <= {CV:.0%}); of the plain median {_cv(plain):.1%}",
            f"same: {inside} of {len(same)} within 1 +- {AA_GATE:.0%} (wanted 99 of 100), "
            f"from {min(same):.4f} to {max(same):.4f}",
        ]
    )


def _cv(values: list[float]) -> float:
    return statistics.stdev(values) / statistics.mean(values)


def main() -> None:
    """Take the readings, and print what they come to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--out", type=Path, default=Path("results/benchmarks/latency-stability.csv")
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time on the device, a reading")
    parser.add_argument("--limit", type=float, default=1800.0, help="stop after so many seconds")
    parser.add_argument("--table", action="store_true", help="print what is there, measure nothing")
    flags = parser.parse_args()
    if not flags.table:
        run(flags.out, flags.seconds, flags.limit)
    print(table(flags.out))


if __name__ == "__main__":
    main()
