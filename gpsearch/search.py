"""The search: Optuna proposes, every trial is really trained and really measured. Start here.

`Search.try_candidate` is the whole story; the rest keeps it going. Where things are kept, and why
a kill loses nothing, is in `gpsearch.study`; what is tried next, in `gpsearch.sampling`.
"""

from __future__ import annotations

import copy
import csv
import math
import random
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import nn

from gpsearch import learned, profiling, tasks
from gpsearch.candidate import Candidate
from gpsearch.compact import compact
from gpsearch.deploy import (
    at_least,
    check_device,
    check_reference,
    columns,
    lacking,
    read_costs,
    read_for,
    reference_model,
    remeasure,
    save_model,
)
from gpsearch.errors import Unsupported, UserError, line_of
from gpsearch.files import write_json
from gpsearch.growprune import sketch
from gpsearch.kernels.memory import keep_freed_memory
from gpsearch.objectives import front, refuse_percentages
from gpsearch.profiling import Host, Reading
from gpsearch.sampling import Proposal, SpaceExhausted, propose
from gpsearch.study import Row, Study
from gpsearch.train import Epoch, grow_and_prune

if TYPE_CHECKING:
    import optuna

MARGIN = 0.25
"""A candidate is gated before training when a cost is above its limit by more than this share:
more than growing, an early stop of the pruning, or a noisy glance would change."""
READINGS = 3
"""How often a trained network is measured until every objective has a value: what trained for an
hour is not lost to somebody who used the device for a minute."""
GIVE_UP_AFTER = 3
"""A study whose first so many trials all fail stops: the fault is not the candidates'."""


@runtime_checkable
class Listener(Protocol):
    """Told what happens; `gpsearch.cli` prints it."""

    def note(self, text: str) -> None:
        """Something was decided that the user should know."""

    def trial_begins(self, number: int, proposal: Proposal) -> None:
        """A trial begins, or goes on."""

    def epoch_ends(self, number: int, epoch: Epoch, epochs: int) -> None:
        """A trial has trained for one more epoch."""

    def trial_ends(self, number: int, row: Row) -> None:
        """A trial is finished: complete, gated or failed."""

    def final_ends(self, number: int, row: Row) -> None:
        """A member of the front has been measured again and scored on the test split."""


class TooCostly(Exception):
    """A candidate is known to break a constraint before it trains.

    Args:
        reason: Which one, and by how much.
        costs: What is known of its costs, as columns of ``trials.csv``.
    """

    def __init__(self, reason: str, costs: Row) -> None:
        super().__init__(reason)
        self.costs = costs


class TimeUp(Exception):
    """The time limit is over; the trial in hand goes on with ``gpsearch resume``."""


class StudyFailed(RuntimeError):
    """No trial can succeed; the message gives the last one's reason."""


class Search:
    """One study at work.

    Args:
        study: Its results folder.
        listener: Told what happens.

    Raises:
        UserError: Task, data, device or space cannot be used for what the settings ask.
    """

    def __init__(self, study: Study, listener: Listener) -> None:
        self.study, self.settings, self.listener = study, study.settings, listener
        self.space = study.space
        study.refuse_changes()
        self.device = profiling.find(self.settings.device)
        with ExitStack() as unless_ready:
            unless_ready.enter_context(profiling.closing(self.device))
            self._make_ready()
            unless_ready.pop_all()

    def _make_ready(self) -> None:
        """Ask for all that a trial needs, before the first one begins."""
        study, listener = self.study, self.listener
        self.facts = profiling.facts_of(self.device)
        check_device(self.facts, self.settings)
        self.task = tasks.find(self.settings.task, self.settings.data_path)
        if tasks.unit(self.task) == "%":
            refuse_percentages(self.settings.limits)
        learned.keep(study.folder, self.settings.task, self.task, self.settings.data_path)
        for note in self.task.notes:
            listener.note(note)
        self.deadline = time.monotonic() + self.settings.timeout_s
        self.reference = reference_model(self.space, self.task)
        if study.saved_fingerprint() not in (None, dict(self.facts.fingerprint)):
            listener.note(
                f"this is not the machine (or not the software) that {study.folder} began on; "
                "latencies of the two do not compare"
            )
        study.save_facts(self.facts)
        torch.set_num_threads(self.settings.threads)
        keep_freed_memory()

    def try_candidate(
        self, number: int, candidate: Candidate, *, baseline: bool = False
    ) -> tuple[dict[str, float], Reading]:
        """Train, compact and measure one candidate: this is what gpsearch does.

        A baseline is never gated: it is what the others are held against.

        Returns:
            The development split's metrics with the error, and every cost.

        Raises:
            TooCostly: The candidate cannot meet a constraint.
            TrainingFailed: The training diverged or ran out of memory.
            Unsupported: The task has no such network, or what the candidate asks of it is refused.
        """
        torch.manual_seed(self.settings.seed)
        model = self._built(candidate)
        if not baseline:
            self._refuse_hopeless(number, model, candidate)
        with Host().sharing() as pause:  # while another study measures here
            trained = grow_and_prune(
                model,
                self.task,
                candidate.schedule,
                candidate.training,
                folder=self.study.trial_folder(number),
                seed=self.settings.seed,
                device=self.facts.torch_device,
                listener=lambda epoch: self._epoch_ended(number, epoch, candidate.training.epochs),
                pause=pause,
            )
            weights = candidate.deployment.weights
            with _its_own_fault():
                deployed = compact(trained.cpu(), weights=weights, here=self.facts.here)
            metrics = tasks.scores(self.task, deployed)
        save_model(deployed, self.study.trial_folder(number) / "model.pt")
        return metrics, self._read(number, deployed)

    def run(self) -> None:
        """Try candidates until the budget is spent, then measure the front again.

        Raises:
            UserError: The device cannot run the task's networks.
            StudyFailed: The first trials all fail.
            TimeUp: The time limit is over.
        """
        with profiling.closing(self.device):
            check_reference(self.device, self.reference, self.task)
            self._tell_doubts()
            self.study.sweep(self.front())  # a kill may have left a finished trial's checkpoint
            while len(finished := self.study.finished()) < self.settings.budget:
                try:
                    self._run_trial(len(finished), self._propose(finished))
                except SpaceExhausted:
                    self.listener.note(f"the space holds nothing new after {len(finished)} trials")
                    break
                if time.monotonic() > self.deadline and len(finished) + 1 < self.settings.budget:
                    raise TimeUp
            self._give_up_if_hopeless()
        self._measure_front_again()  # by processes that open the device themselves

    def _tell_doubts(self) -> None:
        """Say before the first training if the device cannot rank models."""
        try:
            doubts = profiling.aa_gate(self.device, self.reference, self.task.example())
        except (OSError, RuntimeError) as failure:  # as within a trial, which asks again
            doubts = [f"a model could not be held against itself: {line_of(failure)}"]
        for doubt in doubts:
            self.listener.note(doubt)

    def _propose(self, finished: list[optuna.trial.FrozenTrial]) -> Proposal:
        return propose(
            finished,
            self.space,
            goals=len(self.settings.goals),
            sampler=self.settings.sampler,
            seed=self.settings.seed,
            params=self.study.saved_proposal(len(finished)),
        )

    def _run_trial(self, number: int, proposal: Proposal) -> None:
        self.study.save_proposal(number, proposal)
        self.listener.trial_begins(number, proposal)
        row: Row = {"trial": number, "baseline": proposal.baseline}
        row |= {f"p:{name}": value for name, value in proposal.params.items()}
        try:
            row |= self._complete(
                number,
                *self.try_candidate(number, proposal.candidate, baseline=bool(proposal.baseline)),
            )
        except TooCostly as gate:
            known = {name: value for name, value in gate.costs.items() if value is not None}
            row |= {"state": "gated", "reason": str(gate), **known}
        except Exception as failure:
            if _ends_the_study(failure, number):
                raise
            self._log(number, traceback.format_exc())  # recorded, and the study goes on
            kind = "" if isinstance(failure, Unsupported) else f"{type(failure).__name__}: "
            row |= {"state": "failed", "reason": f"{kind}{failure}"}
        row["train_s"] = self._trained_s(number)
        self.study.add(proposal, row, self.settings.goals, self.settings.limits)
        self.study.sweep(self.front())
        self.listener.trial_ends(number, row)
        self._give_up_if_hopeless()

    def front(self) -> set[int]:
        """Return the numbers of the trials on the front."""
        rows = self.study.rows()
        return {rows[i]["trial"] for i in front(rows, self.settings.goals, self.settings.limits)}

    # One trial's parts

    def _built(self, candidate: Candidate) -> nn.Module:
        """Build a candidate's network."""
        with _its_own_fault():
            return tasks.build(self.task, candidate.architecture)

    def _refuse_hopeless(self, number: int, model: nn.Module, candidate: Candidate) -> None:
        """Gate a candidate whose costs are known before training to break a constraint.

        Its final density and structure are known, so its untrained network pruned to them has its
        parameters and FLOPs, and about its latency. One that has begun to train was let through.
        """
        limits = [limit for limit in self.settings.limits if limit.column != "error"]
        if not limits or (self.study.trial_folder(number) / "checkpoint.pt").exists():
            return
        schedule, prunable = candidate.schedule, tasks.prunable(self.task, candidate.schedule)
        weights = candidate.deployment.weights
        with _its_own_fault():
            sketched = sketch(copy.deepcopy(model), schedule, prunable)
            likeness = compact(sketched, weights=weights, here=self.facts.here)
        glance = read_costs(self.device, likeness, self.task, reference=self.reference,
                            max_seconds=1.0, precision=MARGIN / 2,
                            estimate_w=self.settings.estimate_w)  # fmt: skip
        costs = at_least(glance, self.study.reference_s(self.facts.fingerprint))
        for limit in limits:
            if costs.get(limit.column) is not None and limit.violation(costs) > MARGIN:
                excess = f"{limit.violation(costs):.0%}"
                raise TooCostly(f"{limit.text} would be missed by {excess}", columns(glance))

    def _read(self, number: int, deployed: nn.Module) -> Reading:
        """Measure a deployed model, again where somebody kept the device from telling it all."""
        for attempt in range(1, READINGS + 1):
            reading = read_for(self.study, self.device, deployed, self.task, self.reference)
            if (missing := lacking(reading, self.settings.goals)) is None:
                break
            self._log(number, f"reading {attempt} of at most {READINGS}: {missing}")
        return reading

    def _complete(self, number: int, metrics: dict[str, float], reading: Reading) -> Row:
        """Return the columns of a complete trial.

        Raises:
            ValueError: An objective has no value of the kind that may share the front, or the error
                is no number.
        """
        if not math.isfinite(metrics["error"]):
            raise ValueError(f"the error of the compact network is {metrics['error']}")
        record = {"metrics": metrics, "signatures": tasks.signatures(self.task)}
        path = self.study.trial_folder(number) / "reading.json"
        write_json(path, {**record, **reading.to_dict()})
        if missing := lacking(reading, self.settings.goals):
            raise ValueError(missing)
        costs = columns(reading)
        return {
            "state": "complete",
            "metric": self.task.metric,
            "metric_unit": tasks.unit(self.task),
            **metrics,
            **costs,
            **self.study.slowdown(costs),
            "flags": "; ".join(reading.flags),
        }

    def _epoch_ended(self, number: int, epoch: Epoch, epochs: int) -> None:
        self._log(
            number,
            f"epoch {epoch.epoch + 1}/{epochs} {epoch.phase} density {epoch.density:.3f} "
            f"loss {epoch.loss:.3f} error {epoch.error:.4f} {epoch.seconds:.1f} s {epoch.event}",
        )
        self.listener.epoch_ends(number, epoch, epochs)
        if time.monotonic() > self.deadline and epoch.epoch + 1 < epochs:
            raise TimeUp

    def _log(self, number: int, line: str) -> None:
        with (self.study.trial_folder(number) / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line.rstrip()}\n")

    def _trained_s(self, number: int) -> float:
        """Return the seconds of all epochs of a trial, those before a kill included."""
        path = self.study.trial_folder(number) / "history.csv"
        if not path.exists():
            return 0.0
        with path.open(encoding="utf-8", newline="") as file:
            return sum(float(epoch["seconds"]) for epoch in csv.DictReader(file))

    # The study's parts

    def _give_up_if_hopeless(self) -> None:
        rows = self.study.rows()
        enough = min(GIVE_UP_AFTER, self.settings.budget)
        if len(rows) >= enough and all(row["state"] == "failed" for row in rows):
            raise StudyFailed(f"all {len(rows)} trials failed, the last with: {rows[-1]['reason']}")

    def _measure_front_again(self) -> None:
        """Measure the front's members in fresh processes, in random order; score them once."""
        done = self.study.finals()
        members = sorted(self.front() - done.keys())
        random.Random(self.settings.seed).shuffle(members)
        lost = [n for n in members if not (self.study.trial_folder(n) / "model.pt").exists()]
        if lost:  # they were off the front when it was swept, by limits that were lower
            self.listener.note(
                f"on the front without weights (model.pt), and so not measured again: "
                f"trial {', '.join(map(str, lost))}"
            )
        for number in (n for n in members if n not in lost):
            row = remeasure(self.study.folder, number)
            self.study.save_final(number, row)
            self.listener.final_ends(number, row)


@contextmanager
def _its_own_fault() -> Iterator[None]:
    """Let what refuses a candidate's network be no fault of the others: its trial alone fails."""
    try:
        yield
    except UserError as refusal:
        raise Unsupported(refusal.args[0]) from refusal


def _ends_the_study(failure: Exception, number: int) -> bool:
    """Tell failures that others would share from those of one candidate.

    What cannot be built, pruned, compacted or run is the candidate's fault, but for the first one:
    that is what all others are held against.
    """
    if isinstance(failure, Unsupported):
        return number == 0
    return isinstance(failure, UserError | OSError | TimeUp)
