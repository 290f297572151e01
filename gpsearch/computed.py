"""Weights that are computed when they are read, as by `torch.nn.utils.prune` or ``parametrize``."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import Tensor, nn


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of any model; torch refuses weights that were computed with gradients."""
    held = [one for module in model.modules() for one in vars(module).values()]
    computed = [one for one in held if isinstance(one, Tensor) and not one.is_leaf]
    return copy.deepcopy(model, {id(one): one.detach().clone() for one in computed})


def own_weights(module: nn.Module) -> Iterator[Tensor]:
    """Yield a module's own weights as it reads them, those of its submodules aside."""
    stored = (name.removesuffix("_orig") for name, _ in module.named_parameters(recurse=False))
    for name in (*stored, *getattr(module, "parametrizations", ())):
        if isinstance(weight := getattr(module, name, None), Tensor):
            yield weight
