"""The C kernels are found, chosen and switched off as their module says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gpsearch import UserError
from gpsearch.kernels import native


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
