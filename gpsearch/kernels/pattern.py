"""Which weights of a recurrent layer are awake, in the form in which sparse products take them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from gpsearch.kernels.native import counts, pointers

_GROUP = 4
"""Weights of a row that go side by side through a product; the same as in sparse_product.h."""


class CPattern(ctypes.Structure):
    """A `Pattern`, for C: the beginning of a SparseWeight."""

    _fields_ = [
        *counts("rows", "columns"),
        *pointers("start", "column", "place", "start_t", "column_t", "order"),
    ]


@dataclass(frozen=True, eq=False)
class Pattern:
    """The awake weights of a matrix row by row, every row filled up to whole groups."""

    shape: tuple[int, int]
    awake: int
    start: Int[Tensor, " _rows_1"]
    column: Int[Tensor, " filled"]
    """0 where a group is not filled."""
    place: Int[Tensor, " filled"]
    """Where each stands in the matrix, flattened; -1 where a group is not filled."""
    start_t: Int[Tensor, " _columns_1"]
    column_t: Int[Tensor, " _filled_t"]
    order: Int[Tensor, " _filled_t"]
    """Of the transpose's, where each stands in ``place``; -1 where a group is not filled."""

    @cached_property
    def record(self) -> CPattern:
        """The pattern for C, as long as it lives here."""
        arrays = self.start, self.column, self.place, self.start_t, self.column_t, self.order
        return CPattern(*self.shape, *(array.data_ptr() for array in arrays))

    def __getstate__(self) -> dict[str, Any]:
        """Return copies without the record, which knows addresses.

        Copies, since what sends tensors to another process moves those that it was given.
        """
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {n: one.clone() if isinstance(one, Tensor) else one for n, one in given}

    @classmethod
    def of(cls, mask: Bool[Tensor, "rows columns"]) -> Pattern:
        """Return the pattern of a mask.

        Raises:
            ValueError: It has more places than whole numbers of 32 bits can tell.
        """
        if mask.numel() > torch.iinfo(torch.int32).max:
            raise ValueError(f"a mask of {[*mask.shape]} has too many places")
        mask = mask.cpu()  # where the kernels are that read it
        rows, columns = mask.shape
        place = mask.flatten().nonzero().flatten()
        row, column = place // columns, place % columns
        start, slot = _slots(row, rows)
        by_column = (column * rows + row).argsort()
        start_t, slot_t = _slots(column[by_column], columns)
        return cls(
            (rows, columns),
            len(place),
            start.int(),
            _filled(start, slot, column, 0),
            _filled(start, slot, place, -1),
            start_t.int(),
            _filled(start_t, slot_t, row[by_column], 0),
            _filled(start_t, slot_t, slot[by_column], -1),
        )


@dataclass(frozen=True, eq=False)
class Patterns:
    """The patterns of one direction's `gpsearch.kernels.gates.Gates`."""

    ih: Pattern
    hh: Pattern
    dense: tuple[tuple[Pattern, ...], ...]
    """Of every hidden layer's map, those of the four gates."""

    @property
    def density(self) -> float:
        """The share of all weights that is awake."""
        patterns = [self.ih, self.hh, *(one for four in self.dense for one in four)]
        awake = sum(one.awake for one in patterns)
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


def _slots(
    rows: Int[Tensor, " awake"], count: int
) -> tuple[Int[Tensor, " _count_1"], Int[Tensor, " awake"]]:
    """Return where each of ``count`` rows starts, and where each weight of ``rows`` goes."""
    awake = torch.bincount(rows, minlength=count)
    groups = (awake + _GROUP - 1) // _GROUP
    start = F.pad(groups.cumsum(0) * _GROUP, (1, 0))
    first = F.pad(awake.cumsum(0), (1, 0))
    return start, start[rows] + torch.arange(len(rows), device="cpu") - first[rows]


def _filled(
    start: Int[Tensor, " _count_1"],
    slots: Int[Tensor, " awake"],
    values: Int[Tensor, " awake"],
    filling: int,
) -> Int[Tensor, " _filled"]:
    filled = torch.full((int(start[-1]),), filling, dtype=torch.int32, device="cpu")
    filled[slots] = values.int()
    return filled
