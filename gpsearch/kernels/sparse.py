"""The recurrence for weights of which few are awake: products with those only, in C.

Outputs and gradients are those of the masked network, but dormant weights get no gradient (zero),
and what only they would read may be infinite or no number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd

from gpsearch.kernels.compiled import (
    KINDS,
    SLOPE_BY_OUTPUT,
    address,
    in_place,
    readable,
)
from gpsearch.kernels.gates import Gates, flattened, restored
from gpsearch.kernels.native import Native, counts, pointers
from gpsearch.kernels.native import native as find_native
from gpsearch.kernels.pattern import CPattern, Patterns
from gpsearch.kernels.plain import goes_further, gradients, kept_leaves
from gpsearch.kernels.products import apart
from gpsearch.kernels.threads import each_in_threads, slices

PAYS_BELOW = 0.33
"""Density under which sparse products beat dense ones even for small layers and batches: 128 units,
16 sequences (measured; larger ones break even at 0.35 to 0.45)."""
_MANY = 16
_PAYS_BELOW_IF_FEW = 0.23
"""The same for fewer sequences than those (measured: with AVX2, 8 break even at 0.24 to 0.29; on
AVX-512, whose dense products then take the longer vectors, at 0.22)."""
_CACHED = 1 << 16
"""Numbers of an input or a state whose steps go backward together: with what else these steps have,
they stay in the second cache while the weights' gradients are taken from them."""


def kernels_for_sparse(
    native: Native, batch: int, patterns: Sequence[Patterns | None]
) -> Native | None:
    """Return the kernels for products with the awake weights of some directions.

    One sequence is a lane of a vector. A batch that fills no more than half of its vectors leaves
    too much idle; on AVX-512 there are those of AVX2 for it.

    Returns:
        None where patterns are missing, or dense products by ``native`` are faster.
    """
    given = [one for one in patterns if one is not None]
    if len(given) < len(patterns):
        return None
    if batch < _MANY and max(one.density for one in given) >= _PAYS_BELOW_IF_FEW:
        return None
    if 2 * batch > native.lanes(batch):
        return native
    narrower = find_native("avx2") if native.instruction_set in ("avx512", "amx") else None
    fits = narrower is not None and 2 * batch > narrower.lanes(batch)
    return narrower if fits else None


def sparse(
    native: Native,
    xs: Sequence[Float[Tensor, "time batch in"]],
    h0: Float[Tensor, "dir batch hidden"],
    c0: Float[Tensor, "dir batch hidden"],
    gates: Sequence[Gates],
) -> tuple[Float[Tensor, "dir time batch hidden"], Float[Tensor, "dir time batch hidden"]]:
    """Run one layer over all time steps by the weights that its gates' patterns say are awake.

    It takes what `compiled` takes; every direction's gates need patterns.
    """
    patterns = [g.patterns for g in gates]
    fixed = native, patterns, gates[0].activation, tuple(g.masks for g in gates)
    hs, cs = _Sparse.apply(*fixed, h0, c0, *xs, *flattened(gates))  # type: ignore[no-untyped-call]
    return hs, cs


class _Sparse(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any, native: Native, patterns: list[Patterns], activation: str,
        masks: tuple[tuple[Tensor, ...], ...], *leaves: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        dirs = len(masks)
        h0, c0 = leaves[:2]
        xs, weights = readable(leaves, dirs)
        steps, batch, _ = xs[0].shape
        parts = slices(batch, min(batch // native.lanes(1), -(-torch.get_num_threads() // dirs)))
        hs = h0.new_empty(dirs, steps, *h0.shape[1:])
        cs = [
            h0.new_empty(dirs, steps + 1, h0.shape[2], native.lanes(stop - start))
            for start, stop in parts
        ]
        gates = restored(activation, masks, weights)
        loops = [
            [_Loop(native, *own, c[d], slice(*part)) for c, part in zip(cs, parts, strict=True)]
            for d, own in enumerate(zip(gates, patterns, strict=True))
        ]
        outside = list(zip(map(_in_rows, xs), _in_rows(h0), _in_rows(c0), hs, strict=True))
        jobs = [(loop, *outside[d]) for d, own in enumerate(loops) for loop in own]
        each_in_threads(_Loop.forward, jobs)
        ctx.fixed = native, patterns, activation, masks, parts
        # Not to be written to: with one part the c are what is returned. The inputs, which are kept
        # by lanes, too, are there for who differentiates again.
        arrays = (one for loop, *_ in jobs for one in loop.kept)
        ctx.save_for_backward(*cs, *kept_leaves(leaves), *arrays)
        in_rows = [
            c[:, 1:, :, : stop - start].mT for c, (start, stop) in zip(cs, parts, strict=True)
        ]
        return hs, in_rows[0] if len(in_rows) == 1 else torch.cat(in_rows, 2)

    @staticmethod
    @custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        native, patterns, activation, masks, parts = ctx.fixed
        dirs, needed = len(masks), ctx.needs_input_grad[4:]
        cs, leaves, kept = _split(ctx.saved_tensors, len(parts), len(needed))
        if goes_further(grad_h, grad_c):
            own = gradients(activation, masks, leaves, needed, grad_h, grad_c)
            return None, None, None, None, *own
        xs, weights = readable(leaves, dirs)
        arrays = iter(_equal_parts(kept, dirs * len(parts)))
        loops = [
            [_Loop(native, *own, c[d], slice(*part), next(arrays))
             for c, part in zip(cs, parts, strict=True)]
            for d, own in enumerate(
                zip(restored(activation, masks, weights), patterns, strict=True)
            )
        ]  # fmt: skip
        c = cs[0]
        states = dirs, xs[0].shape[1], c.shape[2]
        d_h0, d_c0 = (c.new_empty(states) for _ in range(2))
        d_xs = [d_h0.new_empty(x.shape) if needed[2 + d] else None for d, x in enumerate(xs)]
        grads = [None if one is None else _in_rows(one) for one in (grad_h, grad_c)]
        jobs = [
            (loop, *(None if one is None else one[d] for one in grads), d_xs[d], d_h0[d], d_c0[d])
            for d, own in enumerate(loops)
            for loop in own
        ]
        grads_of = iter(each_in_threads(_Loop.backward, jobs))
        d_weights = [one for own in loops for one in _sums([next(grads_of) for _ in own])]
        return None, None, None, None, d_h0, d_c0, *d_xs, *d_weights


class _CWeight(ctypes.Structure):
    _fields_ = [
        ("pattern", CPattern),
        *pointers("weight", "value", "value_t", "sum", "grad"),
    ]


class _CDense(ctypes.Structure):
    _fields_ = [
        *counts("width", "out"),
        *pointers("maps", "bias", "mask", "pre", "post"),
        *counts("pre_step", "post_step"),
        *pointers("d_pre", "bias_sums", "d_bias"),
    ]


class _COutside(ctypes.Structure):
    _fields_ = [*pointers("at"), *counts("step", "row")]


class _CRecurrence(ctypes.Structure):
    _fields_ = [
        *counts("steps", "block", "batch", "lanes", "size", "inputs"),
        *counts("activation", "depth", "rows", "first"),
        *counts("x_step", "z_step", "gate_step", "h_step", "tanh_step"),
        *pointers("ih", "hh", "bias", "dense", "x", "z", "gate", "h", "c", "tanh_c"),
        *pointers("d_z", "d_gate"),
        *counts("d_gate_step"),
        *pointers("d_h", "d_c", "d_x", "bias_sums", "d_bias"),
        *(
            (name, _COutside)
            for name in ("in", "h0", "c0", "out_h", "grad_h", "grad_c", "d_in", "d_h0", "d_c0")
        ),
    ]


class _Loop:
    """One direction of some sequences of a batch, feature-major: [time, feature, lane].

    Args:
        native: The kernels.
        gates: The weights of the direction.
        patterns: Which of them are awake.
        c: Where c goes: [time + 1, hidden, lane].
        part: Which sequences of the batch.
        kept: The arrays of that name of a loop that has run forward; None makes room for them.
    """

    def __init__(
        self,
        native: Native,
        gates: Gates,
        patterns: Patterns,
        c: Tensor,
        part: slice,
        kept: Sequence[Tensor] | None = None,
    ) -> None:
        self.native, self.gates, self.c, self.part = native, gates, c, part
        self.steps, (size, self.lanes) = len(c) - 1, c.shape[1:]
        self.weights = [gates.ih, gates.hh, *(dense.weight for dense in gates.dense)]
        self.patterns = [(patterns.ih,), (patterns.hh,), *patterns.dense]
        inputs = patterns.ih.shape[1]
        self.kept = self._arrays(inputs, size) if kept is None else kept
        of_maps, self.h, *arrays = self.kept
        self.masks, arrays = arrays[: len(gates.masks)], arrays[len(gates.masks) :]
        self.x, self.z, self.gate, self.tanh_c, *layers = arrays
        further = max(0, len(gates.dense) - 1)
        self.pre = [self.z, *layers[:further]]
        self.post = layers[further:] or in_place(self.pre, gates, dim=1)
        self._maps = self._all_maps(of_maps)
        self._dense = (_CDense * len(gates.dense))(
            *(
                _CDense(
                    width=dense.weight.shape[2],
                    out=dense.weight.shape[1],
                    maps=ctypes.addressof(self._maps[2 + j]),
                    bias=address(dense.bias),
                    mask=address(self.masks[j] if self.masks else None),
                    pre=self.pre[j].data_ptr(),
                    post=self.post[j].data_ptr(),
                    pre_step=self.pre[j].stride(0),
                    post_step=self.post[j].stride(0),
                )
                for j, dense in enumerate(gates.dense)
            )
        )
        self._record = _CRecurrence(
            steps=self.steps,
            batch=part.stop - part.start,
            lanes=self.lanes,
            size=size,
            inputs=inputs,
            activation=KINDS.index(gates.activation),
            depth=len(gates.dense),
            rows=len(gates.ih),
            first=gates.first,
            x_step=self.x.stride(0),
            z_step=self.z.stride(0),
            gate_step=self.gate.stride(0),
            h_step=self.h.stride(0),
            tanh_step=self.tanh_c.stride(0),
            ih=ctypes.addressof(self._maps[0]),
            hh=ctypes.addressof(self._maps[1]),
            bias=address(gates.bias),
            dense=ctypes.addressof(self._dense),
            x=self.x.data_ptr(),
            z=self.z.data_ptr(),
            gate=self.gate.data_ptr(),
            h=self.h.data_ptr(),
            c=c.data_ptr(),
            tanh_c=self.tanh_c.data_ptr(),
        )

    def _room(self, steps: int, *features: int) -> list[Tensor]:
        """Make room for [time, feature, lane], with the steps of a feature in places of their own.

        The weights' gradients come from the same features of many steps at a time.
        """
        return [self._rows(steps, width, apart(width * self.lanes)) for width in features]

    def _rows(self, steps: int, width: int, step: int) -> Tensor:
        """Make room for [time, feature, lane], so many floats from one step to the next."""
        room = self.c.new_empty(steps, step)[:, : width * self.lanes]
        return room.view(steps, width, self.lanes)

    def _arrays(self, inputs: int, size: int) -> list[Tensor]:
        """Make room for what goes forward and is read backward: of the maps, h, masks, layers."""
        gates, each = self.gates, [one for group in self.patterns for one in group]
        filled = sum(2 * one.column.numel() + one.column_t.numel() for one in each)
        widths = [4 * dense.weight.shape[2] for dense in gates.dense]
        layers = [inputs, len(gates.ih), 4 * size, size, *widths[1:]]
        if gates.activation not in SLOPE_BY_OUTPUT:
            layers += widths
        masks = (_feature_major(mask[:, self.part], self.lanes) for mask in gates.masks)
        return [
            self.c.new_empty(filled),
            *self._room(self.steps + 1, size),
            *(mask.flatten(0, 1) for mask in masks),
            *self._room(self.steps, *layers),
        ]

    def _all_maps(self, of_maps: Tensor) -> list[Any]:
        """Return the maps for C, each with its room: of ih, of hh, of every dense layer's gates."""
        room, size, maps = of_maps.data_ptr(), self.c.element_size(), []
        for weight, group in zip(self.weights, self.patterns, strict=True):
            records = (_CWeight * len(group))()
            for i, (record, own) in enumerate(zip(records, group, strict=True)):
                rows, columns = own.shape
                filled = own.column.numel() * size
                record.pattern = own.record
                record.weight = weight.data_ptr() + i * rows * columns * size
                record.value, record.sum, record.value_t = room, room + filled, room + 2 * filled
                room += 2 * filled + own.column_t.numel() * size
            maps.append(records)
        return maps

    def forward(self, x: Tensor, h0: Tensor, c0: Tensor, hs: Tensor) -> None:
        """Fill every array, and this part of h after every step [time all hidden]."""
        self._connect(**{"in": x, "h0": h0[None], "c0": c0[None], "out_h": hs})
        self.native.forward_sparse(ctypes.addressof(self._record))

    def backward(
        self,
        grad_h: Tensor | None,
        grad_c: Tensor | None,
        d_x: Tensor | None,
        d_h0: Tensor,
        d_c0: Tensor,
    ) -> list[Tensor | None]:
        """Fill this part of the gradients [time all in] and [all hidden]; return the weights'.

        These are of ih, hh, bias, and the dense layers' weights and biases.
        """
        grads, room = self._room_for_weights_grads(), self._room_for_sums_grads()
        if d_x is None:
            self._record.d_x = None
        self._connect(grad_h=grad_h, grad_c=grad_c, d_in=d_x, d_h0=d_h0[None], d_c0=d_c0[None])
        self.native.backward_sparse(ctypes.addressof(self._record))
        del room  # the record holds but its addresses
        return grads

    def _room_for_weights_grads(self) -> list[Tensor | None]:
        gates = self.gates
        given = [gates.ih, gates.hh, gates.bias, *(one for d in gates.dense for one in d)]
        grads = [None if one is None else one.new_empty(one.shape) for one in given]
        d_ih, d_hh, d_bias, *d_dense = grads
        for maps, grad in zip(self._maps, (d_ih, d_hh, *d_dense[::2]), strict=True):
            assert grad is not None
            for i, one in enumerate(maps):
                count = one.pattern.rows * one.pattern.columns
                one.grad = grad.data_ptr() + i * count * grad.element_size()
        self._record.d_bias = address(d_bias)
        for layer, d_own in zip(self._dense, d_dense[1::2], strict=True):
            layer.d_bias = address(d_own)
        return grads

    def _room_for_sums_grads(self) -> list[Tensor]:
        """Make room for the gradients of `_block` steps' sums, and for what is added up."""
        gates, record, size = self.gates, self._record, self.c.shape[1]
        record.block = self._block()
        # As far apart as the sums, which may have come back in other places than they went.
        d_pre = [self._rows(record.block, one.shape[1], one.stride(0)) for one in self.pre]
        d_gate = (
            d_pre[0][:, gates.first :]  # the direct path's sums are the gates'
            if gates.direct
            else self._room(record.block, 4 * size)[0]
        )
        record.d_z, record.d_gate, record.d_gate_step = (
            d_pre[0].data_ptr(), d_gate.data_ptr(), d_gate.stride(0),
        )  # fmt: skip
        d_x = self.native.steps_together(self.lanes) * self.x.shape[1]  # features of all of them
        once = self._room(1, size, size, d_x, len(gates.ih))
        record.d_h, record.d_c, record.d_x, record.bias_sums = (one.data_ptr() for one in once)
        biases = self._room(1, *(4 * dense.weight.shape[1] for dense in gates.dense))
        for layer, of_layer, bias in zip(self._dense, d_pre, biases, strict=False):
            layer.d_pre, layer.bias_sums = of_layer.data_ptr(), bias.data_ptr()
        return [*d_pre, d_gate, *once, *biases]

    def _block(self) -> int:
        """Return how many steps go backward together: about `_CACHED` numbers of an input."""
        widest = max(one.shape[1] for one in (self.x, self.h))
        blocks = max(1, -(-self.steps * widest * self.lanes // _CACHED))
        return -(-self.steps // blocks)

    def _connect(self, **outside: Tensor | None) -> None:
        """Say where this part of what is batch-major lies, [time all width]."""
        for name, tensor in outside.items():
            if tensor is None:
                setattr(self._record, name, _COutside())
                continue
            step, row, _ = tensor.stride()
            first = tensor.data_ptr() + self.part.start * row * tensor.element_size()
            setattr(self._record, name, _COutside(first, step, row))


def _split(saved: Sequence[Any], parts: int, leaves: int) -> tuple[Any, Any, Any]:
    return saved[:parts], saved[parts : parts + leaves], saved[parts + leaves :]


def _equal_parts(arrays: Sequence[Tensor], count: int) -> list[Sequence[Tensor]]:
    each = len(arrays) // count
    return [arrays[i * each : (i + 1) * each] for i in range(count)]


def _feature_major(
    x: Float[Tensor, "time batch width"], lanes: int
) -> Float[Tensor, "time width lane"]:
    """Return a copy with the batch last, filled up with zeros."""
    steps, batch, width = x.shape
    copy = x.new_empty(steps, width, lanes)
    copy[..., :batch] = x.mT
    copy[..., batch:] = 0
    return copy


def _in_rows(tensor: Float[Tensor, "*any width"]) -> Float[Tensor, "*any width"]:
    """Return the tensor, copied where the numbers of a row do not follow one another."""
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).resolve_neg()


def _sums(lists: list[list[Tensor | None]]) -> list[Tensor | None]:
    """Add up the parts' gradients, in their order."""
    return [
        None if same[0] is None else sum(same[1:], same[0]) for same in zip(*lists, strict=True)
    ]
