"""The kernels in C, where they were built when the package was installed.

They come once for every instruction set that they know; which one runs is decided here, by the
processor. The environment variable GPSEARCH_KERNELS chooses another: "portable", "avx2", "avx512",
"amx" (that with products by tiles), or "off" for none.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from gpsearch.errors import UserError

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "amx")
_CHOICE = "GPSEARCH_KERNELS"
_ARGUMENTS = {
    "packed_size": "ii",
    "pack": "piiiip",
    "outer_room": "i",
    "outer": "pipiiiipip",
    "tiles_room": "ii",
    "multiply_tiles": "piipiiiiiipip",
    "tiles_size": "iii",
    "pack_tiles": "piiiiip",
    "forward": "pii",
    "backward": "pii",
    "lanes": "i",
    "steps_together": "i",
    "forward_sparse": "p",
    "backward_sparse": "p",
    "clear_dormant": "ppi",
    "pack_matrix": "iipiiip",
    "multiply_matrix": "ppp",
    "knows_digits": "i",
    "decode_stride": "i",
    "decode": "pippp",
    "decode_step": "pipipppp",
}
"""Of every function: whole numbers (i, 64 bits) and pointers (p)."""
_TYPES = {"i": ctypes.c_int64, "p": ctypes.c_void_p}


class Native:
    """The kernels for one instruction set: its functions are attributes.

    ``source`` names the file that they come from, and ``tiles`` says whether they have tiles.

    Args:
        library: The loaded library.
        instruction_set: One of `INSTRUCTION_SETS` that this processor has.
    """

    def __init__(self, library: ctypes.CDLL, instruction_set: str) -> None:
        self.instruction_set = instruction_set
        self.tiles = instruction_set == "amx"
        self.source = "avx512" if self.tiles else instruction_set
        self._library = library

    def __getattr__(self, name: str) -> Any:
        if name not in _ARGUMENTS:
            raise AttributeError(name)
        function = getattr(self._library, f"{name}_{self.source}")
        function.argtypes = [_TYPES[one] for one in _ARGUMENTS[name]]
        function.restype = ctypes.c_int64  # where there is a result at all
        setattr(self, name, function)
        return function


@cache
def library() -> ctypes.CDLL | None:
    """Return the library beside this module, or None where it was not built or does not load."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:
                return None
    return None


def available() -> tuple[str, ...]:
    """Return the instruction sets whose kernels run on this machine, the slowest first.

    To know of "amx", the system is asked for it: a process that has it needs larger stacks for
    signals.
    """
    built = library()
    return () if built is None else _vectors(built) + ("amx",) * built.knows_tiles()


def _vectors(built: ctypes.CDLL) -> tuple[str, ...]:
    return INSTRUCTION_SETS[: built.instruction_set() + 1]


@cache
def native(instruction_set: str = "") -> Native | None:
    """Return the kernels for an instruction set; by default those of ``$GPSEARCH_KERNELS``.

    Returns:
        None where there are none, or where they are switched off.

    Raises:
        UserError: The instruction set is unknown, or not to be had on this machine.
    """
    chosen = instruction_set or os.environ.get(_CHOICE, "")
    built = library()
    if chosen == "off" or (built is None and not chosen):
        return None
    if built is not None and chosen in _vectors(built):
        return Native(built, chosen)
    there = available()
    if built is None or (chosen and chosen not in there):
        have = ", ".join(there) or "none was built"
        raise UserError(f"{_CHOICE}={chosen!r}: no such kernels here (there are: {have}, or off)")
    return Native(built, chosen or there[-1])


def description() -> str:
    """Say which kernels are in use, or why there are none and how to get them."""
    if library() is None:
        return (
            "not built: training and inference of H-LSTMs take the slower way in torch; install a "
            "C compiler (gcc or clang) and reinstall gpsearch"
        )
    chosen = native()
    if chosen is None:
        return f"switched off by {_CHOICE}=off"
    bytes_too = " with VNNI" if chosen.knows_digits(1) else ""
    return f"{chosen.instruction_set}{bytes_too}, of {', '.join(available())}"


def counts(*names: str) -> list[tuple[str, Any]]:
    """Return fields of a struct in C that are whole numbers."""
    return [(name, ctypes.c_int64) for name in names]


def pointers(*names: str) -> list[tuple[str, Any]]:
    """Return fields of a struct in C that are addresses."""
    return [(name, ctypes.c_void_p) for name in names]
