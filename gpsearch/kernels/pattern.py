"""Which weights of a recurrent layer are awake, in the form in which sparse products take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Pattern(NamedTuple):
    """The awake weights of a matrix, row by row, and the way to its transpose."""

    shape: tuple[int, int]
    places: Int[Tensor, " awake"]
    """Where each stands in the matrix, flattened."""
    start: Int[Tensor, " _rows_1"]
    column: Int[Tensor, " awake"]
    order: Int[Tensor, " awake"]
    """Of the awake weights, the one that comes next in the transpose."""
    start_t: Int[Tensor, " _columns_1"]
    column_t: Int[Tensor, " awake"]

    @classmethod
    def of(cls, mask: Bool[Tensor, "rows columns"]) -> Pattern:
        """Return the pattern of a mask."""
        rows, columns = mask.shape
        index = mask.flatten().nonzero().flatten()
        row, column = index // columns, index % columns
        order = (column * rows + row).argsort()
        return cls(
            (rows, columns),
            index,
            _starts(row, rows),
            column.int(),
            order,
            _starts(column, columns),
            row[order].int(),
        )

    def values(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, " awake"]:
        """Return the awake weights."""
        return weight.reshape(-1).index_select(0, self.places)


class Patterns(NamedTuple):
    """The patterns of one direction's `gpsearch.kernels.gates.Gates`."""

    ih: Pattern
    hh: Pattern
    dense: tuple[tuple[Pattern, ...], ...]
    """Of every hidden layer's map, those of the four gates."""

    @property
    def density(self) -> float:
        """The share of all weights that is awake."""
        patterns = [self.ih, self.hh, *(one for four in self.dense for one in four)]
        awake = sum(len(one.places) for one in patterns)
        return awake / sum(rows * columns for rows, columns in (one.shape for one in patterns))

    @classmethod
    def of(
        cls,
        ih: Bool[Tensor, "rows in"],
        hh: Bool[Tensor, "rows state"],
        dense: Sequence[Bool[Tensor, "4 _out _in"]],
    ) -> Patterns:
        """Return the patterns of masks."""
        gates = (tuple(map(Pattern.of, masks)) for masks in dense)
        return cls(Pattern.of(ih), Pattern.of(hh), tuple(gates))


def _starts(places: Int[Tensor, " awake"], count: int) -> Int[Tensor, " count_1"]:
    counts = torch.bincount(places, minlength=count)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
