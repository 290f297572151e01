"""The finished trials of a study, and how they compare."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from gpsearch.candidate import Candidate
from gpsearch.errors import UserError
from gpsearch.files import read_json
from gpsearch.objectives import OBJECTIVES, Constraint, Objective, feasible, front, slowdown
from gpsearch.remeasured import NOT_MEASURED, OF_A_DEVICE, RECORD, Remeasured
from gpsearch.study import Row, Study

COSTS = tuple(goal for goal in OBJECTIVES.values() if goal.name != "error")
LATENCIES = ("latency_s", "latency_lo_s", "latency_hi_s", "latency_p90_s")
AGAIN = (*OF_A_DEVICE, "test_", "flags")
"""What is measured of the front's members at the end: the beginnings of the columns' names."""


@dataclass(frozen=True)
class Results:
    """A study's finished trials and what they are judged by."""

    folder: Path
    """The results folder."""
    rows: Sequence[Row]
    """Finished trials as the search saw them, in order; places are trial numbers."""
    candidates: Mapping[int, Candidate]
    """Every trial's candidate."""
    goals: tuple[Objective, ...]
    """The objectives."""
    limits: tuple[Constraint, ...] = ()
    """The constraints."""
    device: str = ""
    """The device's name."""
    finals: Mapping[int, Row] = field(default_factory=dict)
    """What was measured of the front's members at the end, by trial."""
    again: str = ""
    """The study's name, if these are its front measured again."""
    speed_s: float | None = None
    """What the reference takes at the speed that latencies are shown at; what it usually took, if
    None."""

    @classmethod
    def at(cls, folder: Path) -> Results:
        """Read the results in a folder: a study's, or those of a front measured again.

        Raises:
            UserError: It holds neither.
        """
        if (folder / RECORD).exists():
            return cls.of_again(Remeasured.read(folder))
        return cls.of(Study(folder))

    @classmethod
    def of_again(cls, remeasured: Remeasured) -> Results:
        """Read a front measured again: its members are the complete trials, judged anew."""
        study = remeasured.study
        return dataclasses.replace(
            cls.of(study),
            folder=remeasured.folder,
            rows=remeasured.rows(),
            device=remeasured.plan.device,
            finals={},
            again=study.folder.resolve().name,
        )

    @classmethod
    def of(cls, study: Study) -> Results:
        """Read a study's results."""
        rows = study.rows()
        return cls(
            study.folder,
            rows,
            {row["trial"]: study.candidate(row["trial"]) for row in rows},
            study.settings.goals,
            study.settings.limits,
            study.settings.device,
            study.finals(),
        )

    @property
    def name(self) -> str:
        """What a picture calls these results."""
        own = self.folder.resolve().name
        return f"{self.again}, again on {own}" if self.again else own

    @cached_property
    def front(self) -> list[int]:
        """Trials on the front, best error first; judged by what the search saw of all trials."""
        places = front(self.rows, self.goals, self.limits)
        return sorted(places, key=lambda i: (self.rows[i]["error"], i))

    @cached_property
    def complete(self) -> list[int]:
        """Trials that were trained and measured, feasible or not."""
        return [i for i, row in enumerate(self.rows) if row["state"] == "complete"]

    @cached_property
    def baselines(self) -> list[int]:
        """Complete trials that are baselines; the first is what the others are compared with."""
        return [i for i in self.complete if self.rows[i].get("baseline")]

    @property
    def reference(self) -> int | None:
        """The first baseline whose costs are known; a front measured again may lack its latency."""
        known = ("complete", NOT_MEASURED)
        rows = enumerate(self.rows)
        return next((i for i, r in rows if r.get("baseline") and r["state"] in known), None)

    @property
    def costs(self) -> list[Objective]:
        """The objectives but the error."""
        return [goal for goal in self.goals if goal.name != "error"]

    @property
    def metric(self) -> str:
        """The task's metric, such as "WER" or "BLEU"."""
        return self._metric.upper() if self._metric else "error"

    @property
    def error(self) -> str:
        """What is minimised: the metric, or "1 - BLEU" or the like where higher is better."""
        rising = any(self.score(self.rows[i]) != self.rows[i]["error"] for i in self.complete)
        if rising and not self.unit:
            return f"error, which falls as {self.metric} rises,"
        return f"1 - {self.metric}" if rising else self.metric

    @property
    def unit(self) -> str:
        """Return "%" where the metric is a fraction, and "" where it is a score of its own."""
        return next((str(self.rows[i].get("metric_unit", "%")) for i in self.complete), "%")

    def score_text(self, row: Row, split: str = "dev") -> str:
        """Return a row's metric on a split in `unit`; "-" if it is unknown."""
        value = self.score(row, split)
        if value is None:
            return "-"
        return f"{value * 100:.2f}" if self.unit else f"{value:.3f}"

    @property
    def _metric(self) -> str:
        return next((str(self.rows[i].get("metric") or "") for i in self.complete), "")

    def score(self, row: Row, split: str = "dev") -> float | None:
        """Return a row's metric on a split; None if it is unknown."""
        of_split = "" if split == "dev" else f"{split}_"
        value = row.get(f"{of_split}{self._metric}", row.get(f"{of_split}error"))
        return None if value is None else float(value)

    def row(self, trial: int) -> Row:
        """Return a trial's row, with what was measured at the end where it was."""
        final = self.finals.get(trial, {})
        again = {name: value for name, value in final.items() if name.startswith(AGAIN)}
        return self.rows[trial] | {k: v for k, v in again.items() if _was_read(final, k)}

    def at_one_speed(self, trial: int) -> Row:
        """Return the same for people to compare: what takes time as if the machine never slowed.

        Each latency, and the joules that are estimated from it, is brought to the speed at which
        its reference takes `reference_s`: so they are to one another as their ratios are.
        """
        row = self.row(trial)
        slower = slowdown(row, self.reference_s) or 1.0
        timed = {*LATENCIES, *(goal.column for goal in self.goals if goal.timed)}
        return row | {name: row[name] / slower for name in timed if row.get(name) is not None}

    @cached_property
    def reference_s(self) -> float | None:
        """`speed_s`, or what the reference usually took, at the end if there was one."""
        if self.speed_s is not None:
            return self.speed_s
        name = "latency_reference_s"
        for rows in (self.finals.values(), self.rows):
            if known := [row[name] for row in rows if row.get(name)]:
                return float(statistics.median(known))
        return None

    def fewer(self, trial: int, goal: Objective) -> float | None:
        """Return how many times less of a cost a trial has than the first baseline.

        Latencies are compared by the paired ratio: the baseline's network before compaction ran in
        turns with the trial's, so that a slow spell of the machine hits both.
        """
        row = self.row(trial)
        if goal.name == "latency" and row.get("latency_ratio"):
            return 1 / float(row["latency_ratio"])
        if self.reference is None:
            return None
        base, value = (self.at_one_speed(one).get(goal.column) for one in (self.reference, trial))
        return base / value if base and value else None

    def feasible(self, trial: int) -> bool:
        """Say whether a trial is complete and meets every constraint."""
        return feasible(self.rows[trial], self.limits)

    def violation(self, trial: int) -> float | None:
        """Return the largest share by which a complete trial is above a limit; 0 is feasible."""
        if self.rows[trial]["state"] != "complete":
            return None
        worst = max([0.0, *(limit.violation(self.rows[trial]) for limit in self.limits)])
        return worst if math.isfinite(worst) else None

    @property
    def machine(self) -> Mapping[str, str] | None:
        """The fingerprint of the machine that all was measured on; None if there are several."""
        found = [read_json(path).get("fingerprint") for path in self._records(self.complete)]
        return found[0] if found and all(one == found[0] for one in found) else None

    def _records(self, trials: Sequence[int]) -> list[Path]:
        """Return what was kept of trials' readings, and of the device at the end."""
        paths = [self.folder / "trials" / str(trial) / "reading.json" for trial in trials]
        return [path for path in [*paths, self.folder / "device.json"] if path.exists()]

    def unavailable(self) -> dict[str, str]:
        """Return the costs that could not be had, and why."""
        reasons: dict[str, str] = {}
        for path in self._records(self.complete[:1]):
            reasons |= _reasons(path)
        known = {name for i in self.complete for name, v in self.rows[i].items() if v is not None}
        missing = reasons.keys() - known  # what a device cannot measure may be estimated
        return {goal.name: reasons[goal.column] for goal in COSTS if goal.column in missing}


def _was_read(row: Row, name: str) -> bool:
    """Tell whether a reading has what a column belongs to, such as the latency of an interval."""
    start = name.partition("_")[0]
    whole = {"latency": "latency_s", "energy": "energy_j", "power": "energy_j"}.get(start, name)
    return row.get(whole) is not None


def _reasons(path: Path) -> dict[str, str]:
    """Return the reasons in a device.json, or in a reading.json."""
    record = read_json(path)
    try:
        quantities = record.get("quantities", {}).items()
        missing = {name: one["reason"] for name, one in quantities if one["value"] is None}
        return {**missing, **record.get("unavailable", {})}
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged; restore it from a backup") from error
