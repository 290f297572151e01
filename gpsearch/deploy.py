"""A deployed model and its costs: saved, loaded, counted, measured; also in a fresh process."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from gpsearch import flops, learned, profiling, tasks
from gpsearch.candidate import Candidate
from gpsearch.cell import HLSTM, HLSTMCell
from gpsearch.compact import compact
from gpsearch.errors import Unsupported, UserError
from gpsearch.files import read_json, write_json, write_pickled
from gpsearch.growprune import sketch
from gpsearch.objectives import Objective
from gpsearch.profiling import DeviceFacts, DeviceProfiler, Host, Reading, aa_gate, measure
from gpsearch.profiling.host import WAITING
from gpsearch.settings import Settings
from gpsearch.space import Space
from gpsearch.study import Row, Study
from gpsearch.tasks import Task


def check_device(facts: DeviceFacts, settings: Settings) -> None:
    """Refuse a device that cannot measure what a study needs, and was not asked to estimate.

    Raises:
        UserError: It cannot; says what, and why.
    """
    for column in sorted({"latency_s", *settings.columns}):
        reason = facts.why_not(column)
        if reason is not None and not (column == "energy_j" and settings.estimate_w):
            raise UserError(f"device {facts.name!r} cannot measure {column}: {reason}")


def check_reference(device: DeviceProfiler, reference: nn.Module, task: Task) -> None:
    """Refuse a device that cannot run what all latencies are held against, before all trainings.

    Raises:
        UserError: It cannot; says why.
    """
    with tasks.telling(task.name, "gives no example"):
        example = task.example()
    try:
        profiling.load(device, reference, example)
    except Unsupported as error:
        name = profiling.facts_of(device).name
        raise UserError(
            f"device {name!r} cannot run task {task.name!r}: {error.args[0]}; "
            "choose another --device, such as cpu"
        ) from error
    except UserError as error:
        raise UserError(
            f"task {task.name!r}: its network cannot take example(): {error.args[0]}"
        ) from error


def read_costs(
    device: DeviceProfiler,
    model: nn.Module,
    task: Task,
    *,
    reference: nn.Module | None = None,
    reference_name: str = "reference",
    reference_s: float | None = None,
    energy: bool = False,
    estimate_w: float | None = None,
    precision: float = 0.01,
    max_seconds: float = 20.0,
) -> Reading:
    """Measure a model on the task's example, and count its FLOPs and weights.

    What the A/A gate has against the device is held against each of its readings.
    """
    example = task.example()
    doubts = aa_gate(device, model if reference is None else reference, example)
    reading = measure(
        device,
        model,
        example,
        reference=reference,
        reference_name=reference_name,
        reference_s=reference_s,
        energy=energy,
        estimate_w=estimate_w,
        precision=precision,
        max_seconds=max_seconds,
    )
    counts = flops.count(model, example)
    return dataclasses.replace(
        reading,
        quantities={**reading.quantities, **counts},
        stable=reading.stable and not doubts,
        flags=[*doubts, *reading.flags],
    )


def read_for(
    study: Study, device: DeviceProfiler, model: nn.Module, task: Task, reference: nn.Module
) -> Reading:
    """Measure a model as all of a study's are: what its settings ask for, beside its reference."""
    return read_costs(
        device,
        model,
        task,
        reference=reference,
        reference_name=reference_name(study.space),
        reference_s=study.reference_s(profiling.facts_of(device).fingerprint),
        energy="energy_j" in study.settings.columns,
        estimate_w=study.settings.estimate_w,
    )


def columns(reading: Reading) -> Row:
    """Return a reading as columns of ``trials.csv``; what is unavailable is None."""
    row: Row = {name: quantity.value for name, quantity in reading.quantities.items()}
    if reading["energy_j"].available:
        row["energy_kind"] = reading["energy_j"].kind
    row["latency_lo_s"], row["latency_hi_s"] = reading["latency_s"].ci95 or (None, None)
    return row


def lacking(reading: Reading, goals: Sequence[Objective]) -> str | None:
    """Say which objective has no value of the kind that may share the front, and why."""
    for goal in goals:
        quantity = reading.quantities.get(goal.column)
        if goal.name != "error" and (quantity is None or quantity.kind != goal.kind):
            why = quantity.reason if quantity else "not measured"
            return f"no {goal.kind} {goal.name}: {why}"
    return None


def at_least(glance: Reading, usual_s: float | None) -> Row:
    """Return the costs of a short reading as low as they may be: no disturbance must decide.

    Its latency, and the joules that are estimated by it, are the lower end of the ratio to the
    reference model (of too few calls for an interval: half of it), times what this takes.

    Args:
        glance: A reading beside the reference model.
        usual_s: What the reference takes, in s, if it does not take less in this reading.
    """
    row, ratio = columns(glance), glance["latency_ratio"]
    lowest = ratio.ci95[0] if ratio.ci95 else ratio.number / 2
    now_s: float = row["latency_reference_s"]
    latency_s = lowest * (now_s if usual_s is None else min(usual_s, now_s))
    costs = {name: value for name, value in row.items() if not name.startswith("latency_")}
    if costs["energy_j"] is not None:
        costs["energy_j"] *= latency_s / row["latency_s"]
    return {**costs, "latency_s": latency_s}


def reference_model(space: Space, task: Task) -> nn.Module:
    """Return the space's first baseline, untrained: every latency is interleaved with it."""
    return plain_network(space.baseline_candidates()[reference_name(space)], task)


def plain_network(candidate: Candidate, task: Task) -> nn.Module:
    """Return a candidate's network, always the same, untrained and as torch runs it.

    Raises:
        UserError: The task cannot build it.
    """
    return _fresh(candidate, task).eval()


def _fresh(candidate: Candidate, task: Task) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tasks.build(task, candidate.architecture)


def reference_name(space: Space) -> str:
    """Return the name of the space's first baseline."""
    return next(iter(space.baselines()))


def untrained(candidate: Path, task: Task, *, here: bool = True) -> nn.Module:
    """Return what a candidate file's model will look like: pruned to its final density, compact.

    Args:
        candidate: The file.
        task: What it is for.
        here: As for `compact`.

    Raises:
        UserError: The file is no candidate, or the task cannot build it.
    """
    chosen = Candidate.read(candidate)
    model = _fresh(chosen, task)
    sketched = sketch(model, chosen.schedule, tasks.prunable(task, chosen.schedule))
    return compact(sketched, weights=chosen.deployment.weights, here=here)


def save_model(model: nn.Module, path: Path) -> None:
    """Save a deployed model atomically, as a pickled module."""
    write_pickled(path, model)


@torch.inference_mode(False)  # as for `gpsearch.compact`
def load_model(path: Path) -> nn.Module:
    """Load a model that `save_model` wrote. Like every pickle it must come from a trusted source.

    Raises:
        UserError: The file is missing or damaged.
    """
    if not path.exists():
        raise UserError(f"{path}: no such model (models are kept for members of the front)")
    try:
        model = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling runs code: whatever it raises, the file is no good
        raise UserError(f"{path}: not a readable model ({type(error).__name__})") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{path}: holds no model")
    for name, module in model.named_modules():
        if isinstance(module, HLSTM | HLSTMCell):
            try:
                module.check()
            except UserError as error:
                raise UserError(f"{path}: damaged in {name or 'the model'}: {error}") from error
    return model.eval()


def remeasure(folder: Path, number: int) -> Row:
    """Measure a trial's model in a fresh process and score it on the test split.

    Raises:
        RuntimeError: The process failed.
    """
    row: Row = _in_a_fresh_process(folder, number)
    return row


def reading_on(device: str, folder: Path, number: int) -> Reading:
    """Measure a trial's model on a device in a fresh process; the test split stays untouched.

    Raises:
        RuntimeError: The process failed.
    """
    return Reading.from_dict(_in_a_fresh_process(folder, number, device))


def _in_a_fresh_process(folder: Path, number: int, *device: str) -> dict[str, Any]:
    environment = {**os.environ, WAITING: str(os.getpid())}
    with TemporaryDirectory() as own:
        answer = Path(own) / "found.json"  # a plug-in may print
        words = [str(answer), str(folder), str(number), *device]
        command = [sys.executable, "-P", "-m", "gpsearch.deploy", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"measuring trial {number} again failed: {last}")
        return read_json(answer)


def _answer(folder: Path, number: int, device: str = "") -> dict[str, Any]:
    """Return the row of a study's end; on a device that is named, the reading alone."""
    study = Study(folder)
    task = tasks.find(study.settings.task, study.settings.data_path)
    learned.check(folder, task)
    model = load_model(study.trial_folder(number) / "model.pt")
    with profiling.closing(profiling.find(device or study.settings.device)) as profiler:
        reading = read_for(study, profiler, model, task, reference_model(study.space, task))
    return reading.to_dict() if device else _final(study, task, model, reading)


def _final(study: Study, task: Task, model: nn.Module, reading: Reading) -> Row:
    """Score a member on the test split, and join what was measured of it at the end."""
    with Host().sharing():
        scores = tasks.scores(task, model, "test")
    tested = {f"test_{name}": value for name, value in scores.items()}
    costs = columns(reading)
    return {**costs, **study.slowdown(costs), **tested, "flags": "; ".join(reading.flags)}


if __name__ == "__main__":
    to, of, which, *elsewhere = sys.argv[1:]
    try:
        found = _answer(Path(of), int(which), *elsewhere)
    except UserError as refusal:
        sys.exit(str(refusal))
    write_json(Path(to), found)
