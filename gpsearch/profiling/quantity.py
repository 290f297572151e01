"""One number, and how it was got."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["measured", "analytic", "estimated", "unavailable"]


@dataclass(frozen=True)
class Quantity:
    """A value with its unit, its spread and its origin; never NaN, never a guess in disguise.

    Raises:
        ValueError: The fields contradict each other, as a value of None that is not unavailable.
    """

    value: float | int | None
    """The number, or None where there is none."""
    unit: str
    """Such as "s", "J", "W", "flop", "B"; "1" for a count or a ratio."""
    kind: Kind
    """Values of different kinds never share one front."""
    ci95: tuple[float, float] | None = None
    """95 % interval of ``value``."""
    n: int = 0
    """Samples or windows behind a measured value."""
    method: str = ""
    """How it was got, such as "perf_counter" or "rapl"."""
    scope: str = ""
    """What it covers: "process", "device", "socket", "board", "wall", "model"."""
    reason: str | None = None
    """Why it is unavailable, or on what an estimate rests."""

    def __post_init__(self) -> None:
        fault = self._fault()
        if fault:
            raise ValueError(f"not a quantity: {fault} ({self})")

    @classmethod
    def unavailable(cls, unit: str, reason: str) -> Quantity:
        """Return the quantity that could not be had, and why."""
        return cls(None, unit, "unavailable", reason=reason)

    @property
    def available(self) -> bool:
        """Whether there is a value."""
        return self.value is not None

    @property
    def number(self) -> float | int:
        """The value, for those who cannot go on without one: ValueError with the reason if none."""
        if self.value is None:
            raise ValueError(f"unavailable: {self.reason}")
        return self.value

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Quantity:
        """Return the quantity that `to_dict` wrote."""
        ci95 = fields["ci95"]
        return cls(**{**fields, "ci95": None if ci95 is None else (ci95[0], ci95[1])})

    def _fault(self) -> str | None:
        if not self.unit:
            return "no unit"
        if (self.value is None) != (self.kind == "unavailable"):
            return "no value if, and only if, it is unavailable"
        if self.kind in ("unavailable", "estimated") and not self.reason:
            return f"{self.kind} without a reason"
        return self._fault_in_value()

    def _fault_in_value(self) -> str | None:
        if self.value is None:
            return None if self.ci95 is None else "an interval around nothing"
        if not math.isfinite(self.value) or self.value < 0:
            return "the value is negative or not finite"
        if self.kind == "measured" and (self.value == 0 or self.n < 1):
            return "a sensor that reads 0, or from no sample, has measured nothing"
        if self.ci95 and not 0 <= self.ci95[0] <= self.value <= self.ci95[1] < math.inf:
            return "the interval does not hold the value"
        return None
