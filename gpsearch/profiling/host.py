"""The machine that measures: its clock, its load, and who may use it when.

Measuring needs the machine for itself; trainings may share it. Each machine has two lock files.
Whoever trains holds the `room` together with the others and leaves it for a moment between two
batches; whoever measures wants it alone. Since trainings overlap, the room alone would hardly ever
be free: so whoever measures first closes the `door`, through which every training passes when it
comes back. All locks go with their process: a killed one leaves nothing behind. A stopped one keeps
them: whoever waits for it says so, and gives up in the end.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gpsearch.errors import UserError

HERE = "here"
"""The machine that gpsearch runs on, as in `DeviceFacts.machine`."""
WAITING = "GPSEARCH_WAITING"
"""The environment's variable by which a process tells the one that measures for it its number."""
STALLED = 0.5
"""Share of a reading in which tasks waited for a processor, above which it is disturbed."""
STOLEN = 0.1
"""Share of processor time that went to other guests of the machine above, likewise."""
_POLL_S = 0.02


@dataclass(frozen=True)
class Load:
    """How much others have taken of the machine, since it started; None where it does not tell."""

    clock_s: float
    stalled_s: float | None
    """For how long some task has waited for a processor."""
    ticks: tuple[int, int] | None
    """What the machine above kept for its other guests (steal), and all processor time."""
    throttled: int | None
    """How often a processor was slowed down, for heat or power."""

    def since(self, before: Load) -> list[str]:
        """Return what was wrong between then and now; empty if nothing is known to be."""
        stalled, stolen = self._stalled(before), self._stolen(before)
        faults = {
            f"tasks waited for a processor {stalled:.0%} of the time: a busy machine": (
                stalled > STALLED
            ),
            f"the machine above took {stolen:.0%} of the processors": stolen > STOLEN,
            "a processor was throttled": (self.throttled or 0) > (before.throttled or 0),
        }
        return [fault for fault, is_there in faults.items() if is_there]

    def _stalled(self, before: Load) -> float:
        seconds = self.clock_s - before.clock_s
        if self.stalled_s is None or before.stalled_s is None or seconds <= 0:
            return 0.0
        return (self.stalled_s - before.stalled_s) / seconds

    def _stolen(self, before: Load) -> float:
        if self.ticks is None or before.ticks is None or self.ticks[1] <= before.ticks[1]:
            return 0.0
        return (self.ticks[0] - before.ticks[0]) / (self.ticks[1] - before.ticks[1])


@dataclass(frozen=True)
class Host:
    """What measuring needs of the machine it runs on; a test hands in its own."""

    clock: Callable[[], float] = time.monotonic
    """Seconds; only differences count."""
    sleep: Callable[[float], None] = time.sleep
    proc: Path = Path("/proc")
    """Linux's process file system: pressure stall information, and stat."""
    cpus: Path = Path("/sys/devices/system/cpu")
    """Where the processors count how often they were throttled."""
    locks: Path = field(default_factory=lambda: Path(_shared_folder()))
    """One folder for all processes that share the devices: the environment's GPSEARCH_LOCKS, which
    containers of one machine can mount; else the system's for temporary files."""
    recovery_s: float = 3.0
    """How long a disturbed reading waits before it is taken again."""
    patience_s: float = 600.0
    """How long a measurement waits for trainings to pause; one that is stopped never would."""
    silence_s: float = 10.0
    """How long anybody waits for others who measure before saying so."""
    queue_s: float = 3600.0
    """And how long for the same one; a measurement takes a minute, or ten where energy is counted
    slowly."""

    def load(self) -> Load:
        """Return how busy the machine has been until now."""
        return Load(self.clock(), self._stalled_s(), self._ticks(), self._throttled())

    @contextmanager
    def alone_on(self, machine: str = HERE) -> Iterator[list[str]]:
        """Wait until nobody else measures on a machine and trainings pause; keep them out.

        Yields:
            What casts doubt on measuring now: a training that did not pause in time.

        Raises:
            UserError: Somebody else measures there for ever.
        """
        with self._open(machine, "door") as door, self._open(machine, "room") as room:
            self._wait_for(door, "alone")
            yield [] if self._empty(room) else ["a training that is stopped or stuck did not pause"]

    @contextmanager
    def sharing(self, machine: str = HERE) -> Iterator[Callable[[], None]]:
        """Use a machine beside others, as to train, but never while somebody measures there.

        Yields:
            A function to call now and then, which waits while somebody measures.

        Raises:
            UserError: Somebody measures there for ever.
        """
        with self._open(machine, "door") as door, self._open(machine, "room") as room:

            def pause() -> None:
                _let_go(room)
                self._wait_for(door, "shared")
                self._wait_for(room, "shared")
                _let_go(door)

            pause()
            yield pause

    def _wait_for(self, file: int, how: Literal["alone", "shared"]) -> None:
        """Wait for a lock, in a thread, which can be left behind.

        To ask again and again instead would be to disturb who measures, and to lose against others
        who wait.
        """
        if _free(file, how):
            return
        failures: list[OSError] = []

        def lock() -> None:
            try:
                _lock(file, how)
            except OSError as error:
                failures.append(error)

        waiter = threading.Thread(target=lock, daemon=True)
        waiter.start()
        waiter.join(self.silence_s)
        if waiter.is_alive():
            keeper = self._keeper(file)
            print(f"gpsearch: waiting for {keeper}, which measures", file=sys.stderr)
            self._join(waiter, file, keeper)
        if failures:
            raise failures[0]

    def _join(self, waiter: threading.Thread, file: int, keeper: str) -> None:
        """Wait on while the lock goes from one to the next, but for each no longer than queue_s."""
        while True:
            waiter.join(self.queue_s)
            if not waiter.is_alive():
                return
            before, keeper = keeper, self._keeper(file)
            if keeper == before:
                raise UserError(
                    f"waited {self.queue_s:g} s for {keeper}, which measures; end it, or let it "
                    "go on if it is stopped (`fg` or `kill -CONT`), and repeat"
                )

    def _keeper(self, file: int) -> str:
        """Name the process that has a lock, as far as the system tells."""
        status = os.fstat(file)
        place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        locks = _text(self.proc / "locks")
        found = re.search(rf"^\d+: FLOCK .* (\d+) {place} ", locks, re.MULTILINE)
        if not found:
            return "another process"
        state = _text(self.proc / found[1] / "status")
        stopped = re.search(r"^State:\s+T", state, re.MULTILINE)
        return f"process {found[1]}{' (stopped)' if stopped else ''}"

    def _empty(self, room: int) -> bool:
        """Wait until the room is empty, and take it; False if that takes too long."""
        deadline_s = self.clock() + self.patience_s
        while not _free(room, "alone"):
            if self.clock() > deadline_s:
                return False
            self.sleep(_POLL_S)
        return True

    @contextmanager
    def _open(self, machine: str, part: str) -> Iterator[int]:
        name = re.sub(r"[^\w.-]", "_", machine)
        file = _open_shared(self.locks / f"gpsearch-{name}-{part}.lock")
        try:
            yield file
        finally:
            _let_go(file)  # by name: a child process may still have the file open
            os.close(file)

    def _stalled_s(self) -> float | None:
        text = _text(self.proc / "pressure" / "cpu")
        found = re.search(r"^some .*\btotal=(\d+)", text, re.MULTILINE)
        return int(found[1]) / 1e6 if found else None

    def _ticks(self) -> tuple[int, int] | None:
        found = re.match(r"cpu +((?:\d+ ?)+)", _text(self.proc / "stat"))
        # user nice system idle iowait irq softirq steal guest guest_nice; a guest's are in user's
        ticks = [int(word) for word in found[1].split()][:8] if found else []
        return (ticks[7], sum(ticks)) if len(ticks) == 8 else None

    def _throttled(self) -> int | None:
        files = self.cpus.glob("cpu[0-9]*/thermal_throttle/*_throttle_count")
        counts = [_text(path).strip() for path in files]
        return sum(int(count) for count in counts if count.isdigit()) if counts else None


def waiting() -> frozenset[int]:
    """Return the process that waits while this one measures for it, if there is one.

    It may hold memory of a device, but computes nothing there now: it is no stranger.
    """
    return frozenset(map(int, os.environ.get(WAITING, "").split()))


def _shared_folder() -> str:
    return os.environ.get("GPSEARCH_LOCKS") or tempfile.gettempdir()


# fcntl is imported late since Windows has none; the rest of the engine runs there.


def _lock(file: int, how: Literal["alone", "shared"], also: int = 0) -> None:
    import fcntl

    fcntl.flock(file, (fcntl.LOCK_EX if how == "alone" else fcntl.LOCK_SH) | also)


def _let_go(file: int) -> None:
    import fcntl

    fcntl.flock(file, fcntl.LOCK_UN)


def _free(file: int, how: Literal["alone", "shared"]) -> bool:
    """Take a lock if nobody is in the way."""
    import fcntl

    try:
        _lock(file, how, fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _open_shared(path: Path) -> int:
    """Open a lock file that another user may have made, which only a plain read can."""
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
