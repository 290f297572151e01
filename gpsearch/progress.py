"""What a person sees while a search works, and the tables of devices and readings.

On a terminal the current trial is one line that is rewritten; in a log file, a line every few
epochs. Every finished trial leaves one line in both.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from gpsearch import profiling, tasks
from gpsearch.candidate import Candidate
from gpsearch.errors import UserError
from gpsearch.kernels import native
from gpsearch.objectives import OBJECTIVES
from gpsearch.profiling import Quantity, Reading
from gpsearch.sampling import Proposal
from gpsearch.staircase import Step
from gpsearch.study import Row, Study
from gpsearch.train import Epoch

LOG_EVERY_S = 20.0
"""In a log file, the least time between two lines about one training."""


class Progress:
    """Prints a search's events.

    Args:
        study: The study at work.
        renew: Called after every finished trial, to rewrite tables and pictures.
    """

    def __init__(self, study: Study, renew: Callable[[], object]) -> None:
        self.study, self.renew = study, renew
        self.live = sys.stderr.isatty()
        self.started_s = self.logged_s = time.monotonic()
        self.trials_here = 0
        self.more = 0
        """Trials after the one in hand."""
        self.what = ""

    def note(self, text: str) -> None:
        """Say something that the user should know."""
        self._line(f"note: {text}")

    def trial_begins(self, number: int, proposal: Proposal) -> None:
        """Say what is tried."""
        baseline = f"baseline {proposal.baseline}: " if proposal.baseline else ""
        self.more = self.study.settings.budget - number - 1
        self.what = f"trial {number} ({number + 1} of {self.study.settings.budget})"
        self._line(f"{self.what}  {baseline}{proposal.candidate.in_short()}")

    def epoch_ends(self, number: int, epoch: Epoch, epochs: int) -> None:
        """Say how far the training is."""
        left_s = (epochs - epoch.epoch - 1) * epoch.seconds
        text = f"{self.what}  {epoch_line(epoch, epochs)}  trial {_clock(left_s)} left"
        if left := self._study_left_s(left_s):
            text += f", study {_clock(left)}"
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[2K{text[:width]}")
            sys.stderr.flush()
        elif epoch.event or time.monotonic() - self.logged_s > LOG_EVERY_S:
            self._line(text)

    def trial_ends(self, number: int, row: Row) -> None:
        """Say what came out, and renew the results."""
        self.trials_here += 1
        shown = [f"{self.what}  {row['state']}"]
        for goal in self.study.settings.goals:
            if row.get(goal.column) is not None:
                plain = goal.name == "error" and not _is_fraction(row, row)
                scale, unit = (1.0, "") if plain else (goal.scale, f" {goal.unit}")
                shown += [f"{goal.title} {row[goal.column] * scale:.4g}{unit}"]
        self._line("  ".join([*shown, row.get("reason", "")]).rstrip())
        self.renew()

    def final_ends(self, number: int, row: Row) -> None:
        """Say what a member of the front came to in the end."""
        error = "unknown"  # it may be no number on this split
        if row["test_error"] is not None:
            fraction = _is_fraction(row, self.study.rows()[number], "test_")
            error = f"{row['test_error']:{'.2%' if fraction else '.3f'}}"
        self._line(
            f"front: trial {number} measured again: latency {row['latency_s'] * 1e3:.3g} ms, "
            f"test error {error}"
        )

    def close(self) -> None:
        """Leave the cursor on a fresh line."""
        if self.live:
            sys.stderr.write("\r\x1b[2K")

    def _line(self, text: str) -> None:
        self.logged_s = time.monotonic()
        self.close()
        print(text, file=sys.stderr, flush=True)

    def _study_left_s(self, trial_left_s: float) -> float | None:
        """Estimate the study's time left from the trials this process has finished."""
        if not self.trials_here:
            return None
        each_s = (time.monotonic() - self.started_s) / (self.trials_here + 0.5)
        return trial_left_s + self.more * each_s


def again_line(trial: int, reading: Reading) -> str:
    """Return a member of the front that was measured again in one line."""
    latency, ratio = reading["latency_s"], reading["latency_ratio"]
    text = f"trial {trial}: latency {latency.number * 1e3:.3g} ms, {ratio.number:.3f} x"
    return "; ".join([f"{text} {reading.reference}", *reading.flags])


class RowProgress:
    """Tells of a reproduction's rows, a line at a time."""

    def row_begins(self, name: str, seed: int, candidate: Candidate) -> None:
        """Say what is trained."""
        print(f"{name}, seed {seed}  {candidate.in_short()}", file=sys.stderr, flush=True)

    def epoch_ends(self, epoch: Epoch, epochs: int) -> None:
        """Say what an epoch came to."""
        print(f"  {epoch_line(epoch, epochs)}", file=sys.stderr, flush=True)

    def row_ends(self, row: Row) -> None:
        """Say what the row came to."""
        text = f"{row['row']}, seed {row['seed']}: {row['metric']} "
        scores = " dev, ".join(
            f"{row[f'{split}_' + row['metric']]:.4f}" for split in ("dev", "test")
        )
        print(f"{text}{scores} test", file=sys.stderr, flush=True)


def step_line(step: Step) -> str:
    """Return one width of a staircase in one line."""
    ends = f"{step.latency_ratio_lo:.3f} to {step.latency_ratio_hi:.3f}"
    text = f"{step.width}: {step.latency_ratio:.3f} x the reference ({ends})"
    return "; ".join(filter(None, [f"{text}, {step.latency_s * 1e3:.3g} ms", step.flags]))


def epoch_line(epoch: Epoch, epochs: int) -> str:
    """Return an epoch in one line."""
    text = (
        f"epoch {epoch.epoch + 1}/{epochs}  {epoch.phase}  density {epoch.density:.3f}  "
        f"loss {epoch.loss:.3f}  dev error {epoch.error:.2%}  {epoch.seconds:.1f} s"
    )
    return f"{text}  ({epoch.event})" if epoch.event else text


def reading_lines(reading: Reading) -> str:
    """Return a reading as a small table, one quantity a line."""
    lines = [f"{name:20} {quantity_text(q)}" for name, q in reading.quantities.items()]
    lines += [f"{'device':20} {reading.device}, protocol {reading.protocol}"]
    lines += [f"{'flag':20} {flag}" for flag in reading.flags]
    return "\n".join(lines) + "\n"


def quantity_text(quantity: Quantity) -> str:
    """Return a quantity with unit, interval and origin."""
    if quantity.value is None:
        return f"unavailable: {quantity.reason}"
    text = f"{_number(quantity.value)} {'' if quantity.unit == '1' else quantity.unit}".rstrip()
    if quantity.ci95 is not None:
        text += f"  (95 %: {quantity.ci95[0]:.4g} to {quantity.ci95[1]:.4g})"
    origin = [quantity.kind, quantity.method]
    origin += [quantity.reason or ""] if quantity.kind == "estimated" else []
    return f"{text}  {', '.join(filter(None, origin))}"


def devices_text() -> str:
    """Return the installed devices, what each can measure, and why not."""
    lines = []
    for name, facts in profiling.devices().items():
        package = profiling.installed()[name]
        if isinstance(facts, UserError):
            lines.append(f"{name}  ({package})\n  unusable: {facts}")
            continue
        lines.append(f"{name}  ({package})")
        for goal in ("latency", "energy"):
            reason = facts.why_not(OBJECTIVES[goal].column)
            method = {"latency": facts.latency_method, "energy": facts.energy_method}[goal]
            lines.append(f"  {goal:8} {f'yes, by {method}' if reason is None else f'no: {reason}'}")
    return "\n".join(lines) + "\n"


def diagnosis() -> str:
    """Return what works here, what doesn't and the remedy."""
    import torch

    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads"]
    lines += [f"kernels {native.description()}"]
    lines += [devices_text().rstrip()]
    lines += [_timing()]
    free_gb = shutil.disk_usage(".").free / 1e9
    lines += [f"disk    {free_gb:.1f} GB free here" + (" (a study wants 1)" if free_gb < 1 else "")]
    if importlib.util.find_spec("pynvml") is None:
        lines += ["nvml    not installed; for energy on NVIDIA GPUs: pip install nvidia-ml-py"]
    return "\n".join(lines) + "\n"


def _timing() -> str:
    """Measure a model against itself on the CPU."""
    import torch

    reading = profiling.check(
        profiling.find("cpu"), torch.nn.LSTM(64, 96), (torch.zeros(40, 1, 64),)
    )
    ratio = reading["latency_ratio"].value
    if reading.stable:
        return f"timing  a model against itself: {ratio:.3f}, good enough to rank models"
    return "timing  noisy: " + "; ".join(reading.flags) + "; stop other work before a search"


def _is_fraction(row: Row, of_trial: Row, split: str = "") -> bool:
    """Say whether a row's error is a fraction; its trial's row names metric and unit."""
    error, unit = row[f"{split}error"], of_trial.get("metric_unit", "%")
    metric = row.get(f"{split}{of_trial.get('metric')}")
    return tasks.is_fraction(error, error if metric is None else metric, unit)


def _number(value: float | int) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _clock(seconds: Any) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
    )
