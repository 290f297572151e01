"""Products that are large, by whichever library of torch is fast at them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_ENOUGH_ROWS = 32

# In single precision torch multiplies by MKL, at half the speed of oneDNN on AMD processors; this
# way to oneDNN is torch's own (inductor's), undocumented, so we do without where it is missing.
_onednn = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    else None
)


def linear(
    left: Float[Tensor, "rows inner"],
    right: Float[Tensor, "columns inner"],
    bias: Float[Tensor, " columns"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """Return left @ right.T + bias; no gradients."""
    on_cpu = left.device.type == "cpu" and left.dtype == torch.float32
    if _onednn is None or not on_cpu or len(left) < _ENOUGH_ROWS:
        return F.linear(left, right, bias)
    product: Tensor = _onednn(left, right, bias, "none", [], "")
    return product
