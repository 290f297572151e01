"""The C kernels are found, chosen and switched off as their module says."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpsearch import UserError
from gpsearch.kernels import compiled, decode, native, sparse


def test_every_instruction_set_up_to_the_fastest_is_available() -> None:
    there = native.available()
    assert there == native.INSTRUCTION_SETS[: len(there)]


def test_the_fastest_is_the_default() -> None:
    chosen = native.native()
    assert (chosen.instruction_set if chosen else "") == "".join(native.available()[-1:])


def test_an_unknown_instruction_set_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match="no such kernels here"):
        native.native("mmx")


@pytest.mark.parametrize("name", [*native.available(), "off"])
def test_the_environment_chooses(name: str) -> None:
    code = (
        "from gpsearch.kernels.native import native; n = native(); print(n and n.instruction_set)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"GPSEARCH_KERNELS": name},
    )
    assert done.stdout.strip() == ("None" if name == "off" else name)


CSRC = Path(native.__file__).with_name("csrc")
MIRRORS: list[tuple[str, str, type[ctypes.Structure]]] = [
    ("training.h", "Dense", compiled._CDense),
    ("training.h", "Recurrence", compiled._CRecurrence),
    ("sparse_product.h", "SparseWeight", sparse._CWeight),
    ("sparse.h", "Outside", sparse._COutside),
    ("sparse.h", "SparseDense", sparse._CDense),
    ("sparse.h", "SparseRecurrence", sparse._CRecurrence),
    ("decode.h", "Front", decode._Front),
    ("decode.h", "Back", decode._Back),
    ("decode.h", "Cell", decode._Cell),
    ("decode.h", "Stack", decode._Stack),
]


def fields_in_c(file: str, name: str) -> list[tuple[str, str]]:
    """Return the names and types of a struct's fields: p is a pointer, p[4] four of them."""
    text = re.sub(r"/\*.*?\*/", "", (CSRC / file).read_text(), flags=re.DOTALL)
    found = re.search(rf"typedef struct \{{([^}}]*)\}} {name};", text)
    assert found is not None
    fields = []
    for declaration in found[1].split(";")[:-1]:
        kind, declarators = declaration.strip().removeprefix("const ").split(maxsplit=1)
        for one in declarators.split(","):
            field, _, count = one.strip().partition("[")
            what = "p" if field.startswith("*") else kind
            fields.append((field.lstrip("*"), what + f"[{count}" * bool(count)))
    return fields


def fields_here(mirror: Any) -> list[tuple[str, str]]:
    """Return the same of what Python hands over; a pattern is written out."""
    names: dict[Any, str] = {ctypes.c_int64: "int64_t", ctypes.c_void_p: "p"}
    names |= {here: name for _, name, here in MIRRORS}
    fields: list[tuple[str, str]] = []
    for field, kind in mirror._fields_:
        if field == "pattern":
            fields += fields_here(kind)
        elif kind in names:
            fields.append((field, names[kind]))
        else:
            fields.append((field, f"{names[kind._type_]}[{kind._length_}]"))
    return fields


@pytest.mark.parametrize(("file", "name", "mirror"), MIRRORS)
def test_what_python_hands_over_is_what_c_declares(
    file: str, name: str, mirror: type[ctypes.Structure]
) -> None:
    assert fields_here(mirror) == fields_in_c(file, name)
