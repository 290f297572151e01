"""The processor this runs on: latency in a single thread, energy by RAPL, peak memory."""

from __future__ import annotations

import copy
import itertools
import os
import platform
import re
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpsearch.profiling import API_VERSION, DeviceFacts

Handle = tuple[nn.Module, tuple[Tensor, ...]]

_ATTEMPTS = 8
_WHO = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
_POWERCAP = Path("/sys/class/powercap")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


class CpuProfiler:
    """Runs models eagerly on the processor, in as many threads as asked for."""

    api_version = API_VERSION

    def __init__(self, threads: int = 1, powercap: Path = _POWERCAP) -> None:
        self.threads = threads
        self._rapl = Rapl(powercap)

    def probe(self) -> DeviceFacts:
        """Name the processor and all that its speed depends on."""
        why_not = self._rapl.why_not()
        return DeviceFacts(
            name="cpu",
            fingerprint=_fingerprint(self.threads),
            unavailable={"energy_j": why_not} if why_not else {},
            energy_method=f"rapl:{'+'.join(self._rapl.names)}",
            energy_scope="socket",
        )

    def load(self, model: nn.Module, example: tuple[Tensor, ...]) -> Handle:
        """Copy the model and its arguments to the processor, in evaluation mode."""
        return copy.deepcopy(model).cpu().eval(), tuple(one.detach().cpu() for one in example)

    def run(self, handles: Sequence[Handle], schedule: Sequence[int]) -> list[float]:
        """Time one call after the other."""
        with _threads(self.threads), torch.inference_mode():
            return [_seconds(*handles[index]) for index in schedule]

    def read_energy(self) -> tuple[float, float]:
        """Return (clock in s, cumulative J) of all sockets together."""
        return time.perf_counter(), self._rapl.joules()

    def peak_memory(self, handle: Handle) -> int:
        """Return bytes of the weights and of all that torch held beside them at the peak."""
        model, example = handle
        stored = itertools.chain(model.parameters(), model.buffers(), example)
        return sum(one.nbytes for one in stored) + _peak_allocated(model, example)

    def close(self) -> None:
        """Nothing is held."""


class Rapl:
    """Intel's and AMD's energy counters: one a socket, in uJ, root's alone, and wrapping around.

    Args:
        root: The powercap tree.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        zones = sorted(root.glob("intel-rapl:*"))
        # Sub-domains (core, dram) are parts of a package; psys counts it once more.
        self._zones = [zone for zone in zones if _text(zone / "name").startswith("package")]
        self.names = [_text(zone / "name") for zone in self._zones]
        self._last: dict[Path, int] = {}
        self._wraps: dict[Path, int] = {}

    def why_not(self) -> str | None:
        """Return why there is no energy to be had, with the remedy; None if there is."""
        if not self._zones:
            return (
                f"no RAPL counter under {self.root} (a virtual machine, a container or an older "
                "processor): measure on the bare machine, or mount that folder into the container"
            )
        try:
            self.joules()
        except (OSError, ValueError) as error:
            return _remedy(self.root, error)
        return None

    def joules(self) -> float:
        """Return cumulative J since the first read, wraps undone; to be read before two of them."""
        return sum(self._microjoules(zone) for zone in self._zones) / 1e6

    def _microjoules(self, zone: Path) -> int:
        now = int((zone / "energy_uj").read_text())
        span = int((zone / "max_energy_range_uj").read_text())
        self._wraps[zone] = self._wraps.get(zone, 0) + (now < self._last.get(zone, 0))
        self._last[zone] = now
        return self._wraps[zone] * span + now


def _remedy(root: Path, error: OSError | ValueError) -> str:
    if isinstance(error, PermissionError):
        return (
            "RAPL is readable by root only: run "
            f"`sudo chmod a+r {root}/intel-rapl:*/energy_uj`, which lasts until the next boot "
            "(a udev rule makes it last)"
        )
    return f"RAPL cannot be read ({error}): see to the files under {root}"


def _seconds(model: nn.Module, example: tuple[Tensor, ...]) -> float:
    """Time one call; while another process takes the processor during it, time it again.

    A preempted call measures the scheduler. Worse, on a busy machine preemption keeps in step with
    the calls: two equal models came out 1.4 apart, in an interval of 1 %.
    """
    for _ in range(_ATTEMPTS):
        preempted = resource.getrusage(_WHO).ru_nivcsw
        start = time.perf_counter()
        model(*example)
        seconds = time.perf_counter() - start
        if resource.getrusage(_WHO).ru_nivcsw == preempted:
            break
    return seconds


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute in ``count`` threads, then in as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _peak_allocated(model: nn.Module, example: tuple[Tensor, ...]) -> int:
    """Return the largest sum of bytes that torch allocated and had not yet freed in one call."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it greets on stderr
    record = torch.autograd.profiler.profile(use_kineto=False, profile_memory=True)
    with torch.inference_mode(), record:
        model(*example)
    assert record.kineto_results is not None
    recorded: list[Any] = record.kineto_results.events()
    changes = [(one.start_ns(), one.nbytes()) for one in recorded if one.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    held = itertools.accumulate((change[1] for change in changes), initial=0)
    return int(max(held))


def _fingerprint(threads: int) -> dict[str, str]:
    model_name = re.search(r"^model name\s*: (.*)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return {
        "processor": model_name[1] if model_name else platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "governor": _text(_GOVERNOR) or "unknown",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "torch": torch.__version__,
    }


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
