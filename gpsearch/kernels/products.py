"""Products that are large, by whichever library of torch is fast at them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_ENOUGH_ROWS = 32
_LINE = 16
"""Numbers in a line of the cache."""
_CPUINFO = Path("/proc/cpuinfo")

# In single precision torch multiplies by MKL. The way to oneDNN is torch's own (inductor's),
# undocumented, so we do without where it is missing.
_onednn = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    else None
)


@cache
def torch_is_fast() -> bool:
    """Tell whether torch's own products are the fastest to be had: by MKL, where it knows its way.

    Told by the processor (where Linux shows it) rather than by trying, so that a run can be
    repeated to the bit.
    """
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    with suppress(OSError):
        return mkl_is_fast(_CPUINFO.read_text())
    return False


def mkl_is_fast(processor: str) -> bool:
    """Tell whether MKL makes the most of a processor, as /proc/cpuinfo describes it.

    AVX-512 it uses on Intel's only, and on others that have it is slower than oneDNN: half as fast
    on Zen 5, by a tenth on Zen 4. On an AVX2 processor that is not Intel's it is the faster of the
    two (seen on Zen 3).
    """
    return "GenuineIntel" in processor or "avx512f" not in processor


def apart(width: int) -> int:
    """Return how many floats lie between the beginnings of rows that meet in no place of a cache.

    An odd number of its lines: every further row begins in another place.
    """
    return (-(-width // _LINE) | 1) * _LINE


def room_like(tensor: Float[Tensor, "*any width"]) -> Float[Tensor, "*any width"]:
    """Return room for as much, with rows as far apart as products with it, turned, are fast.

    Rows of a power of two of bytes meet in the same few places of a cache: of 8 KB rows, MKL takes
    up to 1.7 times as long.
    """
    width = tensor.shape[-1]
    step = apart(width) if torch_is_fast() else width
    return tensor.new_empty(*tensor.shape[:-1], step)[..., :width]


def linear(
    left: Float[Tensor, "rows inner"],
    right: Float[Tensor, "columns inner"],
    bias: Float[Tensor, " columns"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """Return left @ right.T + bias; no gradients."""
    on_cpu = left.device.type == "cpu" and left.dtype == torch.float32
    if _onednn is None or not on_cpu or len(left) < _ENOUGH_ROWS or torch_is_fast():
        return F.linear(left, right, bias)
    product: Tensor = _onednn(left, right, bias, "none", [], "")
    return product


def sums_of_products(
    left: Float[Tensor, "rows n"], rights: Sequence[Float[Tensor, "rows _m"]]
) -> list[Tensor]:
    """Return left.T @ right of each; no gradients."""
    turned = left.mT if torch_is_fast() else left.mT.contiguous()
    return [turned @ r if torch_is_fast() else linear(turned, r.mT) for r in rights]
