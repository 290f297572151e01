"""The machine that a benchmark ran on: what it is, what it can do, and who else was there."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from gpsearch.kernels.native import description as kernels

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_READ = """
#include <stddef.h>
#include <stdint.h>
typedef uint64_t lane __attribute__((vector_size(32)));
uint64_t read_all(const lane *x, size_t n, size_t times) {
    lane a = {0}, b = {0}, c = {0}, d = {0};
    for (; times; times--) {
        for (size_t i = 0; i + 4 <= n; i += 4) {
            a += x[i]; b += x[i + 1]; c += x[i + 2]; d += x[i + 3];
        }
        __asm__ volatile("" ::: "memory"); // else reading once and multiplying would do
    }
    a += b + c + d;
    return a[0] + a[1] + a[2] + a[3];
}
"""
_LANE = 32


def description() -> dict[str, str]:
    """Return what a time depends on, by name."""
    return {
        "processor": _cpuinfo("model name") or "unknown",
        "cores": str(os.cpu_count()),
        "caches": _caches() or "unknown",
        "kernels in C": kernels(),
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, 1 thread",
    }


def _cpuinfo(key: str) -> str:
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _caches() -> str:
    found = []
    for index in sorted(_CACHES.glob("index*")):
        level, kind, size = (_text(index / name) for name in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return ", ".join(found)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


class Neighbours:
    """How busy the other processes kept the cores, and how long the load was."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._busy_s, self._own_s = _busy_s(), _own_s()
        self._load = os.getloadavg()[0]

    def __str__(self) -> str:
        wall_s = time.perf_counter() - self._began
        load = f"load average {self._load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end"
        if self._busy_s is None or (busy_s := _busy_s()) is None:
            return f"{load}; what else ran is unknown"
        others = max(0.0, busy_s - self._busy_s - (_own_s() - self._own_s))
        share = others / (wall_s * (os.cpu_count() or 1))
        quiet = "the machine was ours" if share < 0.05 else f"others took {share:.0%} of the cores"
        return f"{load}; {quiet}"


def _busy_s() -> float | None:
    """Return the seconds that all cores together have been busy since boot, steal included."""
    fields = _text(Path("/proc/stat")).partition("\n")[0].split()[1:]
    if len(fields) < 8:
        return None
    idle, waiting = int(fields[3]), int(fields[4])
    return (sum(map(int, fields[:8])) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Product:
    """The fastest product torch has, by which a training step's share of the peak is measured."""

    SIZE = 1024
    FLOPS = 2 * SIZE**3

    def __init__(self) -> None:
        self._a, self._b, self._out = torch.randn(3, self.SIZE, self.SIZE).unbind()

    def __call__(self) -> None:
        """Multiply once."""
        torch.mm(self._a, self._b, out=self._out)


class Reading:
    """One thread that reads so many bytes over and over: the bandwidth at this working set.

    The loop is in C, built for this machine and thrown away afterwards.

    Args:
        working_set: Bytes.
    """

    AT_ONCE = 2**25
    """Bytes that a call reads, about: a millisecond or more."""

    def __init__(self, working_set: int) -> None:
        self._memory = torch.ones(working_set // 8 + _LANE, dtype=torch.int64)
        self._address = -(-self._memory.data_ptr() // _LANE) * _LANE
        self._lanes = -(-working_set // _LANE)
        self._times = max(1, self.AT_ONCE // working_set)
        self.bytes = self._lanes * _LANE * self._times
        """That a call reads, in all."""

    def __call__(self) -> None:
        """Read."""
        read = reader()
        assert read is not None
        read(self._address, self._lanes, self._times)


@cache
def reader() -> Callable[[int, int, int], int] | None:
    """Build the loop of `Reading`; None where there is no compiler."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-x", "c", "-"]
        try:
            subprocess.run(
                ["cc", *flags, "-o", str(library)], input=_READ, text=True,
                check=True, capture_output=True,
            )  # fmt: skip
        except (OSError, subprocess.CalledProcessError):
            return None
        read = ctypes.CDLL(str(library)).read_all
    read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    read.restype = ctypes.c_uint64
    return read
