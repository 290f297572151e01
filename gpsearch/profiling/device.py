"""What a device profiler is.

A new device is one class with the methods of `DeviceProfiler`, named in the entry-point group
`gpsearch.profilers` of its package; `profilers/cpu.py` is the one to copy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gpsearch.errors import UserError, line_of
from gpsearch.kernels.native import native
from gpsearch.profiling.host import HERE

API_VERSION = "1"
"""The version of `DeviceProfiler` that this engine speaks: a major one, which alone decides whether
the two understand each other, and perhaps a minor one ("1.2") that says what is new."""
CAPABILITIES = ("latency_s", "energy_j", "peak_memory_bytes", "outputs")
"""What a profiler may declare `DeviceFacts.unavailable`."""


@dataclass(frozen=True)
class DeviceFacts:
    """What a device is, what can be measured on it, and why the rest cannot."""

    name: str
    """Such as "cpu"."""
    fingerprint: Mapping[str, str]
    """All that a latency depends on: processor, threads, clocks, versions."""
    torch_device: str = "cpu"
    """Where a candidate for this device is trained: "cpu" or "cuda"."""
    unavailable: Mapping[str, str] = field(default_factory=dict)
    """What of `CAPABILITIES` cannot be had, and why."""
    latency_method: str = "perf_counter"
    """The clock behind `DeviceProfiler.run`."""
    energy_method: str = ""
    """The counter behind `EnergyMeter.read_energy`."""
    energy_scope: str = ""
    """What that counter covers: "device", "socket", "board", "rail", "cores"."""
    energy_model: str = ""
    """If that counter is fed by a model of the device and not by a sensor: whose. Its joules are
    then "estimated", with this as the reason, and share no front with measured ones."""
    energy_wrap_j: float | None = None
    """Where that counter starts again from 0, undone by `EnergyMeter.read_energy`; None if never.
    An unseen second wrap would go unnoticed, so windows end well before."""
    power_limit_w: float | None = None
    """More than this the device cannot draw; a counter that says so is wrong."""
    machine: str = HERE
    """Whose quiet a measurement needs: "here" is the machine that gpsearch runs on, whose trainings
    pause meanwhile; another name is another machine. On one machine one model is measured at a
    time."""
    tolerance: float = 1e-4
    """How far outputs may lie from those of torch on the processor in 32 bits, as a share of the
    largest; a device that computes in 16 bits, or in 8, says more."""

    def why_not(self, name: str) -> str | None:
        """Return why one of `CAPABILITIES` cannot be measured, and so be an objective; or None."""
        if name == "energy_j" and self.energy_model and name not in self.unavailable:
            return f"{self.energy_model}; `gpsearch profile` shows it, marked as estimated"
        return self.unavailable.get(name)

    @property
    def here(self) -> bool:
        """Whether models run on this machine's processor: what is fast there can be tried here."""
        return self.machine == HERE and self.torch_device == "cpu"


@runtime_checkable
class DeviceProfiler(Protocol):
    """A device's primitives; the protocol of measurement is the engine's.

    A class that takes an argument after its name, as in ``--device gpu:1``, has a class method
    ``with_argument(argument: str)`` besides, which returns a profiler or raises `UserError`.
    """

    api_version: str
    """A class attribute: `API_VERSION` as it was when the profiler was written."""

    def probe(self) -> DeviceFacts:
        """Say what the device is and what it can; cheap, and without side effects."""

    def load(self, model: nn.Module, example: tuple[Any, ...]) -> Any:
        """Return a handle to a copy of ``model`` that is ready to run on ``example`` there.

        Raises:
            Unsupported: The device cannot run it (`gpsearch.Unsupported`); in a search its trial
                fails, and the others go on.
        """

    def run(self, handles: Sequence[Any], schedule: Sequence[int]) -> list[float]:
        """Run ``handles[i]`` once for each ``i`` of ``schedule``, in this order.

        Returns:
            Seconds of each call, timed on the device, from its start until its output is there.
        """

    def close(self) -> None:
        """Let go of the device."""


@runtime_checkable
class EnergyMeter(Protocol):
    """What a `DeviceProfiler` has besides, where there is an energy counter."""

    def read_energy(self) -> tuple[float, float]:
        """Return (clock in s, cumulative J), both never falling; RuntimeError where it fails.

        Work that was started and is not finished is waited for first.
        """


@runtime_checkable
class Worker(Protocol):
    """What an `EnergyMeter` has besides, where its `run` may repeat a call that was disturbed."""

    def work(self, handle: Any, calls: int) -> None:
        """Run ``handle`` exactly so many times: joules are divided by these calls."""


@runtime_checkable
class PowerMeter(Protocol):
    """What an `EnergyMeter` has besides, where a sensor tells the power: a second opinion."""

    def read_power(self) -> float:
        """Return W, of this moment or the last second; RuntimeError where it fails."""


@runtime_checkable
class Watched(Protocol):
    """What a `DeviceProfiler` has besides, where it can see what disturbs the device."""

    def disturbances(self) -> Sequence[str]:
        """Return what disturbs the device now: other processes on it, throttling; else nothing."""


@runtime_checkable
class MemoryMeter(Protocol):
    """What a `DeviceProfiler` has besides, where the peak memory of a call can be told."""

    def peak_memory(self, handle: Any) -> int:
        """Return bytes at the peak of one call: the weights and everything alive beside them."""


@runtime_checkable
class OutputReader(Protocol):
    """What a `DeviceProfiler` has besides, where a model's outputs can be brought back."""

    def outputs(self, handle: Any) -> tuple[Any, ...]:
        """Return the outputs of one call, computed as `DeviceProfiler.run` does.

        Returns:
            Arrays on the host, those of nested outputs in order; `arrays_of` makes them.
        """


_DOORS = (
    ("energy_j", EnergyMeter, "reads no energy counter"),
    ("peak_memory_bytes", MemoryMeter, "does not tell it"),
    ("outputs", OutputReader, "does not show them"),
)


def facts_of(device: DeviceProfiler) -> DeviceFacts:
    """Ask a profiler what its device is; what it has no methods for is unavailable, too.

    Raises:
        UserError: It does not say, or not in texts and numbers.
        OSError, RuntimeError: It cannot be reached.
    """
    silent = f"device {type(device).__name__} does not say what it is"
    try:
        facts: object = device.probe()
        json.dumps(asdict(facts) if isinstance(facts, DeviceFacts) else None)
    except (UserError, OSError, RuntimeError):  # which say what failed
        raise
    except (Exception, SystemExit) as error:  # whatever a stranger's probe raises
        raise UserError(f"{silent}: {line_of(error)}") from error
    if not isinstance(facts, DeviceFacts):
        raise UserError(f"{silent}: its probe() returned {type(facts).__name__}, not DeviceFacts")
    lacking = {
        name: f"the profiler of {facts.name!r} {words}"
        for name, door, words in _DOORS
        if not isinstance(device, door)
    }
    said = {name: why or "its profiler does not say why" for name, why in facts.unavailable.items()}
    return replace(facts, unavailable=lacking | said)


def understood(api_version: object) -> bool:
    """Say whether this engine speaks a profiler's version: "1" and "1.x" are one major version."""
    major = API_VERSION.partition(".")[0]
    return isinstance(api_version, str) and bool(
        re.fullmatch(rf"{major}(\.\d+)*", api_version, re.ASCII)
    )


def arrays_of(output: Any) -> tuple[np.ndarray[Any, np.dtype[Any]], ...]:
    """Return the tensors of a model's output, however nested, as arrays on the host."""
    if isinstance(output, Tensor):
        one = output.detach().cpu()
        return ((one.float() if one.dtype == torch.bfloat16 else one).numpy(),)
    if isinstance(output, np.ndarray):
        return (output,)
    if isinstance(output, Mapping):
        output = output.values()
    return tuple(array for part in output if part is not None for array in arrays_of(part))


def kernels_in_use() -> str:
    """Name the kernels in C by which models run on this processor; without, they are far slower.

    Raises:
        UserError: ``$GPSEARCH_KERNELS`` asks for kernels that are not to be had.
    """
    chosen = native()
    if chosen is None:
        return "none"
    return f"{chosen.instruction_set}{' with VNNI' if chosen.knows_digits(1) else ''}"


def stored_bytes(model: nn.Module, example: tuple[Any, ...]) -> int:
    """Return the bytes of a model's weights and buffers and of a call's arguments."""
    given = (one for one in pytree.tree_leaves(example) if isinstance(one, Tensor))
    return sum(one.nbytes for one in (*model.parameters(), *model.buffers(), *given))
