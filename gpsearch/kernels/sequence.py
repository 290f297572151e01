"""A padded batch read in one or both directions, the reverse one by every sequence's true length.

Reversing by the true length leaves the padding at the tail of both directions: no state that
counts ever sees it, so that the time loop needs no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gpsearch.kernels.traced import traced


class Padded:
    """The order in which each direction reads a batch of ``steps`` x ``batch`` inputs.

    Args:
        steps: Time steps of the longest sequence.
        batch: Sequences.
        directions: 1, or 2 to read every sequence backwards, too.
        lengths: True lengths of the sequences, or None where all are ``steps`` long.
        device: Where the sequences live.
    """

    def __init__(
        self,
        steps: int,
        batch: int,
        directions: int,
        lengths: Int[Tensor, " batch"] | None,
        device: torch.device,
    ) -> None:
        self.directions = directions
        self.padding = self.ends = None
        if directions == 1 and lengths is None:
            return
        time = torch.arange(steps, device=device).unsqueeze(1)
        if lengths is not None:
            self.ends = lengths.to(device) - 1
            self.padding = (time > self.ends).unsqueeze(2)
            self._padded_rows = self.padding.flatten().nonzero().squeeze(1)
        if directions == 2:
            back = steps - 1 - time if self.ends is None else self.ends - time
            times = back.expand(steps, batch).where(back >= 0, time)
            self.reverse = times * batch + torch.arange(batch, device=device)

    def zeroed(self, x: Float[Tensor, "time batch width"]) -> Float[Tensor, "time batch width"]:
        """Write zeros into the padding, whatever it holds."""
        if self.padding is None:
            return x
        # With a mask in its stead, `masked_fill` takes three times as long on a CPU.
        return x.flatten(0, 1).index_fill(0, self._padded_rows, 0).view_as(x)

    def split(self, x: Float[Tensor, "time batch width"]) -> list[Tensor]:
        """Return the input of each direction, in the order in which it reads."""
        if self.directions == 1:
            return [x]
        return [x, _permuted(x.flatten(0, 1), self.reverse.flatten()).view_as(x)]

    def join(
        self, hs: Float[Tensor, "dir time batch width"]
    ) -> Float[Tensor, "time batch dir*width"]:
        """Put the directions side by side in the order of time, with zeros in the padding."""
        # Unlike indexing, squeeze and unbind have gradients without zeros to be filled and added.
        if self.directions == 1:
            return self.zeroed(hs.squeeze(0))
        forward, backward = (one.flatten(0, 1) for one in hs.unbind(0))
        rows = torch.cat([forward, _permuted(backward, self.reverse.flatten())], 1)
        if self.padding is not None:
            rows.index_fill_(0, self._padded_rows, 0)  # in place: cat made it, and saves none of it
        return rows.view(*hs.shape[1:3], rows.shape[1])

    def last(self, hs: Float[Tensor, "dir time batch width"]) -> Float[Tensor, "dir batch width"]:
        """Return what each direction held at its last step that is no padding."""
        if self.ends is None:
            return hs[:, -1]
        return hs[:, self.ends, torch.arange(len(self.ends), device=hs.device)]


def _permuted(
    rows: Float[Tensor, "rows width"], order: Int[Tensor, " rows"]
) -> Float[Tensor, "rows width"]:
    """Reorder rows by an ``order`` that is its own inverse."""
    if traced():
        return rows.index_select(0, order)
    result: Tensor = _Involution.apply(rows, order)  # type: ignore[no-untyped-call]
    return result


class _Involution(torch.autograd.Function):
    """Reorder rows by an order that is its own inverse: the gradient takes the same way back.

    torch's own gradient of `index_select` adds row by row, many times slower than a gather.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return _permuted(grads[0], order), None
