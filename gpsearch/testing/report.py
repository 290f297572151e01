"""The checks of one profiler, and what came of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gpsearch.errors import UserError, line_of
from gpsearch.profiling import API_VERSION, DeviceProfiler, find, installed
from gpsearch.testing import contract, counters, timing, upkeep  # noqa: F401, they enter their checks
from gpsearch.testing.bench import Bench
from gpsearch.testing.checks import (
    ANSWER_S,
    CHECKS,
    LIMIT_S,
    Check,
    CheckFailed,
    TimedOut,
    deadline,
    demanded,
)

State = Literal["passed", "failed", "expected", "skipped"]
_MARKS = {"passed": "ok", "failed": "FAIL", "expected": "known"}


@dataclass(frozen=True)
class Outcome:
    """What came of one check."""

    check: str
    state: State
    """"expected" is a failure that the author has given the reason for."""
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """What came of a profiler's examination."""

    device: str
    api_version: str
    outcomes: tuple[Outcome, ...]
    demanded: int
    """How many checks the API version demands of the profiler's capabilities."""

    @property
    def ran(self) -> int:
        """How many checks ran, whatever came of them."""
        return sum(one.state != "skipped" for one in self.outcomes)

    @property
    def passed(self) -> bool:
        """Whether none failed, and none was left out."""
        failed = any(one.state == "failed" for one in self.outcomes)
        return not failed and self.ran >= self.demanded

    def summary(self) -> str:
        """Return the counts, in a line."""
        counts = Counter(one.state for one in self.outcomes)
        states: tuple[State, ...] = ("passed", "failed", "expected", "skipped")
        said = ", ".join(f"{counts[one]} {one}" for one in states if counts[one])
        short = f": TOO FEW, API {self.api_version} demands {self.demanded}"
        of = short if self.ran < self.demanded else f" of the {self.demanded} demanded"
        return f"{'passes' if self.passed else 'FAILS'}: {self.ran} checks ran{of}; {said}"

    def text(self) -> str:
        """Return a line a check, a line a reason for those skipped, and the counts."""
        lines = [
            f"{_MARKS[one.state]:5} {one.check}{f': {one.reason}' if one.reason else ''}"
            for one in self.outcomes
            if one.state != "skipped"
        ]
        skipped = Counter(one.reason for one in self.outcomes if one.state == "skipped")
        lines += [f"skip  {count} checks: {reason}" for reason, count in skipped.items()]
        return "\n".join([*lines, f"{self.device} {self.summary()}"]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it."""
        return {
            **asdict(self), "ran": self.ran, "passed": self.passed, "summary": self.summary()
        }  # fmt: skip


def due(bench: Bench, check: Check, limit_s: float = ANSWER_S) -> str | None:
    """Return why a check is skipped, by the profiler's declared capabilities; None if it is due.

    Raises:
        CheckFailed: The profiler takes longer than ``limit_s`` to declare them.
    """
    if not check.needs:
        return None
    with deadline(limit_s):
        reason = bench.lacking.get(check.needs)
    return f"no {check.needs}: {reason}" if reason else None


def examine(
    make: Callable[[], DeviceProfiler],
    name: str = "",
    *,
    expected_failures: Mapping[str, str] | None = None,
    checks: Mapping[str, Check] = CHECKS,
    limit_s: float = LIMIT_S,
) -> Report:
    """Check a profiler against the contract.

    Args:
        make: Makes the profiler; called again after a failure, which may have left it in pieces.
        name: What the report calls the device.
        expected_failures: By check, why it is known to fail.
        checks: By name; all of them, but for the tests of this function.
        limit_s: How long a check may take.
    """
    known = dict(expected_failures or {})
    outcomes: list[Outcome] = []
    lacking: dict[str, str] = {}
    bench = Bench(make())
    spoken = str(bench.profiler.api_version)
    for check in checks.values():
        outcomes.append(_outcome(bench, check, known.get(check.name), limit_s))
        if outcomes[-1].state in ("failed", "expected"):
            _close(bench.profiler, limit_s)
            try:
                with deadline(limit_s):
                    bench = Bench(make())
                _ask(bench, limit_s)
            except Exception as error:
                reason = f"it does not start a second time: {line_of(error)}"
                outcomes.append(Outcome("starts_again", "failed", reason))
                break
    with suppress(Exception), deadline(min(limit_s, ANSWER_S)):
        lacking = bench.lacking
    _close(bench.profiler, limit_s)
    for stray in sorted(known.keys() - checks.keys()):
        outcomes.append(Outcome(stray, "failed", "expected to fail, but there is no such check"))
    return Report(name, spoken, tuple(outcomes), demanded(spoken, lacking))


def examine_named(name: str, limit_s: float = LIMIT_S) -> Report:
    """Check the profiler of this name (as `gpsearch.profiling.find` takes it).

    Args:
        name: The profiler's.
        limit_s: How long it may take to be made, and each check.

    Raises:
        UserError: There is none.
    """
    try:
        with deadline(limit_s):
            found = find(name)
    except (UserError, TimedOut) as error:
        if isinstance(error, UserError) and name.partition(":")[0] not in installed():
            raise
        unusable = Outcome("can_be_made", "failed", str(error))
        return Report(name, API_VERSION, (unusable,), demanded(API_VERSION, {}))
    _close(found, limit_s)  # some devices can be opened only once at a time
    return examine(lambda: find(name), name, limit_s=limit_s)


def _close(profiler: DeviceProfiler, limit_s: float) -> None:
    with suppress(Exception, SystemExit), deadline(limit_s):
        profiler.close()


def _ask(bench: Bench, limit_s: float) -> None:
    """Ask a profiler what it can do: if one hangs there, every check to come would.

    What else is wrong with its answer, the checks tell.
    """
    with deadline(min(limit_s, ANSWER_S)), suppress(Exception):
        _ = bench.lacking


def _outcome(bench: Bench, check: Check, expected: str | None, limit_s: float) -> Outcome:
    start_s = time.perf_counter()
    state, reason = verdict(bench, check, expected, limit_s)
    return Outcome(check.name, state, reason, round(time.perf_counter() - start_s, 3))


def verdict(
    bench: Bench, check: Check, expected: str | None, limit_s: float = LIMIT_S
) -> tuple[State, str]:
    """Run a check, if it is due; return what came of it, and why."""
    try:
        why_not = due(bench, check, min(limit_s, ANSWER_S))
    except Exception as error:
        return "failed", f"probe() failed: {line_of(error)}"
    if why_not:
        return "skipped", why_not
    try:
        check.run(bench, limit_s)
    except CheckFailed as failure:
        return ("expected", f"{expected} ({failure})") if expected else ("failed", str(failure))
    if expected:
        return "failed", f"passes, though expected to fail: {expected}; take it off that list"
    return "passed", ""
