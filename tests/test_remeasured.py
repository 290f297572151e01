import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpsearch import report
from gpsearch.deploy import reading_on, save_model
from gpsearch.errors import UserError
from gpsearch.profiling import waiting
from gpsearch.remeasured import NOT_MEASURED, Remeasured
from gpsearch.report import Results
from gpsearch.sampling import propose
from gpsearch.settings import Settings
from gpsearch.study import Study
from tests.commands import call
from tests.toy import ToyDevice, ToyTask

ROOT = Path(__file__).parents[1]
OTHER = "tests.toy:StepDevice"
FLAGS = {
    "task": "tests.toy:ToyTask",
    "space": str(ROOT / "tests" / "toy.toml"),
    "device": "tests.toy:ToyDevice",
    "objectives": "error,latency",
}
#  trial   error   latency   FLOPs
#    0      20 %    0.4 ms     40    dense_lstm: off the front, so without weights
#    1      10 %    0.3 ms     30
#    2      30 %    0.2 ms     20
COSTS = [(0.2, 4e-4, 40), (0.1, 3e-4, 30), (0.3, 2e-4, 20)]


@pytest.fixture
def study(tmp_path):
    """A study whose networks were never trained; their weights are real."""
    study = Study.create(tmp_path / "toy", Settings.of(FLAGS))
    for number, (error, latency_s, flops) in enumerate(COSTS):
        proposal = propose(study.finished(), study.space, goals=2, sampler="tpe", seed=0)
        study.save_proposal(number, proposal)
        row = {
            "trial": number, "baseline": proposal.baseline, "state": "complete", "metric": "err",
            "error": error, "latency_s": latency_s, "latency_ratio": latency_s / 4e-4,
            "energy_j": 15 * latency_s, "flops_effective": flops,
        }  # fmt: skip
        study.add(proposal, row, study.settings.goals, ())
        if number:
            model = ToyTask().build(proposal.candidate.architecture)
            save_model(model.eval(), study.trial_folder(number) / "model.pt")
    study.save_final(1, {"latency_s": 3.1e-4, "test_err": 0.15, "test_error": 0.15})
    return study


def contents(study):
    """Return the study's own files."""
    paths = [p for p in study.folder.rglob("*") if "remeasured" not in p.parts and p.is_file()]
    return {path: path.read_bytes() for path in paths}


def test_the_front_is_measured_on_another_device_beside_the_first_results(study):
    before, told = contents(study), []
    found = Remeasured.begin(study, OTHER)
    found.run(lambda trial, reading: told.append((trial, reading.device)))
    results = Results.at(found.folder)
    report.write(results)

    assert sorted(told) == [(1, "steps"), (2, "steps")]
    assert contents(study) == before
    assert {"pareto.csv", "pareto.json", "pareto.png", "device.json"} <= {
        path.name for path in found.folder.iterdir()
    }
    off, kept, fallen = results.rows
    assert (off["state"], off["flops_effective"]) == (NOT_MEASURED, 40)
    assert "latency_s" not in off
    # On this device both widths take one tile, so the one with the larger error is no use.
    assert kept["latency_s"] == fallen["latency_s"] == 2e-3
    assert (kept["error"], kept["test_error"]) == (0.1, 0.15)
    assert "test_error" not in fallen, "the test split is used once, by the study"
    assert results.front == [1]


class Asking(ToyDevice):
    """A device that tells which process it measures for."""

    def disturbances(self):
        return [f"{pid} waits" for pid in waiting()]


def test_who_measures_knows_the_process_that_waits_for_it(study):
    reading = reading_on("tests.test_remeasured:Asking", study.folder, 1)
    assert f"{os.getpid()} waits" in reading.flags


def test_a_killed_remeasurement_goes_on_and_a_finished_one_is_kept(study):
    null = subprocess.DEVNULL
    command = [sys.executable, "-m", "gpsearch", "remeasure", str(study.folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=null, stderr=null)
    base = study.folder / "remeasured"
    while not (first := list(base.glob("*/trials/*/reading.json"))):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    stamp = first[0].stat().st_mtime_ns

    code, out, err = call("remeasure", study.folder)
    assert code == 0, err
    (folder,) = base.iterdir()
    assert first[0].stat().st_mtime_ns == stamp, "what was measured is not measured again"
    assert len(err.splitlines()) == 1
    assert len(list(folder.glob("trials/*/reading.json"))) == 2
    assert Remeasured.read(folder).left == []
    assert f"gpsearch compare {study.folder} {folder}" in out
    assert Remeasured.begin(study).folder.name == f"{folder.name}-2"


def test_an_interrupted_remeasurement_does_not_go_on_on_another_machine(study):
    here = Remeasured.begin(study)
    assert Remeasured.begin(study).folder == here.folder
    record = json.loads((here.folder / "remeasured.json").read_text())
    record["fingerprint"] = {"clock": "2 MHz"}
    (here.folder / "remeasured.json").write_text(json.dumps(record))

    assert Remeasured.begin(study).folder == here.folder.with_name(f"{here.folder.name}-2")


def test_estimated_energy_needs_no_counter_the_second_time_either(study):
    flags = {**FLAGS, "constraint": ("energy_mj<=5",), "estimate_energy": 15.0}
    (study.folder / "config.toml").write_text(Settings.of(flags).to_toml())
    assert sorted(Remeasured.begin(Study(study.folder), OTHER).left) == [1, 2]


def test_what_cannot_be_measured_again_is_refused_before_the_work(study, tmp_path):
    with pytest.raises(UserError, match="no front measured again"):
        Remeasured.read(tmp_path)
    (study.trial_folder(2) / "model.pt").unlink()
    with pytest.raises(UserError, match=r"the weights of trial 2 are not there"):
        Remeasured.begin(study)
    empty = Study.create(tmp_path / "empty", Settings.of(FLAGS))
    with pytest.raises(UserError, match="has no front yet"):
        Remeasured.begin(empty)
    energy = Study.create(tmp_path / "joules", Settings.of({**FLAGS, "objectives": "error,energy"}))
    with pytest.raises(UserError, match="cannot measure energy_j: no counter here"):
        Remeasured.begin(energy)
