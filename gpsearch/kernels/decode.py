"""Inference with few sequences at a time, in C: every matrix in the format that its zeros call for.

Packed weights are made from the parameters where they are used, and are never stored.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import has_torch_function

from gpsearch.kernels.compiled import KINDS
from gpsearch.kernels.native import Native
from gpsearch.kernels.traced import traced

_WINDOWS = ("windows", "windows2", "windows4")
_LAYOUTS = ("dense", "rows", "sell16", *_WINDOWS, "16x1", "8x1", "4x4")
_TYPES = ("", "-bfloat16", "-int8")


def _exists(layout: str, type: str) -> bool:
    if layout in ("rows", "8x1"):
        return not type
    return not (layout in _WINDOWS and type == "-bfloat16")


_CODES = {
    layout + type: (i, j)
    for j, type in enumerate(_TYPES)
    for i, layout in enumerate(_LAYOUTS)
    if _exists(layout, type)
}
FORMATS = tuple(_CODES)
"""How a weight matrix may be packed; `csrc/pack.h` describes the layouts, and the types of values,
in these orders. A narrow type is for weights that it holds exactly; see `gpsearch.quantize`."""
MOST_SEQUENCES = 4
"""Sequences of a batch up to which one after the other is fast."""

_ALIGNMENT = 64
_MISFIT = "packed for {} inputs and states of {}, of single precision and on the CPU"

Key = tuple[int, tuple[int, ...], tuple[int, ...], str]
"""What tells packed matrices apart: address, shape and strides of the weights, and the format."""


class Matrix(NamedTuple):
    """The weights of four gates, one below the other, and the format to pack them in."""

    weight: Float[Tensor, "rows in"]
    format: str


class Front(NamedTuple):
    """What maps input and state onto the gates' first hidden layer, or onto the gates directly."""

    input: Matrix
    state: Matrix
    bias: Float[Tensor, " rows"] | None


class Back(NamedTuple):
    """What maps a hidden layer of the gates onto the next one, or onto the gates."""

    map: Matrix
    bias: Float[Tensor, " rows"] | None


class Cell(NamedTuple):
    """The weights of one direction of one layer; without ``hidden`` it is the LSTM."""

    hidden: Front | None
    direct: Front | None
    backs: tuple[Back, ...]
    activation: str


def suits(*tensors: Tensor) -> bool:
    """Tell whether the kernels can read these: plain tensors of single precision on the CPU."""
    for one in tensors:  # at every call: a generator would take twice as long
        if one.dtype is not torch.float32 or not one.is_cpu or one.layout is not torch.strided:
            return False
        if one.is_neg():  # numbers whose signs are only noted
            return False
    return True


def applies(batch: int, *inputs: Tensor) -> bool:
    """Tell whether this is what the kernels are for: inference with a small batch."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if not 0 < batch <= MOST_SEQUENCES:
        return False
    # What watches torch's functions, as gpsearch.exporting does, is to see the recurrence.
    return not traced() and not has_torch_function(inputs) and suits(*inputs)


class Packed:
    """One matrix, packed for the kernels of one instruction set.

    Args:
        kernels: Those that will multiply by it.
        weight: The matrix, of single precision and on the CPU.
        format: One of `FORMATS`.

    Raises:
        ValueError: The format cannot hold the matrix: it has more than 65,535 columns, or weights
            that a narrow type could only round, or for windows such as are hardly a number.
        MemoryError: There is none to pack it.
    """

    def __init__(self, kernels: Native, weight: Float[Tensor, "rows in"], format: str) -> None:
        weight = weight.contiguous()
        size = self.bytes_of(kernels, weight, format)
        if size < 0:
            raise ValueError(f"no {format} for a matrix of {list(weight.shape)}")
        self._memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device="cpu")
        self.pointer = -(-self._memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        where = weight.data_ptr(), *weight.shape, kernels.tiles, self.pointer
        if kernels.pack_matrix(*_CODES[format], *where) < 0:
            raise MemoryError(f"no memory to pack a matrix of {list(weight.shape)}")

    @staticmethod
    def bytes_of(kernels: Native, weight: Float[Tensor, "rows in"], format: str) -> int:
        """Return the bytes that a packed matrix takes; -1 where the format cannot hold it."""
        weight = weight.contiguous()
        where = weight.data_ptr(), *weight.shape, kernels.tiles, None
        return int(kernels.pack_matrix(*_CODES[format], *where))


class Decoder:
    """A stack of layers, packed.

    Args:
        kernels: The kernels of one instruction set.
        cells: Layer by layer, and in each both directions where there are two.
        directions: 1 or 2.
        packed: Matrices packed before; what is missing is added.
    """

    def __init__(
        self,
        kernels: Native,
        cells: Sequence[Cell],
        directions: int,
        packed: dict[Key, Packed] | None = None,
    ) -> None:
        _refuse_unlike(cells, directions)
        self.kernels, self._packed = kernels, {} if packed is None else packed
        self._kept: list[Any] = []
        self._cells = (_Cell * len(cells))(*map(self._cell, cells))
        self._first, self._directions = ctypes.addressof(self._cells), directions
        self.inputs, self._size = int(self._cells[0].inputs), int(self._cells[0].size)
        self._cells_count, self._width = len(cells), directions * self._size

    def run(
        self,
        x: Float[Tensor, "time batch in"],
        state: tuple[Float[Tensor, "cells batch size"], Float[Tensor, "cells batch size"]] | None,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the stack over a batch, sequence by sequence; no gradients.

        Args:
            x: Of single precision, on the CPU; what lies beyond a length is not read.
            state: h and c before the first step; None is zero.
            lengths: True lengths, each within 1 and time; None: all are equally long.

        Returns:
            The last layer's outputs [time batch directions*size], zero beyond the lengths, and h
            and c after the last step.
        """
        steps, batch, inputs = x.shape
        shape = self._cells_count, batch, self._size
        fits = state is None or state[0].shape == state[1].shape == shape
        fits &= lengths is None or lengths.shape == (batch,)
        if inputs != self.inputs or not fits or not suits(x, *(state or ())):
            raise ValueError(_MISFIT.format(self.inputs, list(shape)))
        if state is None:
            h, c = x.new_zeros(2, *shape).unbind()
        else:
            h, c = (s.clone(memory_format=torch.contiguous_format) for s in state)
        out = x.new_empty(steps, batch, self._width)
        if lengths is not None:
            lengths = lengths.to(x.device, torch.int64).contiguous()
        if x.stride(2) != 1:
            x = x.contiguous()
        stack = self._stack(x.stride(), (batch * self._width, self._width), h, c)
        at_lengths = None if lengths is None else lengths.data_ptr()
        where = ctypes.addressof(stack), steps, at_lengths, x.data_ptr(), out.data_ptr()
        if self.kernels.decode(*where):
            raise MemoryError(f"no memory to run {steps} steps")
        return out, (h, c)

    def step(
        self,
        x: Float[Tensor, "batch in"],
        h: Float[Tensor, "batch size"],
        c: Float[Tensor, "batch size"],
    ) -> tuple[Float[Tensor, "batch size"], Float[Tensor, "batch size"]]:
        """Run a single cell for one step, and return the next h and c; no gradients."""
        batch, inputs = x.shape
        shape = batch, self._size
        fits = inputs == self.inputs and h.shape == c.shape == shape and self._cells_count == 1
        if not fits or not suits(x, h, c):
            raise ValueError(_MISFIT.format(self.inputs, list(shape)))
        x, h, c = x.contiguous(), h.contiguous(), c.contiguous()
        next_h, next_c = torch.empty_like(h), torch.empty_like(c)
        failed = self.kernels.decode_step(
            self._first, batch, x.data_ptr(), inputs, h.data_ptr(), c.data_ptr(),
            next_h.data_ptr(), next_c.data_ptr(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory to run a step")
        return next_h, next_c

    def _stack(
        self, x_stride: Sequence[int], out_stride: Sequence[int], h: Tensor, c: Tensor
    ) -> _Stack:
        """Say where everything lies: strides go from a step, and from a sequence, to the next."""
        layers, batch = self._cells_count // self._directions, h.shape[1]
        return _Stack(
            layers, self._directions, self._first, *x_stride[:2], *out_stride, batch,
            h.data_ptr(), c.data_ptr(),
        )  # fmt: skip

    def _cell(self, cell: Cell) -> _Cell:
        front = _front(cell)
        backs = (_Back * max(1, len(cell.backs)))(*map(self._back, cell.backs))
        fronts = [self._front(one) for one in (cell.hidden, cell.direct)]
        bias = [self._bias(f.state.weight, f.bias) for f in (cell.hidden, cell.direct) if f]
        self._kept += [backs, joined := torch.cat(bias).contiguous()]
        return _Cell(
            front.input.weight.shape[1],
            front.state.weight.shape[1],
            KINDS.index(cell.activation),
            (_Front * 2)(*fronts),
            joined.data_ptr(),
            len(cell.backs),
            ctypes.addressof(backs),
        )

    def _front(self, front: Front | None) -> _Front:
        if front is None:
            return _Front()
        along = "dense" if front.input.format.startswith("dense") else "rows"
        columns = front.input.weight.shape[1]
        if front.input.format == "dense-int8" and self.kernels.knows_digits(columns):
            along = front.input.format
        return _Front(
            len(front.state.weight) // 4,
            self._gates(front.input),
            self._gates(front.input._replace(format=along)),
            self._gates(front.state),
        )

    def _back(self, back: Back) -> _Back:
        weight = back.map.weight
        self._kept.append(bias := self._bias(weight, back.bias))
        return _Back(weight.shape[1], len(weight) // 4, self._gates(back.map), bias.data_ptr())

    def _gates(self, matrix: Matrix) -> Any:
        """Pack the four gates' matrices, all of them in one format, and return where they are."""
        gates = matrix.weight.chunk(4)
        keys = [(w.data_ptr(), tuple(w.shape), w.stride(), matrix.format) for w in gates]
        if not all(key in self._packed for key in keys):
            format = self._holding(gates, matrix.format)
            packed = [Packed(self.kernels, weight, format) for weight in gates]
            self._packed |= dict(zip(keys, packed, strict=True))
        found = [self._packed[key] for key in keys]
        self._kept += found
        return (ctypes.c_void_p * 4)(*(one.pointer for one in found))

    def _holding(self, gates: Sequence[Float[Tensor, "rows in"]], format: str) -> str:
        """Return a format, or where it does not hold the matrices (any more) a wider one."""
        for wider in (format, format.partition("-")[0]):
            if all(Packed.bytes_of(self.kernels, weight, wider) >= 0 for weight in gates):
                return wider
        return "dense"

    def _bias(self, weight: Tensor, bias: Tensor | None) -> Float[Tensor, " padded"]:
        """Lay a bias out as the kernels do: each gate's part filled up to its stride."""
        rows = len(weight) // 4
        stride = int(self.kernels.decode_stride(rows))
        parts = weight.new_zeros(4, rows) if bias is None else bias.view(4, rows)
        return F.pad(parts, (0, stride - rows)).flatten()


class Running:
    """A decoder in the midst of sequences, whose next steps are given one after the other.

    Args:
        decoder: Of one direction.
        h: [layers batch size], to be overwritten step by step.
        c: The same.
    """

    def __init__(
        self,
        decoder: Decoder,
        h: Float[Tensor, "layers batch size"],
        c: Float[Tensor, "layers batch size"],
    ) -> None:
        self._alive = decoder, h, c
        batch, size = h.shape[1:]
        self._shape, self._like = (batch, decoder.inputs), h.new_empty(batch, size)
        self._stack = decoder._stack((0, decoder.inputs), (0, size), h, c)
        self._next, self._where = decoder.kernels.decode, ctypes.addressof(self._stack)

    def suits(self, x: Tensor) -> bool:
        """Tell whether the kernels can read this as the next step."""
        return x.shape == self._shape and suits(x) and x.is_contiguous()

    def step(self, x: Float[Tensor, "batch in"]) -> Float[Tensor, "batch size"]:
        """Take a step with what `suits`, and return the last layer's outputs; no gradients."""
        out = torch.empty_like(self._like)
        if self._next(self._where, 1, None, x.data_ptr(), out.data_ptr()):
            raise MemoryError("no memory to run a step")
        return out


def _refuse_unlike(cells: Sequence[Cell], directions: int) -> None:
    """Refuse weights that do not fit one another: the kernels would read beyond them."""
    size = _front(cells[0]).state.weight.shape[1]
    for at, cell in enumerate(cells):
        inputs = _front(cells[0]).input.weight.shape[1] if at < directions else directions * size
        rows = len(_front(cell).state.weight)
        fits = len(cells) % directions == 0
        for front in filter(None, (cell.hidden, cell.direct)):
            like = front is _front(cell) or len(front.state.weight) == 4 * size
            fits &= like and front.input.weight.shape == (len(front.state.weight), inputs)
            fits &= front.state.weight.shape[1] == size
        for back in cell.backs:
            fits &= 4 * back.map.weight.shape[1] == rows
            rows = len(back.map.weight)
        if not fits or rows != 4 * size or (cell.hidden is None) != (not cell.backs):
            raise ValueError(f"the weights of cell {at} do not fit one another")


def _front(cell: Cell) -> Front:
    front = cell.hidden or cell.direct
    assert front is not None
    return front


class _Front(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("input", ctypes.c_void_p * 4),
        ("along", ctypes.c_void_p * 4),
        ("state", ctypes.c_void_p * 4),
    )


class _Back(ctypes.Structure):
    _fields_ = (
        ("width", ctypes.c_int64),
        ("out", ctypes.c_int64),
        ("map", ctypes.c_void_p * 4),
        ("bias", ctypes.c_void_p),
    )


class _Cell(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("activation", ctypes.c_int64),
        ("front", _Front * 2),
        ("bias", ctypes.c_void_p),
        ("depth", ctypes.c_int64),
        ("back", ctypes.c_void_p),
    )


class _Stack(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_int64),
        ("directions", ctypes.c_int64),
        ("cells", ctypes.c_void_p),
        ("x_step", ctypes.c_int64),
        ("x_row", ctypes.c_int64),
        ("out_step", ctypes.c_int64),
        ("out_row", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("h", ctypes.c_void_p),
        ("c", ctypes.c_void_p),
    )
