"""The recurrence of one H-LSTM layer: all its directions go through one loop together.

Every direction reads its input from step 0 on (the caller has reversed the reverse one), so that
padding lies at the tail of each and never reaches a state that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from gpsearch.kernels.compiled import compiled
from gpsearch.kernels.fused import fused
from gpsearch.kernels.gates import Gates, flattened, refuse_unlike
from gpsearch.kernels.native import Native, native
from gpsearch.kernels.sparse import kernels_for_sparse, sparse
from gpsearch.kernels.traced import traced

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}


def recurrence(
    xs: Sequence[Float[Tensor, "time batch in"]],
    h0: Float[Tensor, "dir batch hidden"],
    c0: Float[Tensor, "dir batch hidden"],
    gates: Sequence[Gates],
) -> tuple[Float[Tensor, "dir time batch hidden"], Float[Tensor, "dir time batch hidden"]]:
    """Run one layer over all time steps and return its h and c at every step.

    It goes by the kernels in C where there are any, with the awake weights only where the gates
    have patterns and that is faster; or else the fused way in torch. Tracing and compiling
    need plain operations, and so do gate norms; on a GPU the fused way is untested. For a batch
    without sequences there is nothing to be fast at.
    """
    if not traced() and has_torch_function_unary(h0):
        # What watches torch's functions (gpsearch.exporting does) sees this one as a whole.
        watched: tuple[Tensor, Tensor] = handle_torch_function(recurrence, (h0,), xs, h0, c0, gates)
        return watched
    given = [one for one in (*xs, c0, *flattened(gates)) if one is not None]
    alike = all(one.dtype == h0.dtype and one.device == h0.device for one in given)
    kernels = kernels_for(h0) if alike else None  # torch says what is wrong
    if gates[0].norms or h0.device.type != "cpu" or traced() or not h0.shape[1]:
        return plain(xs, h0, c0, gates)
    if kernels is None:  # the fused way has dense layers
        return fused(xs, h0, c0, gates) if gates[0].dense else plain(xs, h0, c0, gates)
    refuse_unlike(xs, h0, c0, gates)
    if fitting := kernels_for_sparse(kernels, h0.shape[1], [g.patterns for g in gates]):
        return sparse(fitting, xs, h0, c0, gates)
    return compiled(kernels, xs, h0, c0, gates)


def kernels_for(state: Tensor) -> Native | None:
    """Return the kernels in C if they can run a layer with this state, flat gates included."""
    fit = state.device.type == "cpu" and state.dtype == torch.float32 and not traced()
    return native() if fit else None


def plain(
    xs: Sequence[Float[Tensor, "time batch in"]],
    h0: Float[Tensor, "dir batch hidden"],
    c0: Float[Tensor, "dir batch hidden"],
    gates: Sequence[Gates],
) -> tuple[Float[Tensor, "dir time batch hidden"], Float[Tensor, "dir time batch hidden"]]:
    """Run the recurrence written out for autograd: the fused way has to equal this one."""
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
