"""What a study or a model has learnt from: ``data.json`` in its folder.

Letters and words are numbered by the training data, so a network is worth something beside the
data that it has learnt from only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from gpsearch import tasks
from gpsearch.errors import UserError
from gpsearch.files import read_json, write_json
from gpsearch.tasks import Task

FILE = "data.json"


@dataclass(frozen=True)
class Source:
    """A task, where its data was found, and what it was."""

    task: str
    data: str
    """The path as it was given, in full; empty is the task's own data."""
    digest: str
    """As `gpsearch.tasks.digest`; empty where the task does not tell."""


def read(folder: Path) -> Source | None:
    """Return what was learnt from in a folder, if that was noted.

    Raises:
        UserError: The note is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    rows = read_json(path, "task", "data", "digest")
    return Source(rows["task"], rows["data"], rows["digest"])


def check(folder: Path, task: Task) -> None:
    """Refuse data that is not what was learnt from in a folder.

    Raises:
        UserError: It has changed since.
    """
    source, now = read(folder), tasks.digest(task)
    if source and source.digest and now and source.digest not in tasks.known_digests(task):
        where = source.data or "the task's own"
        raise UserError(
            f"{folder}: learnt from other data than {where} is now, or an older gpsearch split it "
            "otherwise; bring that back, or begin in another folder"
        )


def keep(folder: Path, name: str, task: Task, data: Path | None) -> None:
    """Note what is learnt from in a folder, before anything is; go on with nothing else.

    Raises:
        UserError: The folder began with another task, or with other data.
    """
    source = read(folder)
    if source and source.task != name:
        raise UserError(
            f"{folder}: began with the task {source.task!r}, not {name!r}; bring that back, or "
            "begin in another folder"
        )
    check(folder, task)
    if source is None:
        source = Source(name, str(data.resolve()) if data else "", tasks.digest(task))
        write_json(folder / FILE, asdict(source))
