"""What a check is, and which of them an API version demands."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from gpsearch.errors import line_of
from gpsearch.testing.bench import Bench

Body = Callable[[Bench], None]

DEMANDED = {
    "1": {"": 7, "latency_s": 11, "outputs": 2, "peak_memory_bytes": 1, "energy_j": 10},
}
"""By major API version, how many checks each declared capability brings; "" are those of them all.
Written down, so that a check that is lost on the way is missed."""
ALWAYS = ("", "latency_s")
"""What every profiler is held to: where a device cannot be timed, nothing about it is proven."""
LIMIT_S = 120.0
"""A check that takes longer is interrupted, and has failed."""
ANSWER_S = 10.0
"""So long is waited for what a profiler says of its device, outside of the checks."""
_PAUSE_S = 0.5


class CheckFailed(AssertionError):
    """A profiler breaks the contract; the message says how, and what is wanted."""


class TimedOut(CheckFailed):
    """It does not come to an end."""


class _Alarm(BaseException):
    """No Exception, which the code within might take for one of its own.

    A TimeoutError, say, is an OSError: a counter that cannot be read.
    """


@dataclass(frozen=True)
class Check:
    """One thing that a profiler must keep."""

    name: str
    needs: str
    """The capability without which it is skipped; "" for none."""
    body: Body
    tries: int = 1
    """More than one where other work on the machine may spoil what is seen."""

    def run(self, bench: Bench, limit_s: float = LIMIT_S) -> None:
        """Return if the profiler keeps it, at one of the tries.

        Raises:
            CheckFailed: It does not.
        """
        for again in range(1, self.tries):
            try:
                self._run_once(bench, limit_s)
            except TimedOut:
                raise
            except CheckFailed:
                bench.host.sleep(_PAUSE_S * again)  # what is busy now may be at rest then
            else:
                return
        self._run_once(bench, limit_s)

    def _run_once(self, bench: Bench, limit_s: float) -> None:
        try:
            with deadline(limit_s):
                self.body(bench)
        except (CheckFailed, KeyboardInterrupt):
            raise
        except BaseException as error:  # whatever a stranger's profiler raises
            raise CheckFailed(f"the profiler raised {line_of(error)}") from error


CHECKS: dict[str, Check] = {}
"""All checks by name, in the order in which they run."""


def check(needs: str = "", tries: int = 1) -> Callable[[Body], Body]:
    """Enter a function among the checks, under its name."""

    def enter(body: Body) -> Body:
        CHECKS[body.__name__] = Check(body.__name__, needs, body, tries)
        return body

    return enter


def demanded(api_version: str, lacking: dict[str, str]) -> int:
    """Return how many checks must run on a profiler of this version."""
    counts = DEMANDED[api_version.partition(".")[0]]
    return sum(n for needs, n in counts.items() if needs in ALWAYS or needs not in lacking)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, where signals can: in a main thread on Unix.

    A signal, and not a thread left behind: what hangs must not go on beside the next check.

    Raises:
        TimedOut: It took longer.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise _Alarm

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    except _Alarm:
        raise TimedOut(f"no end within {seconds:g} s") from None
