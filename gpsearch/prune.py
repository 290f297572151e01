"""Which awake weights sleep: those with the smallest score. Pure: (mask, score, count) -> mask."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gpsearch.mask import top_k


def prune(
    mask: Bool[Tensor, "*shape"], score: Float[Tensor, "*shape"], count: int
) -> Bool[Tensor, "*shape"]:
    """Put the ``count`` awake weights with the smallest score to sleep; no dormant one is touched.

    With the weight's magnitude as the score this is the pruning of grow-and-prune (Dai et al.,
    section 3). Of equal scores the lower index stays awake.

    Raises:
        ValueError: There are fewer than ``count`` awake weights, or ``count`` is negative.
    """
    awake = int(mask.sum())
    if not 0 <= count <= awake:
        raise ValueError(f"count = {count} should lie between 0 and the {awake} awake weights")
    return top_k(score.masked_fill(~mask, -torch.inf), awake - count)
