"""The recurrence as one autograd node with a hand-written backward, in pure torch.

Against autograd's own way through the written-out loop: buffers are allocated once, a step works
in place while its data is in cache, and all gradients of weights and inputs are large products,
of many steps or of all. At small sizes a step costs what the number of its operations costs; hence

- the rows of hidden and direct path are one product, and the gates of all directions one batch;
- what the derivatives of sigmoid and tanh need is prepared for a block of steps at once: a step
  only multiplies. The gates' gradients of a block, the largest array of all, are in cache when the
  block's share of the weights' gradients is taken from them, and make room for the next;
- tanh(x) is 2 sigmoid(2x) - 1, many times faster in torch on a CPU. The factor inside sits in the
  rows of g and in a doubled cell state; `lerp(-1, 1, s)` is 2s - 1 in one operation;
- weights are turned once before the forward loop: MKL takes up to twice as long where the right
  factor of a product of few rows lies transposed;
- inside the gates a bias is the weight of one more unit, whose output is 1: with its gradient, it
  costs no pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd

from gpsearch.kernels.gates import Gates, flattened, restored
from gpsearch.kernels.plain import goes_further, gradients, kept_leaves
from gpsearch.kernels.products import linear, room_like, sums_of_products

_aten = torch.ops.aten

_ROWS = 256
"""Time steps times sequences that go backward together: as few as products over them are still fast
with."""

_COLUMNS = 512
"""The widest product of few rows; a column of wider ones takes MKL up to 1.3 times as long."""

_ACTIVATE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "relu": lambda pre, out: torch.clamp_min(pre, 0, out=out),
    "leaky_relu": lambda pre, out: _aten.leaky_relu.out(pre, out=out),
    "tanh": lambda pre, out: torch.tanh(pre, out=out),
    "gelu": lambda pre, out: out.copy_(F.gelu(pre)),  # gelu's own out= errs on strided views
}

_DEACTIVATE: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "relu": lambda d, pre, out: _aten.threshold_backward.grad_input(d, pre, 0, grad_input=out),
    "leaky_relu": lambda d, pre, out: _aten.leaky_relu_backward.grad_input(
        d, pre, 0.01, False, grad_input=out
    ),
    "tanh": lambda d, pre, out: _aten.tanh_backward.grad_input(d, torch.tanh(pre), grad_input=out),
    "gelu": lambda d, pre, out: out.copy_(_aten.gelu_backward(d, pre)),
}
"""From the gradient of an activation's output, and its input, the gradient of that."""


def fused(
    xs: Sequence[Float[Tensor, "time batch in"]],
    h0: Float[Tensor, "dir batch hidden"],
    c0: Float[Tensor, "dir batch hidden"],
    gates: Sequence[Gates],
) -> tuple[Float[Tensor, "dir time batch hidden"], Float[Tensor, "dir time batch hidden"]]:
    """Run one layer without gate norms over all time steps."""
    fixed = gates[0].activation, tuple(g.masks for g in gates)
    hs, cs = _Fused.apply(*fixed, h0, c0, *xs, *flattened(gates))  # type: ignore[no-untyped-call]
    return hs, cs


class _Fused(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any, activation: str, masks: tuple[tuple[Tensor, ...], ...], *leaves: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        dirs = len(masks)
        (h0, c0), xs, weights = leaves[:2], leaves[2 : 2 + dirs], leaves[2 + dirs :]
        loop = _Forward(xs, h0, c0, restored(activation, masks, weights))
        trace = loop.run()
        ctx.fixed, ctx.counts = (activation, masks), (dirs, len(leaves), len(trace.post))
        ctx.save_for_backward(*kept_leaves(leaves), *trace.tensors())
        return trace.h[:, 1:], trace.c[1:].transpose(0, 1)

    @staticmethod
    @custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dirs, count, depth = ctx.counts
        saved = ctx.saved_tensors  # at once: each look unpacks all that hooks have packed
        leaves, saved = saved[:count], saved[count:]
        activation, masks = ctx.fixed
        if goes_further(*grads):
            needed = ctx.needs_input_grad[2:]
            return None, None, *gradients(activation, masks, leaves, needed, *grads)
        xs, weights = leaves[2 : 2 + dirs], leaves[2 + dirs :]
        trace = _Trace.of(saved, dirs, depth)
        loop = _Backward(restored(activation, masks, weights), trace, *grads)
        d_h0, d_c0 = loop.run()
        d_dense = loop.dense_gradients()
        d_weights = [
            d for k, x in enumerate(xs) for d in (*loop.first_gradients(k, x), *d_dense[k])
        ]
        d_xs = [
            loop.input_gradient(k) if ctx.needs_input_grad[4 + k] else None for k in range(dirs)
        ]
        return None, None, d_h0, d_c0, *d_xs, *d_weights


class _Trace(NamedTuple):
    """What the forward loop leaves behind; ``gate`` holds i, f, g, o after sigmoid and tanh.

    ``z`` (one for each direction) and ``pre`` are the sums before the activation, of the first
    and the further hidden layers; ``post`` is what all of them put out and, where what follows has
    biases, 1.
    """

    h: Float[Tensor, "dir time+1 batch hidden"]
    c: Float[Tensor, "time+1 dir batch hidden"]
    tanh_c: Float[Tensor, "time dir batch hidden"]
    gate: Float[Tensor, "time 4 dir batch hidden"]
    z: Sequence[Float[Tensor, "time batch rows"]]
    pre: Sequence[Float[Tensor, "time 4 dir batch width"]]
    post: Sequence[Float[Tensor, "4 dir time batch _units_and_one"]]

    def tensors(self) -> tuple[Tensor, ...]:
        return *self[:4], *self.z, *self.pre, *self.post

    @classmethod
    def of(cls, tensors: Sequence[Tensor], dirs: int, depth: int) -> _Trace:
        z, rest = tensors[4 : 4 + dirs], tensors[4 + dirs :]
        h, c, tanh_c, gate = tensors[:4]
        return cls(h, c, tanh_c, gate, z, rest[: depth - 1], rest[depth - 1 :])


class _Forward:
    """The forward loop: buffers, a view of each for every step, and the step."""

    def __init__(
        self, xs: Sequence[Tensor], h0: Tensor, c0: Tensor, gates: Sequence[Gates]
    ) -> None:
        (steps, batch), (dirs, _, size) = xs[0].shape[:2], h0.shape
        widths = [d.weight.shape[2] for d in gates[0].dense]
        self.weights = _weights_and_biases(gates)
        new = h0.new_empty
        self.trace = _Trace(
            new(dirs, steps + 1, batch, size),
            new(steps + 1, dirs, batch, size),
            new(steps, dirs, batch, size),
            new(steps, 4, dirs, batch, size),
            [_rows_product(x, g.ih, g.bias) for x, g in zip(xs, gates, strict=True)],
            [new(steps, 4, dirs, batch, width) for width in widths[1:]],
            [new(4, dirs, steps, batch, weight.shape[2]) for weight in self.weights],
        )
        for post, width in zip(self.trace.post, widths, strict=True):
            post[..., width:] = 1
        self.units = [post[..., :m] for post, m in zip(self.trace.post, widths, strict=True)]
        self.trace.h[:, 0], self.trace.c[0] = h0, c0 * 2
        self.minus, self.plus = torch.full_like(h0, -1.0), torch.ones_like(h0)
        self.activate = _ACTIVATE[gates[0].activation]
        self.masks = [torch.stack(m, 1) for m in zip(*(g.masks for g in gates), strict=True)]
        self._view_directions(gates)
        self._view_layers(gates)
        self._view_cell()

    def _view_directions(self, gates: Sequence[Gates]) -> None:
        """Per direction: product onto z, and what its hidden and its direct rows lead to."""
        first, size = gates[0].first, self.minus.shape[2]
        self.first: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, Any]] = []
        for d, (g, z) in enumerate(zip(gates, self.trace.z, strict=True)):
            hh, h, post = g.hh, self.trace.h[d].unbind(0), self.units[0][:, d].unbind(1)
            if g.direct:
                of_g = slice(first + 2 * size, first + 3 * size)
                hh = hh.clone()
                hh[of_g] *= 2
                z[..., of_g] *= 2
                flat = _by_gate(z[..., first:]).unbind(1)
                self.direct.append((self.trace.gate[:, :, d].unbind(0), flat))
            turned = [piece.mT.contiguous() for piece in torch.split(hh, _COLUMNS)]
            onto = zip(*(piece.unbind(0) for piece in torch.split(z, _COLUMNS, 2)), strict=True)
            hidden = _by_gate(z[..., :first]).unbind(1)
            self.first.append((list(onto), h, turned, hidden, post))

    def _view_layers(self, gates: Sequence[Gates]) -> None:
        """Per hidden layer: the product onto the next layer, or onto the gates."""
        self.weights[-1][2 * len(gates) : 3 * len(gates)] *= 2
        outs = [out.flatten(1, 2).unbind(0) for out in (*self.trace.pre, self.trace.gate)]
        rows = [post.flatten(0, 1).unbind(1) for post in self.trace.post]
        turned = [weight.mT.contiguous() for weight in self.weights]
        self.layers = list(zip(rows, turned, outs, strict=True))
        self.put_out = [units.flatten(0, 1).unbind(1) for units in self.units]
        self.masked = [units.unbind(2) for units in self.units] if self.masks else []

    def _view_cell(self) -> None:
        trace = self.trace
        self.sums = trace.gate.unbind(0)
        parts = (part.unbind(0) for part in trace.gate.unbind(1))
        c, h = trace.c.unbind(0), trace.h[:, 1:].unbind(1)
        self.cell = list(zip(*parts, c[:-1], c[1:], trace.tanh_c.unbind(0), h, strict=True))

    def run(self) -> _Trace:
        for t in range(len(self.cell)):
            self._gates(t)
            self._cell(t)
        self.trace.c.mul_(0.5)
        return self.trace

    def _gates(self, t: int) -> None:
        for onto, h, pieces, hidden, post in self.first:
            for z, hh in zip(onto[t], pieces, strict=True):
                z.addmm_(h[t], hh)
            self.activate(hidden[t], post[t])
        for j, (rows, weight, out) in enumerate(self.layers):
            if j:
                self.activate(self.layers[j - 1][2][t], self.put_out[j][t])
            if self.masks:
                self.masked[j][t].mul_(self.masks[j])
            torch.bmm(rows[t], weight, out=out[t])
        for sums, flat in self.direct:
            sums[t].add_(flat[t])

    def _cell(self, t: int) -> None:
        i, f, g, o, last, c, tanh_c, h = self.cell[t]
        self.sums[t].sigmoid_()
        torch.lerp(self.minus, self.plus, g, out=g)
        torch.mul(f, last, out=c)
        c.addcmul_(i, g, value=2)
        torch.sigmoid(c, out=tanh_c)
        torch.lerp(self.minus, self.plus, tanh_c, out=tanh_c)
        torch.mul(o, tanh_c, out=h)


class _Backward:
    """The backward loop, from the last step to the first, and the products over many steps."""

    def __init__(
        self,
        gates: Sequence[Gates],
        trace: _Trace,
        grad_hs: Tensor | None,
        grad_cs: Tensor | None,
    ) -> None:
        self.gates, self.trace = gates, trace
        steps, dirs, batch, size = trace.tanh_c.shape
        self.block = min(steps, max(1, _ROWS // max(1, batch)))
        self.grad_hs = None if grad_hs is None else grad_hs.unbind(1)
        self.grad_cs = None if grad_cs is None else grad_cs.unbind(1)
        self.dh, self.dc = (trace.h.new_zeros(dirs, batch, size) for _ in range(2))
        self.dz = [room_like(z) for z in trace.z]
        first = gates[0].first
        self.d_flat = [_by_gate(dz[..., first:]) for dz in self.dz] if gates[0].direct else []
        # Of a block's steps, each gate's together: one product then makes its weights' gradients.
        widths = [pre.shape[-1] for pre in trace.pre]
        self.d_outs = [
            trace.h.new_empty(4, dirs, self.block, batch, width) for width in (*widths, size)
        ]
        self.d_dense: list[Tensor] = []
        self._view_cell()
        self._view_layers()

    def _view_cell(self) -> None:
        trace, d_gate = self.trace, self.d_outs[-1]
        self.c_slope = trace.h.new_empty(self.block, *self.dc.shape)
        d_ifg, d_o = d_gate[:3].unbind(2), d_gate[3].unbind(1)
        self.cell = list(zip(self.c_slope.unbind(0), d_ifg, d_o, strict=True))
        self.forget = trace.gate[:, 1].unbind(0)
        of_time = (*trace.gate.unbind(1), trace.c[:-1], trace.tanh_c)
        self.blocks = list(zip(*(torch.split(one, self.block) for one in of_time), strict=True))

    def _prepare(self, block: int) -> int:
        """Fill the gates' gradients with what will be multiplied with dh (for o) and dc.

        Returns:
            How many steps the block has.
        """
        i, f, g, o, c, tanh_c = self.blocks[block]
        count = len(c)
        d_i, d_f, d_g, d_o = self.d_outs[-1].transpose(1, 2)[:, :count].unbind(0)
        c_slope = self.c_slope[:count]
        _aten.sigmoid_backward.grad_input(g, i, grad_input=d_i)
        _aten.sigmoid_backward.grad_input(c, f, grad_input=d_f)
        _aten.tanh_backward.grad_input(i, g, grad_input=d_g)
        _aten.sigmoid_backward.grad_input(tanh_c, o, grad_input=d_o)
        _aten.tanh_backward.grad_input(o, tanh_c, grad_input=c_slope)
        return count

    def _view_layers(self) -> None:
        gates, trace, (dirs, batch) = self.gates, self.trace, self.dh.shape[:2]
        self.deactivate = _DEACTIVATE[gates[0].activation]
        masks = zip(*(g.masks for g in gates), strict=True)
        self.masks = [torch.stack(of_layer, 1).flatten(0, 1) for of_layer in masks]
        self.weights = _stacked_weights(gates)
        self.d_rows = [d.flatten(0, 1).unbind(1) for d in self.d_outs]
        self.pre = [pre.flatten(1, 2).unbind(0) for pre in trace.pre]
        self.post = [post.flatten(0, 1) for post in trace.post]
        self.d_post = [
            self.dh.new_empty(4 * dirs, batch, weight.shape[2]) for weight in self.weights
        ]
        self.directions = []
        for d, g in enumerate(gates):
            pre, d_hidden = (_by_gate(z[d][..., : g.first]).unbind(1) for z in (trace.z, self.dz))
            d_post = self.d_post[0].view(4, dirs, batch, -1)[:, d]
            self.directions.append((d_post, pre, d_hidden, self.dz[d].unbind(0), g.hh, self.dh[d]))
        of_gates = [self.d_outs[-1][:, d].unbind(1) for d in range(len(self.d_flat))]
        self.direct = [(flat.unbind(1), d) for flat, d in zip(self.d_flat, of_gates, strict=True)]

    def run(self) -> tuple[Tensor, Tensor]:
        """Go back through all steps and return the gradients of the initial h and c."""
        if self.grad_hs is not None:
            self.dh.copy_(self.grad_hs[-1])
        for block in range(len(self.blocks) - 1, -1, -1):
            count, first = self._prepare(block), block * self.block
            for kept in range(count - 1, -1, -1):
                self._cell(first + kept, kept)
                self._gates(first + kept, kept)
            self._add_products(first, count)
        return self.dh, self.dc

    def _cell(self, t: int, kept: int) -> None:
        c_slope, d_ifg, d_o = self.cell[kept]
        if self.grad_cs is not None:
            self.dc.add_(self.grad_cs[t])
        self.dc.addcmul_(self.dh, c_slope)
        d_ifg.mul_(self.dc)
        d_o.mul_(self.dh)
        self.dc.mul_(self.forget[t])

    def _gates(self, t: int, kept: int) -> None:
        for j in range(len(self.d_post) - 1, -1, -1):
            torch.bmm(self.d_rows[j][kept], self.weights[j], out=self.d_post[j])
            if self.masks:
                self.d_post[j].mul_(self.masks[j])
            if j:
                self.deactivate(self.d_post[j], self.pre[j - 1][t], self.d_rows[j - 1][kept])
        for flat, of_gates in self.direct:
            flat[t].copy_(of_gates[kept])
        above = None if self.grad_hs is None or t == 0 else self.grad_hs[t - 1]
        for d, (d_post, pre, d_hidden, dz, hh, dh) in enumerate(self.directions):
            self.deactivate(d_post, pre[t], d_hidden[t])
            if above is None:
                torch.mm(dz[t], hh, out=dh)
            else:
                torch.addmm(above[d], dz[t], hh, out=dh)

    def _add_products(self, first: int, count: int) -> None:
        """Add to the dense layers' gradients what ``count`` steps from ``first`` on have in it."""
        for j, (post, d_out) in enumerate(zip(self.post, self.d_outs, strict=True)):
            read = post[:, first : first + count].flatten(1, 2).mT
            written = d_out[:, :, :count].flatten(0, 1).flatten(1, 2)
            if j < len(self.d_dense):
                self.d_dense[j].baddbmm_(read, written)
            else:
                self.d_dense.append(torch.bmm(read, written))

    def input_gradient(self, d: int) -> Tensor:
        return _rows_product(self.dz[d], self.gates[d].ih.mT)

    def first_gradients(self, d: int, x: Tensor) -> list[Tensor | None]:
        """Return a direction's gradients of ih, hh and bias."""
        rows = self.dz[d].flatten(0, 1)
        of_x, of_h = sums_of_products(rows, [x.flatten(0, 1), self.trace.h[d, :-1].flatten(0, 1)])
        return [of_x, of_h, None if self.gates[d].bias is None else rows.sum(0)]

    def dense_gradients(self) -> list[list[Tensor | None]]:
        """Return each direction's gradients of the dense layers' weights and biases."""
        grads: list[list[Tensor | None]] = [[] for _ in self.gates]
        for j, both in enumerate(self.d_dense):
            by_direction = both.view(4, len(self.gates), *both.shape[1:]).unbind(1)
            for own, gates, of_direction in zip(grads, self.gates, by_direction, strict=True):
                width = gates.dense[j].weight.shape[2]
                own.append(of_direction[:, :width].mT.contiguous())
                bias = gates.dense[j].bias
                own.append(None if bias is None else of_direction[:, width].contiguous())
        return grads


def _rows_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x.flatten(0, 1), weight, bias).view(*x.shape[:2], -1)


def _by_gate(z: Float[Tensor, "time batch rows"]) -> Float[Tensor, "4 time batch width"]:
    return z.view(*z.shape[:2], 4, z.shape[2] // 4).permute(2, 0, 1, 3)


def _stacked_weights(gates: Sequence[Gates]) -> list[Tensor]:
    """Return each dense layer's weights of all gates and directions: [4 * dir, out, in]."""
    layers = zip(*(g.dense for g in gates), strict=True)
    return [torch.stack([d.weight for d in layer], 1).flatten(0, 1) for layer in layers]


def _weights_and_biases(gates: Sequence[Gates]) -> list[Tensor]:
    """Return these with the biases, if any, as a last column: [4 * dir, out, in or in + 1]."""
    both = []
    for j, weights in enumerate(_stacked_weights(gates)):
        biases = [g.dense[j].bias for g in gates]
        given = [bias for bias in biases if bias is not None]
        column = [torch.stack(given, 1).flatten(0, 1).unsqueeze(2)] if given else []
        both.append(torch.cat([weights, *column], 2))
    return both
