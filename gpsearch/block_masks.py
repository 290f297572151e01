"""The masks of blocks of weights, and of single weights: blocks of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gpsearch.blocks import SHAPES, awake, fitting, pool, sizes, spread
from gpsearch.groups import Piece, Weight, groups
from gpsearch.grow import grow
from gpsearch.mask import connecting, shares, top_k
from gpsearch.prune import prune
from gpsearch.schedule import Scope


class BlockMasks:
    """Prunes and grows the blocks of every prunable weight; scores compete within a group.

    Densities are shares of the weights: exact for single weights, and for larger blocks reached
    from below to within one block of every group. No group exceeds its own.

    Args:
        weights: The prunable weights.
        masks: Their masks, changed in place.
        structure: A name of `gpsearch.blocks.SHAPES`.
        scope: What a group is; see `gpsearch.groups.groups`.
    """

    def __init__(
        self,
        weights: dict[str, Weight],
        masks: dict[str, Tensor],
        structure: str,
        scope: Scope,
    ) -> None:
        self.masks, self._shape = masks, SHAPES[structure]
        self._groups = groups(weights, scope)

    def seed(self, density: float, generator: torch.Generator) -> None:
        """Draw a random network in which every row and column of a matrix stays connected.

        Where there are fewer blocks than that takes, they connect as many as they can.
        """
        scores = []
        for pieces in self._groups:
            budgets = shares([self._matrix(self.masks, p).numel() for p in pieces], density)
            for piece, budget in zip(pieces, budgets, strict=True):
                rows, columns = awake(self._matrix(self.masks, piece), self._shape).shape
                size = self._sizes([piece])
                score = connecting(rows, columns, generator).flatten().to(size.device)
                self._set([piece], top_k(score, fitting(score, size, size > 0, budget)))
                scores.append(score)
        if scores:  # what is less than a block in every matrix may be some in a group
            self.grow(torch.cat(scores), density)

    def offer(self) -> None:
        """Do nothing: a dormant block reads and is read, and so has a gradient."""

    def scores(self, weights: dict[str, Tensor]) -> Tensor:
        """Return every block's score, group after group, from the scores of their weights."""
        matrices = (self._matrix(weights, piece) for pieces in self._groups for piece in pieces)
        parts = [pool(matrix, self._shape).flatten() for matrix in matrices]
        return torch.cat(parts) if parts else torch.empty(0)

    def random(self, generator: torch.Generator) -> Tensor:
        """Draw a score for every block."""
        lengths = [len(self._sizes(pieces)) for pieces in self._groups]
        device = next(iter(self.masks.values())).device if self.masks else None
        return torch.rand(sum(lengths), generator=generator, device=generator.device).to(device)

    def prune(self, scores: Tensor, density: float) -> None:
        """Put the blocks with the smallest scores to sleep, down to ``density``."""
        for pieces, mask, size, score in self._gathered(scores):
            keep = fitting(score, size, mask, round(density * int(size.sum())))
            self._set(pieces, prune(mask, score, int(mask.sum()) - keep))

    def grow(self, scores: Tensor, density: float) -> None:
        """Wake the dormant blocks with the largest scores, as many as ``density`` allows."""
        for pieces, mask, size, score in self._gathered(scores):
            room = round(density * int(size.sum())) - int((size * mask).sum())
            self._set(pieces, grow(mask, score, fitting(score, size, ~mask, room)))

    def regrow(self, scores: Tensor, before: Mapping[str, Tensor]) -> None:
        """Wake dormant blocks in place of those put to sleep since the masks were ``before``.

        Of every size as many, those with the largest scores, so that a group's weights that are
        awake are as many as they were.
        """
        for pieces, mask, size, score in self._gathered(scores):
            dropped = self._blocks(before, pieces) & ~mask
            for one in torch.unique(size):
                like = size == one
                count = int((dropped & like).sum())
                mask = mask | (grow(mask | ~like, score, count) & like)
            self._set(pieces, mask)

    def state_dict(self) -> dict[str, Any]:
        """Return what the masks do not tell: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    def _gathered(self, scores: Tensor) -> Iterator[tuple[list[Piece], Tensor, Tensor, Tensor]]:
        """Yield every group's pieces, and its blocks' masks, sizes and scores."""
        seen = 0
        for pieces in self._groups:
            size, mask = self._sizes(pieces), self._blocks(self.masks, pieces)
            yield pieces, mask, size, scores[seen : seen + len(size)]
            seen += len(size)

    def _blocks(self, masks: Mapping[str, Tensor], pieces: list[Piece]) -> Tensor:
        matrices = (self._matrix(masks, piece) for piece in pieces)
        return torch.cat([awake(matrix, self._shape).flatten() for matrix in matrices])

    def _sizes(self, pieces: list[Piece]) -> Tensor:
        matrices = [self._matrix(self.masks, piece) for piece in pieces]
        return torch.cat([sizes(m.shape, self._shape, m.device).flatten() for m in matrices])

    def _set(self, pieces: list[Piece], blocks: Tensor) -> None:
        """Set the masks of a group's weights to what its blocks are."""
        seen = 0
        for piece in pieces:
            matrix = self._matrix(self.masks, piece)
            grid = awake(matrix, self._shape).shape
            part = blocks[seen : seen + grid.numel()].view(grid)
            matrix.copy_(spread(part, self._shape, matrix.shape))
            seen += grid.numel()

    def _matrix(self, tensors: Mapping[str, Tensor], piece: Piece) -> Tensor:
        name, first, last = piece
        return tensors[name].flatten(1)[first:last]
