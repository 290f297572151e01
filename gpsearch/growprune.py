"""`GrowPrune`: the masks of one model in training, and what a schedule makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpsearch import groups as grouping
from gpsearch.grow import gradients, grow
from gpsearch.mask import connected, shares
from gpsearch.prune import prune
from gpsearch.schedule import SCHEDULES, Progress, Schedule, Update


class GrowPrune:
    """Grow and prune the connections of any model while an ordinary loop trains it.

    The masks are held by hooks: a gradient is masked as soon as it is computed (so clipping sees
    only awake weights), and dormant weights are set back to zero after every optimizer step, be it
    for weight decay, momentum or whatever else would move them. Dormant weights are exact zeros of
    ordinary parameters: the model needs no masks to run, to be saved, or to be compacted.

        masks = GrowPrune(model, optimizer, "gp", epochs=20)
        for epoch in range(20):
            masks.update(epoch, lambda: (loss(model(x), y) for x, y in data))
            ...                                     # train one epoch as usual

    Source: Dai, Yin, Jha, "Grow and Prune Compact, Fast, and Accurate LSTMs", section 3.

    Args:
        model: Any module: Linear, Conv, Embedding, nn.LSTM, GRU, HLSTM and what is built of them.
        optimizer: The optimizer of the model's parameters; None if the caller applies the masks.
        schedule: A schedule, or the name of one with its default numbers.
        epochs: Epochs of the whole run, of which the schedule's times are shares.
        prunable: Says of a parameter's dotted name whether it may be pruned; None takes every
            parameter of two or more dimensions.
        seed: Of the random seed network and of random growth.

    Attributes:
        masks: A boolean mask for every prunable parameter, by name; True is awake. Whole-unit
            pruning masks the units' biases too.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        schedule: Schedule | str,
        epochs: int,
        *,
        prunable: Callable[[str], bool] | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.optimizer, self.epochs = model, optimizer, epochs
        self.schedule: Schedule = SCHEDULES[schedule]() if isinstance(schedule, str) else schedule
        self._weights = grouping.weights(model, prunable)
        self._groups = grouping.groups(self._weights, self.schedule.scope)
        whole = self.schedule.structure == "row_column"
        self._units = grouping.units(model, self._weights) if whole else []
        self._alive = [torch.ones(units.count, dtype=torch.bool) for units in self._units]
        self._generator = torch.Generator().manual_seed(seed)
        self._holding = True
        self._reference: float | None = None
        self._pruned_once = self._gate_closed = False
        self._last_good: dict[str, Any] | None = None
        self.masks = self._seed()
        self._hooks = self._install_hooks()
        self.hold()

    # What a loop asks of it

    @property
    def density(self) -> float:
        """Share of the prunable weights that is awake."""
        size = sum(weight.size for weight in self._weights.values())
        return self.nonzeros / size if size else 1.0

    @property
    def nonzeros(self) -> int:
        """Number of prunable weights that are awake."""
        return sum(int(self.masks[name].sum()) for name in self._weights)

    def phase(self, epoch: int) -> str:
        """Name the phase of ``epoch``: seed, grow, train, prune, retrain and the like."""
        return self.schedule.phase(self._progress(epoch, None))

    def update(
        self,
        epoch: int,
        losses: Callable[[], Iterable[Tensor]],
        error: float | None = None,
    ) -> Update | None:
        """Make the change the schedule wants before ``epoch``; call once before every epoch.

        Call it once more after the last epoch (``epoch == epochs``), so that an accuracy gate can
        judge the last pruning step too.

        Args:
            epoch: The epoch about to begin, from 0.
            losses: Returns an iterable over one pass of scalar losses, for growth by gradient.
            error: Development error after the last epoch, for the accuracy gate; None opens it.

        Returns:
            What was done, or None.
        """
        if error is not None and not self._pruned_once:
            self._reference = min(error, self._reference or error)
        update = self.schedule.update(self._progress(epoch, error))
        if update is None:
            return None
        if update.event == "restore":
            return self._restore(update)
        if update.event == "prune":
            self._pruned_once = True
            self._last_good = self._snapshot()
        if update.prune_to is not None:
            self._prune(update.prune_to)
        if update.grow_to is not None:
            self._grow(update.grow_to, losses)
        self.hold()
        return update

    def hold(self, model: nn.Module | None = None) -> None:
        """Set dormant weights, and the optimizer's moments for them, to zero.

        Args:
            model: Another module with the same parameter names, such as a running average of the
                weights (`torch.optim.swa_utils.AveragedModel.module`); None is the model itself.
        """
        parameters = dict((model or self.model).named_parameters())
        with torch.no_grad():
            for name, mask in self.masks.items():
                parameters[name].mul_(mask)
                if model is None and self.optimizer is not None:
                    for moment in self.optimizer.state.get(parameters[name], {}).values():
                        if isinstance(moment, Tensor) and moment.shape == mask.shape:
                            moment.mul_(mask)

    def release(self) -> None:
        """Remove the hooks; the weights keep their zeros until something else changes them."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the model's and the optimizer's own state."""
        return {
            "masks": self.masks,
            "alive": self._alive,
            "generator": self._generator.get_state(),
            "reference": self._reference,
            "pruned_once": self._pruned_once,
            "gate_closed": self._gate_closed,
            "last_good": self._last_good,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._load_masks(state["masks"])
        self._alive = [alive.clone() for alive in state["alive"]]
        self._generator.set_state(state["generator"])
        self._reference = state["reference"]
        self._pruned_once = state["pruned_once"]
        self._gate_closed = state["gate_closed"]
        self._last_good = state["last_good"]
        self.hold()

    # The seed

    def _seed(self) -> dict[str, Tensor]:
        """Draw the seed network: random, of exact counts, every neuron connected."""
        self.masks = {
            name: torch.ones_like(weight.parameter, dtype=torch.bool)
            for name, weight in self._weights.items()
        }
        if self._units:
            self.masks |= self._bias_masks()
            scores = [torch.rand(u.count, generator=self._generator) for u in self._units]
            self._choose_units(scores, self.schedule.seed_density, awake_only=True)
        elif self.schedule.seed_density < 1:
            for pieces in self._groups:
                counts = shares([b - a for _, a, b in pieces], self.schedule.seed_density)
                seeds = [
                    self._connected(*piece, n) for piece, n in zip(pieces, counts, strict=True)
                ]
                self._scatter(pieces, torch.cat(seeds))
        return self.masks

    def _connected(self, name: str, first: int, last: int, count: int) -> Tensor:
        """Draw the seed of one gate's matrix, flattened."""
        columns = self._weights[name].parameter[0].numel()
        rows = (last - first) // columns
        mask = connected(rows, columns, count, self._generator)
        return mask.flatten().to(self.masks[name].device)

    # Single weights

    def _prune(self, density: float) -> None:
        scores = {name: weight.parameter.detach().abs() for name, weight in self._weights.items()}
        if self._units:
            self._choose_units(self._unit_scores(scores), density, awake_only=True)
            return
        for mask, score, pieces in self._gathered(scores):
            count = int(mask.sum()) - round(density * mask.numel())
            self._scatter(pieces, prune(mask, score, max(count, 0)))

    def _grow(self, density: float, losses: Callable[[], Iterable[Tensor]]) -> None:
        scores, slopes = self._growth_scores(losses)
        before = {name: mask.clone() for name, mask in self.masks.items()}
        if self._units:
            self._choose_units(self._unit_scores(scores), density, awake_only=False)
        else:
            for mask, score, pieces in self._gathered(scores):
                count = round(density * mask.numel()) - int(mask.sum())
                self._scatter(pieces, grow(mask, score, max(count, 0)))
        if self.schedule.grown_init == "step":
            self._step_grown(before, slopes)

    def _growth_scores(
        self, losses: Callable[[], Iterable[Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the scores dormant weights are woken by, and the gradients if there are any."""
        if self.schedule.growth == "random" and self.schedule.grown_init == "zero":
            return self._random_scores(), {}
        parameters = {name: weight.parameter for name, weight in self._weights.items()}
        self._holding = False
        try:
            slopes = gradients(parameters, losses(), self.schedule.growth_batches)
        finally:
            self._holding = True
        by_gradient = self.schedule.growth == "gradient"
        scores = {n: s.abs() for n, s in slopes.items()} if by_gradient else self._random_scores()
        return scores, slopes

    def _random_scores(self) -> dict[str, Tensor]:
        return {
            name: torch.rand(weight.parameter.shape, generator=self._generator).to(
                weight.parameter.device
            )
            for name, weight in self._weights.items()
        }

    def _step_grown(self, before: dict[str, Tensor], slopes: dict[str, Tensor]) -> None:
        """Move woken weights one gradient step away from zero."""
        rates = {
            id(p): float(group["lr"])
            for group in (self.optimizer.param_groups if self.optimizer else [])
            for p in group["params"]
        }
        with torch.no_grad():
            for name, slope in slopes.items():
                parameter = self._weights[name].parameter
                woken = self.masks[name] & ~before[name]
                parameter.sub_(rates.get(id(parameter), 0.0) * slope * woken)

    def _gathered(
        self, scores: dict[str, Tensor]
    ) -> Iterable[tuple[Tensor, Tensor, list[grouping.Piece]]]:
        """Yield the flattened mask and scores of every group, and where they came from."""
        for pieces in self._groups:
            mask = torch.cat([self.masks[name].flatten()[a:b] for name, a, b in pieces])
            score = torch.cat([scores[name].flatten()[a:b] for name, a, b in pieces])
            yield mask, score, pieces

    def _scatter(self, pieces: list[grouping.Piece], mask: Tensor) -> None:
        seen = 0
        for name, a, b in pieces:
            self.masks[name].view(-1)[a:b] = mask[seen : seen + b - a]
            seen += b - a

    # Whole units

    def _bias_masks(self) -> dict[str, Tensor]:
        names = {name for units in self._units for name, _ in units.rows}
        return {
            name: torch.ones_like(self.model.get_parameter(name), dtype=torch.bool)
            for name in sorted(names - self._weights.keys())
        }

    def _unit_scores(self, scores: dict[str, Tensor]) -> list[Tensor]:
        """Return every unit's score: the root mean square over the weights it owns."""
        found = []
        for units in self._units:
            total, owned = torch.zeros(units.count), 0
            for name, offset in units.rows:
                if name in scores:
                    rows = scores[name].flatten(1)[offset : offset + units.count]
                    total, owned = total + rows.square().sum(1).cpu(), owned + rows.shape[1]
            for name, first, last in units.columns:
                block = scores[name].flatten(1)[first:last]
                total, owned = total + block.square().sum(0).cpu(), owned + block.shape[0]
            found.append((total / owned).sqrt())
        return found

    def _choose_units(self, scores: list[Tensor], density: float, *, awake_only: bool) -> None:
        """Keep the units of the largest scores, as many as the density allows.

        Every family keeps at least one unit. ``awake_only`` prunes (dormant units stay dormant);
        otherwise awake units stay awake and the best dormant ones join them.
        """
        flat = torch.cat(scores)
        alive = torch.cat(self._alive)
        settled = ~alive if awake_only else alive
        flat = flat.masked_fill(settled, -torch.inf if awake_only else torch.inf)
        best = torch.cat([s == s.max() for s in self._by_family(flat)])
        order = flat.masked_fill(best, torch.inf).sort(descending=True, stable=True).indices
        low, high = 0, len(order) if not awake_only else int((alive | best).sum())
        while low < high:
            middle = (low + high + 1) // 2
            self._wake_units(order[:middle])
            low, high = (middle, high) if self.density <= density else (low, middle - 1)
        least = int(best.sum()) if awake_only else int((alive | best).sum())
        self._wake_units(order[: max(low, least)])

    def _by_family(self, flat: Tensor) -> list[Tensor]:
        """Split what has one value a unit into families."""
        return list(torch.split_with_sizes(flat, [units.count for units in self._units]))

    def _wake_units(self, chosen: Tensor) -> None:
        """Mask everything but the ``chosen`` units, numbered over all families."""
        flags = torch.zeros(sum(units.count for units in self._units), dtype=torch.bool)
        flags[chosen] = True
        self._alive = self._by_family(flags)
        for mask in self.masks.values():
            mask.fill_(True)
        for units, alive in zip(self._units, self._alive, strict=True):
            for name, offset in units.rows:
                mask = self.masks[name]
                mask[offset : offset + units.count] &= alive.to(mask.device).view(
                    -1, *[1] * (mask.dim() - 1)
                )
            for name, first, last in units.columns:
                self.masks[name][first:last] &= alive.to(self.masks[name].device)

    # The accuracy gate

    def _progress(self, epoch: int, error: float | None) -> Progress:
        return Progress(epoch, self.epochs, self.density, error, self._reference, self._gate_closed)

    def _snapshot(self) -> dict[str, Any]:
        return {
            "model": {k: v.detach().clone() for k, v in self.model.state_dict().items()},
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "alive": [alive.clone() for alive in self._alive],
        }

    def _restore(self, update: Update) -> Update | None:
        """Take back the network from before the last pruning step, and prune no further."""
        if self._last_good is None:
            return None
        self._gate_closed = True
        self.model.load_state_dict(self._last_good["model"])
        self._load_masks(self._last_good["masks"])
        self._alive = self._last_good["alive"]
        self._last_good = None
        self.hold()
        return update

    def _load_masks(self, masks: dict[str, Tensor]) -> None:
        for name, mask in masks.items():
            self.masks[name].copy_(mask)

    # Hooks

    def _install_hooks(self) -> list[Any]:
        hooks: list[Any] = [
            self.model.get_parameter(name).register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                self._mask_grad(name)
            )
            for name in self.masks
        ]
        if self.optimizer is not None:
            hooks.append(self.optimizer.register_step_post_hook(self._after_step))
        return hooks

    def _mask_grad(self, name: str) -> Callable[[Tensor], None]:
        def mask_grad(parameter: Tensor) -> None:
            if self._holding and parameter.grad is not None:
                parameter.grad.mul_(self.masks[name])

        return mask_grad

    def _after_step(self, *_: Any) -> None:
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.model.get_parameter(name).mul_(mask)


def sketch(
    model: nn.Module, schedule: Schedule, prunable: Callable[[str], bool] | None = None
) -> nn.Module:
    """Prune an untrained model, in place, to the density and structure it will end with.

    Its parameters and FLOPs are those of the trained one, and its latency nearly so: what a
    candidate costs is known before it trains.
    """
    masks = GrowPrune(model, None, schedule, 1, prunable=prunable)
    masks._prune(schedule.final_density)
    masks.hold()
    masks.release()
    return model
