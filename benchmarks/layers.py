"""What is put beside the kernels: an H-LSTM as one writes it down at first, and random zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpsearch import blocks
from gpsearch.cell import HLSTM


class NaiveHLSTM(nn.Module):
    """One layer, step by step: four little networks on [x, h], each of torch's own modules.

    Args:
        layer: Whose weights it takes over: one layer, one direction, one hidden layer in the gates.
    """

    def __init__(self, layer: HLSTM) -> None:
        super().__init__()
        (width,), inputs = layer.gate_hidden, layer.input_size + layer.hidden_size
        self.hidden_size = layer.hidden_size
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, self.hidden_size))
            for _ in range(4)
        )
        first = torch.cat([layer.get_parameter(f"weight_gate_{k}_l0") for k in ("ih", "hh")], 1)
        names = ["bias_gate_l0", "weight_gate1_l0", "bias_gate1_l0"]
        weights = [first, *(layer.get_parameter(name) for name in names)]
        for gate, *own in zip(self.gates, *(w.detach().chunk(4) for w in weights), strict=True):
            for parameter, weight in zip(gate.parameters(), own, strict=True):
                parameter.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the states h of all steps, [T, B, H]."""
        h = c = x.new_zeros(x.shape[1], self.hidden_size)
        states = []
        for step in x:
            read = torch.cat([step, h], 1)
            i, f, g, o = (gate(read) for gate in self.gates)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append(h)
        return torch.stack(states)


def forward_by(kernel: Any, layer: HLSTM) -> Callable[[Tensor], Tensor]:
    """Return a layer's forward pass by one kernel, which it would perhaps not choose by itself.

    Args:
        kernel: Such as `gpsearch.kernels.recurrence.plain`.
        layer: One layer, one direction.
    """

    def forward(x: Tensor) -> Tensor:
        zeros = x.new_zeros(1, x.shape[1], layer.hidden_size)
        outputs: Tensor = kernel([x], zeros, zeros, [layer._gates("_l0", x.shape[1])])[0]
        return outputs.squeeze(0)  # as the layer: the gradient of [0] is filled up with zeros

    return forward


def thinned(layer: HLSTM, zeros: float, structure: str = "element") -> dict[str, Tensor]:
    """Put weights of a layer to sleep, at random, and return the masks: True is awake.

    Args:
        layer: Every gate of its weight matrices loses the same share.
        zeros: The share.
        structure: What sleeps together, by the schedules' names: "element", "16x1", "8x1", "4x4".
    """
    random, shape = torch.Generator().manual_seed(3), blocks.SHAPES[structure]
    masks = {}
    for name, weight in layer.named_parameters():
        if weight.dim() == 2:
            matrices = weight.detach().chunk(4)
            own = [_random_mask(m.shape, zeros, shape, random) for m in matrices]
            masks[name] = torch.cat(own)
            weight.data.mul_(masks[name])
    return masks


def _random_mask(
    matrix: torch.Size, zeros: float, shape: blocks.Shape, random: torch.Generator
) -> Tensor:
    rows, columns = matrix
    grid = -(-rows // shape[0]), -(-columns // shape[1])
    order = torch.rand(grid, generator=random).flatten().argsort()
    awake = (order >= round(zeros * len(order))).view(grid)
    return blocks.spread(awake, shape, (rows, columns))
