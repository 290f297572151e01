"""A front measured again, on its device or on another: ``results/NAME/remeasured/DEVICE``.

The networks and their errors stay what they are; what a device decides is measured anew, each
member in a fresh process and all in random order, beside the study's own results and never in
their place. Every reading is kept as it comes, so a kill loses none.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpsearch import profiling
from gpsearch.deploy import check_device, columns, reading_on
from gpsearch.errors import UserError
from gpsearch.files import read_json, slug, write_json
from gpsearch.objectives import SLOWDOWN, first_reference_s, front, slowdown
from gpsearch.profiling import DeviceFacts, Reading
from gpsearch.study import Row, Study, facts_row

NOT_MEASURED = "not measured"
"""The state of the trials that were not on the study's front."""
RECORD = "remeasured.json"
OF_A_DEVICE = ("latency_", "energy_", "power_", "peak_memory_")
"""The beginnings of the columns that a device decides."""


@dataclass(frozen=True)
class Plan:
    """Which networks are measured where, as ``remeasured.json`` holds it."""

    device: str
    """The device, as the user named it."""
    fingerprint: dict[str, str]
    """All that its latencies depend on: one remeasurement is of one machine."""
    members: list[int]
    """The trials on the study's front when this began."""


@dataclass(frozen=True)
class Remeasured:
    """A front measured again, finished or not."""

    study: Study
    folder: Path
    plan: Plan

    @classmethod
    def begin(cls, study: Study, device: str = "") -> Remeasured:
        """Go on with what was interrupted on this machine, or begin another remeasurement.

        Args:
            study: Whose front.
            device: Where; the study's own if empty.

        Raises:
            UserError: There is no front, its weights are gone, or the device cannot measure it.
        """
        name = device or study.settings.device
        plan = Plan(name, dict(_facts(name, study).fingerprint), _members(study))
        for count in itertools.count(1):
            own = slug(name) + (f"-{count}" if count > 1 else "")
            found = cls(study, study.folder / "remeasured" / own, plan)
            if not (found.folder / RECORD).exists():
                return found._begun()
            if cls.read(found.folder).plan == plan and found.left:
                return found
        raise AssertionError  # the count has no end

    @classmethod
    def read(cls, folder: Path) -> Remeasured:
        """Read the remeasurement in a folder.

        Raises:
            UserError: There is none, or it is damaged.
        """
        try:
            plan = Plan(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{folder}: no front measured again (it has no {RECORD})") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{folder / RECORD}: damaged; delete {folder} and repeat") from error
        return cls(Study(folder.resolve().parents[1]), folder, plan)

    @property
    def left(self) -> list[int]:
        """The members that are still to be measured, in the random order they are taken in."""
        order = list(self.plan.members)
        random.Random(self.study.settings.seed).shuffle(order)
        return [number for number in order if not self._path(number).exists()]

    def run(self, listener: Callable[[int, Reading], object]) -> None:
        """Measure the members that are left; ``listener`` is told of each.

        Raises:
            RuntimeError: A member cannot be measured.
        """
        for number in self.left:
            reading = reading_on(self.plan.device, self.study.folder, number)
            write_json(self._path(number), reading.to_dict())
            listener(number, reading)

    def readings(self) -> dict[int, Reading]:
        """Return what was measured so far, by trial."""
        done = [number for number in self.plan.members if self._path(number).exists()]
        return {n: Reading.from_dict(read_json(self._path(n), "quantities")) for n in done}

    def rows(self) -> list[Row]:
        """Return the study's rows with what this device decides replaced.

        The rows of trials that were not on the front keep what no device decides: their error,
        FLOPs and weights.
        """
        readings, finals = self.readings(), self.study.finals()
        rows = [
            _again(row, readings.get(row["trial"]), finals.get(row["trial"], {}))
            for row in self.study.rows()
        ]
        first_s = first_reference_s(rows)
        return [row | {SLOWDOWN: slowdown(row, first_s)} for row in rows]

    def _path(self, number: int) -> Path:
        return self.folder / "trials" / str(number) / "reading.json"

    def _begun(self) -> Remeasured:
        write_json(self.folder / "device.json", facts_row(_facts(self.plan.device, self.study)))
        write_json(self.folder / RECORD, asdict(self.plan))
        return self


def _facts(name: str, study: Study) -> DeviceFacts:
    """Ask a device what it is; it must measure whatever the study's objectives need."""
    with profiling.closing(profiling.find(name)) as device:
        facts = profiling.facts_of(device)
    check_device(facts, study.settings)
    return facts


def _members(study: Study) -> list[int]:
    rows = study.rows()
    places = front(rows, study.settings.goals, study.settings.limits)
    members = [int(rows[place]["trial"]) for place in places]
    if not members:
        raise UserError(f"{study.folder}: has no front yet; go on with `gpsearch resume` first")
    lost = [n for n in members if not (study.trial_folder(n) / "model.pt").exists()]
    if lost:
        raise UserError(
            f"{study.folder}: the weights of trial {_listed(lost)} are not there (model.pt); "
            "measure again where the study ran, or copy its folder whole"
        )
    return members


def _again(row: Row, reading: Reading | None, final: Row) -> Row:
    kept = {name: v for name, v in row.items() if not name.startswith(OF_A_DEVICE)}
    tested = {name: v for name, v in final.items() if name.startswith("test_")}
    if reading is None:
        state = NOT_MEASURED if row["state"] == "complete" else row["state"]
        return {**kept, "state": state, "flags": ""}
    measured: dict[str, Any] = columns(reading)
    return {**kept, **tested, **measured, "flags": "; ".join(reading.flags)}


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return shown if len(numbers) <= 5 else f"{shown} and {len(numbers) - 5} more"
