"""`GrowPrune`: the masks of one model in training, and what a schedule makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpsearch import groups as grouping
from gpsearch.block_masks import BlockMasks
from gpsearch.cell import HLSTM
from gpsearch.errors import Unsupported, UserError
from gpsearch.grow import gradients
from gpsearch.kernels.dormant import clear_dormant, prepared
from gpsearch.schedule import GMP, SCHEDULES, Progress, Schedule, Update
from gpsearch.unit_masks import UnitMasks


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
        optimizer: The optimizer of the prunable weights; None if the caller applies the masks.
        schedule: A schedule, or the name of one with its default numbers.
        epochs: Epochs of the whole run, of which the schedule's times are shares.
        prunable: Says of a parameter's dotted name whether it may be pruned; None takes every
            parameter of two or more dimensions. What needs no gradient is left alone.
        seed: Of the random seed network and of random growth.

    Attributes:
        masks: A boolean mask for every prunable parameter, by name (of a shared one the first);
            True is awake. Whole-unit pruning masks the units' biases too.

    Raises:
        UserError: There is no such schedule, ``epochs`` is below 1, or the optimizer does not step
            a prunable weight.
        Unsupported: The model has no units for ``row_column``, an embedding's gradients are
            sparse, or a weight is computed of others, as by weight norm.
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
        if epochs < 1:
            raise UserError(f"epochs = {epochs} should be 1 or more")
        self.model, self.optimizer, self.epochs = model, optimizer, epochs
        self.schedule = _schedule(schedule)
        self._weights = grouping.weights(model, prunable)
        if self.schedule.name != "dense":
            grouping.refuse_ingredients(model, self._weights)
            self._refuse_another_optimizer()
        self._generator = torch.Generator().manual_seed(seed)
        self._holding = True
        self._reference: float | None = None
        self._pruned_once = self._gate_closed = False
        self._last_good: dict[str, Any] | None = None
        self.masks = {
            name: torch.ones(
                weight.parameter.shape, dtype=torch.bool, device=weight.parameter.device
            )
            for name, weight in self._weights.items()
        }
        self._structure = self._find_structure()
        if self.schedule.seed_density < 1:
            self._structure.seed(self.schedule.seed_density, self._generator)
        self._held = {name: self.model.get_parameter(name) for name in self.masks}
        self._awake: dict[str, Tensor] = {}
        self.hold()
        self._hooks = self._install_hooks()

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
        self._refuse_other_parameters()
        if error is not None and math.isfinite(error) and not self._pruned_once:
            self._reference = error if self._reference is None else min(error, self._reference)
        update = self.schedule.update(self._progress(epoch, error))
        if update is None:
            return None
        if update.event == "restore":
            return self._restore(update)
        self._pruned_once |= update.event == "prune"
        if update.event == "prune" or self._begins_cycle(update):
            self._last_good = self._snapshot(error)
        before = {name: mask.clone() for name, mask in self.masks.items()}
        if update.prune_to is not None:
            self._prune(update.prune_to)
        if update.grow_to is not None:
            self._grow(update, losses, before)
        self.hold()
        return update

    def hold(self, model: nn.Module | None = None) -> None:
        """Set dormant weights, and the optimizer's moments for them, to zero.

        Whoever changes `masks` by hand calls this next. (With ``row_column`` such a change lasts
        until the next update, which goes by whole units.)

        Args:
            model: Another module with the same parameter names, such as a running average of the
                weights (`torch.optim.swa_utils.AveragedModel.module`); None is the model itself.

        Raises:
            UserError: That module has no parameter of such a name.
        """
        parameters = dict((model or self.model).named_parameters())
        if lacking := sorted(self.masks.keys() - parameters.keys()):
            raise UserError(f"hold: that model has no parameter {lacking[0]!r}; is it its module?")
        self._awake = {
            name: prepared(mask, self._held[name])
            for name, mask in self.masks.items()
            if not mask.all()
        }
        with torch.no_grad():
            for name, mask in self.masks.items():
                parameters[name].mul_(mask)
                if model is None and self.optimizer is not None:
                    for moment in self.optimizer.state.get(parameters[name], {}).values():
                        if isinstance(moment, Tensor) and moment.shape == mask.shape:
                            moment.mul_(mask)
        if model is None and self._holding:
            self._compute_with(self.masks)

    def release(self) -> None:
        """Remove the hooks; the weights keep their zeros until something else changes them."""
        self._holding = False
        self._compute_with({})
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the model's and the optimizer's own state."""
        return {
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "structure": self._structure.state_dict(),
            "generator": self._generator.get_state(),
            "reference": self._reference,
            "pruned_once": self._pruned_once,
            "gate_closed": self._gate_closed,
            "last_good": self._last_good,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            UserError: It is of another model, or of a schedule with another structure.
        """
        shapes = [{name: mask.shape for name, mask in masks.items()}
                  for masks in (self.masks, state["masks"])]  # fmt: skip
        if shapes[0] != shapes[1]:
            raise UserError("the masks are those of another model, or of other prunable weights")
        if state["structure"].keys() != self._structure.state_dict().keys():
            raise UserError("the masks are those of a schedule with another structure")
        self._load_masks(state)
        self._generator.set_state(state["generator"])
        self._reference = state["reference"]
        self._pruned_once = state["pruned_once"]
        self._gate_closed = state["gate_closed"]
        self._last_good = state["last_good"]
        self.hold()

    def __getstate__(self) -> Any:
        """Refuse to be copied: the hooks would stay with the first model and optimizer."""
        raise UserError(
            "GrowPrune cannot be copied: make one for the copied model and optimizer, and let its "
            "load_state_dict take this one's state_dict"
        )

    def _refuse_another_optimizer(self) -> None:
        """Its steps are what dormant weights are held after: another's would wake them."""
        groups = self.optimizer.param_groups if self.optimizer else []
        stepped = {id(parameter) for group in groups for parameter in group["params"]}
        for name, weight in self._weights.items():
            if self.optimizer is not None and id(weight.parameter) not in stepped:
                raise UserError(
                    f"{name} is in no group of the optimizer: give the one that steps all prunable "
                    "weights, leave it out by prunable, or make another GrowPrune of the rest"
                )

    def _refuse_other_parameters(self) -> None:
        for name, parameter in self._held.items():
            if self.model.get_parameter(name) is not parameter:
                raise UserError(
                    f"{name} is another parameter than it was: after load_state_dict(assign=True) "
                    "and the like make GrowPrune anew"
                )

    # What lives and dies together

    def _find_structure(self) -> UnitMasks | BlockMasks:
        if self.schedule.structure != "row_column":
            return BlockMasks(
                self._weights, self.masks, self.schedule.structure, self.schedule.scope
            )
        families = grouping.units(self.model, self._weights)
        if not families:
            raise Unsupported(
                "structure='row_column' takes whole units, of which this model has none that are "
                "prunable (no HLSTM, nn.LSTM, nn.GRU or nn.Linear); choose another structure"
            )
        return UnitMasks(self.model, families, self.masks, lambda: self.density)

    def _prune(self, density: float) -> None:
        sizes = {name: weight.parameter.detach().abs() for name, weight in self._weights.items()}
        self._structure.prune(self._structure.scores(sizes), density)

    def _grow(
        self,
        update: Update,
        losses: Callable[[], Iterable[Tensor]],
        before: Mapping[str, Tensor],
    ) -> None:
        self._structure.offer()
        scores, slopes = self._growth_scores(losses)
        if update.event == "rewire" and isinstance(self._structure, BlockMasks):
            self._structure.regrow(scores, before)
        elif update.grow_to is not None:
            self._structure.grow(scores, update.grow_to)
        if self.schedule.grown_init == "step":
            self._step_grown(before, slopes)

    def _growth_scores(
        self, losses: Callable[[], Iterable[Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what the dormant are woken by, and the weights' gradients if they were taken."""
        slopes: dict[str, Tensor] = {}
        if self.schedule.growth == "gradient" or self.schedule.grown_init == "step":
            slopes = self._slopes(losses)
        if self.schedule.growth == "random":
            return self._structure.random(self._generator), slopes
        return self._structure.scores({name: s.abs() for name, s in slopes.items()}), slopes

    def _slopes(self, losses: Callable[[], Iterable[Tensor]]) -> dict[str, Tensor]:
        parameters = {name: weight.parameter for name, weight in self._weights.items()}
        kept = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        self.model.zero_grad()
        held, self._holding = self._holding, False
        self._compute_with({})
        try:
            return gradients(parameters, losses(), self.schedule.growth_batches)
        finally:
            self._holding = held
            for parameter, grad in kept:  # biases take part in the pass, not in its result
                parameter.grad = grad

    def _compute_with(self, masks: Mapping[str, Tensor]) -> None:
        """Tell recurrent layers which weights are awake: where these are few they save the rest."""
        for prefix, module in self.model.named_modules():
            if isinstance(module, HLSTM):
                dot = f"{prefix}." if prefix else ""
                own = [name for name, _ in module.named_parameters(recurse=False)]
                if any(dot + name in self.masks for name in own):  # else it is another's to tell
                    module.use_masks({n: masks[dot + n] for n in own if dot + n in masks})

    def _step_grown(self, before: Mapping[str, Tensor], slopes: dict[str, Tensor]) -> None:
        """Move woken weights one gradient step away from zero; what was awake before is none."""
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

    # The accuracy gate

    def _progress(self, epoch: int, error: float | None) -> Progress:
        return Progress(epoch, self.epochs, self.density, error, self._reference, self._gate_closed)

    def _snapshot(self, error: float | None) -> dict[str, Any]:
        return {
            "error": error,
            "model": {k: v.detach().clone() for k, v in self.model.state_dict().items()},
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "structure": self._structure.state_dict(),
        }

    def _begins_cycle(self, update: Update) -> bool:
        """Tell whether this growth is the first since a pruning, which the gate then found good."""
        if update.event != "grow" or self._last_good is None:
            return False
        return self.nonzeros < sum(
            int(self._last_good["masks"][name].sum()) for name in self._weights
        )

    def _restore(self, update: Update) -> Update | None:
        """Take back the last good network, and grow and prune no further."""
        if self._last_good is None:
            return None
        self._gate_closed = True
        self.model.load_state_dict(self._last_good["model"])
        self._load_masks(self._last_good)
        error = self._last_good.get("error")  # older checkpoints do not tell it
        self._last_good = None
        self.hold()
        return replace(update, error=error)

    def _load_masks(self, state: dict[str, Any]) -> None:
        for name, mask in state["masks"].items():
            self.masks[name].copy_(mask)
        self._structure.load_state_dict(state["structure"])

    # Hooks

    def _install_hooks(self) -> list[Any]:
        hooks: list[Any] = [
            parameter.register_post_accumulate_grad_hook(self._mask_grad(name))  # type: ignore[no-untyped-call]
            for name, parameter in self._held.items()
            if parameter.requires_grad
        ]
        if self.optimizer is not None:
            hooks.append(self.optimizer.register_step_post_hook(self._after_step))
        return hooks

    def _mask_grad(self, name: str) -> Callable[[Tensor], None]:
        def mask_grad(parameter: Tensor) -> None:
            awake = self._awake.get(name)
            if self._holding and awake is not None and parameter.grad is not None:
                clear_dormant([parameter.grad], [awake])

        return mask_grad

    def _after_step(self, *_: Any) -> None:
        with torch.no_grad():
            clear_dormant([self._held[name] for name in self._awake], [*self._awake.values()])


def _schedule(given: Schedule | str) -> Schedule:
    if not isinstance(given, str):
        return given
    if given not in SCHEDULES:
        raise UserError(f"schedule {given!r} is unknown; one of {', '.join(SCHEDULES)}")
    schedule: Schedule = SCHEDULES[given]()
    return schedule


def sketch(
    model: nn.Module, schedule: Schedule, prunable: Callable[[str], bool] | None = None
) -> nn.Module:
    """Prune an untrained model, in place, to the density and structure it will end with.

    Its parameters and FLOPs are those of the trained one, and its latency nearly so: what a
    candidate costs is known before it trains.
    """
    end = GMP(
        final_density=schedule.final_density, structure=schedule.structure, scope=schedule.scope
    )
    masks = GrowPrune(model, None, end, 1, prunable=prunable)
    masks._prune(schedule.final_density)
    masks.hold()
    masks.release()
    return model
