"""The weights of one direction of an H-LSTM layer, as its recurrence takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from gpsearch.kernels.pattern import Patterns


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
    the first hidden layer; without any, the gates are flat: an LSTM's. ``norms`` is empty without
    layer norms; ``masks``, the scaled dropout masks of the hidden layers' outputs, is empty
    without dropout. ``patterns`` says which weights are awake, where only these are to get
    gradients; None gives them to all.
    """

    ih: Float[Tensor, "rows in"]
    hh: Float[Tensor, "rows state"]
    bias: Float[Tensor, " rows"] | None
    dense: tuple[Dense, ...]
    norms: tuple[Norm, ...]
    masks: tuple[Float[Tensor, "4 batch width"], ...]
    activation: str
    patterns: Patterns | None = None

    @property
    def first(self) -> int:
        """Rows of the first hidden layer, all four gates together."""
        return 4 * self.dense[0].weight.shape[2] if self.dense else 0

    @property
    def direct(self) -> bool:
        """Whether the gates have a direct path, too."""
        return self.ih.shape[0] > self.first


def flattened(gates: Sequence[Gates]) -> list[Tensor | None]:
    """Return the weights of some directions as autograd takes them, in one list."""
    return [w for g in gates for w in (g.ih, g.hh, g.bias, *(p for d in g.dense for p in d))]


def restored(
    activation: str, masks: Sequence[tuple[Tensor, ...]], weights: Sequence[Any]
) -> list[Gates]:
    """Put the directions' gates together again from what `flattened` returned."""
    each, gates = len(weights) // len(masks), []
    for d, own in enumerate(masks):
        ih, hh, bias, *dense = weights[d * each : (d + 1) * each]
        pairs = zip(dense[::2], dense[1::2], strict=True)
        gates.append(Gates(ih, hh, bias, tuple(Dense(*p) for p in pairs), (), own, activation))
    return gates


def refuse_unlike(xs: Sequence[Tensor], h0: Tensor, c0: Tensor, gates: Sequence[Gates]) -> None:
    """Refuse what does not fit together: by these sizes the kernels in C read and write.

    Raises:
        ValueError: It does not.
    """
    steps, (dirs, batch, size) = xs[0].shape[0], h0.shape
    if not len(xs) == len(gates) == dirs or c0.shape != h0.shape:
        raise ValueError(f"states of {[*h0.shape]} and {[*c0.shape]} for {len(gates)} directions")
    for d, (x, g) in enumerate(zip(xs, gates, strict=True)):
        fits = x.shape == (steps, batch, g.ih.shape[1]) and _fit(g, batch, size)
        if not fits or (g.patterns is not None and not _are_of(g.patterns, g)):
            raise ValueError(f"direction {d}: input, weights and masks do not fit one another")


def _fit(g: Gates, batch: int, size: int) -> bool:
    rows, width = len(g.ih), g.first // 4
    direct = (0, 4 * size) if g.dense else (4 * size,)
    fits = g.hh.shape == (rows, size) and rows - g.first in direct
    fits &= g.bias is None or g.bias.shape == (rows,)
    fits &= len(g.masks) in (0, len(g.dense))
    for j, (weight, bias) in enumerate(g.dense):
        out = weight.shape[1]
        fits &= weight.shape == (4, out, width) and (bias is None or bias.shape == (4, out))
        fits &= not g.masks or g.masks[j].shape == (4, batch, width)
        width = out
    return fits and (not g.dense or width == size)


def _are_of(patterns: Patterns, g: Gates) -> bool:
    given = [patterns.ih, patterns.hh, *(one for four in patterns.dense for one in four)]
    own = [g.ih, g.hh, *(one for dense in g.dense for one in dense.weight)]
    return [one.shape for one in given] == [one.shape for one in own]
