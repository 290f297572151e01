"""Narrow weights: the recurrent matrices of a model, rounded to what fewer bits can hold.

Parameters stay ordinary ones of single precision, so every device, format and precision computes
with the same values; where they are packed or counted, narrow ones take fewer bytes. Activations,
sums, biases and all other modules keep their precision. A zero stays zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gpsearch.cell import HLSTM, HLSTMCell

Weights = Literal["float32", "bfloat16", "int8"]

_MOST = 127
_SPARE_BITS = 7
"""Of a scale: without them, its product with a whole number up to 127 is exact."""


@torch.no_grad()
def quantize_weights(model: nn.Module, weights: Weights) -> None:
    """Round the matrices of all recurrent layers in place, biases excepted.

    Args:
        model: Any module; its `HLSTM`, `HLSTMCell` and `torch.nn.LSTM` are changed.
        weights: "float32" leaves them, "bfloat16" keeps 8 significant bits of each; "int8" makes
            each a whole number within 127 times a scale of its row (symmetric, after training).
    """
    for weight in recurrent_matrices(model):
        weight.copy_(rounded(weight, weights))


def rounded(weight: Float[Tensor, "rows in"], weights: Weights) -> Float[Tensor, "rows in"]:
    """Return a matrix rounded as `quantize_weights` does; what is rounded already stays."""
    if weights == "int8":
        return _whole_numbers(weight)[1]
    return weight.bfloat16().to(weight.dtype) if weights == "bfloat16" else weight


def stored_bytes(weight: Float[Tensor, "rows in"]) -> int:
    """Return the bytes of a matrix in the narrowest type that holds it exactly, scales included."""
    plain = weight.detach()
    if plain.dtype is not torch.float32:
        return plain.nbytes
    scale, whole = _whole_numbers(plain)
    if whole.equal(plain):
        return plain.numel() + scale.nbytes
    return plain.nbytes // (2 if rounded(plain, "bfloat16").equal(plain) else 1)


def recurrent_matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights that may be narrow, each once."""
    layers = [one for one in model.modules() if isinstance(one, HLSTM | HLSTMCell | nn.LSTM)]
    found = {id(p): p for layer in layers for p in layer.parameters(recurse=False) if p.dim() == 2}
    yield from found.values()


def _whole_numbers(
    weight: Float[Tensor, "rows in"],
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows in"]]:
    """Return the rows' scales, and the matrix rounded to whole numbers times them."""
    most = weight.abs().amax(1, keepdim=True) / _MOST
    bits = most.float().view(torch.int32)
    spare = (1 << _SPARE_BITS) - 1
    scale = ((bits + spare) & ~spare).view(torch.float32)
    whole = (weight / scale.where(scale > 0, 1.0)).round()
    return scale, whole * scale
