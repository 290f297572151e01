"""From a name to a device profiler: built-in, installed by pip, or in a plain file.

All come by the same door, the entry-point group `gpsearch.profilers`, and only the one that is
named is imported: a broken plug-in troubles nobody who does not use it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from gpsearch.errors import UserError, line_of
from gpsearch.profiling.device import (
    API_VERSION,
    DeviceFacts,
    DeviceProfiler,
    facts_of,
    understood,
)
from gpsearch.profiling.patience import within

GROUP = "gpsearch.profilers"
_METHODS = ("probe", "load", "run", "close")
_IN_A_FILE = re.compile(r"(?P<module>.*?\.py|[^:]+):(?P<name>[^:]+)(:(?P<argument>.*))?")


def installed() -> dict[str, str]:
    """Return the names of all profilers, each with the package (and version) that brings it."""
    return {entry.name: _package(entry) for entry in sorted(entry_points(group=GROUP))}


def find(name: str) -> DeviceProfiler:
    """Return the profiler called ``name``.

    Args:
        name: A name of `installed`; or ``module:Class``, importable from here or in the current
            folder; or ``path/to/file.py:Class``, which may import what lies beside it. An argument
            may follow each, as in ``gpu:1``, where the class takes one: it then has a class method
            ``with_argument``.

    Raises:
        UserError: There is none of this name, it cannot be imported, it is no profiler, or it
            takes no such argument.
    """
    first, colon, rest = name.partition(":")
    entries = [entry for entry in entry_points(group=GROUP) if entry.name == first]
    if len({entry.value for entry in entries}) > 1:
        packages = " and ".join(sorted(_package(entry) for entry in entries))
        raise UserError(f"two devices are called {first!r}, of {packages}; uninstall one of them")
    if entries:
        source = f"of package {_package(entries[0])}"
        mend = "update or reinstall that package"
        factory = _imported(entries[0].load, name, source, mend)
        return _made(factory, name, rest if colon else None, source, mend)
    found = _IN_A_FILE.fullmatch(name)
    if found is None:
        known = ", ".join(installed()) or "none"
        raise UserError(f"no device called {name!r}; installed: {known} (or give module:Class)")
    return _from_file(name, found["module"], found["name"], found["argument"])


def from_anywhere(name: str) -> str:
    """Return the name by which `find` finds the same profiler from any folder: a file's in full."""
    found = _IN_A_FILE.fullmatch(name)
    if found is None or not found["module"].endswith(".py"):
        return name
    return f"{Path(found['module']).resolve()}{name[len(found['module']) :]}"


def devices(patience_s: float = 10.0) -> dict[str, DeviceFacts | UserError]:
    """Return what each installed profiler says of its device, or why it cannot be asked.

    Args:
        patience_s: For how long each is waited for.
    """
    return {name: _asked(name, patience_s) for name in installed()}


def _asked(name: str, patience_s: float) -> DeviceFacts | UserError:
    try:
        return within(patience_s, lambda: facts_of(find(name)))
    except UserError as error:
        return error
    except (Exception, SystemExit) as error:  # whatever a stranger raises
        return UserError(f"device {name!r} does not say what it is: {line_of(error)}")


def _from_file(name: str, module: str, class_name: str, argument: str | None) -> DeviceProfiler:
    load = _load_path if module.endswith(".py") else _load_module
    if module.endswith(".py") and not Path(module).is_file():
        raise UserError(f"device {name!r}: there is no file {module}")
    source, mend = f"of {module}", "correct that file"
    loaded = _imported(lambda: load(module), name, source, mend)
    if not hasattr(loaded, class_name):
        raise UserError(f"device {name!r}: {module} defines no {class_name!r}; {mend}")
    return _made(getattr(loaded, class_name), name, argument, source, mend)


def _load_module(name: str) -> ModuleType:
    with _importable(Path.cwd()):  # as `python -m` has it, and an installed command has not
        return importlib.import_module(name)


def _load_path(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpsearch_device_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None  # since it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    with _importable(Path(path).resolve().parent):  # as `python path` has it
        spec.loader.exec_module(module)
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let imports see a folder, for as long as a module of it is loaded."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _imported(load: Any, name: str, source: str, mend: str) -> Any:
    try:
        return load()
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises
        raise UserError(
            f"device {name!r} {source} cannot be imported: {line_of(error)}; {mend}"
        ) from error


def _made(factory: Any, name: str, argument: str | None, source: str, mend: str) -> DeviceProfiler:
    spoken = getattr(factory, "api_version", None)
    if not understood(spoken):
        said = f"speaks API version {spoken!r}, this gpsearch {API_VERSION!r}"
        raise UserError(f"device {name!r} {source} {said}; {mend}")
    missing = [method for method in _METHODS if not callable(getattr(factory, method, None))]
    if missing:
        raise UserError(f"device {name!r} {source} lacks {', '.join(missing)}(); {mend}")
    if argument is not None and not callable(getattr(factory, "with_argument", None)):
        plain = name.removesuffix(f":{argument}")
        raise UserError(f"device {plain!r} takes no argument {argument!r}; write --device {plain}")
    try:
        made: DeviceProfiler = factory() if argument is None else factory.with_argument(argument)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a stranger's constructor raises
        raise UserError(
            f"device {name!r} {source} does not start: {line_of(error)}; {mend}"
        ) from error
    return made


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"
