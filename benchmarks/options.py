"""The flags that the benchmarks of speed share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.interleaved import CLOCKS, FEWEST_ROUNDS, Clock

RESULTS = Path("results")

Flag = tuple[str, type, str]
"""A flag's name, the type of its value, and its help."""


@dataclass(frozen=True)
class Options:
    """How to measure, and where to put it."""

    quick: bool
    rounds: int
    clock: Clock
    clock_name: str
    out: Path
    more: Mapping[str, Any]
    """The benchmark's own flags."""


def parse(
    command: str,
    about: str | None,
    arguments: list[str],
    *,
    rounds: int,
    quick_rounds: int = FEWEST_ROUNDS,
    more: Sequence[Flag] = (),
) -> Options:
    """Read the flags of ``python -m benchmarks COMMAND``.

    Args:
        command: The benchmark's name.
        about: Its docstring.
        arguments: What stood behind the name.
        rounds: How often everything is timed if nothing is said.
        quick_rounds: How often in a quick run.
        more: Flags of its own.
    """
    parser = argparse.ArgumentParser(
        f"python -m benchmarks {command}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few and small sizes, below a minute")
    parser.add_argument("--wall", action="store_true", help="wall time, not the thread's own")
    parser.add_argument("--rounds", type=int, help=f"default {rounds}; quick: {quick_rounds}")
    parser.add_argument("--out", type=Path, help="default results/benchmarks; quick: results/quick")
    for name, kind, text in more:
        parser.add_argument(f"--{name}", type=kind, help=text)
    flags = parser.parse_args(arguments)
    return Options(
        flags.quick,
        flags.rounds or (quick_rounds if flags.quick else rounds),
        CLOCKS["wall" if flags.wall else "processor"],
        "wall time" if flags.wall else "the thread's processor time (other work shares the cores)",
        flags.out or RESULTS / ("quick" if flags.quick else "benchmarks"),
        {name: getattr(flags, name) for name, _, _ in more},
    )
