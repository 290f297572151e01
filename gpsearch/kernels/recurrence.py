"""The recurrence of one H-LSTM layer: all its directions go through one loop together.

Every direction reads its input from step 0 on (the caller has reversed the reverse one), so that
padding lies at the tail of each and never reaches a state that counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}


class Affine(NamedTuple):
    """An affine map of input and state onto the four gates (i, f, g, o)."""

    ih: Float[Tensor, "dir out in"]
    hh: Float[Tensor, "dir out state"]
    bias: Float[Tensor, "dir out"] | None


class Dense(NamedTuple):
    """An affine map inside each gate, from a hidden layer to the next one or to the gate."""

    weight: Float[Tensor, "dir 4 out in"]
    bias: Float[Tensor, "dir 4 out"] | None


class Norm(NamedTuple):
    """A layer norm over each gate's units."""

    weight: Float[Tensor, "dir 4 width"]
    bias: Float[Tensor, "dir 4 width"] | None


class Gates(NamedTuple):
    """The weights of one layer's gates, its directions stacked; masks are None without dropout.

    ``flat`` is the path without hidden layers; ``hidden`` is the first hidden layer and ``dense``
    what follows it. ``masks`` holds a dropout mask for the outputs of each hidden layer.
    """

    flat: Affine | None
    hidden: Affine
    dense: tuple[Dense, ...]
    norms: tuple[Norm, ...]
    masks: tuple[Float[Tensor, "batch dir 4 width"], ...]
    activation: str


def recurrence(
    xs: Float[Tensor, "dir time batch in"],
    h0: Float[Tensor, "dir batch hidden"],
    c0: Float[Tensor, "dir batch hidden"],
    gates: Gates,
) -> tuple[Float[Tensor, "time batch dir hidden"], Float[Tensor, "time batch dir hidden"]]:
    """Run one layer over all time steps and return its h and c at every step."""
    return plain(xs, h0, c0, gates)


def plain(
    xs: Float[Tensor, "dir time batch in"],
    h0: Float[Tensor, "dir batch hidden"],
    c0: Float[Tensor, "dir batch hidden"],
    gates: Gates,
) -> tuple[Float[Tensor, "time batch dir hidden"], Float[Tensor, "time batch dir hidden"]]:
    """Run the recurrence written out for autograd: the oracle, and the way for gate norms."""
    hidden_in = _input_product(xs, gates.hidden)
    flat_in = None if gates.flat is None else _input_product(xs, gates.flat)
    h, c, hs, cs = h0, c0, [], []
    for t in range(xs.shape[1]):
        z = torch.baddbmm(hidden_in[t], h, gates.hidden.hh.mT)
        a = _per_gate(z)
        for j, dense in enumerate(gates.dense):
            a = _dense(dense, _activate(gates, j, a))
        if flat_in is not None and gates.flat is not None:
            a = a + _per_gate(torch.baddbmm(flat_in[t], h, gates.flat.hh.mT))
        i, f, g, o = a.unbind(1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        hs.append(h)
        cs.append(c)
    return torch.stack(hs).transpose(1, 2), torch.stack(cs).transpose(1, 2)


def _input_product(
    xs: Float[Tensor, "dir time batch in"], affine: Affine
) -> tuple[Float[Tensor, "dir batch out"], ...]:
    """Multiply the inputs of all time steps at once, and hand out a step each."""
    rows = xs.flatten(1, 2)
    if affine.bias is None:
        product = torch.bmm(rows, affine.ih.mT)
    else:
        product = torch.baddbmm(affine.bias.unsqueeze(1), rows, affine.ih.mT)
    return product.view(*xs.shape[:3], -1).unbind(1)


def _per_gate(z: Float[Tensor, "dir batch out"]) -> Float[Tensor, "dir 4 batch width"]:
    return z.view(*z.shape[:2], 4, -1).transpose(1, 2)


def _dense(dense: Dense, a: Float[Tensor, "dir 4 batch in"]) -> Float[Tensor, "dir 4 batch out"]:
    product = a @ dense.weight.mT
    return product if dense.bias is None else product + dense.bias.unsqueeze(2)


def _activate(
    gates: Gates, j: int, a: Float[Tensor, "dir 4 batch width"]
) -> Float[Tensor, "dir 4 batch width"]:
    """Apply norm, activation and dropout of hidden layer ``j``."""
    if gates.norms:
        norm = gates.norms[j]
        a = F.layer_norm(a, a.shape[-1:]) * norm.weight.unsqueeze(2)
        a = a if norm.bias is None else a + norm.bias.unsqueeze(2)
    a = ACTIVATIONS[gates.activation](a)
    return a * gates.masks[j].permute(1, 2, 0, 3) if gates.masks else a
