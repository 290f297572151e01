"""The recurrence as one autograd node whose loops over time run in C.

A thread takes some rows of the batch through all steps of one direction, forward or backward, and
waits for nobody; how the rows are shared out changes results by rounding at the most, and outputs
only where the processor has tiles, which want more rows than others.
What does not depend on the step before is a few large products here: of the inputs before the loop,
and for the gradients of weights and inputs after it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd

from gpsearch.kernels.gates import Gates, flattened, restored
from gpsearch.kernels.native import Native, counts, pointers
from gpsearch.kernels.plain import goes_further, gradients, kept_leaves
from gpsearch.kernels.products import linear, room_like, torch_is_fast
from gpsearch.kernels.threads import Slice, each_in_threads, slices
from gpsearch.kernels.tiles import in_tiles, put_product, terms

KINDS = ("relu", "leaky_relu", "tanh", "gelu")
"""Activations, in the order of the enumeration in training.h."""
SLOPE_BY_OUTPUT = ("relu", "leaky_relu")
"""Activations whose outputs may take the place of their inputs: their signs, and so the slopes, are
those of the inputs, or else dropout makes the gradient zero."""
_FEWEST_ROWS = 4
"""Rows of a batch that are worth a thread: fewer fill no tile of the products."""


def compiled(
    native: Native,
    xs: Sequence[Float[Tensor, "time batch in"]],
    h0: Float[Tensor, "dir batch hidden"],
    c0: Float[Tensor, "dir batch hidden"],
    gates: Sequence[Gates],
) -> tuple[Float[Tensor, "dir time batch hidden"], Float[Tensor, "dir time batch hidden"]]:
    """Run one layer without gate norms over all time steps, in float32."""
    fixed = native, gates[0].activation, tuple(g.masks for g in gates)
    hs, cs = _Compiled.apply(*fixed, h0, c0, *xs, *flattened(gates))  # type: ignore[no-untyped-call]
    return hs, cs


class _Compiled(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any, native: Native, activation: str, masks: tuple[tuple[Tensor, ...], ...],
        *leaves: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        dirs = len(masks)
        h0, c0 = leaves[:2]
        xs, weights = readable(leaves, dirs)
        steps, batch, _ = xs[0].shape
        h, c = (h0.new_empty(dirs, steps + 1, *h0.shape[1:]) for _ in range(2))
        h[:, 0], c[:, 0] = h0, c0
        gates = restored(activation, masks, weights)
        loops = [_Loop.begin(native, *one) for one in zip(gates, xs, h, c, strict=True)]
        parts = _parts(batch, dirs)
        _in_threads(native.forward, [loop.forward(native, parts) for loop in loops], parts)
        ctx.fixed = native, activation, masks, len(leaves)
        kept = kept_leaves(leaves)
        ctx.save_for_backward(*kept, h, c, *(one for loop in loops for one in loop.saved()))
        return h[:, 1:], c[:, 1:]

    @staticmethod
    @custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        native, activation, masks, count = ctx.fixed
        dirs = len(masks)
        saved = ctx.saved_tensors  # at once: each look unpacks all that hooks have packed
        leaves, (h, c, *saved) = saved[:count], saved[count:]
        if goes_further(grad_h, grad_c):
            needed = ctx.needs_input_grad[3:]
            return None, None, None, *gradients(activation, masks, leaves, needed, grad_h, grad_c)
        xs, weights = readable(leaves, dirs)
        kept = len(saved) // dirs
        gates = restored(activation, masks, weights)
        loops = [
            _Loop.again(g, h[d], c[d], saved[d * kept : (d + 1) * kept])
            for d, g in enumerate(gates)
        ]
        d_h, d_c = torch.zeros_like(h[:, 0]), torch.zeros_like(c[:, 0])
        parts = _parts(h.shape[2], dirs)
        calls = [
            loop.backward(native, parts, _part(grad_h, d), _part(grad_c, d), d_h[d], d_c[d])
            for d, loop in enumerate(loops)
        ]
        _in_threads(native.backward, calls, parts)
        firsts = [first for first, _ in parts]
        d_weights = [
            one
            for loop, x in zip(loops, xs, strict=True)
            for one in loop.d_weights(native, x, firsts)
        ]
        d_xs = [
            loop.d_input(native) if ctx.needs_input_grad[5 + d] else None
            for d, loop in enumerate(loops)
        ]
        return None, None, None, d_h, d_c, *d_xs, *d_weights


class _CDense(ctypes.Structure):
    _fields_ = [
        *counts("width", "out"),
        *pointers("packed", "flipped", "tiles", "flipped_tiles"),
        *pointers("bias", "mask", "pre", "post"),
        *counts("post_step"),
        *pointers("d_pre"),
        *counts("d_pre_step"),
        *pointers("d_bias"),
    ]


class _CRecurrence(ctypes.Structure):
    _fields_ = [
        *counts("steps", "batch", "size", "activation", "depth", "rows", "first", "terms"),
        *pointers("hh", "hh_flipped", "hh_tiles", "hh_flipped_tiles"),
        *pointers("bias", "dense", "z", "gate", "h", "c", "tanh_c"),
        *pointers("grad_h", "grad_c", "d_z", "d_gate"),
        *counts("d_z_step", "d_gate_step"),
        *pointers("d_h", "d_c", "d_bias"),
    ]


class Call(NamedTuple):
    """What a function in C is called with, and what has to live as long."""

    record: _CRecurrence
    alive: list[Any]


class _Loop:
    """One direction's arrays, and what is made of them before and after its loop.

    ``pre`` are the sums before the activations of the hidden layers (the first ones' are the first
    columns of ``z``), ``post`` what the hidden layers put out.
    """

    def __init__(self, gates: Gates, h: Tensor, c: Tensor, saved: Sequence[Tensor]) -> None:
        self.gates, self.h, self.c = gates, h, c
        self.z, self.gate, self.tanh_c, *layers = saved
        further = max(0, len(gates.dense) - 1)
        self.pre = [self.z, *layers[:further]]
        self.post = layers[further:] or in_place(self.pre, gates, dim=2)

    @classmethod
    def begin(cls, native: Native, gates: Gates, x: Tensor, h: Tensor, c: Tensor) -> _Loop:
        """Multiply the inputs of all steps, and make room for the rest."""
        steps, batch, size = h.shape[0] - 1, *h.shape[1:]
        z = _product(native, x.flatten(0, 1), gates.ih).view(steps, batch, -1)
        widths = [4 * dense.weight.shape[2] for dense in gates.dense]
        shapes = [4 * size, size, *widths[1:]]
        if gates.activation not in SLOPE_BY_OUTPUT:
            shapes += widths
        saved = [h.new_empty(steps, batch, width) for width in shapes]
        return cls(gates, h, c, [z, *saved])

    @classmethod
    def again(cls, gates: Gates, h: Tensor, c: Tensor, saved: Sequence[Tensor]) -> _Loop:
        """Return to a loop that has run forward."""
        return cls(gates, h, c, saved)

    def saved(self) -> list[Tensor]:
        """Return what `again` needs."""
        post = () if self.gates.activation in SLOPE_BY_OUTPUT else self.post
        return [self.z, self.gate, self.tanh_c, *self.pre[1:], *post]

    def forward(self, native: Native, parts: Sequence[Slice]) -> Call:
        """Return the call that fills everything from the inputs' products and the initial state."""
        pack = partial(_packed, native, parts, len(self.z), terms(), flip=False)
        packed = [pack(dense.weight) for dense in self.gates.dense]
        hh = pack(self.gates.hh[None])
        fields = [{"packed": one.floats.data_ptr(), "tiles": address(one.tiles)} for one in packed]
        call = self._call(
            fields, hh=hh.floats.data_ptr(), hh_tiles=address(hh.tiles), terms=hh.terms
        )
        call.alive.extend([*packed, hh])
        return call

    def backward(
        self,
        native: Native,
        parts: Sequence[Slice],
        grad_h: Tensor | None,
        grad_c: Tensor | None,
        d_h: Tensor,
        d_c: Tensor,
    ) -> Call:
        """Return the call that fills the gradients of all sums and of the initial state."""
        gates, first = self.gates, self.gates.first
        pack = partial(_packed, native, parts, len(self.z), terms(), flip=True)
        flipped = [pack(dense.weight) for dense in gates.dense]
        hh = pack(gates.hh[None])
        self.d_pre = [room_like(pre) for pre in self.pre]
        self.d_gate = (
            self.d_pre[0][..., first:] if gates.direct else room_like(self.gate)
        )  # the direct path's sums are the gates'
        self.d_bias, *self.d_biases = (
            None if bias is None else d_h.new_empty(len(d_h), bias.numel())
            for bias in (gates.bias, *(dense.bias for dense in gates.dense))
        )
        fields = [
            {
                "flipped": one.floats.data_ptr(),
                "flipped_tiles": address(one.tiles),
                "d_pre": d_pre.data_ptr(),
                "d_pre_step": d_pre.stride(1),
                "d_bias": address(d_bias),
            }
            for one, d_pre, d_bias in zip(flipped, self.d_pre, self.d_biases, strict=False)
        ]
        call = self._call(
            fields,
            hh_flipped=hh.floats.data_ptr(),
            hh_flipped_tiles=address(hh.tiles),
            terms=hh.terms,
            grad_h=address(grad_h),
            grad_c=address(grad_c),
            d_z=self.d_pre[0].data_ptr(),
            d_gate=self.d_gate.data_ptr(),
            d_z_step=self.d_pre[0].stride(1),
            d_gate_step=self.d_gate.stride(1),
            d_h=d_h.data_ptr(),
            d_c=d_c.data_ptr(),
            d_bias=address(self.d_bias),
        )
        call.alive.extend([*flipped, hh, grad_h, grad_c, d_h, d_c])
        return call

    def _call(self, of_layers: list[dict[str, Any]], **of_direction: Any) -> Call:
        gates, (steps, batch, size) = self.gates, self.tanh_c.shape
        layers = (_CDense * len(gates.dense))()
        masks = [mask.contiguous() for mask in gates.masks]
        for j, (layer, dense) in enumerate(zip(layers, gates.dense, strict=True)):
            layer.out, layer.width = dense.weight.shape[1:]
            layer.bias = address(dense.bias)
            layer.mask = address(masks[j] if masks else None)
            layer.pre, layer.post = self.pre[j].data_ptr(), self.post[j].data_ptr()
            layer.post_step = self.post[j].stride(1)
            for name, value in of_layers[j].items():
                setattr(layer, name, value)
        record = _CRecurrence(
            steps=steps,
            batch=batch,
            size=size,
            activation=KINDS.index(gates.activation),
            depth=len(gates.dense),
            rows=self.z.shape[2],
            first=gates.first,
            bias=address(gates.bias),
            dense=ctypes.addressof(layers),
            z=self.z.data_ptr(),
            gate=self.gate.data_ptr(),
            h=self.h.data_ptr(),
            c=self.c.data_ptr(),
            tanh_c=self.tanh_c.data_ptr(),
            **of_direction,
        )
        return Call(record, [layers, masks, self])

    def d_input(self, native: Native) -> Tensor:
        """Return the gradient of the inputs."""
        d_x = _product(native, self.d_pre[0].flatten(0, 1), self.gates.ih.mT)
        return d_x.view(*self.z.shape[:2], -1)

    def d_weights(self, native: Native, x: Tensor, firsts: list[int]) -> list[Tensor | None]:
        """Return the gradients of ih, hh, bias, and the dense layers' weights and biases.

        ``firsts`` are the first rows of the slices of the batch that went backward.
        """

        def summed(sums: Tensor | None) -> Tensor | None:
            return None if sums is None else sums[firsts].sum(0)

        d_z, h = self.d_pre[0].flatten(0, 1), self.h[:-1].flatten(0, 1)
        d_ih, d_hh = (one.new_empty(one.shape) for one in (self.gates.ih, self.gates.hh))
        _put_sum_of_products(native, d_z, x.flatten(0, 1), d_ih)
        _put_sum_of_products(native, d_z, h, d_hh)
        grads: list[Tensor | None] = [d_ih, d_hh, summed(self.d_bias)]
        outs = [*self.d_pre[1:], self.d_gate][: len(self.gates.dense)]
        layers = zip(self.gates.dense, self.d_biases, outs, self.post, strict=True)
        for dense, d_bias, out, post in layers:
            d_weight = dense.weight.new_empty(dense.weight.shape)
            d_out, read = out.flatten(0, 1), post.flatten(0, 1)
            for one in zip(d_out.chunk(4, 1), read.chunk(4, 1), d_weight, strict=True):
                _put_sum_of_products(native, *one)
            d_bias = summed(d_bias)
            grads += [d_weight, None if d_bias is None else d_bias.view(4, -1)]
        return grads


def in_place(pre: Sequence[Tensor], gates: Gates, dim: int) -> list[Tensor]:
    """Return where the hidden layers' outputs lie that take the place of their inputs."""
    widths = [4 * dense.weight.shape[2] for dense in gates.dense]
    return [sums.narrow(dim, 0, width) for sums, width in zip(pre, widths, strict=False)]


class _Packed(NamedTuple):
    floats: Tensor
    tiles: Tensor | None
    terms: int


def _packed(
    native: Native,
    parts: Sequence[Slice],
    times: int,
    of_float: int,
    weights: Float[Tensor, "n out in"],
    *,
    flip: bool,
) -> _Packed:
    """Pack matrices for so many products of parts of a batch with them or their transposes."""
    n, out, width = weights.shape
    columns, inner = (width, out) if flip else (out, width)
    steps = (1, width) if flip else (width, 1)
    packed = weights.new_empty(n, native.packed_size(columns, inner))
    for matrix, room in zip(weights, packed, strict=True):
        native.pack(matrix.data_ptr(), *steps, columns, inner, room.data_ptr())
    rows = min(last - first for first, last in parts)
    tiles = in_tiles(native, weights, rows, times, of_float, flip=flip)
    return _Packed(packed, tiles, of_float)


def _product(
    native: Native, left: Float[Tensor, "rows inner"], right: Float[Tensor, "columns inner"]
) -> Tensor:
    """Return left @ right.T."""
    out = left.new_empty(len(left), len(right))
    return out if put_product(native, left, right.mT, out) else linear(left, right)


def _put_sum_of_products(
    native: Native,
    left: Float[Tensor, "n rows"],
    right: Float[Tensor, "n columns"],
    out: Float[Tensor, "rows columns"],
) -> None:
    """Fill ``out`` with left.T @ right: by torch, or in C by rows of it in each thread."""
    if put_product(native, left.mT, right, out):
        return
    if torch_is_fast():
        torch.mm(left.mT, right, out=out)
        return
    right = right if right.stride(1) == 1 else right.contiguous()
    (n, rows), columns = left.shape, right.shape[1]
    room = native.outer_room(columns)

    def part(first: int, last: int) -> None:
        a, to, own = left[:, first:last], out[first:last], left.new_empty(room)
        native.outer(
            a.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0), last - first, columns,
            n, to.data_ptr(), columns, own.data_ptr(),
        )  # fmt: skip

    each_in_threads(part, slices(rows, torch.get_num_threads()))


def _part(tensor: Tensor | None, direction: int) -> Tensor | None:
    """Return one direction of a gradient, contiguous."""
    return None if tensor is None else tensor[direction].contiguous().resolve_neg()


def readable(leaves: Sequence[Any], dirs: int) -> tuple[list[Tensor], list[Any]]:
    """Return the inputs and the weights as they can be read in C."""
    xs = [one.resolve_neg() for one in leaves[2 : 2 + dirs]]
    weights = leaves[2 + dirs :]
    return xs, [None if one is None else one.contiguous().resolve_neg() for one in weights]


def address(tensor: Tensor | None) -> int | None:
    """Return where a tensor's numbers lie, for C."""
    return None if tensor is None else tensor.data_ptr()


def _parts(batch: int, dirs: int) -> list[Slice]:
    """Share the batch out to as many threads as torch has, each direction apart."""
    wanted = -(-torch.get_num_threads() // dirs)
    return slices(batch, min(batch // _FEWEST_ROWS, wanted))


def _in_threads(function: Callable[..., Any], calls: Sequence[Call], parts: list[Slice]) -> None:
    each_in_threads(
        function, [(ctypes.addressof(call.record), *rows) for rows in parts for call in calls]
    )
