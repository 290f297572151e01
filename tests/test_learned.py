"""A folder that began with some data goes on with no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpsearch import UserError, learned, tasks
from gpsearch.tasks.speech import SpeechTask
from tests.toy import ToyTask


class Told(ToyTask):
    """A task that tells its data by a word."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.digest = word


def test_data_that_changes_is_refused_and_what_is_kept_stays(tmp_path: Path) -> None:
    learned.keep(tmp_path, "told", Told("one"), tmp_path / "d")
    learned.keep(tmp_path, "told", Told("one"), None)
    assert learned.read(tmp_path) == learned.Source("told", str(tmp_path / "d"), "one")
    with pytest.raises(UserError, match=r"learnt from other data than .*/d is now"):
        learned.keep(tmp_path, "told", Told("two"), tmp_path / "d")
    assert learned.read(tmp_path) == learned.Source("told", str(tmp_path / "d"), "one")


def test_another_task_is_refused_whether_it_tells_its_data_or_not(tmp_path: Path) -> None:
    learned.keep(tmp_path, "toy", ToyTask(), None)
    with pytest.raises(UserError, match="began with the task 'toy', not 'speech'"):
        learned.keep(tmp_path, "speech", Told("one"), None)


def test_what_an_older_version_told_of_the_same_data_counts(tmp_path: Path) -> None:
    learned.keep(tmp_path, "told", Told("one"), None)
    now: Any = Told("one and more")
    with pytest.raises(UserError, match="learnt from other data"):
        learned.check(tmp_path, now)
    now.older_digests = ("one",)
    learned.check(tmp_path, now)


def test_a_task_need_not_tell(tmp_path: Path) -> None:
    learned.keep(tmp_path, "toy", ToyTask(), None)
    assert learned.read(tmp_path) == learned.Source("toy", "", "")
    learned.check(tmp_path, Told("one"))
    learned.check(tmp_path / "none", Told("one"))


def test_a_damaged_note_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(UserError, match=r"data\.json: damaged"):
        learned.check(tmp_path, ToyTask())


def test_a_digest_follows_the_texts_and_the_splits() -> None:
    task = SpeechTask()
    first = task.corpus.utterances[0]
    digests = {
        tasks.digest_of((u.id, u.split, u.text) for u in (one, *task.corpus.utterances[1:]))
        for one in (first, replace(first, text="GO"), replace(first, split="dev"), first)
    }
    assert len(digests) == 3
    assert tasks.digest(task) in digests
