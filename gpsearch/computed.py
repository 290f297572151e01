"""Weights that are computed when they are read, as by `torch.nn.utils.prune` or ``parametrize``."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@torch.inference_mode(False)  # within it a copy's weights could not be watched, nor run in C
def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of any model; torch refuses weights that were computed with gradients."""
    held = [one for module in model.modules() for one in vars(module).values()]
    held += [one for values in held if isinstance(values, list) for one in values]  # of nn.LSTM
    computed = [one for one in held if isinstance(one, Tensor) and not one.is_leaf]
    return copy.deepcopy(model, {id(one): one.detach().clone() for one in computed})


def own_weights(module: nn.Module) -> Iterator[Tensor]:
    """Yield a module's own weights as it reads them, those of its submodules aside."""
    stored = (name.removesuffix("_orig") for name, _ in module.named_parameters(recurse=False))
    for name in (*stored, *getattr(module, "parametrizations", ())):
        if isinstance(weight := getattr(module, name, None), Tensor):
            yield weight


def computed_weights(module: nn.Module) -> list[str]:
    """Name a module's own weights that are computed of parameters, other than by a mask."""
    masked = {name for name, _, _ in masked_weights(module)}
    held = [name for name, one in vars(module).items() if isinstance(one, Tensor)]
    return [one for one in (*held, *getattr(module, "parametrizations", ())) if one not in masked]


def masked_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Yield the name, the parameter and the mask of what `torch.nn.utils.prune` masks in it."""
    for buffer, mask in module.named_buffers(recurse=False):
        name = buffer.removesuffix("_mask")
        original = module._parameters.get(f"{name}_orig")
        if buffer != name and original is not None:
            yield name, original, mask


def apply_masks(model: nn.Module) -> None:
    """Let all masked weights follow their parameters now, as they do before every call."""
    for module in model.modules():
        for name, original, mask in masked_weights(module):
            setattr(module, name, original * mask)


@torch.no_grad()
def remaining(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Return every parameter of a model, and what masks leave of it in any of its places."""
    masks: dict[nn.Parameter, list[Tensor | None]] = defaultdict(list)
    for module in model.modules():
        own = {f"{name}_orig": mask for name, _, mask in masked_weights(module)}
        for name, parameter in module._parameters.items():
            if parameter is not None:
                masks[parameter].append(own.get(name))
    return {parameter: _left(parameter, given) for parameter, given in masks.items()}


def _left(parameter: nn.Parameter, masks: list[Tensor | None]) -> Tensor:
    given = [mask for mask in masks if mask is not None]
    return parameter * torch.stack(given).amax(0) if len(given) == len(masks) else parameter
