"""What stands in a folder of speech: which recordings, what is said in them, and by whom.

Two layouts are read: AN4's own (`etc/an4_train.fileids` and so on) and a `manifest.csv`.
"""

from __future__ import annotations

import csv
import io
import os.path
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from gpsearch.errors import UserError
from gpsearch.tasks import Split

LISTED = 20
"""So many problems are named; the rest is counted."""


@dataclass(frozen=True)
class Recording:
    """A line of a corpus' index."""

    path: Path
    id: str
    text: str
    """As networks learn it (see `plain_text`); empty if there is no transcription."""
    place: str
    """Where the index says so, for messages: "manifest.csv line 7"."""
    split: Split | None = None
    """None: for the loader to decide."""
    speaker: str | None = None


def read(folder: Path) -> list[Recording]:
    """Return the recordings listed in ``folder``, in the index's order; no audio is opened.

    Args:
        folder: AN4's folder or the one above it, a folder with `manifest.csv`, or a manifest.

    Raises:
        UserError: There is no index, or it cannot be understood; all its bad lines are named.
    """
    if folder.is_file():
        return _manifest(folder)
    for an4 in (folder, folder / "an4"):
        if (an4 / "etc" / "an4_train.fileids").is_file():
            return [*_an4(an4, "train"), *_an4(an4, "test")]
    if (folder / "manifest.csv").is_file():
        return _manifest(folder / "manifest.csv")
    missing = (
        "has neither manifest.csv nor etc/an4_train.fileids" if folder.is_dir() else "is no folder"
    )
    raise UserError(
        f"{folder} {missing}; give AN4's folder, or one with a manifest.csv whose first line is "
        "path,text or path,text,split,speaker"
    )


def plain_text(text: str) -> str:
    """Return ``text`` as networks learn it: upper-case letters, digits, apostrophes, single spaces.

    >>> plain_text("It\u2019s  half-past ten, isn't it?")
    "IT'S HALF PAST TEN ISN'T IT"
    """
    upper = unicodedata.normalize("NFC", text).upper().replace("\u2019", "'")
    kept = (c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in upper)
    return " ".join("".join(kept).split())


def refuse(head: str, problems: Sequence[str]) -> None:
    """Raise a `UserError` of ``head`` and a line for each problem, if there are any."""
    if problems:
        rest = [f"... and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        raise UserError("\n  ".join([head, *problems[:LISTED], *rest]))


def _an4(folder: Path, split: Literal["train", "test"]) -> Iterator[Recording]:
    """Yield AN4's recordings of one split; the transcription ends in the recording's id."""
    ids = folder / "etc" / f"an4_{split}.fileids"
    lines = _text(ids.with_suffix(".transcription")).splitlines()
    parts = (re.fullmatch(r"(?:<s>)?(.*?)(?:</s>)?\s*\(([^()]*)\)\s*", line) for line in lines)
    texts = {part[2]: part[1] for part in parts if part}
    for number, line in enumerate(_text(ids).splitlines(), 1):
        name = Path(line.strip())
        if not name.name:
            continue
        yield Recording(
            path=_with_suffix(folder / "wav" / name),
            id=name.name,
            text=plain_text(texts.get(name.name, "")),
            place=f"{ids.name} line {number}",
            split=split,
            speaker=name.parent.name,
        )


def _with_suffix(path: Path) -> Path:
    """Return the recording's file: AN4 has been given out as wav, sphere and headerless."""
    files = [path.with_name(path.name + suffix) for suffix in (".wav", ".sph", ".raw")]
    return next((file for file in files if file.exists()), files[0])


def _manifest(path: Path) -> list[Recording]:
    """Read a manifest: a CSV file with a head line, columns in any order."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        columns = [name.strip().lower() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{path} line {reader.reader.line_num}: {error}; mend its quotes") from None
    wrong = [name for name in ("path", "text") if name not in columns]
    wrong += [name for name in set(columns) if columns.count(name) > 1]
    if wrong:
        raise UserError(
            f"{path} line 1: needs the columns path and text once each (and may have split and "
            f"speaker); found {','.join(columns) or 'nothing'}"
        )
    refuse(f"{path} has lines that cannot be used:", list(_row_problems(rows, len(columns))))
    return [_recording(path, number, row) for number, row in rows]


def _row_problems(rows: list[tuple[int, dict[str, str]]], columns: int) -> Iterator[str]:
    """Yield a line for each row that is not as the head says."""
    seen: dict[str, int] = {}
    for number, row in rows:
        if None in row or None in row.values():
            fields = sum(value is not None for value in row.values())
            fields += len(row.get(None, [""])) - 1  # type: ignore[call-overload]
            yield f"line {number}: {fields} fields, {columns} columns (quote texts with commas)"
            continue
        given, split = row["path"].strip(), row.get("split", "").strip()
        path = os.path.normpath(given) if given else ""
        if not path:
            yield f"line {number}: no path"
        elif path in seen:
            yield f"line {number}: {path} stands in line {seen[path]} too"
        if split not in ("", *get_args(Split)):
            yield f"line {number}: split {split!r} is none of train, dev, test (or empty)"
        seen.setdefault(path, number)


def _recording(manifest: Path, number: int, row: dict[str, str]) -> Recording:
    """Return what a row without problems says; relative paths start at the manifest."""
    split = row.get("split", "").strip()
    return Recording(
        path=manifest.parent / row["path"].strip(),
        id=row["path"].strip(),
        text=plain_text(row["text"]),
        place=f"{manifest.name} line {number}",
        split=next((name for name in get_args(Split) if name == split), None),
        speaker=row.get("speaker", "").strip() or None,
    )


def _text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte-order mark."""
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line}: not in UTF-8; save it as UTF-8") from None
