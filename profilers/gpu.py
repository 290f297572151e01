"""CUDA and ROCm devices: latency by events, energy by the board's counter, peak memory.

Needs `pip install nvidia-ml-py` for energy, which NVIDIA counts from Volta on; on a Jetson and on
AMD's GPUs, `pip install zeus`. ``--device gpu`` is the first visible device, ``gpu:1`` the second,
``gpu:GPU-5a3f...`` the one of this UUID. Clocks, power limits and modes stay as they are.

The logic of `Nvml` is tested with a stand-in of NVIDIA's library that replays a board's counter;
what needs CUDA itself (`GpuProfiler.load`, `run`, `peak_memory`) has tests marked `gpu` and has not
run on a GPU yet, since none was at hand.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gpsearch.errors import UserError
from gpsearch.profiling import (
    API_VERSION,
    DeviceFacts,
    arguments_on,
    arrays_of,
    copied,
    stored_bytes,
    waiting,
)
from gpsearch.profiling.zeus import AmdBoard, Chip, SocMeter

Handle = tuple[nn.Module, tuple[Any, ...]]

_MEASURABLE = ("latency_s", "energy_j", "peak_memory_bytes")
_SLOWED = {
    0x08: "the hardware slows it down",
    0x20: "it is too hot, and the driver slows it down",
    0x40: "it is too hot, and the hardware slows it down",
    0x80: "the power supply slows it down",
}
"""NVML's reasons for lower clocks (nvmlClocksEventReason...) that no board has all the time."""


class GpuProfiler:
    """Runs models eagerly on one CUDA device.

    Args:
        which: Number among the visible devices, or UUID ("GPU-..."); "" is the first.
        library: The module `pynvml`; None imports it when it is needed.
    """

    api_version = API_VERSION

    def __init__(self, which: str = "", library: Any = None) -> None:
        self.which = which
        self._library = library
        self._source: Nvml | AmdBoard | SocMeter | None = None

    @classmethod
    def with_argument(cls, argument: str) -> GpuProfiler:
        """Return the profiler of one of several devices.

        Raises:
            UserError: The argument is neither a number nor a UUID.
        """
        if not re.fullmatch(r"\d+|GPU-[0-9A-Fa-f-]+", argument):
            raise UserError(
                f"--device gpu:{argument}: {argument!r} is neither a number such as 1 nor a UUID "
                "such as GPU-5a3f... (`nvidia-smi -L` lists them)"
            )
        return cls(argument)

    def probe(self) -> DeviceFacts:
        """Name the device and its software, and say what is missing."""
        name = f"gpu:{self.which}" if self.which else "gpu"
        index, reason = _index(self.which)
        if index is None:
            lacking = dict.fromkeys(_MEASURABLE, reason)
            return DeviceFacts(name, {"torch": torch.__version__}, "cuda", lacking)
        facts = DeviceFacts(
            name,
            _fingerprint(index),
            f"cuda:{index}",
            # As with the CPU's caches, and as in use: what the other model left is there.
            latency_method="cuda events, synchronised, L2 not flushed",
        )
        try:
            self.read_energy()
            board = self._board()
            return replace(
                facts,
                energy_method=board.method,
                energy_scope=board.scope,
                energy_model=board.model,
                power_limit_w=board.power_limit_w(),
            )
        except (ImportError, RuntimeError) as error:
            return replace(facts, unavailable={"energy_j": str(error)})

    def load(self, model: nn.Module, example: tuple[Any, ...]) -> Handle:
        """Copy the model and its arguments to the device, in evaluation mode."""
        device = self._device()
        own = copied(model).to(device).eval()
        return own, arguments_on(device, example)

    def run(self, handles: Sequence[Handle], schedule: Sequence[int]) -> list[float]:
        """Time one call after the other, each until its output is there."""
        with torch.cuda.device(self._device()), torch.inference_mode():
            return [_seconds(*handles[index]) for index in schedule]

    def read_energy(self) -> tuple[float, float]:
        """Return (clock in s, cumulative J) of the counter's scope."""
        torch.cuda.synchronize(self._device())
        return time.perf_counter(), self._board().joules()

    def read_power(self) -> float:
        """Return W of the board: of this moment, or (NVIDIA's from Ampere on) the last second."""
        return self._board().watts()

    def disturbances(self) -> list[str]:
        """Return who else computes on the board, and why it is slower than it could be."""
        try:
            return self._board().disturbances(ours=_on_cuda())
        except (ImportError, RuntimeError):
            return []  # without its maker's library nothing is known, and `probe` has said so

    def peak_memory(self, handle: Handle) -> int:
        """Return bytes of the weights and of all that torch held beside them at the peak."""
        model, example = handle
        device = self._device()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.inference_mode():
            model(*example)
        torch.cuda.synchronize(device)
        beside = torch.cuda.max_memory_allocated(device) - before
        return stored_bytes(model, example) + beside

    def outputs(self, handle: Handle) -> tuple[Any, ...]:
        """Return the outputs of one call."""
        model, example = handle
        with torch.inference_mode():
            return arrays_of(model(*example))

    def close(self) -> None:
        """Let go of the board."""
        if self._source:
            self._source.close()
        self._source = None

    def _device(self) -> torch.device:
        index, reason = _index(self.which)
        if index is None:
            raise RuntimeError(reason)
        return torch.device("cuda", index)

    def _board(self) -> Nvml | AmdBoard | SocMeter:
        if self._source is None:
            self._source = self._found(self._device())
        return self._source

    def _found(self, device: torch.device) -> Nvml | AmdBoard | SocMeter:
        if torch.version.hip:
            return AmdBoard(device.index, torch.cuda.device_count())
        if (chip := Chip()).jetson:  # NVML opens there, and then answers nothing
            return chip.source("gpu")
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return Nvml(self._library or _pynvml(), f"GPU-{uuid}")


class Nvml:
    """What NVIDIA's management library says of one board.

    Args:
        library: The module `pynvml`.
        uuid: Of the board; an index would not survive CUDA_VISIBLE_DEVICES.

    Raises:
        RuntimeError: The energy counter cannot be used; the message says why.
    """

    method, scope, model = "nvml.total_energy", "board", ""

    def __init__(self, library: Any, uuid: str) -> None:
        self._library = library
        try:
            library.nvmlInit()
            self._board = library.nvmlDeviceGetHandleByUUID(uuid)
        except library.NVMLError as error:
            raise RuntimeError(f"NVML does not answer for {uuid}: {error}") from error
        if self._ask("nvmlDeviceGetMigMode", [0, 0])[0] == library.NVML_DEVICE_MIG_ENABLE:
            raise RuntimeError("the board is split by MIG, and no slice has its own counter")

    def joules(self) -> float:
        """Return cumulative J since the driver was loaded."""
        try:
            return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._board)) / 1e3
        except self._library.NVMLError as error:
            raise RuntimeError(
                f"NVML gives no total energy on this board: {error} (data centre and desktop "
                "boards have it from Volta on, Jetson has not)"
            ) from error

    def watts(self) -> float:
        """Return what the board draws; it comes from another place than the energy.

        Raises:
            RuntimeError: The board does not tell.
        """
        try:
            return float(self._library.nvmlDeviceGetPowerUsage(self._board)) / 1e3
        except self._library.NVMLError as error:
            raise RuntimeError(f"NVML gives no power of this board: {error}") from error

    def power_limit_w(self) -> float | None:
        """Return the power that the board keeps below, where it tells."""
        milliwatts = self._ask("nvmlDeviceGetEnforcedPowerLimit", 0)
        return milliwatts / 1e3 if milliwatts else None

    def disturbances(self, *, ours: bool) -> list[str]:
        """Return who else computes on the board, and why it is slower than it could be.

        Args:
            ours: Whether this process computes there too.
        """
        return self._others(ours) + self._slowed()

    def close(self) -> None:
        """Let go of the library."""
        self._library.nvmlShutdown()

    def _others(self, ours: bool) -> list[str]:
        pids = {one.pid for one in self._ask("nvmlDeviceGetComputeRunningProcesses", [])}
        strangers = pids - {os.getpid()} - waiting()
        # In a container processes may be listed under other numbers, or none is listed. There a
        # stranger passes for the process that waits, where that one holds nothing of the board.
        others = len(pids) - ours - len(waiting()) if strangers == pids else len(strangers)
        if others <= 0:
            return []
        named = ", ".join(map(str, sorted(strangers)[:4]))
        return [f"{others} other process(es) on the board (of {named})"]

    def _slowed(self) -> list[str]:
        reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", 0)
        return [why for bit, why in _SLOWED.items() if reasons & bit]

    def _ask(self, question: str, otherwise: Any) -> Any:
        """Return the answer on this board, or ``otherwise`` where it has none."""
        try:
            return getattr(self._library, question)(self._board)
        except self._library.NVMLError:
            return otherwise


def _index(which: str) -> tuple[int | None, str]:
    """Return the number of a visible device; or None, and why there is none."""
    if not torch.cuda.is_available():
        return None, "torch sees no CUDA device: see to the driver, and to torch built for CUDA"
    count = torch.cuda.device_count()
    if which.startswith("GPU-"):
        uuids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(count)]
        found = [i for i, uuid in enumerate(uuids) if uuid.lower() == which.lower()]
        return (found[0], "") if found else (None, f"no {which} among {', '.join(uuids)}")
    index = int(which or 0)
    if index >= count:
        return None, f"no device {index}: torch sees {count}, numbered from 0"
    return index, ""


def _on_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _pynvml() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise ImportError("NVML's bindings are missing: pip install nvidia-ml-py") from error
    return pynvml


def _seconds(model: nn.Module, example: tuple[Any, ...]) -> float:
    """Time one call on an idle device, the gaps between its kernels included.

    The device notes the time when it is told that a call begins, and after its last kernel; in
    between it waits for the host, as it does in use.
    """
    start, end = _event(), _event()
    torch.cuda.synchronize()
    start.record()
    model(*example)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _fingerprint(index: int) -> dict[str, str]:
    board = torch.cuda.get_device_properties(index)
    return {
        "processor": board.name,
        "uuid": str(board.uuid),
        "compute capability": f"{board.major}.{board.minor}",
        "cuda": str(torch.version.cuda or f"hip {torch.version.hip}"),
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "system": f"{platform.system()} {platform.release()}",
        "torch": torch.__version__,
    }
