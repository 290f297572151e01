"""A search space's TOML file: its parameters and baselines, and the line of every mistake."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import combinations_with_replacement, product
from pathlib import Path
from typing import Any, get_type_hints

from gpsearch.candidate import Architecture, Deployment, Training, record
from gpsearch.errors import UserError
from gpsearch.schedule import SCHEDULES
from gpsearch.space.values import Keys, Parameter, Range, Snapped, parse

KNOWN = ", ".join(SCHEDULES)
RECORDS = {"architecture": Architecture, "training": Training, "deployment": Deployment}
TABLES = ("architecture", "schedule", "training", "deployment", "baselines", "rows", "snapped")
SNAPPING = ("hidden_size", "gate_width")
"""Keys of the architecture that can snap to a device's steps."""


@dataclass(frozen=True)
class SpaceFile:
    """A space's file: its tables, and the line that every key stands in."""

    where: str
    text: str
    tables: dict[str, Any]
    lines: Mapping[Keys, int]

    @classmethod
    def read(cls, name_or_path: str) -> SpaceFile:
        """Read the built-in space of this name, or the file of this path.

        Raises:
            UserError: It is not there, or no TOML, or has an unknown table.
        """
        return cls.parse(*_read_text(name_or_path))

    @classmethod
    def parse(cls, where: str, text: str) -> SpaceFile:
        """Read a space's text; ``where`` is how messages call it.

        Raises:
            UserError: It is no TOML, or has an unknown table.
        """
        try:
            file = cls(where, text, tomllib.loads(text), _lines(text))
        except tomllib.TOMLDecodeError as error:
            line = re.search(r"at line (\d+)", str(error))
            at = f"{where}:{line[1]}" if line else where
            raise UserError(f"{at}: not valid TOML: {error}") from error
        file._check_keys(file.tables, (), TABLES)
        return file

    def parameters(self) -> dict[Keys, Parameter]:
        """Return the parameter of every key.

        Raises:
            UserError: A key, a bound or a combination of them is wrong.
        """
        found = {one.keys: self._snapped(one) for one in self._parameters()}
        snapping = [one.key for one in found.values() if isinstance(one.values, Snapped)]
        self._check_keys(self.tables.get("snapped", {}), ("snapped",), snapping)
        self._check_corners(found)
        return found

    def baselines(self, parameters: Mapping[Keys, Parameter]) -> dict[str, dict[str, Any]]:
        """Return what every baseline has other than the defaults, by the parameters' names.

        Raises:
            UserError: There is no baseline, or one lies outside the space.
        """
        found = self.overrides("baselines", parameters)
        if not found:
            raise UserError(f"{self.where}: has no [baselines.NAME]; results need one to compare")
        return found

    def overrides(
        self, table: str, parameters: Mapping[Keys, Parameter]
    ) -> dict[str, dict[str, Any]]:
        """Return what the candidates in a table have other than the defaults, by their names.

        Raises:
            UserError: A candidate lies outside the space.
        """
        tables = self.tables.get(table, {})
        if not isinstance(tables, dict):
            raise self._fault((table,), f"{table} should be a table")
        found: dict[str, dict[str, Any]] = {}
        for name, rows in tables.items():
            if not isinstance(rows, dict):
                raise self._fault((table, name), f"{name} should be a table")
            found[name] = {}
            for keys, value in _leaves(rows):
                self._check_override((table, name), keys, value, parameters)
                values = parameters[keys].values
                snapped = values.edge(value) if isinstance(values, Snapped) else value
                found[name][parameters[keys].name] = snapped
        return found

    # The keys

    def _parameters(self) -> Iterator[Parameter]:
        for table, kind in RECORDS.items():
            yield from self._table(self.tables.get(table, {}), (table,), _fields([kind]))
        schedule = self.tables.get("schedule", {})
        common = {"name": (str, "dense"), **_fields(SCHEDULES.values())}
        self._check_keys(schedule, ("schedule",), [*common, *SCHEDULES])
        for name in (name for name in SCHEDULES if name in schedule):
            keys = ("schedule", name)
            yield from self._table(schedule[name], keys, _fields([SCHEDULES[name]]))
        rows = {key: value for key, value in schedule.items() if key in common}
        yield from self._table(rows, ("schedule",), common)

    def _table(
        self, rows: Any, at: Keys, fields: Mapping[str, tuple[Any, Any]]
    ) -> Iterator[Parameter]:
        self._check_keys(rows, at, fields)
        for key, raw in rows.items():
            yield self._parameter((*at, key), raw, *fields[key])

    def _parameter(self, keys: Keys, raw: Any, hint: Any, natural: Any) -> Parameter:
        only = list(SCHEDULES)
        if keys[:-1] == ("schedule",) and isinstance(raw, dict):
            raw = dict(raw)
            only = raw.pop("only", only)
        try:
            if not isinstance(only, list) or any(name not in list(SCHEDULES) for name in only):
                raise ValueError(f"only = {only!r} should be a list of schedules: {KNOWN}")
            return Parameter(keys, parse(raw, integer=hint is int, natural=natural), tuple(only))
        except ValueError as error:
            raise self._fault(keys, f"{keys[-1]}: {error}") from error

    def _snapped(self, one: Parameter) -> Parameter:
        """Put the edges of [snapped], if they are known, in the place of a range that snaps."""
        if not isinstance(one.values, Range) or not one.values.snap:
            return one
        if one.keys not in [("architecture", key) for key in SNAPPING]:
            raise self._fault(one.keys, f"{one.key}: only {' and '.join(SNAPPING)} can snap")
        if "snapped" not in self.tables:
            return one
        try:
            edges = self.tables["snapped"][one.key]
            return replace(one, values=Snapped(one.values, tuple(edges)))
        except (KeyError, TypeError) as error:
            fault = f'{one.key}: should list the widths that {one.key}\'s snap = "device" leaves'
            raise self._fault(("snapped", one.key), fault) from error
        except ValueError as error:
            raise self._fault(("snapped", one.key), f"{one.key}: {error}") from error

    # The checks

    def _check_keys(self, rows: Any, at: Keys, known: Iterable[str]) -> None:
        if not isinstance(rows, dict):
            raise self._fault(at, f"{at[-1]} should be a table")
        names = list(known)
        for key in rows:
            if key not in names:
                near = difflib.get_close_matches(key, names, 1, cutoff=0.5)
                mend = f"did you mean {near[0]}?" if near else f"it takes {', '.join(names)}"
                raise self._fault((*at, key), f"{key} is no {'key' if at else 'table'}; {mend}")

    def _check_corners(self, parameters: Mapping[Keys, Parameter]) -> None:
        """Build every record at each pair of its keys' bounds: what passes, passes everywhere.

        The records relate at most two of their keys to each other, so pairs are enough.
        """
        for table, kind in RECORDS.items():
            self._check_record(kind, table, [p for k, p in parameters.items() if k[0] == table])
        name = parameters.get(("schedule", "name"))
        for choice in name.values.corners if name else ():
            if choice not in SCHEDULES:
                raise self._fault(("schedule", "name"), f"name = {choice!r} is none of {KNOWN}")
            self._check_record(SCHEDULES[choice], "schedule", of_schedule(parameters, choice))

    def _check_record(self, kind: type[Any], table: str, parameters: list[Parameter]) -> None:
        defaults = {one.key: one.values.default for one in parameters}
        for a, b in combinations_with_replacement(parameters, 2):
            for of_a, of_b in product(a.values.corners, b.values.corners):
                try:
                    record(kind, {**defaults, a.key: of_a, b.key: of_b}, "")
                except UserError as error:
                    words = str(error).split()
                    named = [one for one in parameters if one.key in words] or [a]
                    named.sort(key=lambda one: words.index(one.key) if one.key in words else 0)
                    raise self._fault(named[0].keys, str(error).strip()) from error

    def _check_override(
        self, table: Keys, keys: Keys, value: Any, parameters: Mapping[Keys, Parameter]
    ) -> None:
        at, dotted = (*table, *keys), ".".join(keys)
        if keys not in parameters:
            near = difflib.get_close_matches(dotted, [".".join(one) for one in parameters], 1)
            mend = f"; did you mean {near[0]}?" if near else ""
            raise self._fault(at, f"{dotted} is no key of this space{mend}", table=at[:2])
        if value not in (values := parameters[keys].values):
            raise self._fault(
                at, f"{dotted} = {value!r} lies outside the space: {values}", table=at[:2]
            )

    def _fault(self, keys: Keys, message: str, table: Keys | None = None) -> UserError:
        """Return the error ``message`` about ``keys``, with the line of the nearest that stands."""
        nearest = (keys[:length] for length in range(len(keys), 0, -1))
        line = next((self.lines[one] for one in nearest if one in self.lines), None)
        name = ".".join(keys[:-1] if table is None else table)
        where = f"{self.where}:{line}" if line else self.where
        return UserError(f"{where}: {f'[{name}] ' if name else ''}{message}")


def of_schedule(parameters: Mapping[Keys, Parameter], name: str) -> list[Parameter]:
    """Return the parameters that hold for a schedule; its own go before the common ones."""
    found = []
    for key in _fields([SCHEDULES[name]]):
        common = parameters.get(("schedule", key))
        if own := parameters.get(("schedule", name, key)):
            found.append(own)
        elif common and name in common.only:
            found.append(common)
    return found


def built_in() -> dict[str, str]:
    """Return the built-in spaces' names, each with what its first line says of it."""
    found = sorted(files("gpsearch.search_spaces").iterdir(), key=lambda path: path.name)
    return {
        path.name.removesuffix(".toml"): path.read_text(encoding="utf-8").partition("\n")[0][2:]
        for path in found
        if path.name.endswith(".toml")
    }


def _read_text(name_or_path: str) -> tuple[str, str]:
    """Return how a space is called in messages, and its text."""
    if name_or_path.endswith(".toml"):
        try:
            return name_or_path, Path(name_or_path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise UserError(f"{name_or_path}: cannot be read ({reason})") from error
    if name_or_path not in built_in():
        known = ", ".join(built_in())
        raise UserError(
            f"no search space called {name_or_path!r}; there are {known}, or give a .toml file"
        )
    name = f"{name_or_path}.toml"
    text = files("gpsearch.search_spaces").joinpath(name).read_text(encoding="utf-8")
    return f"search_spaces/{name}", text


def _lines(text: str) -> dict[Keys, int]:
    """Return the line of every table and key; tomllib does not tell."""
    found: dict[Keys, int] = {}
    table: Keys = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            table = _split(header[1])
            found.setdefault(table, number)
        elif key := re.match(r"\s*([\w\"'.\s-]+?)\s*=", line):
            found.setdefault((*table, *_split(key[1])), number)
    return found


def _split(dotted: str) -> Keys:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _leaves(rows: Any, at: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield every value of nested tables, and where it stands."""
    if not isinstance(rows, dict):
        yield at, rows
        return
    for key, value in rows.items():
        yield from _leaves(value, (*at, key))


def _fields(kinds: Iterable[type[Any]]) -> dict[str, tuple[Any, Any]]:
    """Return the type and default of every field; of the first kind, where several have it."""
    found: dict[str, tuple[Any, Any]] = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            found.setdefault(field.name, (hints[field.name], field.default))
    return found
