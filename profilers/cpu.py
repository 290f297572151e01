"""The processor this runs on: latency in a single thread, energy by RAPL, peak memory.

On Jetson boards and Apple's chips, which have no RAPL, energy comes by Zeus: the extra `zeus`.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpsearch.profiling import (
    API_VERSION,
    DeviceFacts,
    arguments_on,
    arrays_of,
    copied,
    kernels_in_use,
    stored_bytes,
)
from gpsearch.profiling.rapl import Meter, Sources
from gpsearch.profiling.zeus import Chip

Handle = tuple[nn.Module, tuple[Any, ...]]

_ATTEMPTS, _PATIENCE_S = 8, 0.02
_WHO = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


class CpuProfiler:
    """Runs models eagerly on the processor, in as many threads as asked for.

    Args:
        threads: Threads within an operation.
        sources: Where RAPL's counters may be.
        chip: What Zeus may know, where there are none.
    """

    api_version = API_VERSION

    def __init__(
        self, threads: int = 1, sources: Sources | None = None, chip: Chip | None = None
    ) -> None:
        self.threads = threads
        self._sources, self._chip = sources or Sources(), chip or Chip()

    def probe(self) -> DeviceFacts:
        """Name the processor and all that its speed depends on."""
        facts = DeviceFacts("cpu", _fingerprint(self.threads))
        if isinstance(self._meter, str):
            return replace(facts, unavailable={"energy_j": self._meter})
        return replace(
            facts,
            energy_method=self._meter.method,
            energy_scope=self._meter.scope,
            energy_model=self._meter.model,
            energy_wrap_j=self._meter.wrap_j,
        )

    def load(self, model: nn.Module, example: tuple[Any, ...]) -> Handle:
        """Copy the model and its arguments to the processor, in evaluation mode."""
        return copied(model).cpu().eval(), arguments_on("cpu", example)

    def run(self, handles: Sequence[Handle], schedule: Sequence[int]) -> list[float]:
        """Time one call after the other."""
        with _threads(self.threads), torch.inference_mode():
            before = (schedule[-1], *schedule)  # as if the schedule went round and round
            pairs = zip(before, schedule, strict=False)
            return [_seconds(handles[earlier], handles[index]) for earlier, index in pairs]

    def work(self, handle: Handle, calls: int) -> None:
        """Run a model so many times, preempted or not: every call takes its joules."""
        model, example = handle
        with _threads(self.threads), torch.inference_mode():
            for _ in range(calls):
                model(*example)

    def read_energy(self) -> tuple[float, float]:
        """Return (clock in s, cumulative J) of the meter's scope, all sockets together."""
        if isinstance(self._meter, str):
            raise RuntimeError(self._meter)
        return time.perf_counter(), self._meter.joules()

    def peak_memory(self, handle: Handle) -> int:
        """Return bytes of the weights and of all that torch held beside them at the peak."""
        model, example = handle
        return stored_bytes(model, example) + _peak_allocated(model, example)

    def outputs(self, handle: Handle) -> tuple[Any, ...]:
        """Return the outputs of one call."""
        model, example = handle
        with _threads(self.threads), torch.inference_mode():
            return arrays_of(model(*example))

    def close(self) -> None:
        """Nothing is held."""

    @cached_property
    def _meter(self) -> Meter | str:
        """The way to energy, or why there is none; late, since Zeus may start a process for it."""
        return self._chip.meter(otherwise=self._sources.meter())


def _seconds(before: Handle, handle: Handle) -> float:
    """Time one call; while another process takes the processor during it, time it again.

    A preempted call measures the scheduler. Worse, on a busy machine preemption keeps in step with
    the calls: two equal models came out 1.4 apart, in an interval of 1 %. Each new attempt finds
    the caches as the call before left them, as every call does. A long call is hardly ever left
    alone on such a machine, so patience ends after some attempts or milliseconds.
    """
    began = time.perf_counter()
    for attempt in range(_ATTEMPTS):
        preempted = resource.getrusage(_WHO).ru_nivcsw
        if attempt:
            before[0](*before[1])
        start = time.perf_counter()
        handle[0](*handle[1])
        seconds = time.perf_counter() - start
        undisturbed = resource.getrusage(_WHO).ru_nivcsw == preempted
        if undisturbed or start + seconds - began > _PATIENCE_S:
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


def _peak_allocated(model: nn.Module, example: tuple[Any, ...]) -> int:
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
        "kernels in C": kernels_in_use(),
        "system": f"{platform.system()} {platform.release()}",
        "torch": torch.__version__,
    }


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
