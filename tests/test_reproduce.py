"""The paper's rows on the toy task: what is finished is kept, what is left is done."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpsearch import UserError, report
from gpsearch.candidate import Candidate
from gpsearch.compact import compact
from gpsearch.deploy import load_model
from gpsearch.reproduce import Comparison, Reproduction
from gpsearch.space import Space, built_in
from gpsearch.study import Row
from gpsearch.train import Epoch, grow_and_prune
from tests.toy import ToyTask

TOY = Path(__file__).with_name("toy.toml")
ROWS = """
[deployment]
weights = { choices = ["float32", "int8"], default = "float32" }

[rows.dense_lstm]
architecture.gate_depth = 0
schedule.name = "dense"

[rows.gp_hlstm]
schedule.name = "gp"
deployment.weights = "int8"
"""


class Notes:
    """What a listener was told."""

    def __init__(self, stop_after: int = 1000) -> None:
        self.begun: list[tuple[str, int]] = []
        self.epochs, self.stop_after = 0, stop_after

    def row_begins(self, name: str, seed: int, candidate: Candidate) -> None:
        self.begun.append((name, seed))

    def epoch_ends(self, epoch: Epoch, epochs: int) -> None:
        self.epochs += 1
        if self.epochs == self.stop_after:
            raise KeyboardInterrupt

    def row_ends(self, row: Row) -> None:
        pass


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    space = tmp_path / "rows.toml"
    space.write_text(TOY.read_text() + ROWS)
    task, device = f"{ToyTask.__module__}:ToyTask", "tests.toy:ToyDevice"
    return Comparison(task, str(space), "small", device=device, seeds=2, epochs=3)


def weights(folder: Path, name: str, seed: int) -> dict[str, Tensor]:
    """Return those of a row's network, to be compared to the last bit."""
    return load_model(folder / "rows" / name / str(seed) / "model.pt").state_dict()


def test_every_row_is_trained_with_every_seed(tmp_path: Path, comparison: Comparison) -> None:
    found = Reproduction.begin(tmp_path / "out", comparison)
    rows = list(found.run(Notes()))
    assert [(row["row"], row["seed"]) for row in rows] == [
        ("dense_lstm", 0), ("gp_hlstm", 0), ("dense_lstm", 1), ("gp_hlstm", 1),
    ]  # fmt: skip
    assert all(0 <= row["test_error"] <= 1 and row["latency_ratio"] > 0 for row in rows)
    report.write_rows(found)
    text = (found.folder / "table.md").read_text()
    assert "| gp_hlstm | " in text
    assert (found.folder / "table.png").stat().st_size > 1000
    assert len((found.folder / "rows.csv").read_text().splitlines()) == 5
    for (name, one), seed in product(found.candidates.items(), (0, 1)):
        torch.manual_seed(seed)
        network = ToyTask().build(one.architecture)
        alone = grow_and_prune(network, ToyTask(), one.schedule, one.training, seed=seed)
        narrow = {"dense_lstm": "float32", "gp_hlstm": "int8"}[name]
        wanted = compact(alone, weights=narrow, here=False).state_dict()
        torch.testing.assert_close(weights(found.folder, name, seed), wanted, rtol=0, atol=0)


def test_what_was_interrupted_goes_on_and_ends_in_the_same_numbers(
    tmp_path: Path, comparison: Comparison
) -> None:
    whole = list(Reproduction.begin(tmp_path / "whole", comparison).run(Notes()))
    parts, folder = Notes(stop_after=5), tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        list(Reproduction.begin(folder, comparison).run(parts))
    again = Notes()
    list(Reproduction.begin(folder, comparison).run(again))
    assert parts.begun == [("dense_lstm", 0), ("gp_hlstm", 0)]
    assert again.begun == [("gp_hlstm", 0), ("dense_lstm", 1), ("gp_hlstm", 1)]
    assert again.epochs == 3 + 3 + 1

    def scores(rows: list[Row]) -> list[Row]:
        of_interest = ("row", "seed", "dev_err", "test_err", "params_nonzero")
        return sorted(({k: row[k] for k in of_interest} for row in rows), key=str)

    assert scores(Reproduction(folder).rows()) == scores(whole)
    for name, seed in ((row["row"], row["seed"]) for row in whole):
        wanted = weights(tmp_path / "whole", name, seed)
        torch.testing.assert_close(weights(folder, name, seed), wanted, rtol=0, atol=0)


def test_two_at_once_are_refused(tmp_path: Path, comparison: Comparison) -> None:
    found = Reproduction.begin(tmp_path / "out", comparison)
    at_work = found.run(Notes())
    next(at_work)
    with pytest.raises(UserError, match="another gpsearch works there"):
        next(Reproduction(tmp_path / "out").run(Notes()))
    assert len(list(at_work)) == 3


def test_rows_can_be_done_one_at_a_time(tmp_path: Path, comparison: Comparison) -> None:
    found, notes = Reproduction.begin(tmp_path / "out", comparison), Notes()
    list(found.run(notes, only=["gp_hlstm"]))
    assert notes.begun == [("gp_hlstm", 0), ("gp_hlstm", 1)]
    with pytest.raises(UserError, match="no such row; there are: dense_lstm, gp_hlstm"):
        list(found.run(notes, only=["hlstm"]))


def test_another_comparison_needs_another_folder(tmp_path: Path, comparison: Comparison) -> None:
    other = Comparison(**{**vars(comparison), "epochs": 2})
    Reproduction.begin(tmp_path / "out", comparison)
    found = Reproduction.begin(tmp_path / "out", other)  # nothing was trained yet
    assert found.comparison == other
    next(found.run(Notes()))
    with pytest.raises(UserError, match="another --out"):
        Reproduction.begin(tmp_path / "out", comparison)


@pytest.mark.parametrize("name", ["trials", "study.db"])
def test_a_study_s_folder_stays_as_it_is(tmp_path: Path, comparison: Comparison, name: str) -> None:
    folder = tmp_path / "study"
    (folder / name).mkdir(parents=True)
    (folder / "config.toml").write_text("of the study")
    with pytest.raises(UserError, match="study: holds a study; choose another --out"):
        Reproduction.begin(folder, comparison)
    assert (folder / "config.toml").read_text() == "of the study"
    assert sorted(path.name for path in folder.iterdir()) == sorted(["config.toml", name])


def test_a_space_without_rows_cannot_be_reproduced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no \[rows.NAME\]"):
        Reproduction.begin(tmp_path / "out", Comparison("toy", str(TOY), "small"))


@pytest.mark.parametrize("name", sorted(built_in()))
def test_the_rows_of_a_built_in_space_are_the_paper_s(name: str) -> None:
    rows = Space.read(name).rows
    if rows:
        assert list(rows)[:7] == [
            "dense_lstm", "dense_hlstm", "narrow_hlstm", "gp_lstm", "pruned_hlstm",
            "gp_hlstm_compact", "gp_hlstm_accurate",
        ]  # fmt: skip
        # Where a vocabulary has most of the weights, one row prunes that, too.
        assert set(list(rows)[7:]) <= {"gp_hlstm_smallest"}
        schedules = {k: c.schedule.name for k, c in Space.read(name).row_candidates().items()}
        kinds = {"dense": "dense", "narrow": "dense", "pruned": "gmp", "gp": "gp"}
        assert schedules == {row: kinds[row.partition("_")[0]] for row in schedules}


def test_a_comparison_tells_what_is_other_and_may_get_more_seeds(
    tmp_path: Path, comparison: Comparison
) -> None:
    folder = tmp_path / "out"
    list(Reproduction.begin(folder, comparison).run(Notes()))
    with pytest.raises(UserError, match="with --epochs 3 and not 4; choose another --out"):
        Reproduction.begin(folder, replace(comparison, epochs=4))
    more = Notes()
    list(Reproduction.begin(folder, replace(comparison, seeds=3)).run(more))
    assert more.begun == [("dense_lstm", 2), ("gp_hlstm", 2)]
    Path(comparison.space).write_text(TOY.read_text() + ROWS + "\n[rows.another]\n")
    with pytest.raises(UserError, match=r"rows.toml is no longer as it was then"):
        Reproduction.begin(folder, replace(comparison, seeds=3))


def test_a_start_in_other_words_meanwhile_is_noticed(
    tmp_path: Path, comparison: Comparison
) -> None:
    first = Reproduction.begin(tmp_path / "out", comparison)
    list(Reproduction.begin(tmp_path / "out", replace(comparison, epochs=1)).run(Notes()))
    with pytest.raises(UserError, match="was begun anew meanwhile"):
        list(first.run(Notes()))


def test_a_user_s_own_files_stay(tmp_path: Path, comparison: Comparison) -> None:
    (tmp_path / "config.toml").write_text("mine = 1")
    with pytest.raises(UserError, match=r"config.toml is not of gpsearch"):
        Reproduction.begin(tmp_path, comparison)


def test_a_row_s_name_names_a_folder(tmp_path: Path, comparison: Comparison) -> None:
    for name in ("../a", "a|b", "..", "a b"):
        Path(comparison.space).write_text(TOY.read_text() + f'[rows."{name}"]\n')
        with pytest.raises(UserError, match="is no name for a folder"):
            Reproduction.begin(tmp_path / "out", comparison)


def test_a_table_without_its_first_row_has_no_factors(
    tmp_path: Path, comparison: Comparison
) -> None:
    found = Reproduction.begin(tmp_path / "out", comparison)
    list(found.run(Notes(), ["gp_hlstm"]))
    assert "x |" not in report.table(found)
    list(found.run(Notes()))
    assert "1.00x |" in report.table(found)
