"""The recurrence written out in torch's own operations: what all faster ways have to equal.

It also stands in for them where more is wanted than a gradient: one that is differentiated again,
or several at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gpsearch.kernels.gates import Gates, restored

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}


def plain(
    xs: Sequence[Float[Tensor, "time batch in"]],
    h0: Float[Tensor, "dir batch hidden"],
    c0: Float[Tensor, "dir batch hidden"],
    gates: Sequence[Gates],
) -> tuple[Float[Tensor, "dir time batch hidden"], Float[Tensor, "dir time batch hidden"]]:
    """Run one layer over all time steps; differentiable as often as wanted."""
    first, direct, depth = gates[0].first, gates[0].direct, len(gates[0].dense)
    hh = torch.stack([g.hh for g in gates]).mT
    weights = [torch.stack([g.dense[j].weight for g in gates]).mT for j in range(depth)]
    biases = [_stacked([g.dense[j].bias for g in gates]) for j in range(depth)]
    h, c, hs, cs = h0, c0, [], []
    for x in _input_products(xs, gates):
        z = torch.baddbmm(x, h, hh)
        a = _per_gate(z[..., :first])
        for j in range(depth):
            a = _activated(gates, j, a) @ weights[j] + biases[j]
        if direct:
            flat = _per_gate(z[..., first:])
            a = a + flat if depth else flat
        i, f, g, o = a.unbind(1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        hs.append(h)
        cs.append(c)
    return torch.stack(hs, 1), torch.stack(cs, 1)


def goes_further(*grads: Tensor | None) -> bool:
    """Tell whether a backward pass is to be differentiated again, or gets many gradients at once.

    As by ``create_graph=True``, ``is_grads_batched=True`` or `torch.func.vmap`: the faster ways can
    do none of it.
    """
    if torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    batched = torch._C._functorch.is_legacy_batchedtensor  # as `torch.autograd.grad` makes them
    return any(one is not None and batched(one) for one in grads)


def kept_leaves(leaves: Sequence[Any]) -> list[Any]:
    """Return the leaves as they can be kept for `gradients`.

    A state that wants no gradient is often written to, as by who carries it from call to call.
    """
    states = [one if one.requires_grad else one.clone() for one in leaves[:2]]
    return [*states, *leaves[2:]]


def gradients(
    activation: str,
    masks: Sequence[tuple[Tensor, ...]],
    leaves: Sequence[Any],
    needed: Sequence[bool],
    *grads: Tensor | None,
) -> list[Tensor | None]:
    """Return a layer's gradients by autograd.

    Args:
        activation: Of the gates.
        masks: Of every direction's gates.
        leaves: h0, c0, every direction's input, and the weights as `flattened` returns them.
        needed: Which of these have a gradient.
        *grads: Of the layer's h and c; None is zero.

    Raises:
        RuntimeError: Autocast had cast some, and the copies know nothing of what they were.
    """
    if any(need and not one.requires_grad for one, need in zip(leaves, needed, strict=True)):
        raise RuntimeError("what autocast has cast for an H-LSTM is differentiable once")
    dirs = len(masks)
    with torch.enable_grad():
        # What was computed from another leaf would else have its gradient in that one's, too.
        own: list[Any] = [None if one is None else one.view_as(one) for one in leaves]
        (h0, c0), xs, weights = own[:2], own[2 : 2 + dirs], own[2 + dirs :]
        hs, cs = plain(xs, h0, c0, restored(activation, masks, weights))
    outputs = [(out, grad) for out, grad in zip((hs, cs), grads, strict=True) if grad is not None]
    wanted = [one for one, need in zip(own, needed, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in outputs],
            wanted,
            [grad for _, grad in outputs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    )
    return [next(found) if need else None for need in needed]


def _stacked(biases: Sequence[Tensor | None]) -> Tensor | float:
    """Stack per-gate vectors, to be added to rows of each gate; zero where they are absent."""
    given = [bias for bias in biases if bias is not None]
    return torch.stack(given).unsqueeze(2) if given else 0.0


def _input_products(
    xs: Sequence[Float[Tensor, "time batch in"]], gates: Sequence[Gates]
) -> tuple[Float[Tensor, "dir batch rows"], ...]:
    """Multiply the inputs of all time steps at once, and hand out a step each."""
    products = [F.linear(x, g.ih, g.bias) for x, g in zip(xs, gates, strict=True)]
    return torch.stack(products, 1).unbind(0)


def _per_gate(z: Float[Tensor, "dir batch rows"]) -> Float[Tensor, "dir 4 batch width"]:
    return z.reshape(*z.shape[:2], 4, z.shape[2] // 4).transpose(1, 2)


def _activated(
    gates: Sequence[Gates], j: int, a: Float[Tensor, "dir 4 batch width"]
) -> Float[Tensor, "dir 4 batch width"]:
    """Apply norm, activation and dropout of hidden layer ``j``."""
    if gates[0].norms:
        a = F.layer_norm(a, a.shape[-1:])
        a = a * _stacked([g.norms[j].weight for g in gates])
        a = a + _stacked([g.norms[j].bias for g in gates])
    a = ACTIVATIONS[gates[0].activation](a)
    return a * torch.stack([g.masks[j] for g in gates]) if gates[0].masks else a
