"""The energy counters of Intel's and AMD's processors (RAPL): a shared part of profilers.

A socket has one counter. Linux shows it twice: as a file under powercap, for root, and as an event
of perf's power unit, for whoever may count system-wide. The first that can be read is used. Where
neither can, the reason says what stands in the way (a container, a virtual machine, permissions)
and the remedy.

Only packages are counted: their parts (core, dram of some parts) are in them, and psys, the whole
platform, has them in it.

Tried on trees of files like the kernel's, and perf's system call on a software event; never yet
on a machine with counters, since none was at hand.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

POWERCAP = (
    Path("/sys/class/powercap"),
    # Docker hides the first; Zeus made this a custom for where to mount it.
    Path("/zeus_sys/class/powercap/intel-rapl"),
)
POWER_UNIT = Path("/sys/bus/event_source/devices/power")
_SYSCALL = {"x86_64": 298, "AMD64": 298}
_UDEV = (
    'SUBSYSTEM=="powercap", KERNEL=="intel-rapl:*", ACTION=="add", '
    'RUN+="/bin/chmod a+r /sys%p/energy_uj"'
)


@runtime_checkable
class Meter(Protocol):
    """One way to the energy of a processor, all sockets together."""

    @property
    def method(self) -> str:
        """Such as "rapl:package-0+package-1"."""

    @property
    def scope(self) -> str:
        """What is counted, as in `DeviceFacts.energy_scope`."""

    @property
    def model(self) -> str:
        """Whose model it is, if no sensor's, as in `DeviceFacts.energy_model`."""

    @property
    def wrap_j(self) -> float | None:
        """Where a counter starts again from 0; None if never."""

    def joules(self) -> float:
        """Return cumulative J, never falling.

        Raises:
            OSError, RuntimeError: It cannot be read.
            ValueError: What is there is no number.
        """


class Rapl:
    """Powercap's counters: one a socket, in uJ, and wrapping around.

    Args:
        root: The powercap tree, or its folder intel-rapl.

    Raises:
        FileNotFoundError: There are none.
        OSError: They cannot be read.
        ValueError: What is there is no number.
    """

    scope, model = "socket", ""

    def __init__(self, root: Path) -> None:
        zones = sorted(root.glob("intel-rapl:*"))
        named = {zone: _text(zone / "name") for zone in zones}
        self._spans = {
            zone: int((zone / "max_energy_range_uj").read_text())
            for zone, name in named.items()
            if name.startswith("package")
        }
        if not self._spans:
            raise FileNotFoundError(f"no RAPL counter under {root}")
        if min(self._spans.values()) <= 0:
            raise ValueError(f"max_energy_range_uj of {root} is not above 0")
        self._last: dict[Path, int] = {}
        self._wraps = dict.fromkeys(self._spans, 0)
        self.method = f"rapl:{'+'.join(named[zone] for zone in self._spans)}"
        self.wrap_j = min(self._spans.values()) / 1e6
        self.joules()

    def joules(self) -> float:
        """Return cumulative J, wraps undone; to be read before a counter wraps twice."""
        return sum(self._microjoules(zone) for zone in self._spans) / 1e6

    def _microjoules(self, zone: Path) -> int:
        now = int((zone / "energy_uj").read_text())
        self._wraps[zone] += now < self._last.get(zone, 0)
        self._last[zone] = now
        return self._wraps[zone] * self._spans[zone] + now


class PerfEvents:
    """Linux's ``perf_event_open``: counters that the kernel keeps in 64 bits."""

    def open(self, kind: int, config: int, cpu: int, pid: int = -1) -> int:
        """Start a counter and return its file.

        Args:
            kind: Number of the unit that counts.
            config: Which of its events.
            cpu: The processor to count on; -1 for all.
            pid: The process to count; 0 for this one, -1 for all.

        Raises:
            OSError: It is not allowed, or there is no such thing.
        """
        if platform.machine() not in _SYSCALL:
            raise OSError(f"no RAPL on {platform.machine()}")
        attributes = _Attributes(kind=kind, size=ctypes.sizeof(_Attributes), config=config)
        libc = ctypes.CDLL(None, use_errno=True)
        number = ctypes.c_long(_SYSCALL[platform.machine()])
        file = int(libc.syscall(number, ctypes.byref(attributes), pid, cpu, -1, ctypes.c_ulong(0)))
        if file < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return file

    def read(self, file: int) -> int:
        """Return what a counter has counted."""
        return int.from_bytes(os.read(file, 8), "little")

    def close(self, file: int) -> None:
        """End a counter."""
        os.close(file)


class _Attributes(ctypes.Structure):
    """The first version of the kernel's struct perf_event_attr, which it still takes."""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("config", ctypes.c_uint64),
        ("_unused", ctypes.c_uint64 * 6),
    )


class PerfPower:
    """Perf's energy counters: one a socket, which the kernel keeps from wrapping around.

    Args:
        unit: The power unit in sysfs.
        events: The system call.

    Raises:
        FileNotFoundError: There is no such unit.
        OSError: It may not be used.
        ValueError: What is there is no number.
    """

    scope, model, wrap_j = "socket", "", None

    def __init__(self, unit: Path, events: PerfEvents) -> None:
        self._events, self._files = events, list[int]()
        kind = int((unit / "type").read_text())
        event = (unit / "events" / "energy-pkg").read_text()
        config = int(re.sub(r"^\s*event=", "", event), 0)
        self._scale = float((unit / "events" / "energy-pkg.scale").read_text())
        cpus = list(_numbers((unit / "cpumask").read_text()))
        try:
            for cpu in cpus:
                self._files.append(events.open(kind, config, cpu))
        except OSError:
            self.close()
            raise
        self.method = f"perf:power/energy-pkg on {len(cpus)} socket{'s' * (len(cpus) > 1)}"

    def joules(self) -> float:
        """Return cumulative J since this was opened."""
        return sum(map(self._events.read, self._files)) * self._scale

    def close(self) -> None:
        """End the counters."""
        while self._files:
            self._events.close(self._files.pop())

    def __del__(self) -> None:
        with suppress(OSError):
            self.close()


@dataclass(frozen=True)
class Surroundings:
    """What this process runs inside of, as far as files under ``root`` tell."""

    root: Path = Path("/")

    @property
    def container(self) -> bool:
        """Whether this is a container, which shows less of the machine."""
        marks = [
            self.root / name
            for name in (".dockerenv", "run/.containerenv", "run/secrets/kubernetes.io")
        ]
        groups = _text(self.root / "proc" / "1" / "cgroup")
        known = re.search(r"docker|kubepods|containerd|lxc|libpod", groups)
        return any(mark.exists() for mark in marks) or known is not None

    @property
    def virtual(self) -> bool:
        """Whether this is a virtual machine, which has no counters of its own."""
        flags = re.search(r"^flags\s*:.*$", _text(self.root / "proc" / "cpuinfo"), re.MULTILINE)
        return flags is not None and "hypervisor" in flags[0].split()


@dataclass(frozen=True)
class Sources:
    """Where counters may be; a test hands in its own."""

    powercap: tuple[Path, ...] = POWERCAP
    power_unit: Path = POWER_UNIT
    events: PerfEvents = field(default_factory=PerfEvents)
    surroundings: Surroundings = Surroundings()

    def meter(self) -> Meter | str:
        """Return the first way that works, or why none does and the remedy."""
        ways: list[Callable[[], Meter]] = [
            *(partial(Rapl, root) for root in self.powercap),
            partial(PerfPower, self.power_unit, self.events),
        ]
        failures: list[OSError | ValueError] = []
        for way in ways:
            try:
                return way()
            except (OSError, ValueError) as error:
                failures.append(error)
        return self._reason(failures)

    def _reason(self, failures: list[OSError | ValueError]) -> str:
        there = [one for one in failures if not isinstance(one, FileNotFoundError)]
        if any(isinstance(one, PermissionError) for one in there):
            return self._not_allowed()
        if there:
            return f"RAPL cannot be read ({there[0]}): see to the files under {self.powercap[0]}"
        return self._not_there()

    def _not_there(self) -> str:
        if self.surroundings.virtual:
            return (
                "this is a virtual machine, and the machine below keeps its energy counters to "
                "itself: measure on a bare machine"
            )
        if self.surroundings.container:
            inside = self.powercap[-1]
            return (
                "this is a container, which hides the energy counters: start it with "
                f"`-v /sys/class/powercap/intel-rapl:{inside}:ro`, as root"
            )
        return (
            f"no RAPL counter under {self.powercap[0]}: an older or another processor, or "
            "`sudo modprobe intel_rapl_msr` is missing"
        )

    def _not_allowed(self) -> str:
        if self.surroundings.container:
            return (
                "the energy counters are root's, and root's outside the container too: run it as "
                "root, or with `--cap-add PERFMON` and perf's counters"
            )
        return (
            "the energy counters are readable by root only: run "
            f"`sudo chmod a+r {self.powercap[0]}/intel-rapl:*/energy_uj`, which lasts until the "
            f"next boot; put {_UDEV} into /etc/udev/rules.d/90-rapl.rules, which stays; or "
            "allow perf's counters, `sudo sysctl kernel.perf_event_paranoid=0`"
        )


def _numbers(text: str) -> Iterator[int]:
    """Yield the processors of a kernel list, such as "0,18" or "0-3"."""
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
