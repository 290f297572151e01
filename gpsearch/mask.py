"""Masks: which weights are awake. Pure functions with exact counts and one rule for ties.

The tie rule, everywhere: of equal scores the one with the lower index (row-major) wins. Magnitudes
tie more often than one thinks - all dormant weights are exactly zero - and a threshold would then
take all of them or none, so counts are exact by construction.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def top_k(score: Float[Tensor, "*shape"], count: int) -> Bool[Tensor, "*shape"]:
    """Mark the ``count`` largest scores; of equal ones the lower index wins.

    Raises:
        ValueError: ``count`` is negative or more than there are scores, or a score is NaN.
    """
    if not 0 <= count <= score.numel():
        raise ValueError(f"count = {count} should lie between 0 and {score.numel()}")
    if score.isnan().any():
        raise ValueError("a score is NaN")
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    flat = score.flatten()
    edge = flat.kthvalue(len(flat) - count + 1).values  # a fifth of the time of sorting
    mask = flat > edge
    ties = (flat == edge).nonzero().squeeze(1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view(score.shape)


def connecting(
    rows: int, columns: int, generator: torch.Generator
) -> Float[Tensor, "rows columns"]:
    """Draw random scores of which the largest connect every neuron.

    The max(rows, columns) largest meet every row and every column; fewer, as many as they can.
    """
    where: Any = {"generator": generator, "device": generator.device}  # whatever the default is
    links = torch.arange(max(rows, columns), device=generator.device)
    row, column = torch.randperm(rows, **where), torch.randperm(columns, **where)
    score = torch.rand(rows, columns, **where)
    # Walking both permutations in step, the shorter one around and around, meets every row and
    # every column, and no pair twice.
    score[row[links % rows], column[links % columns]] = 2 - links / len(links)
    return score


def shares(sizes: list[int], density: float) -> list[int]:
    """Split round(density * sum(sizes)) weights over matrices of these sizes, exactly."""
    counts, taken, seen = [], 0, 0
    for size in sizes:
        seen += size
        upto = round(density * seen)
        counts.append(upto - taken)
        taken = upto
    return counts
