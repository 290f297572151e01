"""What the arms reach on AN4: dense, narrow, prune-only and grow-and-prune, several seeds each.

    python -m benchmarks accuracy --out results/benchmarks/an4-accuracy.csv
    python -m benchmarks accuracy --arm lstm-gp --seed 0 --dropout 0.1
    python -m benchmarks accuracy --table

Every arm gets the same epochs, the same recipe and the same tries of its dropout (`DROPOUTS`, seed
0, chosen on the development split); the chosen one is then run with the other seeds. A row is
appended after every training, so that an interrupted run goes on where it stopped. One thread.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import append_row, read_rows
from gpsearch.candidate import Architecture, Candidate, Training
from gpsearch.kernels.memory import keep_freed_memory
from gpsearch.schedule import GMP, GP, Dense, Schedule
from gpsearch.tasks.speech import SpeechTask
from gpsearch.train import grow_and_prune

SEEDS = (0, 1, 2)
DROPOUTS = (0.1, 0.25)
Shape = dict[str, Any]
LSTM: Shape = {"hidden_size": 128, "gate_depth": 0}
HLSTM: Shape = {"hidden_size": 128, "gate_depth": 1, "gate_width": 96}
DIRECT: Shape = {"hidden_size": 104, "gate_depth": 1, "gate_width": 32, "gate_direct": True}
NARROW: Shape = {"hidden_size": 32, "gate_depth": 1, "gate_width": 24, "gate_direct": False}
NARROW_LSTM: Shape = {"hidden_size": 24, "gate_depth": 0}

ARMS: dict[str, tuple[Shape, Schedule]] = {
    "lstm-dense": (LSTM, Dense()),
    "lstm-gp": (LSTM, GP(final_density=0.1)),
    "lstm-prune-only": (LSTM, GMP(final_density=0.1)),
    "hlstm-direct-gp": (DIRECT, GP(final_density=0.1)),
    "hlstm-direct-dense": (DIRECT, Dense()),
    "hlstm-direct-prune-only": (DIRECT, GMP(final_density=0.1)),
    "hlstm-narrow-dense": (NARROW, Dense()),
    "hlstm-dense": (HLSTM, Dense()),
    "lstm-narrow-dense": (NARROW_LSTM, Dense()),
    "hlstm-gp": (HLSTM, GP(final_density=0.1)),
}


def train(arm: str, seed: int, dropout: float, epochs: int) -> dict[str, object]:
    """Train one arm once and return its row."""
    shape, schedule = ARMS[arm]
    architecture = Architecture(**shape, dropout=dropout)
    candidate = Candidate(architecture, schedule, Training(epochs=epochs))
    task = SpeechTask()
    torch.manual_seed(seed)
    model = task.build(candidate.architecture)
    started = time.process_time()
    grow_and_prune(model, task, candidate.schedule, candidate.training, seed=seed)
    minutes = (time.process_time() - started) / 60
    weights = [p for n, p in model.named_parameters() if task.prunable(n) and p.dim() > 1]
    test = task.evaluate(model, "test")
    return {
        "arm": arm,
        "seed": seed,
        "dropout": dropout,
        "epochs": epochs,
        "weights": sum(w.numel() for w in weights),
        "nonzeros": sum(int(w.count_nonzero()) for w in weights),
        "cpu_minutes": round(minutes, 2),
        "dev_wer": round(task.evaluate(model)["wer"], 4),
        "test_wer": round(test["wer"], 4),
        "test_cer": round(test["cer"], 4),
    }


def run(out: Path, arm: str, seed: int, dropout: float, epochs: int) -> float:
    """Train unless a row is there already; return the development error."""
    for row in read_rows(out):
        if (row["arm"], int(row["seed"]), float(row["dropout"]), int(row["epochs"])) == (
            arm, seed, dropout, epochs,
        ):  # fmt: skip
            return float(row["dev_wer"])
    done = train(arm, seed, dropout, epochs)
    append_row(out, done)
    print("  ".join(f"{key} {value}" for key, value in done.items()), flush=True)
    return float(str(done["dev_wer"]))


def table(out: Path, epochs: int) -> str:
    """Return the rows of so many epochs by arm: means, and the lowest and highest of the seeds."""
    lines = [
        "| arm | weights | non-zeros | dropout | seeds | CPU minutes | dev WER % | test WER % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [row for row in read_rows(out) if int(row["epochs"]) == epochs]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        first = [row for row in rows if row["arm"] == arm and int(row["seed"]) == SEEDS[0]]
        chosen = min(first, key=lambda row: float(row["dev_wer"]))["dropout"]
        kept = [row for row in rows if row["arm"] == arm and row["dropout"] == chosen]
        spread = [
            _spread([float(row[column]) * scale for row in kept], digits)
            for column, scale, digits in (
                ("cpu_minutes", 1, 1), ("dev_wer", 100, 1), ("test_wer", 100, 1),
            )
        ]  # fmt: skip
        cells = [arm, kept[0]["weights"], kept[0]["nonzeros"], chosen, str(len(kept)), *spread]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main(arguments: list[str]) -> None:
    """Run the arms asked for."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks accuracy", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/an4-accuracy.csv"))
    parser.add_argument("--arm", choices=list(ARMS), action="append")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--dropout", type=float, action="append")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--table", action="store_true", help="print what is there, train nothing")
    flags = parser.parse_args(arguments)
    if flags.table:
        print(table(flags.out, flags.epochs))
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    for arm in flags.arm or ARMS:
        tries = {
            dropout: run(flags.out, arm, SEEDS[0], dropout, flags.epochs)
            for dropout in flags.dropout or DROPOUTS
        }
        chosen = min(tries, key=lambda dropout: tries[dropout])
        for seed in flags.seed or SEEDS:
            run(flags.out, arm, seed, chosen, flags.epochs)
