"""A task that trains in milliseconds, and a device whose latencies are known beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gpsearch.candidate import Architecture, Training
from gpsearch.cell import HLSTM
from gpsearch.profiling import API_VERSION, DeviceFacts

RECURRENT = (HLSTM, nn.LSTM)
Batch = tuple[Tensor, Tensor]


class ToyModel(nn.Module):
    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.layers = HLSTM(
            3,
            architecture.hidden_size,
            batch_first=True,
            gate_hidden=architecture.gate_hidden,
            activation=architecture.activation,
        )
        self.dropout = nn.Dropout(architecture.dropout)
        self.output = nn.Linear(architecture.hidden_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.output(self.dropout(self.layers(x)[0][:, -1]))
        return scores


class ToyTask:
    """Tell which of two tones a short sequence holds."""

    name, metric = "toy", "err"
    notes: tuple[str, ...] = ("two tones, made up",)

    def __init__(self, data: Path | None = None) -> None:
        random = torch.Generator().manual_seed(1)
        label = torch.arange(96) % 2
        time = torch.arange(6) * (1.0 + label[:, None])
        self.x = torch.stack([time.sin(), time.cos(), time * 0], 2)
        self.x += 0.3 * torch.randn(self.x.shape, generator=random)
        self.y = label

    def build(self, architecture: Architecture) -> nn.Module:
        return ToyModel(architecture)

    def prunable(self, name: str) -> bool:
        return name.startswith("layers.")

    def batches(self, training: Training, epoch: int, seed: int) -> Iterator[Batch]:
        random = torch.Generator().manual_seed(1000 * seed + epoch)
        for rows in torch.randperm(64, generator=random).split(training.batch_size):
            yield self.x[rows], self.y[rows]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, split: str = "dev") -> dict[str, float]:
        rows = slice(64, 80) if split == "dev" else slice(80, 96)
        wrong = model.eval()(self.x[rows]).argmax(1) != self.y[rows]
        return {"err": float(wrong.float().mean())}

    @torch.inference_mode()
    def show(self, model: nn.Module, split: str = "dev", n: int = 5) -> list[str]:
        first = 64 if split == "dev" else 80
        guesses = model.eval()(self.x[first : first + n]).argmax(1).tolist()
        truth = self.y[first : first + n].tolist()
        return [f"tone {true}\nheard {said}" for true, said in zip(truth, guesses, strict=True)]

    def example(self) -> tuple[Tensor, ...]:
        return (self.x[:1],)


class ToyDevice:
    """A device on which every non-zero parameter takes a microsecond, and none takes energy."""

    api_version = API_VERSION

    def probe(self) -> DeviceFacts:
        why_not = {"energy_j": "no counter here"}
        return DeviceFacts("toy", {"clock": "1 MHz"}, unavailable=why_not, machine="toy")

    def load(self, model: nn.Module, example: tuple[Tensor, ...]) -> float:
        return 1e-6 * sum(int(p.count_nonzero()) for p in model.parameters())

    def run(self, handles: Sequence[float], schedule: Sequence[int]) -> list[float]:
        return [handles[index] for index in schedule]

    def close(self) -> None:
        pass


class ModelDevice(ToyDevice):
    """A device whose energy counter is fed by a model of it."""

    def probe(self) -> DeviceFacts:
        return DeviceFacts("model", {}, energy_model="the vendor's model", machine="toy")

    def read_energy(self) -> tuple[float, float]:
        raise AssertionError("not to be read")


class Lopsided(ToyDevice):
    """A device that is slower with what was loaded first."""

    def run(self, handles: Sequence[float], schedule: Sequence[int]) -> list[float]:
        return [handles[index] * (1 if index else 1.3) for index in schedule]


class StepDevice(ToyDevice):
    """A device whose kernels take 32 units at a time: latency rises in steps of a layer's width."""

    def probe(self) -> DeviceFacts:
        why_not = {"energy_j": "no counter here"}
        return DeviceFacts("steps", {"tile": "32"}, unavailable=why_not, machine="toy")

    def load(self, model: nn.Module, example: tuple[Tensor, ...]) -> float:
        width = max(layer.hidden_size for layer in model.modules() if isinstance(layer, RECURRENT))
        return 1e-3 * (1 - -width // 32)

    def close(self) -> None:
        print("what a plug-in prints is no answer of the process that measures")
