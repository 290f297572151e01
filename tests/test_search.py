import contextlib
import csv
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gpsearch import report
from gpsearch.candidate import Architecture, Candidate, Training
from gpsearch.deploy import load_model
from gpsearch.errors import Unsupported, UserError
from gpsearch.files import read_json
from gpsearch.profiling import Host, Quantity, aa_gate, measure
from gpsearch.quantize import quantize_weights
from gpsearch.schedule import GP
from gpsearch.search import Search, StudyFailed, TimeUp, TooCostly
from gpsearch.settings import Settings
from gpsearch.study import Study
from tests.commands import call
from tests.toy import Lopsided, ToyDevice, ToyModel, ToyTask

ROOT = Path(__file__).parents[1]
TOY = {
    "task": "tests.toy:ToyTask",
    "space": str(ROOT / "tests" / "toy.toml"),
    "device": "tests.toy:ToyDevice",
}
TOY_FLAGS = [word for name, value in TOY.items() for word in (f"--{name}", value)]
NOISE = ("train_s", "flags")


class Silent:
    """A listener that only remembers, and may end the search after some trials."""

    def __init__(self, stop_after=1000):
        self.rows, self.finals, self.notes = [], {}, []
        self.stop_after = stop_after

    def note(self, text):
        self.notes.append(text)

    def trial_begins(self, number, proposal):
        pass

    def epoch_ends(self, number, epoch, epochs):
        pass

    def trial_ends(self, number, row):
        self.rows.append(row)
        if len(self.rows) == self.stop_after:
            raise KeyboardInterrupt

    def final_ends(self, number, row):
        self.finals[number] = row


def a_study(folder, **flags):
    return Study.create(folder, Settings.of({**TOY, "objectives": "error,flops", **flags}))


def run(study):
    listener = Silent()
    Search(study, listener).run()
    return listener


def run_trials(study, count):
    """Run a study's next trials only: the front is measured again in processes, which take long."""
    listener = Silent(stop_after=count)
    with pytest.raises(KeyboardInterrupt):
        Search(study, listener).run()
    return listener


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small study, run to its end."""
    study = a_study(tmp_path_factory.mktemp("study") / "toy", budget=4)
    return study, run(study)


def test_every_trial_is_trained_compacted_and_measured(finished):
    study, listener = finished

    assert listener.notes == ["two tones, made up"]
    assert [row["trial"] for row in listener.rows] == [0, 1, 2, 3]
    assert [row["baseline"] for row in listener.rows] == ["dense_lstm", "pruned_lstm", "", ""]
    for row in listener.rows:
        assert row["state"] == "complete"
        assert 0 <= row["error"] <= 1
        assert row["flops_effective"] <= row["flops_dense"]
        assert row["latency_lo_s"] <= row["latency_s"] <= row["latency_hi_s"]
        names = {path.name for path in study.trial_folder(row["trial"]).iterdir()}
        assert {"candidate.toml", "history.csv", "reading.json", "log.txt"} <= names
        assert "checkpoint.pt" not in names


def test_models_are_kept_for_the_front_only(finished):
    study, _ = finished
    kept = {int(path.parent.name) for path in study.folder.glob("trials/*/model.pt")}

    assert kept == Search(study, Silent()).front()


def test_the_front_is_measured_again_and_scored_on_the_test_split_once(finished):
    study, listener = finished

    assert listener.finals.keys() == Search(study, Silent()).front()
    assert all(0 <= row["test_error"] <= 1 for row in listener.finals.values())
    assert {round(row["latency_slowdown"], 2) for row in listener.finals.values()} == {1}
    assert run(study).finals == {}


def test_what_a_kill_left_in_a_finished_trial_is_deleted_at_the_next_start(finished):
    study, _ = finished
    checkpoint = study.trial_folder(0) / "checkpoint.pt"
    checkpoint.touch()
    run(study)
    assert not checkpoint.exists()


def test_a_study_with_another_seed_tries_other_candidates(finished, tmp_path):
    study, _ = finished
    many = 2 * study.finished()  # so that the sampler chooses, and neither baselines nor defaults
    others = [a_study(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    one, two = (Search(other, Silent())._propose(many) for other in others)
    assert one.params != two.params


class Crowded(ToyDevice):
    def disturbances(self):
        return ["somebody else computes there"]


def test_what_casts_doubt_on_a_last_reading_stays_with_it(tmp_path):
    study = a_study(tmp_path / "toy", budget=1, device="tests.test_search:Crowded")
    assert "somebody else computes there" in run(study).finals[0]["flags"]


def test_a_larger_budget_goes_on_where_the_study_ended(finished, tmp_path):
    ended, first = finished
    study = Study(shutil.copytree(ended.folder, tmp_path / "toy"))
    study.extend(5)

    assert [row["trial"] for row in run(study).rows] == [4]
    assert [row["trial"] for row in study.rows()] == [0, 1, 2, 3, 4]
    assert study.rows()[:4] == first.rows


def test_what_is_scored_and_counted_has_the_weights_of_its_deployment(tmp_path):
    space = tmp_path / "narrow.toml"
    text = (ROOT / "tests" / "toy.toml").read_text(encoding="utf-8")
    choice = '[deployment]\nweights = { choices = ["float32", "int8"], default = "int8" }\n'
    wide = 'architecture.gate_depth = 0\ndeployment.weights = "float32"\nschedule.name = "dense"'
    space.write_text(
        text.replace("[baselines.d", f"{choice}\n[baselines.d").replace(
            'architecture.gate_depth = 0\nschedule.name = "dense"', wide
        )
    )
    study = a_study(tmp_path / "toy", budget=2, space=str(space), objectives="error,memory")

    wide_row, narrow_row = run_trials(study, 2).rows

    assert [row["p:weights"] for row in (wide_row, narrow_row)] == ["float32", "int8"]
    assert narrow_row["weight_bytes"] < 0.7 * wide_row["weight_bytes"]
    assert 'weights = "int8"' in (study.trial_folder(1) / "candidate.toml").read_text()
    model = load_model(study.trial_folder(1) / "model.pt")  # kept: nobody takes less memory
    assert not quantize_weights(model, "int8")


def test_a_candidate_that_cannot_meet_a_constraint_is_gated_before_it_trains(tmp_path):
    study = a_study(tmp_path / "toy", budget=4, constraint=("params<=30", "flops<=1e9"))
    rows = run_trials(study, 4).rows

    assert [row["state"] for row in rows] == ["complete", "complete", "gated", "gated"]
    assert "params<=30 would be missed by" in rows[2]["reason"]
    assert not (study.trial_folder(2) / "history.csv").exists()
    limits = study.finished()[2].constraints
    assert limits["params<=30"] > 0 > limits["flops<=1e9"]


def test_what_cannot_be_pruned_counts_in_full_before_a_candidate_trains(tmp_path):
    flags = {"task": "tests.test_search:HalfPrunable", "constraint": ("params<=200",)}
    search = Search(a_study(tmp_path / "toy", **flags), Silent())
    shape, schedule = Architecture(hidden_size=8, gate_width=6), GP(final_density=0.2)
    with pytest.raises(TooCostly, match="params<=200 would be missed by"):  # 192 are in one gate
        search.try_candidate(0, Candidate(shape, schedule, Training(epochs=1)))


class Ponderous(ToyDevice):
    """A device on which a call takes so long that a glance has no more than a few of them."""

    def load(self, model, example):
        return super().load(model, example) * 1e4


@pytest.mark.parametrize("limit", ["latency_ms<=10", "energy_mj<=150"])
def test_few_calls_are_enough_to_gate_what_is_far_too_slow(tmp_path, limit):
    device = "tests.test_search:Ponderous"
    study = a_study(tmp_path / "toy", device=device, constraint=(limit,), estimate_energy=15.0)
    run_trials(study, 3)
    assert [row["state"] for row in study.rows()] == ["complete", "complete", "gated"]


def test_nobody_is_gated_for_a_slow_spell(tmp_path):
    """The third model takes 0.16 ms; its glance comes in a spell that adds a half."""
    flags = {"device": "tests.test_search:Tiring", "constraint": ("latency_ms<=0.17",)}
    study = a_study(tmp_path / "toy", **flags)
    run_trials(study, 3)
    row = study.rows()[2]
    assert row["state"] == "complete"
    assert row["latency_s"] > 1.25 * 0.17e-3


def test_who_has_begun_to_train_is_not_gated(tmp_path):
    study = a_study(tmp_path / "toy", budget=3, timeout="1h")
    run_trials(study, 2)
    search = Search(study, Silent())
    search.deadline = -math.inf  # it stops after an epoch
    with pytest.raises(TimeUp):
        search.run()
    config = study.folder / "config.toml"
    config.write_text(config.read_text().replace("constraint = []", 'constraint = ["params<=30"]'))
    assert run_trials(Study(study.folder), 1).rows[0]["state"] == "complete"


def test_the_time_limit_stops_a_trial_that_then_goes_on(tmp_path):
    study = a_study(tmp_path / "toy", budget=1, timeout="0.01s")
    with pytest.raises(TimeUp):
        run(study)
    assert study.rows() == []
    assert (study.trial_folder(0) / "checkpoint.pt").exists()

    study.extend(None)
    assert len(run_trials(study, 1).rows) == 1


class FailsOften(ToyTask):
    def loss(self, model, batch):
        return super().loss(model, batch) * float("nan")


def test_failures_are_recorded_and_a_hopeless_study_gives_up(tmp_path):
    study = a_study(tmp_path / "toy", budget=9, task="tests.test_search:FailsOften")
    with pytest.raises(StudyFailed, match=r"all 3 trials failed.* the loss is nan"):
        run(study)

    assert [row["state"] for row in study.rows()] == ["failed"] * 3
    assert "lower training.learning_rate" in study.rows()[0]["reason"]
    assert "Traceback" in (study.trial_folder(0) / "log.txt").read_text()


class NoHiddenLayers(ToyDevice):
    """A device that cannot run gates with hidden layers."""

    def load(self, model, example):
        if any("weight_gate" in name for name, _ in model.named_parameters()):
            raise Unsupported("this device has no hidden layers")
        return super().load(model, example)


def test_a_candidate_that_the_device_cannot_run_fails_alone(tmp_path):
    study = a_study(tmp_path / "toy", budget=6, device="tests.test_search:NoHiddenLayers")
    states = [row["state"] for row in run_trials(study, 6).rows]

    assert states[:2] == ["complete", "complete"]
    assert "failed" in states
    assert all("no hidden layers" in row.get("reason", "no hidden layers") for row in study.rows())


class OnlyLSTMs(ToyTask):
    """A task without networks whose gates have hidden layers, which counts in numpy."""

    def build(self, architecture):
        if architecture.gate_depth:
            raise UserError("gate_depth = 1: only 0 is there")
        return super().build(architecture)

    def evaluate(self, model, split="dev"):
        return {name: np.float32(value) for name, value in super().evaluate(model, split).items()}


def test_a_candidate_that_the_task_cannot_build_fails_alone(tmp_path):
    study = a_study(tmp_path / "toy", budget=4, task="tests.test_search:OnlyLSTMs")
    run(study)

    assert [row["state"] for row in study.rows()][:2] == ["complete", "complete"]
    assert {row["reason"] for row in study.rows() if row["state"] == "failed"} == {
        "unsupported: gate_depth = 1: only 0 is there"
    }
    assert study.finals()


class HalfPrunable(ToyTask):
    """A task whose H-LSTMs are not pruned as a whole, so that they have no whole units."""

    def prunable(self, name):
        return super().prunable(name) and "weight_gate1" not in name


class Misnamed(ToyModel):
    def compaction_chain(self):
        return ["nowhere"]


class Misnaming(ToyTask):
    """A task whose H-LSTMs cannot be made compact."""

    def build(self, architecture):
        return (Misnamed if architecture.gate_depth else ToyModel)(architecture)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("HalfPrunable", "unsupported: structure='row_column' takes whole units"),
        ("Misnaming", "unsupported: Misnamed.compaction_chain() names 'nowhere'"),
    ],
)
@pytest.mark.parametrize("constraint", [(), ("params<=1e9",)], ids=["trained", "sketched"])
def test_a_candidate_that_cannot_be_pruned_or_compacted_fails_alone(
    tmp_path, task, reason, constraint
):
    space = tmp_path / "units.toml"
    text = (ROOT / "tests" / "toy.toml").read_text(encoding="utf-8")
    space.write_text(text.replace("[training]", 'structure = "row_column"\n\n[training]'))
    study = a_study(
        tmp_path / "toy", space=str(space), constraint=constraint,
        task=f"tests.test_search:{task}",
    )  # fmt: skip
    rows = run_trials(study, 6).rows
    failed = [row for row in rows if row["state"] == "failed"]

    assert [row["state"] for row in rows[:2]] == ["complete", "complete"]
    assert failed
    assert all(row["reason"].startswith(reason) for row in failed)
    assert all(row["p:gate_depth"] == 1 for row in failed)


@pytest.mark.parametrize("failure", [UserError("the data has changed"), OSError("disk full")])
def test_what_others_would_share_ends_the_study(tmp_path, monkeypatch, failure):
    def evaluate(self, model, split="dev"):
        raise failure

    study = a_study(tmp_path / "toy")
    run_trials(study, 1)
    monkeypatch.setattr(ToyTask, "evaluate", evaluate)
    with pytest.raises(type(failure), match=str(failure)):
        run(study)
    assert len(study.rows()) == 1


class RunsNothing(ToyDevice):
    def load(self, model, example):
        raise Unsupported("whatever it is")


def test_a_device_that_cannot_run_the_first_baseline_ends_the_study(tmp_path):
    study = a_study(tmp_path / "toy", device="tests.test_search:RunsNothing")
    refused = "cannot run task 'toy': whatever it is; choose another --device"
    with pytest.raises(UserError, match=refused):
        run(study)
    assert list((study.folder / "trials").glob("*/history.csv")) == []  # nothing has trained


class LosesItsError(ToyTask):
    """A task whose error is no number once a model has been made compact."""

    def evaluate(self, model, split="dev"):
        trained = any(p.grad is not None for p in model.parameters())
        return super().evaluate(model, split) if trained else {"err": float("nan")}


def test_an_error_that_is_no_number_fails_a_trial(tmp_path):
    study = a_study(tmp_path / "toy", budget=9, task="tests.test_search:LosesItsError")
    with pytest.raises(StudyFailed, match="the error of the compact network is nan"):
        run(study)


def test_a_limit_of_the_error_is_no_percentage(tmp_path):
    study = a_study(tmp_path / "toy", constraint=("error<=20",))
    with pytest.raises(UserError, match=r"'error<=20' is a fraction: 0\.2 is 20 %"):
        run(study)


class Told(ToyTask):
    """A task that tells its data by a word."""

    digest = "one"


def test_data_that_has_changed_is_refused(tmp_path, monkeypatch):
    study = a_study(tmp_path / "toy", budget=1, task="tests.test_search:Told")
    run_trials(study, 1)
    monkeypatch.setattr(Told, "digest", "two")
    with pytest.raises(UserError, match="learnt from other data"):
        run(Study(study.folder))


def test_energy_without_a_counter_is_refused_at_the_start(tmp_path):
    study = a_study(tmp_path / "toy", objectives="error,energy")
    with pytest.raises(UserError, match="cannot measure energy_j: no counter here"):
        Search(study, Silent())


def test_energy_of_a_model_is_refused_at_the_start_and_estimates_asked_for_are_not(tmp_path):
    flags = {"objectives": "error,energy", "device": "tests.toy:ModelDevice"}
    with pytest.raises(
        UserError, match="cannot measure energy_j: the vendor's model; `gpsearch pr"
    ):
        Search(a_study(tmp_path / "modelled", **flags), Silent())
    Search(a_study(tmp_path / "estimated", estimate_energy=15.0, **flags), Silent())


def test_energy_without_a_counter_is_estimated_on_request_and_marked(tmp_path):
    study = a_study(tmp_path / "toy", objectives="error,energy", budget=1, estimate_energy=15.0)
    (row,) = run_trials(study, 1).rows
    assert row["energy_j"] == pytest.approx(15 * row["latency_s"])
    assert row["energy_kind"] == "estimated"

    report.write(report.Results.of(study))
    assert ",estimated" in (study.folder / "trials.csv").read_text()
    assert "estimated" in (study.folder / "pareto.csv").read_text()
    table = report.front_text(report.Results.of(study), "table")
    assert "estimated energy" in table
    assert "unavailable" not in table


def test_measured_energy_shares_no_front_with_estimates(tmp_path):
    study = a_study(tmp_path / "toy", objectives="error,energy", budget=1, estimate_energy=15.0)
    reading = measure(ToyDevice(), nn.Linear(3, 2), (torch.zeros(3),))
    joules = Quantity(1.0, "J", "measured", None, 5)
    measured = replace(reading, quantities={**reading.quantities, "energy_j": joules})
    with pytest.raises(ValueError, match="no estimated energy"):
        Search(study, Silent())._complete(0, {"err": 0.1, "error": 0.1}, measured)


def test_a_slow_spell_is_told_and_not_held_against_a_candidate(tmp_path):
    study = a_study(tmp_path / "toy", device="tests.test_search:Tiring", objectives="error,latency")
    run_trials(study, 3)
    rows, judged = study.rows(), [trial.values[1] for trial in study.finished()]
    assert "against other readings" not in rows[0]["flags"]
    assert "the reference took +50% against other readings" in rows[2]["flags"]
    assert [round(row["latency_slowdown"], 2) for row in rows] == [1, 1, 1.5]
    usual_s = rows[0]["latency_reference_s"]
    assert judged == pytest.approx([row["latency_ratio"] * usual_s for row in rows])


class InUse(ToyDevice):
    """A device with a counter that somebody else holds."""

    def probe(self):
        return replace(super().probe(), unavailable={})

    def read_energy(self):
        raise OSError("somebody else reads it")


def test_a_reading_that_somebody_disturbed_is_taken_again(tmp_path):
    flags = {"device": "tests.test_search:InUse", "objectives": "error,energy"}
    study = a_study(tmp_path / "toy", **flags)
    run_trials(study, 1)
    assert study.rows()[0]["state"] == "failed"
    log = (study.trial_folder(0) / "log.txt").read_text()
    for reading in (1, 2, 3):
        assert f"reading {reading} of at most 3: no measured energy: " in log


def test_whose_weights_are_gone_is_named_and_the_others_are_measured_again(tmp_path):
    study = a_study(tmp_path / "toy", budget=2)
    listener = run_trials(study, 2)
    search = Search(study, listener)
    lost, *others = sorted(search.front())
    (study.trial_folder(lost) / "model.pt").unlink()
    search.run()
    told = f"without weights (model.pt), and so not measured again: trial {lost}"
    assert told in listener.notes[-1]
    assert sorted(study.finals()) == others


class Tiring(ToyDevice):
    """A device that is slower from the third model on; before, it has loaded one on trial.

    That is held against itself, too, but only by the first study of a process: it counts once.
    """

    loaded, last = 0, None

    def load(self, model, example):
        self.loaded += model is not self.last
        self.last = model
        return super().load(model, example) * (1.5 if self.loaded > 5 else 1)


def test_trainings_wait_while_another_study_measures(tmp_path):
    study = a_study(tmp_path / "toy", budget=1)
    with ThreadPoolExecutor(1) as pool:
        with Host().alone_on():
            work = pool.submit(run_trials, study, 1)
            while not (study.trial_folder(0) / "proposal.json").exists():
                assert not work.done()
                time.sleep(0.05)
            time.sleep(1)
            assert not (study.trial_folder(0) / "history.csv").exists()
        work.result(60)
    assert len(study.rows()) == 1
    assert (study.trial_folder(0) / "history.csv").exists()


def test_a_constraint_on_energy_needs_the_counter_too(tmp_path):
    study = a_study(tmp_path / "toy", constraint=("energy_mj<=1",))
    with pytest.raises(UserError, match="cannot measure energy_j"):
        Search(study, Silent())


def command(folder, *more):
    return [sys.executable, "-m", "gpsearch", *more, str(folder)]


def values(folder):
    """Return trials.csv without seconds, and how busy the machine was."""
    rows = rows_of(folder)
    return [{k: v for k, v in row.items() if not k.startswith(NOISE)} for row in rows]


def rows_of(folder):
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_study_killed_at_random_moments_ends_like_an_undisturbed_one(tmp_path):
    flags = ["run", *TOY_FLAGS, "--objectives", "error,flops,latency", "--budget", "5", "--out"]
    assert call(*flags, tmp_path / "a")[0] == 0
    took_s = sum(float(row["train_s"]) for row in rows_of(tmp_path / "a"))

    moments = [random.uniform(0, 1 + took_s / 2) for _ in range(3)]
    killed = command(tmp_path / "b", *flags)
    for moment in moments:
        with subprocess.Popen(killed, cwd=ROOT, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            assert b"note" in process.stderr.readline()  # it begins to work
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            process.kill()
        killed = command(tmp_path / "b", "resume")
    code, _, err = call("resume", tmp_path / "b")

    assert code == 0, err
    assert len(values(tmp_path / "b")) == 5
    assert values(tmp_path / "b") == values(tmp_path / "a"), f"killed after {moments} s"


def test_a_second_run_on_a_folder_is_refused(tmp_path):
    study = a_study(tmp_path / "toy", budget=2)
    with study.locked():
        code, _, err = call("resume", study.folder)

    assert code == 2
    assert "another gpsearch works there" in err
    assert len(err.strip().splitlines()) == 1


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(tmp_path):
    starts = command(tmp_path / "c", "run", *TOY_FLAGS, "--out")
    # Tests in the background ignore Ctrl-C, and so would their children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(starts, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with process:
        assert process.stderr is not None
        process.stderr.readline()  # the first trial begins
        os.kill(process.pid, signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()

    assert process.returncode == 130
    assert f"gpsearch resume {tmp_path / 'c'}" in err
    assert "Traceback" not in err


class Silence(ToyDevice):
    """A device whose profiler reads no energy, and does not say so."""

    closed = 0

    def probe(self):
        return replace(super().probe(), unavailable={})

    def close(self):
        Silence.closed += 1


@pytest.mark.parametrize(
    "flags", [{"objectives": "error,energy"}, {"constraint": ("energy_mj<=5",)}]
)
def test_a_profiler_that_reads_no_energy_is_refused_and_closed(tmp_path, flags):
    before = Silence.closed
    study = a_study(tmp_path / "toy", device="tests.test_search:Silence", **flags)
    with pytest.raises(UserError, match="the profiler of 'toy' reads no energy counter"):
        Search(study, Silent())
    assert Silence.closed == before + 1


class Watched(ToyTask):
    """Notes whether anybody could measure while it was evaluated."""

    free: list[bool] = []  # noqa: RUF012 - shared on purpose

    def evaluate(self, model, split="dev"):
        alone = threading.Event()

        def measured():
            with Host().alone_on("here"):
                alone.set()

        threading.Thread(target=measured, daemon=True).start()
        self.free.append(alone.wait(0.3))
        return super().evaluate(model, split)


def test_nobody_measures_while_a_model_is_scored(tmp_path):
    study = a_study(tmp_path / "toy", task="tests.test_search:Watched", epochs=1)
    Search(study, Silent()).try_candidate(0, study.space.baseline_candidates()["dense_lstm"])
    assert Watched.free == [False, False]


def test_a_device_that_fails_the_aa_gate_is_told_at_the_start_and_flagged(tmp_path):
    study = a_study(tmp_path / "toy", device="tests.toy:Lopsided")
    impatient = Host(sleep=lambda seconds: None, locks=tmp_path)
    aa_gate(Lopsided(), nn.Linear(3, 2), ToyTask().example(), host=impatient)  # and no pause later

    listener = run_trials(study, 1)

    assert "a model against itself: 1.300" in listener.notes[-1]
    assert listener.rows[0]["flags"] == listener.notes[-1]
    reading = read_json(study.trial_folder(0) / "reading.json")
    assert not reading["stable"]
    assert reading["started_at"]
    assert reading["wall_s"] > 0
    assert reading["workload"]["example"] == ["float32[1, 6, 3]"]


class FailsOnce(ToyDevice):
    """A device whose first call of all fails."""

    failed = False

    def run(self, handles, schedule):
        if not self.failed:
            type(self).failed = True
            raise RuntimeError("timed out once")
        return super().run(handles, schedule)


def test_a_device_that_fails_in_the_aa_gate_gets_its_trials(tmp_path):
    listener = run_trials(a_study(tmp_path / "toy", device="tests.test_search:FailsOnce"), 1)

    assert "a model could not be held against itself: " in listener.notes[-1]
    assert "timed out once" in listener.notes[-1]
    assert listener.rows[0]["state"] == "complete"


class Drawn(ToyTask):
    """Notes by which seeds its networks and its batches are drawn."""

    seeds: set[tuple[str, int]] = set()  # noqa: RUF012 - shared on purpose

    def build(self, architecture):
        self.seeds.add(("network", torch.initial_seed()))
        return super().build(architecture)

    def batches(self, training, epoch, seed):
        self.seeds.add(("batches", seed))
        return super().batches(training, epoch, seed)


def test_networks_and_batches_are_drawn_by_the_seed_of_the_study(tmp_path):
    study = a_study(tmp_path / "toy", task="tests.test_search:Drawn", seed=7, epochs=1)
    search = Search(study, Silent())
    Drawn.seeds.clear()
    search.try_candidate(0, study.space.baseline_candidates()["dense_lstm"])
    assert Drawn.seeds == {("network", 7), ("batches", 7)}


def test_a_study_computes_in_as_many_threads_as_it_was_told(tmp_path):
    for threads in (2, 1):  # the last as other tests have it
        Search(a_study(tmp_path / str(threads), threads=threads), Silent())
        assert torch.get_num_threads() == threads


def test_a_study_that_goes_on_with_another_machine_says_so(tmp_path):
    study, before, after = a_study(tmp_path / "toy"), Silent(), Silent()
    Search(study, before)
    facts = study.folder / "device.json"
    facts.write_text(facts.read_text().replace("1 MHz", "2 MHz"))
    Search(study, after)
    told = [f"this is not the machine (or not the software) that {study.folder} began on"]
    assert [note.split(";")[0] for note in after.notes if note not in before.notes] == told
