"""The recurrence for weights of which few are awake: products with those only, in C.

Outputs and gradients are those of the masked network, but dormant weights get no gradient (zero).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from gpsearch.kernels.compiled import KINDS, address, each_in_threads, slices
from gpsearch.kernels.gates import Gates, flattened, restored
from gpsearch.kernels.native import Native
from gpsearch.kernels.native import native as find_native
from gpsearch.kernels.pattern import Pattern, Patterns

PAYS_BELOW = 0.25
"""Density under which sparse products beat dense ones even for small layers and batches: 128 units,
8 sequences (measured; larger ones break even at 0.35)."""
_PAYS_BELOW_IF_NARROW = 0.12
"""The same where the products take narrower vectors than the dense ones, as for 8 sequences on
AVX-512 (measured there)."""


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
    if 2 * batch > native.lanes(batch):
        return native
    narrower = find_native("avx2") if native.instruction_set == "avx512" else None
    fits = narrower is not None and 2 * batch > narrower.lanes(batch)
    sparse_enough = max(one.density for one in given) < _PAYS_BELOW_IF_NARROW
    return narrower if fits and sparse_enough else None


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
        (h0, c0), xs, weights = leaves[:2], leaves[2 : 2 + dirs], leaves[2 + dirs :]
        steps, batch, _ = xs[0].shape
        hs, cs = (h0.new_empty(dirs, steps, *h0.shape[1:]) for _ in range(2))
        parts = slices(batch, min(batch // native.lanes(1), -(-torch.get_num_threads() // dirs)))
        ctx.loops = [
            [_Loop(native, g, p, x.shape[2], steps, h, c, slice(*part)) for part in parts]
            for g, p, x, h, c in zip(
                restored(activation, masks, weights), patterns, xs, h0, c0, strict=True
            )
        ]
        outside = list(zip(map(_in_rows, xs), hs, cs, strict=True))
        jobs = [(loop, *outside[d]) for d, loops in enumerate(ctx.loops) for loop in loops]
        each_in_threads(_Loop.forward, jobs)
        ctx.x_shapes = [x.shape for x in xs]
        return hs, cs

    @staticmethod
    @custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    @once_differentiable
    def backward(
        ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        d_xs = [
            ctx.loops[d][0].h.new_empty(shape) if ctx.needs_input_grad[6 + d] else None
            for d, shape in enumerate(ctx.x_shapes)
        ]
        grads = [None if one is None else _in_rows(one) for one in (grad_h, grad_c)]
        jobs = [
            (loop, *(None if one is None else one[d] for one in grads), d_xs[d])
            for d, loops in enumerate(ctx.loops)
            for loop in loops
        ]
        each_in_threads(_Loop.backward, jobs)
        d_h, d_c = (
            torch.stack([torch.cat([getattr(loop, name).mT[: loop.batch] for loop in loops])
                         for loops in ctx.loops])
            for name in ("d_h", "d_c")
        )  # fmt: skip
        d_weights = [one for loops in ctx.loops for one in _sums([one.grads for one in loops])]
        return None, None, None, None, d_h, d_c, *d_xs, *d_weights


class _CSparse(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("start", "column", "value")),
    ]


class _CDense(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("width", "out")),
        *(
            (name, ctypes.c_void_p)
            for name in ("maps", "bias", "mask", "pre", "post", "d_pre", "d_bias")
        ),
    ]  # fmt: skip


class _COutside(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("step", ctypes.c_int64), ("row", ctypes.c_int64)]


class _CRecurrence(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "steps", "batch", "lanes", "size", "inputs", "activation", "depth", "rows", "first",
            )
        ),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "ih", "hh", "bias", "dense", "x", "z", "gate", "h", "c", "tanh_c", "d_z", "d_gate",
            )
        ),
        ("d_gate_step", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("d_h", "d_c", "d_x", "d_bias")),
        *((name, _COutside) for name in ("in", "out_h", "out_c", "grad_h", "grad_c", "d_in")),
    ]  # fmt: skip


class _Loop:
    """One direction of some sequences of a batch, feature-major: [time, feature, lane]."""

    def __init__(
        self,
        native: Native,
        gates: Gates,
        patterns: Patterns,
        inputs: int,
        steps: int,
        h0: Float[Tensor, "all hidden"],
        c0: Float[Tensor, "all hidden"],
        part: slice,
    ) -> None:
        self.native, self.gates, self.patterns, self.part = native, gates, patterns, part
        self.batch = part.stop - part.start
        size = h0.shape[1]
        self.lanes = native.lanes(self.batch)
        widths = [4 * dense.weight.shape[2] for dense in gates.dense]

        def room(*features: int) -> list[Tensor]:
            return [h0.new_empty(steps, width, self.lanes) for width in features]

        self.x, self.z, self.gate, self.tanh_c = room(inputs, len(gates.ih), 4 * size, size)
        self.post, self.pre = room(*widths), [self.z, *room(*widths[1:])]
        self.h, self.c = (h0.new_empty(steps + 1, size, self.lanes) for _ in range(2))
        for state, first in ((self.h, h0), (self.c, c0)):
            state[0] = _feature_major(first[part][None], self.lanes)[0]
        self.masks = [
            _feature_major(mask[:, part], self.lanes).flatten(0, 1) for mask in gates.masks
        ]
        self.values = [
            [pattern.values(weight) for pattern, weight in zip(patterns_, weights, strict=True)]
            for patterns_, weights in self._matrices()
        ]

    def _matrices(self) -> list[tuple[tuple[Pattern, ...], tuple[Tensor, ...]]]:
        """List ih, hh, and every dense layer's four gates."""
        gates, own = self.gates, self.patterns
        flat = [((own.ih,), (gates.ih,)), ((own.hh,), (gates.hh,))]
        return flat + [
            (patterns, tuple(dense.weight))
            for patterns, dense in zip(own.dense, gates.dense, strict=True)
        ]

    def forward(self, x: Tensor, hs: Tensor, cs: Tensor) -> None:
        """Fill every array, and this part of the states after every step [time all hidden]."""
        maps = [
            _array(
                _CSparse, [_map(p, v, flip=False) for p, v in zip(patterns, values, strict=True)]
            )
            for (patterns, _), values in zip(self._matrices(), self.values, strict=True)
        ]
        outside = {"in": self._outside(x), "out_h": self._outside(hs), "out_c": self._outside(cs)}
        record, _alive = self._record(maps, [{} for _ in self.gates.dense], **outside)
        self.native.forward_sparse(ctypes.addressof(record))

    def backward(self, grad_h: Tensor | None, grad_c: Tensor | None, d_x: Tensor | None) -> None:
        """Fill the gradients of all sums, and this part of the inputs' [time all in]."""
        gates = self.gates
        flipped, maps = [], []
        for (patterns, _), values in zip(self._matrices(), self.values, strict=True):
            pairs = list(zip(patterns, values, strict=True))
            flipped.append([value.index_select(0, pattern.order) for pattern, value in pairs])
            pairs = list(zip(patterns, flipped[-1], strict=True))
            maps.append(_array(_CSparse, [_map(p, v, flip=True) for p, v in pairs]))
        self.d_pre = [torch.empty_like(pre) for pre in self.pre]
        behind = self.d_pre[0][:, gates.first :]  # the direct path's sums are the gates'
        self.d_gate = behind if gates.direct else torch.empty_like(self.gate)
        self.d_h, self.d_c = (torch.zeros_like(self.h[0]) for _ in range(2))
        room = None if d_x is None else torch.empty_like(self.x[0])
        self.d_bias = None if gates.bias is None else torch.zeros_like(self.z[0])
        self.d_biases = [
            None if one.bias is None else self.h.new_zeros(one.bias.numel(), self.lanes)
            for one in gates.dense
        ]
        record, _alive = self._record(
            maps,
            [
                {"d_pre": d_pre.data_ptr(), "d_bias": address(d_bias)}
                for d_pre, d_bias in zip(self.d_pre, self.d_biases, strict=False)
            ],
            grad_h=self._outside(grad_h),
            grad_c=self._outside(grad_c),
            d_in=self._outside(d_x),
            d_z=self.d_pre[0].data_ptr(),
            d_gate=self.d_gate.data_ptr(),
            d_gate_step=self.d_gate.stride(0),
            d_h=self.d_h.data_ptr(),
            d_c=self.d_c.data_ptr(),
            d_x=address(room),
            d_bias=address(self.d_bias),
        )
        self.native.backward_sparse(ctypes.addressof(record))
        self.grads = self._gradients()

    def _outside(self, tensor: Float[Tensor, "time all width"] | None) -> _COutside:
        """Say where this part of something batch-major lies."""
        if tensor is None:
            return _COutside()
        part = tensor[:, self.part]
        return _COutside(part.data_ptr(), *part.stride()[:2])

    def _record(
        self, maps: list[Any], of_layers: list[dict[str, Any]], **more: Any
    ) -> tuple[_CRecurrence, list[Any]]:
        gates, (steps, inputs, lanes) = self.gates, self.x.shape
        layers = [
            _CDense(
                width=dense.weight.shape[2],
                out=dense.weight.shape[1],
                maps=ctypes.addressof(maps[2 + j]),
                bias=address(dense.bias),
                mask=address(self.masks[j] if self.masks else None),
                pre=self.pre[j].data_ptr(),
                post=self.post[j].data_ptr(),
                **of_layers[j],
            )
            for j, dense in enumerate(gates.dense)
        ]
        array = _array(_CDense, layers)
        record = _CRecurrence(
            steps=steps,
            batch=self.batch,
            lanes=lanes,
            size=self.h.shape[1],
            inputs=inputs,
            activation=KINDS.index(gates.activation),
            depth=len(layers),
            rows=self.z.shape[1],
            first=gates.first,
            ih=ctypes.addressof(maps[0]),
            hh=ctypes.addressof(maps[1]),
            bias=address(gates.bias),
            dense=ctypes.addressof(array),
            x=self.x.data_ptr(),
            z=self.z.data_ptr(),
            gate=self.gate.data_ptr(),
            h=self.h.data_ptr(),
            c=self.c.data_ptr(),
            tanh_c=self.tanh_c.data_ptr(),
            **more,
        )
        return record, [array, maps]

    def _gradients(self) -> list[Tensor | None]:
        """Return the gradients of ih, hh, bias, and the dense layers' weights and biases."""
        gates, own, d_z = self.gates, self.patterns, self.d_pre[0]
        grads: list[Tensor | None] = [
            self._sample(own.ih, d_z, self.x, d_z.new_empty(gates.ih.shape)),
            self._sample(own.hh, d_z, self.h[:-1], d_z.new_empty(gates.hh.shape)),
            None if self.d_bias is None else self.d_bias.sum(1),
        ]
        outs = [*self.d_pre[1:], self.d_gate][: len(gates.dense)]
        for dense, patterns, d_out, post, d_bias in zip(
            gates.dense, own.dense, outs, self.post, self.d_biases, strict=True
        ):
            weight = d_out.new_empty(dense.weight.shape)
            four = zip(patterns, d_out.chunk(4, 1), post.chunk(4, 1), weight, strict=True)
            for pattern, d, x, grad in four:
                self._sample(pattern, d, x, grad)
            grads.append(weight)
            grads.append(None if d_bias is None else d_bias.sum(1).view(4, -1))
        return grads

    def _sample(
        self,
        pattern: Pattern,
        d: Float[Tensor, "time rows lane"],
        x: Float[Tensor, "time columns lane"],
        grad: Float[Tensor, "rows columns"],
    ) -> Tensor:
        """Return ``grad``, filled with the gradient of the awake weights, and zeros."""
        record = _map(pattern, None, flip=False)
        self.native.sampled(
            ctypes.addressof(record), x.shape[1], len(x), self.lanes,
            d.data_ptr(), d.stride(0), x.data_ptr(), x.stride(0), grad.data_ptr(),
        )  # fmt: skip
        return grad


def _map(pattern: Pattern, values: Tensor | None, *, flip: bool) -> _CSparse:
    """Return the map (or its transpose, whose values come in its own order) for C."""
    start, column = (pattern.start_t, pattern.column_t) if flip else (pattern.start, pattern.column)
    return _CSparse(pattern.shape[flip], start.data_ptr(), column.data_ptr(), address(values))


def _array(kind: Any, records: Sequence[ctypes.Structure]) -> Any:
    return (kind * len(records))(*records)


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
