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
        """Say how ``outputs`` differ from the model's; None if they are equal up to rounding."""
        if [one.shape for one in outputs] != [one.shape for one in self.expected]:
            return "its outputs have other shapes than the model's"
        for found, wanted in zip(outputs, self.expected, strict=True):
            error = relative_error(found, wanted)
            if not error <= tolerance:
                return (
                    f"its outputs differ from the model's by {error:.1e}, relative to the largest"
                )
        return None


def relative_error(found: Array, wanted: Array) -> float:
    """Return the largest difference as a fraction of the largest wanted value; 0 if all agree."""
    if not wanted.size:
        return 0.0
    difference = np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max()
    scale = np.abs(wanted.astype(np.float64)).max()
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
