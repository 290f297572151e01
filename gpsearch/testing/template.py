"""A new package for a profiler or a task, from the files in `templates/`, which hold one."""

from __future__ import annotations

import keyword
import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from gpsearch import profiling, tasks
from gpsearch.errors import UserError
from gpsearch.files import write_text


def write(kind: str, name: str, folder: Path) -> list[Path]:
    """Write a package that passes the kit as it is.

    Args:
        kind: "profiler" or "task".
        name: Of the device or the task.
        folder: Where; made here.

    Returns:
        The files written.

    Raises:
        UserError: The name is none or taken, or the folder is there.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(
            f"{name!r} is no name for a {kind}: a letter, then letters, digits or _, all small"
        )
    what, installed = {
        "profiler": ("device", profiling.installed),
        "task": ("task", tasks.installed),
    }[kind]
    if name in installed():
        raise UserError(f"a {what} is called {name!r} already; choose another name")
    if folder.exists():
        raise UserError(f"{folder} exists already; move it away, or give --out")
    source = files("gpsearch.testing") / "templates" / kind
    return [_copied(one, folder / _renamed(path, name), name) for path, one in _walk(source)]


def _walk(folder: Traversable, path: str = "") -> list[tuple[str, Traversable]]:
    found = []
    for one in sorted(folder.iterdir(), key=lambda one: one.name):
        inner = f"{path}{one.name}"
        if one.is_file():
            found.append((inner, one))
        elif one.name != "__pycache__":
            found += _walk(one, f"{inner}/")
    return found


def _copied(source: Traversable, target: Path, name: str) -> Path:
    write_text(target, _renamed(source.read_text(encoding="utf-8"), name))
    return target


def _renamed(text: str, name: str) -> str:
    """Put the name in the place of "demo", in either spelling."""
    camel = "".join(word.capitalize() for word in name.split("_"))
    names = {"gpsearch-demo": f"gpsearch-{name.replace('_', '-')}", "demo": name, "Demo": camel}
    return re.sub("|".join(names), lambda found: names[found[0]], text)
