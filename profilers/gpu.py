"""The first visible CUDA device: latency with synchronisation, energy by NVML, peak memory.

Needs `pip install gpsearch[gpu]` for the energy counter, which NVIDIA has from Volta on.
"""

from __future__ import annotations

import copy
import itertools
import platform
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpsearch.profiling import API_VERSION, DeviceFacts

Handle = tuple[nn.Module, tuple[Tensor, ...]]


class GpuProfiler:
    """Runs models eagerly on one CUDA device."""

    api_version = API_VERSION

    def __init__(self) -> None:
        self._nvml: Nvml | None = None

    def probe(self) -> DeviceFacts:
        """Name the device and its software, and say what is missing."""
        if not torch.cuda.is_available():
            reason = "torch sees no CUDA device: see to the driver, and to torch built for CUDA"
            lacking = dict.fromkeys(("latency_s", "energy_j", "peak_memory_bytes"), reason)
            return DeviceFacts("gpu", {"torch": torch.__version__}, "cuda", lacking)
        why_not = self._why_no_energy()
        return DeviceFacts(
            name="gpu",
            fingerprint=_fingerprint(),
            torch_device="cuda",
            unavailable={"energy_j": why_not} if why_not else {},
            latency_method="perf_counter, synchronised",
            energy_method="nvml.total_energy",
            energy_scope="board",
        )

    def load(self, model: nn.Module, example: tuple[Tensor, ...]) -> Handle:
        """Copy the model and its arguments to the device, in evaluation mode."""
        copied = copy.deepcopy(model).to("cuda").eval()
        return copied, tuple(one.detach().to("cuda") for one in example)

    def run(self, handles: Sequence[Handle], schedule: Sequence[int]) -> list[float]:
        """Time one call after the other, each until its output is there."""
        with torch.inference_mode():
            return [_seconds(*handles[index]) for index in schedule]

    def read_energy(self) -> tuple[float, float]:
        """Return (clock in s, cumulative J) of the board."""
        torch.cuda.synchronize()
        self._nvml = self._nvml or _open_nvml()
        return time.perf_counter(), self._nvml.joules()

    def peak_memory(self, handle: Handle) -> int:
        """Return bytes of the weights and of all that torch held beside them at the peak."""
        model, example = handle
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            model(*example)
        torch.cuda.synchronize()
        stored = itertools.chain(model.parameters(), model.buffers(), example)
        return sum(one.nbytes for one in stored) + torch.cuda.max_memory_allocated() - before

    def close(self) -> None:
        """Let go of NVML."""
        if self._nvml:
            self._nvml.close()
        self._nvml = None

    def _why_no_energy(self) -> str | None:
        try:
            self.read_energy()
        except (ImportError, RuntimeError) as error:
            return str(error)
        return None


class Nvml:
    """The cumulative energy counter of one board.

    Args:
        library: The module `pynvml`.
        uuid: Of the board; an index would not survive CUDA_VISIBLE_DEVICES.

    Raises:
        RuntimeError: The counter cannot be used; the message says why.
    """

    def __init__(self, library: Any, uuid: str) -> None:
        self._library = library
        try:
            library.nvmlInit()
            self._board = library.nvmlDeviceGetHandleByUUID(uuid)
        except library.NVMLError as error:
            raise RuntimeError(f"NVML does not answer for {uuid}: {error}") from error
        if self._is_sliced():
            raise RuntimeError("the board is split by MIG, and no slice has its own counter")

    def joules(self) -> float:
        """Return cumulative J since the driver was loaded."""
        try:
            return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._board)) / 1e3
        except self._library.NVMLError as error:
            raise RuntimeError(f"NVML gives no total energy on this board: {error}") from error

    def close(self) -> None:
        """Let go of the library."""
        self._library.nvmlShutdown()

    def _is_sliced(self) -> bool:
        try:
            current, _ = self._library.nvmlDeviceGetMigMode(self._board)
        except self._library.NVMLError:  # boards without MIG do not support the question
            return False
        return bool(current == self._library.NVML_DEVICE_MIG_ENABLE)


def _open_nvml() -> Nvml:
    try:
        import pynvml
    except ImportError as error:
        raise ImportError("NVML's bindings are missing: pip install gpsearch[gpu]") from error
    return Nvml(pynvml, f"GPU-{torch.cuda.get_device_properties(0).uuid}")


def _seconds(model: nn.Module, example: tuple[Tensor, ...]) -> float:
    # The host's clock, not CUDA events: starting kernels is part of what a user waits for.
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    model(*example)
    torch.cuda.synchronize()
    return time.perf_counter() - start_s


def _fingerprint() -> dict[str, str]:
    board = torch.cuda.get_device_properties(0)
    return {
        "processor": board.name,
        "uuid": str(board.uuid),
        "compute capability": f"{board.major}.{board.minor}",
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "system": f"{platform.system()} {platform.release()}",
        "torch": torch.__version__,
    }
