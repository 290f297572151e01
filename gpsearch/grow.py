"""Which dormant weights wake: those with the largest score. Pure: (mask, score, count) -> mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gpsearch.mask import top_k


def grow(
    mask: Bool[Tensor, "*shape"], score: Float[Tensor, "*shape"], count: int
) -> Bool[Tensor, "*shape"]:
    """Wake the ``count`` dormant weights with the largest score; no awake weight is touched.

    With the magnitude of the loss's gradient as the score this is the growth of grow-and-prune
    (Dai et al., section 3: wake the connections with the largest gradients); with random numbers
    that of SET.

    Raises:
        ValueError: There are fewer than ``count`` dormant weights, or ``count`` is negative.
    """
    dormant = int((~mask).sum())
    if not 0 <= count <= dormant:
        raise ValueError(f"count = {count} should lie between 0 and the {dormant} dormant weights")
    return mask | top_k(score.masked_fill(mask, -torch.inf), count)


def gradients(
    weights: Mapping[str, nn.Parameter], losses: Iterable[Tensor], batches: int = 0
) -> dict[str, Tensor]:
    """Return the dense gradient of every weight, averaged over ``batches`` batches (0: over all).

    The weights stay as they are. Dormant weights are stored as zeros of an ordinary parameter, so
    autograd gives their gradient as well: that of the loss of the *masked* network. Only those that
    a rewiring step has just put to sleep are not zeros yet: as in RigL, its gradient is that of the
    network before the step.

    Args:
        weights: The parameters to look at; their ``grad`` is overwritten and then cleared.
        losses: Scalar losses, one a batch, computed as they are asked for.
        batches: Stop after so many.

    Raises:
        ValueError: ``losses`` is empty.
    """
    for weight in weights.values():
        weight.grad = None
    seen = 0
    for loss in islice(losses, batches or None):
        loss.backward()  # type: ignore[no-untyped-call]
        seen += 1
    if not seen:
        raise ValueError("no batch to take the growth gradient from")
    means = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad / seen
        for name, weight in weights.items()
    }
    for weight in weights.values():
        weight.grad = None
    return means
