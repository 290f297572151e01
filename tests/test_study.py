import contextlib
import json
import shlex
import sqlite3
from pathlib import Path

import optuna
import pytest

from gpsearch.errors import UserError
from gpsearch.sampling import propose
from gpsearch.settings import Settings
from gpsearch.study import Study, how_to_resume

SPACE = "tests/toy.toml"
ROW = {"trial": 0, "baseline": "", "state": "complete", "error": 0.25, "flops_effective": 100}


def a_study(folder, **flags):
    return Study.create(folder, Settings.of({"space": SPACE, "objectives": "error,flops", **flags}))


def add(study, **row):
    number = len(study.finished())
    proposal = propose(study.finished(), study.space, goals=2, sampler="tpe", seed=0)
    study.save_proposal(number, proposal)
    settings = study.settings
    study.add(proposal, {**ROW, "trial": number, **row}, settings.goals, settings.limits)


def test_a_new_folder_holds_all_that_a_resume_needs(tmp_path):
    study = a_study(tmp_path / "s", budget=7)

    again = Study(study.folder)
    assert again.settings.budget == 7
    assert again.space.text == study.space.text
    environment = json.loads((study.folder / "environment.json").read_text())
    assert "torch" in environment["packages"]
    assert "2 FLOPs" in environment["flops"]


def test_the_space_is_kept_as_it_was(tmp_path):
    space = tmp_path / "mine.toml"
    space.write_text("[architecture]\nlayers = [1, 2]\n[baselines.a]\n")
    study = Study.create(tmp_path / "s", Settings.of({"space": str(space), "epochs": 3}))
    space.write_text("half of an edi")

    assert Study(study.folder).space.baseline_candidates()["a"].training.epochs == 3


def test_finished_trials_are_rows_and_open_in_optuna(tmp_path):
    study = a_study(tmp_path / "s")
    add(study)
    add(study, state="failed", reason="the loss is nan")
    add(study, state="gated", reason="too slow")

    assert [row["state"] for row in study.rows()] == ["complete", "failed", "gated"]
    loaded = optuna.load_study(study_name="gpsearch", storage=f"sqlite:///{study.folder}/study.db")
    assert [t.state.name for t in loaded.trials] == ["COMPLETE", "FAIL", "PRUNED"]
    assert loaded.best_trials[0].values == [0.25, 100.0]
    assert loaded.metric_names == ["error", "flops_effective"]


def test_the_storage_is_opened_once_and_shows_what_another_process_adds(tmp_path):
    study = a_study(tmp_path / "s")
    assert study.storage() is study.storage()
    assert study.rows() == []
    other = Study(study.folder)
    for count in (1, 2):
        add(other)
        assert len(study.rows()) == count


def test_constraints_reach_optuna(tmp_path):
    study = a_study(tmp_path / "s", constraint=("flops<=80",))
    add(study)

    assert study.finished()[0].constraints == {"flops<=80": pytest.approx(0.25)}
    assert study.storage().best_trials == []


def test_the_sweep_keeps_the_fronts_models_and_no_checkpoints(tmp_path):
    study = a_study(tmp_path / "s")
    for number in range(2):
        add(study)
        for name in ("model.pt", "checkpoint.pt"):
            (study.trial_folder(number) / name).write_text("weights")
    study.trial_folder(2).mkdir()
    (study.trial_folder(2) / "checkpoint.pt").write_text("of the trial in hand")

    study.sweep(keep={1})

    left = sorted(str(p.relative_to(study.folder / "trials")) for p in study.folder.rglob("*.pt"))
    assert left == ["1/model.pt", "2/checkpoint.pt"]


def test_what_had_begun_is_remembered(tmp_path):
    study = a_study(tmp_path / "s")
    assert study.saved_proposal(0) is None
    proposal = propose([], study.space, goals=2, sampler="tpe", seed=0)
    study.save_proposal(0, proposal)

    assert study.saved_proposal(0) == proposal.params
    assert study.candidate(0) == proposal.candidate


def test_a_folder_with_a_study_is_not_started_again(tmp_path):
    study = a_study(tmp_path / "s")
    study.trial_folder(0).mkdir()
    with pytest.raises(UserError, match="holds a study already; continue it with `gpsearch resume"):
        a_study(tmp_path / "s")
    assert shlex.split(how_to_resume(Path("my study"))) == ["gpsearch", "resume", "my study"]


def test_a_reproduction_s_folder_stays_as_it_is(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "config.toml").write_text("of the reproduction")
    with pytest.raises(UserError, match="holds a reproduction; choose another --out"):
        a_study(tmp_path)

    assert (tmp_path / "config.toml").read_text() == "of the reproduction"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "rows"]


@pytest.mark.parametrize("left", ["checkpoint.pt", "model.pt"])
def test_a_training_s_folder_is_no_place_for_a_study(tmp_path, left):
    (tmp_path / left).touch()
    with pytest.raises(UserError, match="holds a training; choose another --out"):
        a_study(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_nor_is_that_of_a_front_measured_again(tmp_path):
    (tmp_path / "trials").mkdir()
    (tmp_path / "remeasured.json").touch()
    with pytest.raises(UserError, match="holds a remeasured front; choose another --out"):
        a_study(tmp_path)


def test_a_start_that_failed_before_its_first_trial_can_be_made_again(tmp_path):
    a_study(tmp_path / "s", device="nowhere")

    assert a_study(tmp_path / "s").settings.device == "cpu"


def test_no_results_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="no results folder"):
        Study(tmp_path)
    a_study(tmp_path / "s")
    (tmp_path / "s" / "rows.csv").touch()
    with pytest.raises(UserError, match=r"what `gpsearch reproduce` left; see .*table\.md"):
        Study(tmp_path / "s")


def test_a_damaged_database_is_named(tmp_path):
    study = a_study(tmp_path / "s")
    (study.folder / "study.db").write_bytes(b"not a database at all, whatever its name says")
    with pytest.raises(UserError, match=r"study\.db: cannot be opened"):
        study.finished()


def test_who_reads_makes_no_database(tmp_path):
    study = a_study(tmp_path / "s")
    study.trial_folder(0).mkdir()  # of the first trial, in hand
    (study.trial_folder(0) / "reading.json").touch()

    assert study.rows() == []
    assert not (study.folder / "study.db").exists()


def test_a_lost_database_is_named(tmp_path):
    study = a_study(tmp_path / "s")
    add(study)
    (study.folder / "study.db").unlink()
    (study.folder / "trials.csv").write_text("trial,state\n0,complete\n")
    with pytest.raises(UserError, match=r"study\.db: holds no trial, though some are finished"):
        Study(study.folder).finished()

    assert not (study.folder / "study.db").exists()
    (study.folder / "trials.csv").unlink()
    study.trial_folder(1).mkdir()  # which begins once the first has ended
    with pytest.raises(UserError, match=r"study\.db: holds no trial"):
        Study(study.folder).rows()


def test_a_damaged_file_is_named(tmp_path):
    study = a_study(tmp_path / "s")
    study.trial_folder(0).mkdir()
    for path, read in (
        (study.folder / "device.json", study.saved_fingerprint),
        (study.trial_folder(0) / "final.json", study.finals),
        (study.trial_folder(0) / "proposal.json", lambda: study.saved_proposal(0)),
    ):
        path.write_text('{"half": ')
        with pytest.raises(UserError, match=rf"{path.name}: damaged"):
            read()


def test_two_at_once_are_refused(tmp_path):
    study = a_study(tmp_path / "s")
    with study.locked(), pytest.raises(UserError, match="another gpsearch works"), study.locked():
        pass


def test_a_study_that_has_just_begun_is_not_begun_again(tmp_path):
    study = a_study(tmp_path / "s", budget=7)
    with study.locked(), pytest.raises(UserError, match="another gpsearch works"):
        a_study(tmp_path / "s", budget=3)

    assert Study(study.folder).settings.budget == 7


def test_a_budget_below_what_is_done_is_refused(tmp_path):
    study = a_study(tmp_path / "s", budget=9, timeout="1h")
    add(study)
    add(study)
    with pytest.raises(UserError, match="--budget 1: 2 trials are finished already"):
        study.extend(1)

    study.extend(3)
    assert (study.settings.budget, study.settings.timeout) == (3, "")


def test_finished_trials_keep_their_objectives(tmp_path):
    study = a_study(tmp_path / "s")
    add(study)
    config = study.folder / "config.toml"
    config.write_text(config.read_text().replace("error,flops", "error,params"))
    with pytest.raises(UserError, match="judged by error, flops_effective, not by error, params"):
        Study(study.folder).refuse_changes()


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (15.0, 0.0, "was estimated at 15 W, and would now be measured"),
        (15.0, 30.0, "was estimated at 15 W, and would now be estimated at 30 W"),
        (0.0, 15.0, "was measured, and would now be estimated at 15 W"),
    ],
)
def test_finished_trials_keep_the_way_to_their_energy(tmp_path, before, after, told):
    study = a_study(tmp_path / "s", objectives="error,energy", estimate_energy=before)
    kind = "estimated" if before else "measured"
    add(study, latency_s=0.002, energy_j=0.03, energy_kind=kind)
    study.refuse_changes()
    config = study.folder / "config.toml"
    config.write_text(
        config.read_text().replace(f"estimate_energy = {before}", f"estimate_energy = {after}")
    )
    with pytest.raises(UserError, match=told):
        Study(study.folder).refuse_changes()


def test_a_reference_is_compared_with_readings_of_its_own_device(tmp_path):
    study = a_study(tmp_path / "s")
    for number, (seconds, clock) in enumerate([(4e-3, "1 GHz"), (6e-3, "1 GHz"), (1e-3, "5 GHz")]):
        add(study, latency_reference_s=seconds)
        reading = {"fingerprint": {"clock": clock}}
        (study.trial_folder(number) / "reading.json").write_text(json.dumps(reading))

    assert study.reference_s({"clock": "1 GHz"}) == 5e-3
    assert study.reference_s({"clock": "5 GHz"}) == 1e-3
    assert study.reference_s({"clock": "3 GHz"}) is None


def test_slowdowns_are_against_the_first_reading(tmp_path):
    study = a_study(tmp_path / "s")
    costs = {"latency_s": 4e-3, "latency_ratio": 0.5, "latency_reference_s": 8e-3}
    assert study.slowdown(costs) == {"latency_slowdown": 1}
    add(study, latency_slowdown=1, latency_reference_s=4e-3)
    assert study.slowdown(costs) == {"latency_slowdown": 2}
    assert study.slowdown({"latency_s": 4e-3}) == {"latency_slowdown": None}


def test_a_study_that_began_without_slowdowns_goes_on_without(tmp_path):
    study = a_study(tmp_path / "s")
    add(study, latency_reference_s=4e-3)
    assert study.slowdown({"latency_s": 4e-3, "latency_ratio": 0.5}) == {}


@pytest.mark.parametrize("name", ["what?", "a%20b", "{a}"])
def test_a_name_that_no_database_can_have_is_refused_before_anything_is_made(tmp_path, name):
    with pytest.raises(UserError, match=r"under a name with \?, \{, \} or %xx; give another"):
        a_study(tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_space_may_have_wider_ranges_but_no_other_choices(tmp_path):
    study = a_study(tmp_path / "s")
    for _ in range(3):
        add(study)
    space = study.folder / "space.toml"
    text = space.read_text()
    space.write_text(text.replace("high = 12", "high = 16"))
    Study(study.folder).refuse_changes()
    space.write_text(text.replace('"gmp"', '"gmp", "set"', 1))
    with pytest.raises(UserError, match=r"schedule was one of gp, gmp, dense .* bring that back"):
        Study(study.folder).refuse_changes()


def test_a_folder_that_cannot_be_written_can_be_looked_at(tmp_path):
    study = a_study(tmp_path / "s")
    add(study)
    with contextlib.closing(sqlite3.connect(study.folder / "study.db")) as other:
        other.execute("begin immediate")  # nobody else can write now
        assert len(Study(study.folder).rows()) == 1


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    study = a_study(tmp_path / "s")
    add(study)

    def full(trial):
        raise optuna.exceptions.StorageInternalError("database or disk is full")

    monkeypatch.setattr(study.storage(), "add_trial", full)
    with pytest.raises(OSError, match=r"study.db: cannot be written \(is the disk full\?\)"):
        add(study)


@pytest.mark.parametrize("name", ["config.toml", "space.toml"])
def test_a_user_s_own_files_are_not_written_over(tmp_path, name):
    (tmp_path / name).write_text("# mine")
    with pytest.raises(UserError, match=f"{name} is not of gpsearch; choose another --out"):
        a_study(tmp_path)
    assert (tmp_path / name).read_text() == "# mine"


def test_a_start_that_came_to_nothing_may_be_repeated_with_other_data(tmp_path):
    study = a_study(tmp_path / "s")
    (study.folder / "data.json").write_text('{"task": "toy", "data": "", "digest": "old"}')
    assert not (a_study(study.folder).folder / "data.json").exists()


def test_a_copied_trial_is_no_trial(tmp_path):
    study = a_study(tmp_path / "s")
    study.save_final(0, {"test_error": 0.1})
    copy = study.folder / "trials" / "0 (copy)"
    copy.mkdir()
    (copy / "final.json").write_text("{}")
    assert study.finals().keys() == {0}
