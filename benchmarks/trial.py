"""A whole speech trial: where its time goes, and how long it takes against another revision.

    python -m benchmarks trial [--quick] [--epochs N] [--against GITREV] [--rounds 3]

The candidate is the default one of the space hlstm. Every trial runs in a process of its own, in
one thread; with --against, this working tree and the other revision take turns at beginning, and
their ratios are those of whole trials. The other one is taken out of git and installed into a
folder that is thrown away.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import options
from benchmarks.interleaved import Ratio, Timings
from benchmarks.machine import Neighbours
from benchmarks.report import Column, Row, head, number, ratio_text, save, table
from gpsearch.candidate import Candidate
from gpsearch.errors import UserError
from gpsearch.formats import one_thread
from gpsearch.profiling.intervals import quantile
from gpsearch.space import Space

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
OURS = "this tree"
QUICK_EPOCHS, QUICK_EVERY, QUICK_SECONDS = 4, 8, 1.0
"""A quick trial's epochs, the one utterance of so many that it takes, and its measuring."""
FLAGS = (
    ("against", str, "another revision in git, to take turns with"),
    ("epochs", int, f"default the space's own; quick: {QUICK_EPOCHS}"),
)
TRAINING = ("forward", "backward", "clipping", "optimizer and masks", "growing and pruning")
APART = ("measuring", "once a study")
"""What is left when these are, and training is, should stay below a tenth of a trial."""
OTHER = "other"

Trial = Mapping[str, Any]


def candidate(epochs: int | None) -> Candidate:
    """Return the default candidate of the space hlstm, with other epochs if they are given."""
    default = Space.read("hlstm").candidate({})
    if epochs is None:
        return default
    return replace(default, training=replace(default.training, epochs=epochs))


def shortest_toml(chosen: Candidate) -> str:
    """Return the candidate without what is at its default: a revision may lack newer keys."""
    schedule = type(chosen.schedule)()
    usual = Candidate(schedule=schedule).to_dict()
    lines = []
    for table_, rows in chosen.to_dict().items():
        own = {k: v for k, v in rows.items() if k == "name" or v != usual[table_][k]}
        # A scalar of JSON is one of TOML.
        lines += [f"[{table_}]"] * bool(own)
        lines += [f"{key} = {json.dumps(v)}" for key, v in own.items()]
    return "\n".join(lines) + "\n"


def install(revision: str, folder: Path) -> Path:
    """Install a revision of gpsearch, its kernels in C included; return where from to import it.

    Raises:
        UserError: git does not know the revision, or pip cannot install it.
    """
    archive = ["git", "-C", str(ROOT), "archive", "--format=tar", revision]
    packed = _output(archive, f"--against {revision}: git cannot give it out")
    source, site = folder / "source", folder / "site"
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(source, filter="data")
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-build-isolation"]
    _output([*pip, "--target", str(site), str(source)], f"--against {revision}: pip failed")
    return site


def _output(command: Sequence[str], otherwise: str) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{otherwise}: {last}")
    return done.stdout


def run(chosen: Path, site: Path | None, size: tuple[int, float]) -> Trial:
    """Run one trial in a fresh process, of this tree or of what is installed in ``site``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(site or ROOT)}
    # -P: what is imported is not to be found beside the script.
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "one_trial.py"), str(chosen)]
    command += map(str, size)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found: Trial = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(
    chosen: Candidate,
    against: str | None,
    rounds: int,
    folder: Path,
    size: tuple[int, float] = (1, 20.0),
) -> dict[str, list[Trial]]:
    """Run trials in turn; return them by revision.

    Args:
        chosen: What they train.
        against: The other revision, if there is one.
        rounds: How many trials of each.
        folder: For what is needed meanwhile.
        size: One utterance of how many is taken, and the seconds to measure a latency.
    """
    file = folder / "candidate.toml"
    file.write_text(shortest_toml(chosen), encoding="utf-8")
    sites = {OURS: None} | ({against: install(against, folder)} if against else {})
    trials: dict[str, list[Trial]] = {name: [] for name in sites}
    for turn in range(rounds):
        for name in list(sites)[:: -1 if turn % 2 else 1]:
            trials[name].append(run(file, sites[name], size))
            print(f"{name}: {trials[name][-1]['wall_s']:.1f} s", flush=True)
    return trials


def rows_of(trials: Mapping[str, Sequence[Trial]]) -> list[Row]:
    """Return a row for each part of each revision's trials, and one for the whole."""
    rows: list[Row] = []
    for name, own in trials.items():
        whole = {clock: _median(own, clock) for clock in ("wall_s", "cpu_s")}
        for part in [*_parts(own), OTHER]:
            seconds = {clock: _part_s(own, clock, part) for clock in whole}
            rows.append(_row(name, part, part in TRAINING, seconds, whole))
        rows.append(_row(name, "whole trial", None, whole, whole))
    return rows


def _row(
    revision: str,
    part: str,
    training: bool | None,
    seconds: Mapping[str, float],
    whole: Mapping[str, float],
) -> Row:
    share = seconds["cpu_s"] / whole["cpu_s"]
    return {"revision": revision, "part": part, "training": training, **seconds, "share": share}


def _parts(trials: Sequence[Trial]) -> list[str]:
    """Return the parts, the longest first."""
    found = list(dict.fromkeys(part for trial in trials for part in trial["parts"]["wall_s"]))
    return sorted(found, key=lambda part: -_part_s(trials, "wall_s", part))


def _part_s(trials: Sequence[Trial], clock: str, part: str) -> float:
    if part == OTHER:
        return quantile([t[clock] - sum(t["parts"][clock].values()) for t in trials])
    return quantile([t["parts"][clock].get(part, 0.0) for t in trials])


def _median(trials: Sequence[Trial], key: str) -> float:
    return quantile([trial[key] for trial in trials])


def overhead(rows: Sequence[Row], name: str) -> float:
    """Return the share of a revision's trials that is neither training nor `APART`."""
    own = [row for row in rows if row["revision"] == name and row["training"] is not None]
    counted = {row["part"]: float(row["cpu_s"]) for row in own if row["part"] not in APART}
    return 1 - sum(counted.get(part, 0.0) for part in TRAINING) / sum(counted.values())


def speed_up(trials: Mapping[str, Sequence[Trial]], against: str, clock: str) -> Ratio:
    """Return how many times as long the other revision's trials took."""
    seconds = {name: [trial[clock] for trial in own] for name, own in trials.items()}
    ratio = Timings(seconds).ratio(against, OURS)
    if ratio.low is None and len(seconds[OURS]) > 1:  # too few for 95 %: the lowest and highest
        pairs = [a / b for a, b in zip(seconds[against], seconds[OURS], strict=True)]
        return Ratio(ratio.value, min(pairs), max(pairs))
    return ratio


COLUMNS = (
    Column("part", "part"),
    Column("wall_s", "wall s", number(1)),
    Column("cpu_s", "CPU s", number(1)),
    Column("share", "share of CPU", number(1, 100, " %")),
)


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """Draw a bar for each revision, its parts one after the other."""
    from matplotlib import colormaps

    names = list(dict.fromkeys(row["revision"] for row in rows))
    figure.set_size_inches(10, 1.9 + 0.6 * len(names))
    axes = figure.subplots()
    parts = list(dict.fromkeys(r["part"] for r in rows if r["training"] is not None))
    order = sorted(parts, key=lambda part: part not in TRAINING)
    left = dict.fromkeys(names, 0.0)
    for index, part in enumerate(order):
        seconds = {r["revision"]: r["wall_s"] for r in rows if r["part"] == part}
        widths = [seconds.get(name, 0.0) for name in names]
        colour = colormaps["tab20"](index)
        axes.barh(names, widths, left=[left[n] for n in names], label=part, color=colour)
        left = {name: left[name] + width for name, width in zip(names, widths, strict=True)}
    axes.invert_yaxis()
    axes.set_xlabel("wall time of one trial, s")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def main(arguments: list[str]) -> None:
    """Run the trials, print, and leave table, rows and picture in a folder.

    Raises:
        UserError: The revision cannot be had.
    """
    flags = options.parse("trial", __doc__, arguments, rounds=3, quick_rounds=1, more=FLAGS)
    against = flags.more["against"]
    chosen = candidate(flags.more["epochs"] or (QUICK_EPOCHS if flags.quick else None))
    size = (QUICK_EVERY, QUICK_SECONDS) if flags.quick else (1, 20.0)
    neighbours = Neighbours()
    with tempfile.TemporaryDirectory() as folder, one_thread():
        trials = measure(chosen, against, flags.rounds, Path(folder), size)
    rows = rows_of(trials)
    notes = {
        "candidate": f"{chosen.in_short()}; {chosen.training.epochs} epochs",
        "how": f"median of {flags.rounds} trial(s), each in its own process, 1 thread",
        "brackets": "95 %; of fewer than six pairs the lowest and the highest",
        "others": str(neighbours),
        "not training": ", ".join(f"{n} {overhead(rows, n):.1%}" for n in trials)
        + f" of the processor time without {' and '.join(APART)}",
        "error": ", ".join(f"{n} {own[-1]['metrics']['wer']:.3f}" for n, own in trials.items()),
    }
    for clock in ("wall_s", "cpu_s") if against else ():
        ratio = ratio_text(speed_up(trials, against, clock))
        notes[f"times, {clock[:-2]}"] = f"{against} / {OURS}: {ratio}"
    if flags.quick:
        notes["quick"] = f"one utterance of {QUICK_EVERY}; {QUICK_SECONDS} s to measure a latency"
    text = head("The default speech trial", notes) + "\n\n" + table(rows, COLUMNS, "revision")
    save(flags.out, "trial", text, rows, lambda figure: draw(rows, figure))
