"""The weights of one direction of an H-LSTM layer, as its recurrence takes them."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Dense(NamedTuple):
    """An affine map inside each gate, from a hidden layer to the next one or onto the gate."""

    weight: Float[Tensor, "4 out in"]
    bias: Float[Tensor, "4 out"] | None


class Norm(NamedTuple):
    """A layer norm over each gate's units."""

    weight: Float[Tensor, "4 width"]
    bias: Float[Tensor, "4 width"] | None


class Gates(NamedTuple):
    """All weights of the four gates (i, f, g, o).

    ``ih``, ``hh`` and ``bias`` map input and state onto the gates' first hidden layer and, where
    there is a direct path, in the rows below onto the gates themselves. ``dense`` is what follows
    the first hidden layer. ``norms`` is empty without layer norms; ``masks``, the scaled dropout
    masks of the hidden layers' outputs, is empty without dropout.
    """

    ih: Float[Tensor, "rows in"]
    hh: Float[Tensor, "rows state"]
    bias: Float[Tensor, " rows"] | None
    dense: tuple[Dense, ...]
    norms: tuple[Norm, ...]
    masks: tuple[Float[Tensor, "4 batch width"], ...]
    activation: str

    @property
    def first(self) -> int:
        """Rows of the first hidden layer, all four gates together."""
        return 4 * self.dense[0].weight.shape[2]

    @property
    def direct(self) -> bool:
        """Whether the gates have a direct path, too."""
        return self.ih.shape[0] > self.first
