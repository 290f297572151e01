"""Files that are either the old version or the new one, and folders that one process writes to."""

import io
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from gpsearch.errors import UserError

Kind = Literal["remeasured front", "study", "reproduction", "training"]
_KINDS: dict[Kind, tuple[str, ...]] = {
    "remeasured front": ("remeasured.json",),
    "study": ("trials", "study.db"),
    "reproduction": ("rows", "rows.csv"),
    "training": ("checkpoint.pt", "model.pt"),
}
"""What a folder of each kind is known by."""


ENVIRONMENT = "environment.json"
"""With what results are made, in each folder of a study or a reproduction."""


def slug(words: str) -> str:
    """Return words as a file's name: what may not stand there becomes an underscore."""
    return re.sub(r"[^\w.-]+", "_", words)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it into place.

    The data reaches the disk before the rename, so a kill or a power cut at any moment leaves
    either the previous file or the complete new one.

    Args:
        path: The file to replace; its folder is made if needed.
        write: Called with the temporary path, which keeps ``path``'s suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a full disk names no file
            error.filename = str(path)  # the name that the user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_pickled(path: Path, value: object) -> None:
    """Replace ``path``'s content by what `torch.save` makes of ``value``, atomically.

    Not by itself: on a full disk torch raises no OSError.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def toml_literal(value: Any) -> str:
    """Return a value as TOML has it: a string, boolean, number or a list of those.

    Raises:
        UserError: It holds characters that no file can.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{value!r}: no text that a file can hold") from None
        # TOML's strings are JSON's, but for this one.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_literal, value))}]"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def write_text(path: Path, text: str) -> None:
    """Replace ``path``'s content by ``text`` atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def json_text(value: Any) -> str:
    """Return a value as lines of JSON, which has no NaN and no infinity: they are null there."""
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Replace ``path``'s content by a value's `json_text` atomically."""
    write_text(path, json_text(value))


def make_folder(folder: Path) -> None:
    """Make a folder in which files can be written, before the work whose results go there.

    Raises:
        UserError: That cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error


def refuse_others(folder: Path, own: Kind) -> None:
    """Refuse a folder in which work of another kind was begun: its files would be overwritten.

    Raises:
        UserError: It is one.
    """
    for kind, names in _KINDS.items():
        if kind != own and any((folder / name).exists() for name in names):
            raise UserError(f"{folder}: holds a {kind}; choose another --out")


def refuse_strangers(folder: Path) -> None:
    """Refuse to write over a user's own files.

    Raises:
        UserError: There are such.
    """
    if (folder / ENVIRONMENT).exists():  # of our own that came to nothing
        return
    for name in ("config.toml", "space.toml"):
        if (folder / name).exists():
            raise UserError(f"{folder / name} is not of gpsearch; choose another --out")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the lock ends with this process, however it does.

    Raises:
        UserError: Another process works there.
    """
    import fcntl  # which Windows lacks; the rest runs there

    try:
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another gpsearch works there; wait for it or stop it"
            ) from None
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be locked ({error.strerror}); choose a folder on a local disk"
            ) from error
        yield


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UserError: It is missing, unreadable or no TOML; names the file and, where known, the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin so
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML ({error})") from error


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON file that holds an object with these keys.

    Raises:
        UserError: It is unreadable or damaged; names the file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); restore it from a backup") from error
    if not isinstance(found, dict) or not found.keys() >= set(keys):
        wanted = f"an object with {', '.join(keys)}" if keys else "an object"
        raise UserError(f"{path}: damaged (not {wanted}); restore it from a backup")
    return found
