"""The machine that measures: its clock, its load, and the lock that keeps measurements apart."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    """What measuring needs of the machine it runs on; a test hands in its own."""

    clock: Callable[[], float] = time.monotonic
    """Seconds; only differences count."""
    sleep: Callable[[float], None] = time.sleep
    pressure: Path = Path("/proc/pressure/cpu")
    """Linux's pressure stall information."""
    locks: Path = Path(tempfile.gettempdir())
    """One folder for all processes that share the devices."""

    def stalled_s(self) -> float | None:
        """Return for how long tasks have waited for a processor since boot; None if unknown."""
        try:
            text = self.pressure.read_text()
        except OSError:
            return None
        found = re.search(r"^some .*\btotal=(\d+)", text, re.MULTILINE)
        return int(found[1]) / 1e6 if found else None

    @contextmanager
    def alone_on(self, device: str) -> Iterator[None]:
        """Wait until no other process measures on the device of this name, and keep them out.

        The lock goes with the process: a killed one leaves nothing behind.
        """
        # Imported here since Windows has none; the rest of the engine runs there.
        import fcntl

        name = re.sub(r"[^\w.-]", "_", device)
        file = _open_shared(self.locks / f"gpsearch-{name}.lock")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def _open_shared(path: Path) -> int:
    """Open a lock file that another user may have made, which only a plain read can."""
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
