"""What a model computes for one example: a flat list of operations, as JSON, and bytes of weights.

    {"inputs": ["x0"], "outputs": ["v7"], "constants": {"c0": {"dtype", "shape", "offset"}, ...},
     "ops": [{"op": "linear", "in": ["x0", "c0", "c1"], "out": ["v0"]}, ...]}

The operations are those of `gpsearch.exporting.agent.OPERATIONS`; shapes are those of the example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpsearch.exporting import agent

Array = np.ndarray[Any, np.dtype[Any]]
Op = dict[str, Any]
"""Its name under "op", names of arrays under "in" and "out", and its attributes."""


@dataclass(frozen=True)
class Program:
    """What a model computes for arguments of one shape."""

    inputs: Sequence[str]
    outputs: Sequence[str]
    ops: Sequence[Op]
    constants: Mapping[str, Array]
    example: Sequence[Array]
    """The arguments."""
    expected: Sequence[Array]
    """The model's outputs for them."""

    @property
    def text(self) -> dict[str, Any]:
        """All but the bytes, as JSON takes it."""
        layout = dict(zip(self.constants, packed(self.constants.values())[0], strict=True))
        names = {"inputs": list(self.inputs), "outputs": list(self.outputs)}
        return {**names, "constants": layout, "ops": list(self.ops)}

    @property
    def weights(self) -> bytes:
        """The constants, one after the other."""
        return packed(self.constants.values())[1]

    def check(self, outputs: Sequence[Array], tolerance: float = 1e-4) -> str | None:
        """Say how ``outputs`` differ from the model's; None if they are equal up to rounding.

        Rounding is relative to what an output is made of. One that lies near 0 by chance is smaller
        than that, and so is held against how far other inputs move it, too.
        """
        if [one.shape for one in outputs] != [one.shape for one in self.expected]:
            return "its outputs have other shapes than the model's"
        for place, (found, wanted) in enumerate(zip(outputs, self.expected, strict=True)):
            error = relative_error(found, wanted)
            if not error <= tolerance:
                error = relative_error(found, wanted, self._moved(place))
            if not error <= tolerance:
                return (
                    f"its outputs differ from the model's by {error:.1e}, relative to the largest"
                )
        return None

    def _moved(self, place: int) -> float:
        """Return how far an output moves where the inputs' own values are drawn anew."""
        random, program = np.random.default_rng(0), agent.Program(self.text, self.weights)
        wanted, moved = self.expected[place].astype(np.float64), 0.0
        for _ in range(4):
            drawn = [random.choice(x.ravel(), x.shape) if x.size else x for x in self.example]
            with np.errstate(all="ignore"):
                change = np.abs(program.run(*drawn)[place] - wanted).max(initial=0.0)
            moved = max(moved, float(change) if np.isfinite(change) else 0.0)
        return moved


def relative_error(found: Array, wanted: Array, least: float = 0.0) -> float:
    """Return the largest difference as a fraction of the largest wanted value; 0 if all agree.

    Args:
        found: What is judged.
        wanted: What it should be.
        least: What the largest wanted value counts as, if it is smaller.
    """
    if not wanted.size:
        return 0.0
    difference = np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max()
    scale = max(np.abs(wanted.astype(np.float64)).max(), least)
    return float(difference / scale) if scale else float(difference)


def packed(arrays: Any) -> tuple[list[dict[str, Any]], bytes]:
    """Return where arrays lie in one run of bytes (at multiples of 16), and these bytes."""
    layout, data = [], bytearray()
    for one in arrays:
        data += bytes(-len(data) % 16)
        layout.append({"dtype": one.dtype.str, "shape": list(one.shape), "offset": len(data)})
        data += one.tobytes()
    return layout, bytes(data)


def checksum(data: bytes) -> str:
    """Return the sha256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
