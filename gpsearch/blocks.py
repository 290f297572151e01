"""Blocks: weights that live or die together. Pure functions of one matrix and a block's shape.

Blocks of r x c weights tile a matrix from its first row and column; those at its lower and right
edges may be smaller. What has more dimensions is the matrix it multiplies by: a convolution's
weight is [outputs, inputs x taps]. In a recurrent parameter every gate is a matrix of its own, so
the tiling starts anew with each. A single weight is a block of 1 x 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Shape = tuple[int, int]
"""Rows and columns of a block."""

SHAPES: dict[str, Shape] = {"element": (1, 1), "16x1": (16, 1), "8x1": (8, 1), "4x4": (4, 4)}
"""A block's shape by the schedules' name of it; 16x1 is 16 consecutive rows of one column."""


def pool(
    score: Float[Tensor, "rows columns"], shape: Shape
) -> Float[Tensor, "block_rows block_columns"]:
    """Return every block's score: the root mean square of its weights' scores.

    Of all masks with as many weights, keeping the largest root mean squares changes the matrix
    least, as magnitude does for single weights (their score is left as it is); the mean makes a
    small block at an edge stand for what it saves. Whole units are compared in the same way. The
    literature also has the largest magnitude in a block (Narang, Undersander, Diamos, "Block-Sparse
    Recurrent Neural Networks", arXiv 1711.02782; its group lasso has the Euclidean norm) and the
    mean magnitude (the default of TensorFlow Model Optimization).
    """
    if shape == (1, 1):
        return score
    return F.avg_pool2d(score.square()[None], shape, ceil_mode=True)[0].sqrt()


def sizes(
    matrix: tuple[int, ...], shape: Shape, device: torch.device | None = None
) -> Int[Tensor, "block_rows block_columns"]:
    """Return the number of weights in every block of a matrix of this shape."""
    rows, columns = matrix
    height = (rows - torch.arange(0, rows, shape[0], device=device)).clamp(max=shape[0])
    width = (columns - torch.arange(0, columns, shape[1], device=device)).clamp(max=shape[1])
    return height[:, None] * width


def awake(
    mask: Bool[Tensor, "rows columns"], shape: Shape
) -> Bool[Tensor, "block_rows block_columns"]:
    """Return which blocks are awake, of a mask in which every block is so as a whole."""
    return mask[:: shape[0], :: shape[1]]


def spread(
    blocks: Bool[Tensor, "block_rows block_columns"], shape: Shape, matrix: tuple[int, ...]
) -> Bool[Tensor, "rows columns"]:
    """Return the mask of a matrix of this shape in which the blocks are awake as in ``blocks``."""
    if shape == (1, 1):
        return blocks
    rows, columns = matrix
    tall = blocks.repeat_interleave(shape[0], 0)[:rows]
    return tall.repeat_interleave(shape[1], 1)[:, :columns]


def fitting(
    score: Float[Tensor, " blocks"],
    sizes: Int[Tensor, " blocks"],
    among: Bool[Tensor, " blocks"],
    weights: int,
) -> int:
    """Count the blocks of ``among``, the largest score first, with at most ``weights`` weights.

    Less than one block is left over, unless all of them fit. Of equal scores the lower index comes
    first, as in `gpsearch.mask.top_k`.
    """
    if not len(sizes) or weights <= 0:
        return 0
    if (sizes == sizes[0]).all():  # no need to sort
        return min(weights // int(sizes[0]), int(among.sum()))
    order = score[among].sort(descending=True, stable=True).indices
    return int((sizes[among][order].cumsum(0) <= weights).sum())
