from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpsearch.profilers.gpu import GpuProfiler, Nvml  # type: ignore[import-not-found]
from torch import nn

from gpsearch.profiling import Host, check


class Board:
    """NVIDIA's library, as far as it is used, for a board that has drawn so many mJ."""

    NVML_DEVICE_MIG_ENABLE = 1

    class NVMLError(Exception):
        pass

    def __init__(self, millijoules: int | None, *, mig: int | None = 0) -> None:
        self.millijoules, self.mig, self.is_open = millijoules, mig, False

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1":
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMigMode(self, board: str) -> list[int]:
        if self.mig is None:
            raise self.NVMLError("Not Supported")
        return [self.mig, self.mig]

    def nvmlDeviceGetTotalEnergyConsumption(self, board: str) -> int:
        if self.millijoules is None:
            raise self.NVMLError("Not Supported")
        return self.millijoules


@pytest.mark.parametrize("mig", [0, None])
def test_nvmls_millijoules_become_joules(mig: int | None) -> None:
    library = Board(2500, mig=mig)
    nvml = Nvml(library, "GPU-1")
    assert nvml.joules() == 2.5
    nvml.close()
    assert not library.is_open


def test_a_board_without_a_counter_says_so() -> None:
    with pytest.raises(RuntimeError, match="no total energy on this board: Not Supported"):
        Nvml(Board(None), "GPU-1").joules()


def test_a_board_that_is_not_there_says_so() -> None:
    with pytest.raises(RuntimeError, match="NVML does not answer for GPU-2: Not Found"):
        Nvml(Board(0), "GPU-2")


def test_a_slice_of_a_board_has_no_energy_of_its_own() -> None:
    with pytest.raises(RuntimeError, match="split by MIG"):
        Nvml(Board(2500, mig=1), "GPU-1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_everything_is_unavailable_with_the_reason() -> None:
    facts = GpuProfiler().probe()
    assert facts.torch_device == "cuda"
    assert facts.unavailable.keys() == {"latency_s", "energy_j", "peak_memory_bytes"}
    assert all("torch sees no CUDA device" in reason for reason in facts.unavailable.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_times_models_and_tells_their_memory(tmp_path: Path) -> None:
    gpu = GpuProfiler()
    model, example = nn.LSTM(16, 32), (torch.zeros(20, 1, 16),)
    reading = check(gpu, model, example, host=Host(locks=tmp_path))
    gpu.close()
    assert reading["latency_ratio"].value == pytest.approx(1, abs=0.2)
    assert reading["peak_memory_bytes"].number > sum(one.nbytes for one in model.parameters())
    assert reading.fingerprint["processor"] == torch.cuda.get_device_name(0)
