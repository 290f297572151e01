"""Products by tiles of bfloat16, where the processor has them (AMX); see tiles.h."""

from __future__ import annotations

from contextlib import suppress

import torch
from jaxtyping import Float
from torch import Tensor

from gpsearch.kernels.native import Native
from gpsearch.kernels.threads import each_in_threads, slices

_FEWEST_ROWS = {3: 25, 2: 17}
"""Rows from which tiles are filled well enough, by `terms` (measured)."""
_FEWEST_IN_ALL = 1024
"""Rows in all products with a matrix that are worth turning it into tiles (measured)."""
_SMALLEST = {3: 190, 2: 128}
"""Rows and columns of a square product that are worth turning its factors into tiles, by `terms`
(measured against MKL)."""
_LEAST_INNER = 64
"""Places in the sum for which it pays."""


def terms() -> int:
    """Return how many bfloat16 stand for a float.

    Three are as good as it, but for numbers below 1e-31. Two have 17 of its 24 bits and take half
    as many products: what torch calls "high" precision (`torch.set_float32_matmul_precision`).
    """
    with suppress(RuntimeError):  # torch does not tell once its settings by backend were used
        return 3 if torch.get_float32_matmul_precision() == "highest" else 2
    return 3


def put_product(
    native: Native,
    left: Float[Tensor, "rows inner"],
    right: Float[Tensor, "inner columns"],
    out: Float[Tensor, "rows columns"],
) -> bool:
    """Fill ``out``, whose rows are contiguous, with left @ right.

    Returns:
        False where another way is faster, or where a number is none or larger than 3e16: ``out`` is
        then not to be used.
    """
    (rows, inner), columns = left.shape, right.shape[1]
    if len(right) != inner or out.shape != (rows, columns):  # the kernels would read beyond them
        raise ValueError(f"no product of {[*left.shape]} and {[*right.shape]} is {[*out.shape]}")
    if not native.tiles or inner < _LEAST_INNER:
        return False
    of_float = terms()
    if 2 * rows * columns < _SMALLEST[of_float] * (rows + columns):  # by the harmonic mean
        return False
    left, right = (one if 1 in one.stride() else one.contiguous() for one in (left, right))
    room = native.tiles_room(columns, inner)

    def part(first: int, last: int) -> int:
        a, to, own = left[first:last], out[first:last], left.new_empty(room)
        has_terms: int = native.multiply_tiles(
            a.data_ptr(), *a.stride(), right.data_ptr(), *right.stride(), last - first, columns,
            inner, of_float, to.data_ptr(), to.stride(0), own.data_ptr(),
        )  # fmt: skip
        return has_terms

    return all(each_in_threads(part, slices(rows, torch.get_num_threads())))


def in_tiles(
    native: Native,
    weights: Float[Tensor, "n out in"],
    rows: int,
    times: int,
    of_float: int,
    *,
    flip: bool,
) -> Float[Tensor, "n room"] | None:
    """Pack matrices for products of many rows with them, or with their transposes.

    Args:
        native: The kernels.
        weights: The matrices.
        rows: How many are multiplied at a time.
        times: How often.
        of_float: How many `terms`.
        flip: Whether they are multiplied with the transposes.

    Returns:
        None where tiles do not pay, or where a weight is no number or larger than 3e16.
    """
    if not native.tiles or rows < _FEWEST_ROWS[of_float] or rows * times < _FEWEST_IN_ALL:
        return None
    n, out, width = weights.shape
    columns, inner = (width, out) if flip else (out, width)
    steps = (1, width) if flip else (width, 1)
    packed = weights.new_empty(n, native.tiles_size(columns, inner, of_float))
    have_terms = [
        native.pack_tiles(matrix.data_ptr(), *steps, columns, inner, of_float, room.data_ptr())
        for matrix, room in zip(weights, packed, strict=True)
    ]
    return packed if all(have_terms) else None
