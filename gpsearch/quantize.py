"""Narrow weights: the recurrent matrices of a model, rounded to what fewer bits can hold.

Parameters stay ordinary ones, so every device computes with the rounded values; the kernels in C
read them as narrow ones. Activations, sums, biases and all other modules keep their precision, but
where a processor multiplies bytes (VNNI): there activations are multiples of 2^-20 or less. A zero
stays zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gpsearch.cell import HLSTM, HLSTMCell
from gpsearch.computed import apply_masks, computed_weights, remaining
from gpsearch.errors import UserError

TYPES = ("float32", "bfloat16", "int8")
"""Of weights; the first one rounds nothing."""

RECURRENT = (HLSTM, HLSTMCell, nn.RNNBase, nn.RNNCellBase)
"""The layers whose matrices may be narrow, and whose products follow time."""
_SINGLE = 4
"""Bytes of a number of single precision."""
_MOST = 127
_SPARE_BITS = 7
"""Of a scale: without them, its product with a whole number up to 127 is exact."""


@torch.no_grad()
def quantize_weights(model: nn.Module, weights: str) -> bool:
    """Round the matrices of all recurrent layers in place, biases excepted.

    Args:
        model: Any module; its `HLSTM`, `HLSTMCell` and torch's own recurrent layers are changed.
        weights: "float32" leaves them, "bfloat16" keeps 8 significant bits of each; "int8" makes
            each a whole number within 127 times a scale of its row (symmetric, after training).
            Parameters of 16 bits stay as they are, and so does what `torch.nn.utils.prune` masks.

    Returns:
        Whether anything was changed: what is rounded already stays.

    Raises:
        UserError: There is no such type, or a matrix is computed anew at every call.
    """
    if weights not in TYPES:
        raise UserError(f"weights={weights!r} should be one of {', '.join(TYPES)}")
    if weights == "float32":
        return False
    _refuse_computed(model, weights)
    changed = False
    for weight, left in recurrent_matrices(model):
        narrow = rounded(left, weights)
        if not ((narrow == left) | left.isnan()).all():
            weight.copy_(narrow.where(left != 0, weight))
            changed = True
    apply_masks(model)
    return changed


def rounded(weight: Float[Tensor, "rows in"], weights: str) -> Float[Tensor, "rows in"]:
    """Return a matrix rounded as `quantize_weights` does."""
    if weights == "float32" or weight.itemsize < _SINGLE:
        return weight
    if weights == "int8":
        return _whole_numbers(weight)[1].to(weight.dtype)
    return weight.bfloat16().to(weight.dtype)


def narrow_bytes(weight: Float[Tensor, "rows in"]) -> int:
    """Return the bytes that a matrix needs: as it is, or where that is exact in 16 or 8 bits.

    The scales of its rows are counted, too. Only single precision is looked into.
    """
    plain = weight.detach()
    if plain.dtype is not torch.float32:
        return plain.nbytes
    scale, whole = _whole_numbers(plain)
    if whole.equal(plain) and bool(scale.isfinite().all()):
        return plain.numel() + scale.nbytes
    return plain.nbytes // (2 if rounded(plain, "bfloat16").equal(plain) else 1)


def recurrent_matrices(model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield the weights that may be narrow, each once, and what masks leave of them."""
    layers = [one for one in model.modules() if isinstance(one, RECURRENT)]
    own = {p for layer in layers for p in layer.parameters(recurse=False) if p.dim() == 2}
    yield from ((weight, left) for weight, left in remaining(model).items() if weight in own)


def _refuse_computed(model: nn.Module, weights: str) -> None:
    """Refuse matrices that would not be narrow though what they are computed of were."""
    for place, layer in model.named_modules():
        names = computed_weights(layer) if isinstance(layer, RECURRENT) else []
        for name in names:
            if name.startswith("weight") and getattr(layer, name).dim() == 2:
                raise UserError(
                    f"weights={weights!r}: {place}{'.' if place else ''}{name} is computed anew at "
                    "every call; make it permanent first: remove_parametrizations, "
                    "remove_weight_norm or the like, of torch.nn.utils"
                )


def _whole_numbers(
    weight: Float[Tensor, "rows in"],
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows in"]]:
    """Return the rows' scales, and the matrix rounded to whole numbers times them.

    A row that holds what is infinite or no number stays as it is, and so does its scale.
    """
    weight = weight.float()
    bits = (weight.abs().amax(1, keepdim=True) / _MOST).view(torch.int32)
    spare = (1 << _SPARE_BITS) - 1
    scale = ((bits + spare) & ~spare).view(torch.float32)
    whole = (weight / scale.where(scale > 0, 1.0)).round()
    return scale, (whole * scale).where(scale.isfinite(), weight)
