"""What a key of a search space may be: one value, one of several, or a range."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

from gpsearch.schedule import SCHEDULES

Keys = tuple[str, ...]
"""Where something stands in the file, such as ("schedule", "gp", "peak_density")."""


@runtime_checkable
class Trial(Protocol):
    """What a space needs of an Optuna trial."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """Return an integer from ``low`` to ``high``."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        """Return a number from ``low`` to ``high``."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Return one of the choices."""


@dataclass(frozen=True)
class Fixed:
    """One value; the sampler never hears of it."""

    default: Any

    @property
    def corners(self) -> tuple[Any, ...]:
        """The only value."""
        return (self.default,)

    def suggest(self, trial: Trial, name: str) -> Any:
        """Return the value."""
        return self.default

    def __contains__(self, value: Any) -> bool:
        return _is_among(value, self.corners)

    def __str__(self) -> str:
        return f"fixed at {self.default!r}"


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    default: Any
    corners: tuple[Any, ...]

    def suggest(self, trial: Trial, name: str) -> Any:
        """Ask the sampler."""
        return trial.suggest_categorical(name, self.corners)

    def __contains__(self, value: Any) -> bool:
        return _is_among(value, self.corners)

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.corners))}"


@dataclass(frozen=True)
class Range:
    """A number between two bounds, both included."""

    default: Any
    low: Any
    high: Any
    step: Any = None
    log: bool = False
    integer: bool = False
    snap: bool = False
    """Only the right edges of the device's latency steps are wanted; see `Snapped`."""

    @property
    def corners(self) -> tuple[Any, ...]:
        """Both bounds."""
        return (self.low, self.high)

    def suggest(self, trial: Trial, name: str) -> Any:
        """Ask the sampler."""
        if self.integer:
            return trial.suggest_int(name, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def __contains__(self, value: Any) -> bool:
        if type(value) is not int and (type(value) is not float or self.integer):
            return False
        return bool(self.low <= value <= self.high) and _on_grid(value - self.low, self.step)

    def __str__(self) -> str:
        steps = f" in steps of {self.step}" if self.step else ""
        return f"a number from {self.low} to {self.high}{steps}"


@dataclass(frozen=True)
class Snapped:
    """A range of which only a device's right edges are suggested; the highest width is one.

    Raises:
        ValueError: The edges are no rising widths of the range up to its highest.
    """

    of: Range
    corners: tuple[Any, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.corners))
        if not rising or any(edge not in self.of for edge in self.corners):
            raise ValueError(f"{list(self.corners)} should rise, each {self.of}")
        if self.corners[-1:] != (self.of.high,):
            raise ValueError(f"{list(self.corners)} should end at {self.of.high}")

    @property
    def default(self) -> Any:
        """The right edge of the default's step."""
        return self.edge(self.of.default)

    def edge(self, width: Any) -> Any:
        """Return the next right edge."""
        return min(edge for edge in self.corners if edge >= width)

    def suggest(self, trial: Trial, name: str) -> Any:
        """Ask the sampler."""
        return trial.suggest_categorical(name, self.corners)

    def __contains__(self, value: Any) -> bool:
        return value in self.of

    def __str__(self) -> str:
        return str(self.of)


Values = Fixed | Choice | Range | Snapped


@dataclass(frozen=True)
class Parameter:
    """One key of a space, and what it may be."""

    keys: Keys
    values: Values
    only: tuple[str, ...] = tuple(SCHEDULES)
    """The schedules it holds for, if it is one of theirs."""

    @property
    def key(self) -> str:
        """Its key in the record."""
        return self.keys[-1]

    @property
    def name(self) -> str:
        """What Optuna calls it: "hidden_size", "schedule", "gp.peak_density"."""
        return "schedule" if self.keys == ("schedule", "name") else ".".join(self.keys[1:])


def parse(raw: Any, *, integer: bool, natural: Any) -> Values:
    """Return what a value of the file allows.

    Args:
        raw: As tomllib gives it.
        integer: Whether a range is one of integers.
        natural: The default if none is given and this one is allowed.

    Raises:
        ValueError: It allows nothing, or contradicts itself.
    """
    if isinstance(raw, list):
        raw = {"choices": raw}
    if not isinstance(raw, dict):
        return Fixed(raw)
    values: Values
    values = _choice(raw, natural) if "choices" in raw else _range(raw, integer, natural)
    if values.corners == (values.default,):
        return Fixed(values.default)
    if values.default not in values:
        raise ValueError(f"default = {values.default!r} should be {values}")
    return values


def _choice(raw: dict[str, Any], natural: Any) -> Choice:
    _refuse_others(raw, ("choices", "default"))
    choices = raw["choices"]
    scalars = (bool, int, float, str)
    if not isinstance(choices, list) or not choices or not all(type(c) in scalars for c in choices):
        raise ValueError("choices should be a list of values")
    if len({(type(choice), choice) for choice in choices}) < len(choices):
        raise ValueError(f"choices = {choices} has a value twice")
    default = natural if _is_among(natural, choices) else choices[0]
    return Choice(raw.get("default", default), tuple(choices))


def _range(raw: dict[str, Any], integer: bool, natural: Any) -> Range:
    _refuse_others(raw, ("low", "high", "step", "log", "default", "snap"))
    for key in ("low", "high"):
        if key not in raw:
            raise ValueError(f"a range needs low and high; {key} is missing")
        if type(raw[key]) not in ((int,) if integer else (int, float)):
            raise ValueError(f"{key} = {raw[key]!r} should be {_number(integer)}")
        if not abs(raw[key]) < math.inf:  # nor is NaN
            raise ValueError(f"{key} = {raw[key]!r} should be finite")
        _refuse_huge(key, raw[key])
    low, high, step, log = raw["low"], raw["high"], raw.get("step"), raw.get("log", False)
    if low > high:
        raise ValueError(f"low = {low} is above high = {high}")
    if type(log) is not bool:
        raise ValueError(f"log = {log!r} should be true or false")
    if log and (low <= 0 or step is not None):
        raise ValueError("log = true needs low above 0, and no step")
    _check_step(step, high - low, integer)
    if "snap" in raw and (raw["snap"] != "device" or step is None or low == high):
        raise ValueError(
            f'snap = {raw["snap"]!r} should be "device", beside a step from low to high'
        )
    if not integer:
        low, high, step = float(low), float(high), None if step is None else float(step)
    values = Range(natural, low, high, step, log, integer, "snap" in raw)
    return replace(values, default=raw.get("default", natural if natural in values else low))


def _refuse_huge(key: str, value: int | float) -> None:
    """Refuse a whole number that no float can hold."""
    if abs(value) > sys.float_info.max:
        raise ValueError(f"{key} has {len(str(abs(value)))} digits, too many")


def _check_step(step: Any, width: float | int, integer: bool) -> None:
    if step is None:
        return
    if type(step) not in ((int,) if integer else (int, float)) or not 0 < step < math.inf:
        raise ValueError(f"step = {step!r} should be {_number(integer)} above 0")
    _refuse_huge("step", step)
    if not _on_grid(width, step):
        raise ValueError(f"step = {step} does not lead from low to high")


def _number(integer: bool) -> str:
    return "an integer" if integer else "a number"


def _refuse_others(raw: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in raw:
        if key not in known:
            raise ValueError(f"{key} is unknown here; there are {', '.join(known)}")


def _is_among(value: Any, choices: Iterable[Any]) -> bool:
    """Say whether a value of the same type is among the choices: True is not 1."""
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _on_grid(distance: float | int, step: float | int | None) -> bool:
    return step is None or abs(distance / step - round(distance / step)) < 1e-9
