"""Whole units, alive or dead, and the masks of the weights and biases they own."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpsearch.groups import Units
from gpsearch.mask import top_k

FAINT = 1e-3
"""What share of its initial weights a dead row is offered that others may read."""


class UnitMasks:
    """Prunes and grows whole units: gates' hidden units, state units, rows of a linear layer.

    A weight is awake while every unit that owns it is alive. Every family keeps a unit.

    Args:
        model: The model the families belong to.
        families: Its families of units.
        masks: The masks of its weights, changed in place; those of the units' biases join them.
        density: Returns the density of the weights' masks.

    Attributes:
        alive: For all families one after another, whether a unit lives.
    """

    def __init__(
        self,
        model: nn.Module,
        families: list[Units],
        masks: dict[str, Tensor],
        density: Callable[[], float],
    ) -> None:
        self.families, self.masks, self._density = families, masks, density
        self.alive = torch.ones(
            sum(units.count for units in families), dtype=torch.bool, device="cpu"
        )
        owned = {name for units in families for name, _ in units.rows}
        for name in sorted(owned - masks.keys()):
            masks[name] = torch.ones_like(model.get_parameter(name), dtype=torch.bool)
        self._rows = {
            name: model.get_parameter(name)
            for units in families
            if _offered(units)
            for name, _ in units.rows
        }
        self.initial = {name: row.detach().clone() for name, row in self._rows.items()}

    def seed(self, density: float, generator: torch.Generator) -> None:
        """Draw a random network of whole units."""
        self.prune(self.random(generator), density)

    @torch.no_grad()
    def offer(self) -> None:
        """Give dead units their initial inputs back, so that growth can tell them apart.

        With zeros on both sides of a hidden unit neither has a gradient, and it could never learn.
        Nothing reads it yet, so the network computes what it did; but with ``gate_norm`` the gate's
        mean and variance take the unit in. A linear layer's row may be read by a ReLU, which has no
        slope at 0: a faint copy of its inputs opens it and changes next to nothing.
        """
        for units, alive in zip(self.families, self._by_family(self.alive), strict=True):
            dead, share = torch.nonzero(~alive).flatten(), _offered(units)
            for name, offset in units.rows if share else []:
                places = (dead + offset).to(self._rows[name].device)
                self._rows[name][places] = share * self.initial[name][places]

    def random(self, generator: torch.Generator) -> Tensor:
        """Draw a score for every unit."""
        return torch.rand(len(self.alive), generator=generator, device=generator.device)

    def prune(self, scores: Tensor, density: float) -> None:
        """Kill the units with the smallest scores until the weights' density is ``density``.

        The density is reached from above to within the weights of one unit, and never exceeded
        unless every family is down to its last unit.
        """
        kept = torch.cat([top_k(s, 1) for s in self._by_family(self._where(self.alive, scores))])
        # The smallest first; of equal scores the lower index stays alive.
        order = self._ranked(self.alive & ~kept, scores).flip(0)
        count = bisect_left(
            range(len(order)), True, key=lambda n: self._without(order[:n]) <= density
        )
        self._without(order[:count])
        self.alive[order[:count]] = False

    def grow(self, scores: Tensor, density: float) -> None:
        """Wake the dead units with the largest scores, as many as ``density`` allows."""
        order = self._ranked(~self.alive, scores)
        count = bisect_left(
            range(1, len(order) + 1), True, key=lambda n: self._with(order[:n]) > density
        )
        self._with(order[:count])
        self.alive[order[:count]] = True

    def scores(self, weights: dict[str, Tensor]) -> Tensor:
        """Return every unit's score: the root mean square of its weights' scores."""
        return torch.cat([self._family_scores(units, weights) for units in self.families])

    def state_dict(self) -> dict[str, Any]:
        """Return what the masks do not tell."""
        initial = {name: row.clone() for name, row in self.initial.items()}
        return {"alive": self.alive.clone(), "initial": initial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.alive = state["alive"].clone()
        for name, initial in state["initial"].items():
            self.initial[name].copy_(initial)

    def _family_scores(self, units: Units, weights: dict[str, Tensor]) -> Tensor:
        total, owned = torch.zeros(units.count, device="cpu"), 0
        for name, offset in units.rows:
            if name in weights:  # a bias has no score
                rows = weights[name].flatten(1)[offset : offset + units.count]
                total, owned = total + rows.square().sum(1).cpu(), owned + rows.shape[1]
        for name, first, last in units.columns:
            block = weights[name].flatten(1)[first:last]
            total, owned = total + block.square().sum(0).cpu(), owned + block.shape[0]
        return (total / owned).sqrt()

    def _ranked(self, candidates: Tensor, scores: Tensor) -> Tensor:
        """Return the candidates' indices, the largest score first."""
        order = scores.sort(descending=True, stable=True).indices
        return order[candidates[order]]

    def _where(self, candidates: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(~candidates, -torch.inf)

    def _without(self, dead: Tensor) -> float:
        return self._show(self.alive.clone().index_fill_(0, dead, False))

    def _with(self, woken: Tensor) -> float:
        return self._show(self.alive.clone().index_fill_(0, woken, True))

    def _show(self, alive: Tensor) -> float:
        """Set the masks to what follows if the units ``alive`` live; return their density."""
        for mask in self.masks.values():
            mask.fill_(True)
        for units, living in zip(self.families, self._by_family(alive), strict=True):
            for name, offset in units.rows:
                rows = self.masks[name][offset : offset + units.count]
                rows &= living.to(rows.device).view(-1, *[1] * (rows.dim() - 1))
            for name, first, last in units.columns:
                self.masks[name][first:last] &= living.to(self.masks[name].device)
        return self._density()

    def _by_family(self, flat: Tensor) -> list[Tensor]:
        return list(torch.split_with_sizes(flat, [units.count for units in self.families]))


def _offered(units: Units) -> float:
    """Return what share of their initial inputs dead units of a family are offered."""
    if units.hidden:
        return 1.0
    return 0.0 if units.columns else FAINT  # a state unit learns by itself: its gates are open
