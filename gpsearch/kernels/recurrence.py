"""The recurrence of one H-LSTM layer: all its directions go through one loop together.

Every direction reads its input from step 0 on (the caller has reversed the reverse one), so that
padding lies at the tail of each and never reaches a state that counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from gpsearch.kernels.compiled import compiled
from gpsearch.kernels.fused import fused
from gpsearch.kernels.gates import Gates, flattened, refuse_unlike
from gpsearch.kernels.native import Native, native
from gpsearch.kernels.plain import plain
from gpsearch.kernels.sparse import kernels_for_sparse, sparse
from gpsearch.kernels.traced import traced


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
