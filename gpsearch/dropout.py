"""Dropout that draws its random numbers four at a time, on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpsearch.kernels.traced import traced

_LEVELS = 2**16


def dropout(x: Tensor, p: float, *, training: bool = True) -> Tensor:
    """Zero every element with probability ``p`` and scale the rest so that the mean stays.

    On a CPU torch's own draws 53 random bits for an element, one element after the other, which
    was 6 % of a training step in speech. Sixteen are enough, and a draw has four times as many.
    Elsewhere, and where operations are recorded or transformed, this is torch's.

    Args:
        x: Any shape.
        p: From 0 to 1; on a CPU rounded to a multiple of 1 / 65,536.
        training: False returns ``x``.

    Raises:
        ValueError: ``p`` lies outside.
    """
    if not training or not 0 < p < 1 or x.device.type != "cpu" or traced():
        return F.dropout(x, p, training)
    dropped = min(round(p * _LEVELS), _LEVELS - 1)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    draws.random_(-(2**63), None)
    levels = draws.view(torch.int16)[: x.numel()].view(x.shape)
    kept = levels >= dropped - _LEVELS // 2
    return x * kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` by `dropout`, or by torch where it works in place."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x`` in training."""
        if self.inplace:
            return super().forward(x)
        return dropout(x, self.p, training=self.training)
