from __future__ import annotations

import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpsearch.candidate import Candidate
from gpsearch.errors import UserError
from gpsearch.schedule import GMP, GP, SCHEDULES
from gpsearch.space import Space, built_in
from gpsearch.tasks.speech import SpeechModel

NAMES = ("captioning", "deepspeech2", "hlstm", "lstm", "neuraltalk", "seq2seq", "translation")

SMALL = """\
[architecture]
layers = 2
hidden_size = { low = 8, high = 32, step = 8, default = 16 }
gate_depth = [0, 1]
gate_width = { low = 4, high = 8 }

[schedule]
name = ["gp", "set", "dense"]
final_density = { low = 0.1, high = 0.4, log = true }

[schedule.gp]
seed_density = { low = 0.4, high = 0.5, default = 0.5 }

[training]
epochs = 3

[baselines.plain]
architecture.gate_depth = 0
schedule.name = "dense"

[baselines.deep]
architecture.gate_depth = 1
schedule.name = "gp"
schedule.gp.seed_density = 0.45
"""


class Drawn:
    """A trial whose values hypothesis draws; keeps what it was asked for."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.asked: dict[str, Any] = {}

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        return int(self.draw(name, st.sampled_from(range(low, high + 1, step))))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        return float(self.draw(name, st.sampled_from([low, high]) | st.floats(low, high)))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.draw(name, st.sampled_from(choices))

    def draw(self, name: str, values: st.SearchStrategy[Any]) -> Any:
        assert name not in self.asked, "a parameter is suggested once"
        self.asked[name] = self.data.draw(values, name)
        return self.asked[name]


def space(folder: Path, text: str = SMALL) -> Space:
    path = folder / "mine.toml"
    path.write_text(text)
    return Space.read(str(path))


def refused(folder: Path, old: str, new: str) -> str:
    """Return the message about SMALL with ``old`` replaced, without the file's folder."""
    assert old in SMALL
    with pytest.raises(UserError) as caught:
        space(folder, SMALL.replace(old, new))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{folder}/")


# The built-in spaces


def test_the_built_in_spaces_are_listed_with_a_line_each() -> None:
    assert tuple(built_in()) == NAMES
    assert built_in()["hlstm"].endswith("(the default)")


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_built_in_space_is_commented(name: str) -> None:
    text = files("gpsearch.search_spaces").joinpath(f"{name}.toml").read_text()
    keys = [line for line in text.partition("[baselines")[0].splitlines() if re.match(r"\w", line)]
    assert keys
    assert [line for line in keys if "  # " not in line and " # " not in line] == []


@settings(max_examples=60)
@given(st.sampled_from(NAMES), st.data())
def test_whatever_is_suggested_is_a_valid_candidate(name: str, data: st.DataObject) -> None:
    trial, within = Drawn(data), SPACES[name]
    candidate = within.suggest(trial)
    assert within.candidate(trial.asked) == candidate
    assert Candidate.from_dict(candidate.to_dict()) == candidate


SPACES = {name: Space.read(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_based_sampler_takes_a_space_and_its_baselines(name: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        sampler = optuna.samplers.TPESampler(
            seed=0, multivariate=True, group=True, n_startup_trials=8
        )
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    for params in SPACES[name].baselines().values():
        study.enqueue_trial(params)
    for value in range(20):
        trial = study.ask()
        SPACES[name].suggest(trial)
        study.tell(trial, [value, -value])
    baselines = list(SPACES[name].baselines().values())
    assert [told.params for told in study.trials[: len(baselines)]] == baselines
    distributions: dict[str, Any] = {}
    for told in study.trials:
        for key, one in told.distributions.items():
            assert distributions.setdefault(key, one) == one, "a name has one distribution"


def test_the_default_space_holds_the_plain_lstm_and_every_schedule() -> None:
    within = SPACES["hlstm"]
    for name in SCHEDULES:
        candidate = within.candidate({"gate_depth": 0, "schedule": name})
        assert candidate.architecture.gate_hidden == ()
        assert candidate.schedule.name == name


def recurrent_weights(candidate: Candidate) -> int:
    with torch.device("meta"):
        model = SpeechModel(candidate.architecture, 29)
    return sum(weight.numel() for weight in model.layers.parameters() if weight.dim() > 1)


def test_the_baselines_are_dense_pruned_and_narrow() -> None:
    dense, pruned, narrow = SPACES["hlstm"].baseline_candidates().values()
    # Dropout is tuned for each.
    assert replace(pruned.architecture, dropout=dense.architecture.dropout) == dense.architecture
    assert dense.architecture.gate_depth == 0
    assert (dense.schedule.name, pruned.schedule.name, narrow.schedule.name) == (
        "dense",
        "gmp",
        "dense",
    )
    assert narrow.architecture.gate_depth == 1
    # As many weights as the sparse candidates have non-zeros.
    sparse = recurrent_weights(pruned) * pruned.schedule.final_density
    assert 0.8 < recurrent_weights(narrow) / sparse < 1.25


def test_the_paper_s_baseline_has_its_fifty_million_weights() -> None:
    baseline = SPACES["deepspeech2"].baseline_candidates()["dense_lstm"]
    assert recurrent_weights(baseline) == 50_380_800


# What a space means


def test_only_what_means_something_is_suggested(tmp_path: Path) -> None:
    assert space(tmp_path).baselines() == {
        "plain": {"hidden_size": 16, "gate_depth": 0, "schedule": "dense"},
        "deep": {
            "hidden_size": 16,
            "gate_depth": 1,
            "gate_width": 4,
            "schedule": "gp",
            "final_density": 0.1,
            "gp.seed_density": 0.45,
        },
    }


def test_a_default_is_the_files_else_the_record_s_else_the_first(tmp_path: Path) -> None:
    text = SMALL.replace("epochs = 3", "epochs = { low = 10, high = 50 }\nclip = [1.0, 2.0]")
    deep = space(tmp_path, text).baseline_candidates()["deep"]
    assert deep.architecture.hidden_size == 16
    assert deep.training.epochs == 30
    assert deep.training.clip == 1.0
    assert isinstance(deep.schedule, GP)
    assert deep.schedule.final_density == 0.1


def test_a_schedule_s_own_number_goes_before_the_common_one(tmp_path: Path) -> None:
    text = SMALL.replace("[schedule.gp]", "[schedule.gp]\nfinal_density = 0.2")
    within = space(tmp_path, text)
    assert within.candidate({"schedule": "gp"}).schedule.final_density == 0.2
    assert within.candidate({"schedule": "set"}).schedule.final_density == 0.1


def test_a_common_number_can_be_kept_to_some_schedules(tmp_path: Path) -> None:
    line = 'structure = { choices = ["row_column"], only = ["gp"] }\n'
    within = space(tmp_path, SMALL.replace("[schedule.gp]", line + "[schedule.gp]"))
    assert within.candidate({"schedule": "gp"}).schedule.structure == "row_column"
    assert within.candidate({"schedule": "set"}).schedule.structure == "element"


def test_a_schedule_may_be_fixed_or_left_out(tmp_path: Path) -> None:
    baselines = "[baselines.one]\n"
    fixed = space(tmp_path, f'[schedule]\nname = "gmp"\n{baselines}')
    assert fixed.candidate({}).schedule == GMP()
    assert space(tmp_path, baselines).candidate({}) == Candidate()


def test_epochs_can_be_overridden_also_in_baselines(tmp_path: Path) -> None:
    text = SMALL.replace("epochs = 3", "epochs = [3, 4]").replace(
        "[baselines.deep]", "[baselines.deep]\ntraining.epochs = 4"
    )
    short = space(tmp_path, text).override(epochs=1)
    assert {one.training.epochs for one in short.baseline_candidates().values()} == {1}
    assert all("epochs" not in params for params in short.baselines().values())
    assert short.text == text
    with pytest.raises(UserError, match="--epochs: 0"):
        short.override(epochs=0)


# Mistakes are named with their line


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "hidden_size =",
            "hiden_size =",
            "mine.toml:3: [architecture] hiden_size is no key; did you mean hidden_size?",
        ),
        ("[training]", "[trainin]", "mine.toml:14: trainin is no table; did you mean training?"),
        (
            "seed_density = {",
            "seed = {",
            "mine.toml:12: [schedule.gp] seed is no key; did you mean seed_density?",
        ),
        (
            "epochs = 3",
            'epochs = "3"',
            "mine.toml:15: [training] epochs = '3' should be of type int",
        ),
        (
            "low = 8, high = 32",
            "low = 40, high = 32",
            "mine.toml:3: [architecture] hidden_size: low = 40 is above high = 32",
        ),
        (
            "step = 8",
            "step = 7",
            "mine.toml:3: [architecture] hidden_size: step = 7 does not lead from low to high",
        ),
        (
            "default = 16",
            "default = 15",
            "mine.toml:3: [architecture] hidden_size: default = 15 should be a number from 8 to 32 "
            "in steps of 8",
        ),
        (
            "default = 16",
            "start = 15",
            "mine.toml:3: [architecture] hidden_size: start is unknown here; there are low, high, "
            "step, log, default, snap",
        ),
        (
            "low = 4,",
            "low = 4.5,",
            "mine.toml:5: [architecture] gate_width: low = 4.5 should be an integer",
        ),
        (
            "low = 4,",
            "",
            "mine.toml:5: [architecture] gate_width: a range needs low and high; low is missing",
        ),
        (
            "low = 0.1, high",
            "low = 0.0, high",
            "mine.toml:9: [schedule] final_density: log = true needs low above 0, and no step",
        ),
        (
            "epochs = 3",
            f"epochs = 3\nclip = {{ low = 1.0, high = {'9' * 400} }}",
            "mine.toml:16: [training] clip: high has 400 digits, too many",
        ),
        (
            "epochs = 3",
            "epochs = 3\nclip = { low = 1.0, high = inf }",
            "mine.toml:16: [training] clip: high = inf should be finite",
        ),
        (
            "epochs = 3",
            "epochs = 3\nclip = { low = nan, high = 5.0 }",
            "mine.toml:16: [training] clip: low = nan should be finite",
        ),
        (
            "epochs = 3",
            "epochs = 3\nclip = { low = 1.0, high = 5.0, step = nan }",
            "mine.toml:16: [training] clip: step = nan should be a number above 0",
        ),
        (
            "epochs = 3",
            "epochs = 3\nclip = nan",
            "mine.toml:16: [training] clip = nan should be above 0",
        ),
        (
            "[0, 1]",
            "[]",
            "mine.toml:4: [architecture] gate_depth: choices should be a list of values",
        ),
        (
            "[0, 1]",
            "[0, 1, 0]",
            "mine.toml:4: [architecture] gate_depth: choices = [0, 1, 0] has a value twice",
        ),
        (
            "[0, 1]",
            "[0, true]",
            "mine.toml:4: [architecture] gate_depth = True should be of type int",
        ),
        (
            '"set"',
            '"sett"',
            "mine.toml:8: [schedule] name = 'sett' is none of gp, gmp, set, rigl, selfish, dense",
        ),
        (
            "high = 0.4, log = true",
            'high = 0.4, only = ["gpp"]',
            "mine.toml:9: [schedule] final_density: only = ['gpp'] should be a list of schedules: "
            "gp, gmp, set, rigl, selfish, dense",
        ),
        # Corners: 0.8 is above gp's default peak of 0.6, and 1.5 is no share.
        (
            "high = 0.4,",
            "high = 0.8,",
            "mine.toml:9: [schedule] final_density = 0.8 is above peak_density = 0.6",
        ),
        (
            "high = 0.5,",
            "high = 1.5,",
            "mine.toml:12: [schedule.gp] seed_density = 1.5 should be a share between 0 and 1",
        ),
        (
            "schedule.gp.seed_density = 0.45",
            "schedule.gp.seed_density = 0.9",
            "mine.toml:24: [baselines.deep] schedule.gp.seed_density = 0.9 lies outside the space: "
            "a number from 0.4 to 0.5",
        ),
        (
            "high = 0.4,",
            'high = 0.4, only = [["gp"]],',
            "mine.toml:9: [schedule] final_density: only = [['gp']] should be a list of schedules: "
            "gp, gmp, set, rigl, selfish, dense",
        ),
        (
            "architecture.gate_depth = 1",
            "architecture.depth = 1",
            "mine.toml:22: [baselines.deep] architecture.depth is no key of this space; did you "
            "mean architecture.gate_depth?",
        ),
        (
            "architecture.gate_depth = 1",
            "architecture.layers = 3",
            "mine.toml:22: [baselines.deep] architecture.layers = 3 lies outside the space: "
            "fixed at 2",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert refused(tmp_path, old, new) == message


def test_broken_toml_is_named_with_its_line(tmp_path: Path) -> None:
    assert refused(tmp_path, "layers = 2", "layers = ").startswith("mine.toml:2: not valid TOML: ")


def test_a_space_needs_a_baseline(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no \[baselines.NAME\]"):
        space(tmp_path, SMALL.partition("[baselines")[0])


@pytest.mark.parametrize("table", ["architecture", "schedule", "training", "schedule.gp"])
def test_a_value_where_a_table_should_be_is_refused(tmp_path: Path, table: str) -> None:
    with pytest.raises(UserError, match=rf"mine.toml:1: .*{table[-2:]} should be a table"):
        space(tmp_path, f"{table} = 3\n[baselines.one]\n")


def test_a_space_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no search space called 'hlst'; there are captioning, "):
        Space.read("hlst")
    with pytest.raises(UserError, match=r"none\.toml: cannot be read"):
        Space.read(str(tmp_path / "none.toml"))


# Widths that snap to a device's steps

SNAP = SMALL.replace("step = 8, default = 16 }", 'step = 8, default = 16, snap = "device" }')


def test_a_width_snaps_once_its_edges_are_known(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SNAP)
    space = Space.read(str(tmp_path / "s.toml"))
    assert space.unsnapped == {"hidden_size": (8, 32, 8)}

    known = space.with_edges({"hidden_size": [24, 32]}, "of a board\nwith 16 lanes")
    assert known.unsnapped == {}
    assert known.defaults()["hidden_size"] == known.baselines()["plain"]["hidden_size"] == 24
    assert "# Right edges of the latency steps of a board with 16 lanes\n" in known.text
    (tmp_path / "s.toml").write_text(known.text)
    assert Space.read(str(tmp_path / "s.toml")).parameters == known.parameters


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('snap = "device"', "snap = true", "snap = True should be"),
        ('snap = "device"', 'log = true, snap = "device"', "log = true needs"),
        ("high = 8 }", 'high = 8, snap = "device" }', "beside a step"),
        ("layers = 2", 'layers = { low = 1, high = 3, step = 1, snap = "device" }', "can snap"),
        (
            "[baselines.plain]",
            "[snapped]\nhidden_size = [24, 16]\n[baselines.plain]",
            "should rise",
        ),
        ("[baselines.plain]", "[snapped]\nhidden_size = [16, 24]\n[baselines.plain]", "end at 32"),
        ("[baselines.plain]", "[snapped]\nhidden_size = 32\n[baselines.plain]", "should list"),
        ("[baselines.plain]", "[snapped]\n[baselines.plain]", "hidden_size: should list"),
        ("[baselines.plain]", "[snapped]\nlayers = [2]\n[baselines.plain]", "should list"),
    ],
)
def test_a_mistake_in_snapping_is_named_with_its_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    (tmp_path / "s.toml").write_text(SNAP.replace(old, new))
    with pytest.raises(UserError, match=rf"s\.toml:\d+: .*{re.escape(message)}"):
        Space.read(str(tmp_path / "s.toml"))
