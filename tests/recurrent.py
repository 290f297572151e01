"""Random layers for the tests of the recurrence's implementations, and what comes of them."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpsearch.kernels.gates import Dense, Gates, flattened

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Layer = tuple[list[Tensor], Tensor, Tensor, list[Gates]]


def layer(
    dirs: int = 2,
    steps: int = 4,
    batch: int = 3,
    inputs: int = 3,
    hidden: int = 2,
    widths: tuple[int, ...] = (3,),
    activation: str = "relu",
    direct: bool = True,
    bias: bool = True,
    dropout: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Layer:
    """Inputs, states and weights of one layer, drawn at random; all of them want gradients."""

    def draw(*shape: int) -> Tensor:
        # Wider draws saturate gates three layers deep: single precision then has no 5 digits left.
        return (torch.randn(shape, dtype=dtype) / 2).requires_grad_()

    def gates() -> Gates:
        rows = 4 * widths[0] + 4 * hidden * direct
        outs = (*widths[1:], hidden)
        last = len(widths) - 1
        dense = [
            Dense(draw(4, out, m), draw(4, out) if bias and not (direct and j == last) else None)
            for j, (m, out) in enumerate(zip(widths, outs, strict=True))
        ]
        masks = [F.dropout(torch.ones(4, batch, m, dtype=dtype), 0.5) for m in widths * dropout]
        first = draw(rows, inputs), draw(rows, hidden), draw(rows) if bias else None
        return Gates(*first, tuple(dense), (), tuple(masks), activation)

    xs = [draw(steps, batch, inputs) for _ in range(dirs)]
    states = draw(dirs, batch, hidden), draw(dirs, batch, hidden)
    return xs, *states, [gates() for _ in range(dirs)]


def leaves(example: Layer) -> list[Tensor]:
    xs, h0, c0, gates = example
    return [*xs, h0, c0, *(w for w in flattened(gates) if w is not None)]


def results(run: Any, example: Layer, *, use: str = "both") -> list[Tensor]:
    """Both outputs, and the gradients of a loss that uses the outputs named."""
    hs, cs = run(*example)
    loss = torch.zeros((), dtype=hs.dtype)
    if use != "c":
        loss = loss + hs.sin().sum()
    if use != "h":
        loss = loss + cs[:, 1:].cos().sum()
    grads = torch.autograd.grad(loss, leaves(example), allow_unused=True, materialize_grads=True)
    return [hs, cs, *grads]


def assert_same(left: list[Tensor], right: list[Tensor], tolerance: float) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


def as_buffers(module: ModuleT) -> ModuleT:
    """Return a module whose weights are no parameters any more."""
    for name, parameter in list(module.named_parameters()):
        delattr(module, name)
        module.register_buffer(name, parameter.detach())
    return module
