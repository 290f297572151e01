"""The latency staircase: how the time of an inference on a device rises with a layer's width.

Kernels and their tiles make it rise in steps (the "latency hysteresis" of arXiv 1901.10997); within
one, the widest layer costs no more than the narrowest. What a step is must be told from noisy
measurements: see `right_edges`. Where a space says ``snap = "device"``, widths are taken from the
steps' right edges alone.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import random
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from gpsearch import profiling, tasks
from gpsearch.candidate import Architecture
from gpsearch.compact import compact
from gpsearch.errors import UserError
from gpsearch.files import slug, write_json, write_text
from gpsearch.profiling import DeviceFacts, DeviceProfiler, Reading, aa_gate, facts_of, measure
from gpsearch.profiling.measuring import PROTOCOL
from gpsearch.settings import Settings
from gpsearch.space import Space
from gpsearch.tasks import Task

FOLDER = Path("results") / "staircases"
WIDTHS = {"hidden": "hidden_size", "gate": "gate_width"}
"""What may be swept, by the short name and by the architecture's."""
EQUAL = 0.03
"""A width counts as no slower than another if it is shown to take at most this share longer."""
PRECISION = 0.0075
"""Wanted half-width of a ratio's interval: two of them have to fit into `EQUAL`."""
MAX_SECONDS = 8.0


@dataclass(frozen=True)
class Sweep:
    """The widths to measure, such as ``hidden=64:512:8``: both ends are included."""

    key: str
    """"hidden_size" or "gate_width"."""
    low: int
    high: int
    step: int

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """Read ``--sweep``.

        Raises:
            UserError: It has another form, or its step does not lead from low to high.
        """
        match = re.fullmatch(r"(\w+)=(\d+):(\d+):(\d+)", text.strip())
        key = WIDTHS.get(match[1], match[1]) if match else ""
        if match is None or key not in WIDTHS.values():
            raise UserError(f"--sweep: {text!r} should look like hidden=64:512:8 or gate=16:64:8")
        low, high, step = (int(number) for number in match.groups()[1:])
        if not 0 < low < high or step == 0 or (high - low) % step:
            raise UserError(f"--sweep: {text!r}: steps of {step} do not lead from {low} to {high}")
        return cls(key, low, high, step)

    @property
    def widths(self) -> list[int]:
        """All widths, rising."""
        return list(range(self.low, self.high + 1, self.step))

    def __str__(self) -> str:
        return f"{self.key}={self.low}:{self.high}:{self.step}"


@dataclass(frozen=True)
class Subject:
    """All that a staircase depends on; another machine, task or shape has another one."""

    device: str
    fingerprint: dict[str, str]
    task: str
    example: list[list[int]]
    """The shapes of one inference's arguments."""
    architecture: dict[str, Any]
    """The other widths; its own width is the reference's, which all latencies are relative to."""
    sweep: str
    protocol: str = PROTOCOL

    @property
    def folder_name(self) -> str:
        """A name for the device and the width, and a digest of all the rest."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        device = slug(self.device)
        return f"{device}-{Sweep.parse(self.sweep).key}-{digest}"


@dataclass(frozen=True)
class Step:
    """One width's latency; a row of ``staircase.csv``."""

    width: int
    latency_ratio: float
    """To the reference's, call by call."""
    latency_ratio_lo: float
    latency_ratio_hi: float
    latency_s: float
    stable: bool
    """Whether the reading can be trusted; if not, the next sweep takes it again."""
    flags: str

    @classmethod
    def of(cls, width: int, reading: Reading) -> Step:
        """Return what a reading says of a width; without an interval nothing is told apart."""
        ratio = reading["latency_ratio"]
        low, high = ratio.ci95 or (0.0, float("inf"))
        latency_s, flags = reading["latency_s"].number, "; ".join(reading.flags)
        return cls(width, ratio.number, low, high, latency_s, reading.stable, flags)


@dataclass(frozen=True)
class Staircase:
    """A sweep on a device, finished or not; every width is kept as it comes."""

    folder: Path
    subject: Subject
    steps: tuple[Step, ...]
    """The widths measured so far, rising."""

    @classmethod
    def stored(cls, subject: Subject, root: Path = FOLDER) -> Staircase:
        """Return what is stored of a subject, which may be nothing yet.

        Raises:
            UserError: The file is damaged.
        """
        folder = root / subject.folder_name
        if not (path := folder / "staircase.json").exists():
            return cls(folder, subject, ())
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["steps"]
            return cls(folder, subject, tuple(Step(**row) for row in rows))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged; delete it and sweep again") from error

    @property
    def sweep(self) -> Sweep:
        """Which widths it is of."""
        return Sweep.parse(self.subject.sweep)

    @property
    def missing(self) -> list[int]:
        """The widths without a reading."""
        return sorted(set(self.sweep.widths) - {step.width for step in self.steps})

    @property
    def left(self) -> list[int]:
        """What is missing or unstable, in random order: drift of the machine makes no steps."""
        widths = self.missing + [step.width for step in self.steps if not step.stable]
        random.Random(0).shuffle(widths)
        return widths

    @property
    def snapped(self) -> dict[int, int]:
        """The right edge of each width's step, by the width."""
        low = np.array([step.latency_ratio_lo for step in self.steps])
        high = np.array([step.latency_ratio_hi for step in self.steps])
        widths = [step.width for step in self.steps]
        return {widths[i]: widths[edge] for i, edge in enumerate(right_edges(low, high))}

    @property
    def edges(self) -> list[int]:
        """The widths at a step's right edge, rising."""
        return sorted(set(self.snapped.values()))

    def extended(self, step: Step) -> Staircase:
        """Return the staircase with one more width, or another reading of one, and write it."""
        others = [one for one in self.steps if one.width != step.width]
        steps = tuple(sorted([*others, step], key=lambda one: one.width))
        longer = dataclasses.replace(self, steps=steps)
        rows = {"subject": asdict(self.subject), "steps": [asdict(one) for one in steps]}
        write_json(self.folder / "staircase.json", rows)
        write_text(self.folder / "staircase.csv", longer.csv())
        return longer

    def csv(self) -> str:
        """Return ``staircase.csv``'s text."""
        text, snapped = io.StringIO(), self.snapped
        names = [*Step.__dataclass_fields__, "right_edge"]
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(s) | {"right_edge": snapped[s.width]} for s in self.steps)
        return text.getvalue()


def right_edges(low: Float[np.ndarray, " n"], high: Float[np.ndarray, " n"]) -> list[int]:
    """Return the place of the right edge of each width's step.

    Going from the widest down, a width joins the widest edge so far that its interval cannot be
    told apart from (or that is faster) and that is *shown* to take at most `EQUAL` longer; a width
    that joins none is an edge itself. So edges are surely told apart or not shown to be equal;
    widths are compared with their edge and not with a neighbour, so that a slope of small rises is
    no step; and noise, which tells nothing apart, makes no steps either.

    Args:
        low: Lower ends of the latencies' 95 % intervals, by rising width.
        high: Upper ends.
    """
    edges: list[int] = []
    found = list(range(len(low)))
    for place in reversed(range(len(low))):
        fits = (low[edges] <= high[place]) & (high[edges] <= (1 + EQUAL) * low[place])
        if fits.any():
            found[place] = edges[int(fits.argmax())]
        else:
            edges.append(place)
    return found


def subject(facts: DeviceFacts, task: Task, base: Architecture, sweep: Sweep) -> Subject:
    """Describe a sweep around a shape.

    Raises:
        UserError: The shape has no such width.
    """
    if sweep.key == "gate_width" and base.gate_depth == 0:
        raise UserError("--sweep gate: the shape's gates have no hidden layers (gate_depth = 0)")
    shapes = [list(tensor.shape) for tensor in task.example()]
    return Subject(facts.name, dict(facts.fingerprint), task.name, shapes, asdict(base), str(sweep))


def take(
    stairs: Staircase,
    device: DeviceProfiler,
    task: Task,
    listener: Callable[[Step], object] = lambda step: None,
) -> Staircase:
    """Measure the widths that are left, each in turns with the reference.

    Raises:
        UserError: The device cannot measure latency.
    """
    base, key = Architecture(**stairs.subject.architecture), stairs.sweep.key
    here = facts_of(device).here
    reference = _network(task, base, here)
    # A flag only: a width whose reading is unstable is measured again, which would not help here.
    doubts = aa_gate(device, reference, task.example()) if stairs.left else []
    for width in stairs.left:
        shape = Architecture(**{**stairs.subject.architecture, key: width})
        reading = measure(
            device,
            _network(task, shape, here),
            task.example(),
            reference=reference,
            reference_name=f"{key} {getattr(base, key)}",
            precision=PRECISION,
            max_seconds=MAX_SECONDS,
        )
        reading = dataclasses.replace(reading, flags=[*doubts, *reading.flags])
        stairs = stairs.extended(step := Step.of(width, reading))
        listener(step)
    return stairs


def snapped(space: Space, settings: Settings, root: Path = FOLDER) -> Space:
    """Return a space with the right edges of the study's device wherever its widths snap to them.

    They become part of the space's text, so a study keeps them wherever it goes on.

    Raises:
        UserError: The device's staircase has not been taken; says how.
    """
    if not space.unsnapped:
        return space
    task = tasks.find(settings.task, settings.data_path)
    with profiling.closing(profiling.find(settings.device)) as device:
        facts = facts_of(device)
    base, found = space.candidate({}).architecture, {}
    if "gate_width" in space.unsnapped and base.gate_depth == 0:
        raise UserError(
            f"{space.where}: gate_width snaps to the steps of gates with hidden layers, and "
            "gate_depth = 0 has none; give gate_depth another default"
        )
    for key, (low, high, step) in space.unsnapped.items():
        stairs = Staircase.stored(subject(facts, task, base, Sweep(key, low, high, step)), root)
        if stairs.missing:
            raise UserError(
                f"{space.where}: {key} snaps to the steps of {settings.device}, which "
                f"{'are' if not stairs.steps else 'were only partly'} not measured here; run "
                f"`gpsearch profile --sweep {stairs.sweep} {_flags(settings)}` first"
            )
        found[key] = stairs.edges
    return space.with_edges(found, f"of {facts.name}, {_words(facts)}")


def _network(task: Task, architecture: Architecture, here: bool) -> nn.Module:
    """Return the dense network of a shape, as it would be deployed (``here``: see `compact`)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return compact(tasks.build(task, architecture), here=here)


def _flags(settings: Settings) -> str:
    flags = {"space": settings.space, "device": settings.device, "task": settings.task}
    if settings.data:
        flags["data"] = settings.data
    return " ".join(f"--{name} {shlex.quote(value)}" for name, value in flags.items())


def _words(facts: DeviceFacts) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.fingerprint.items())
