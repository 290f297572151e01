"""Zeros where weights sleep: at every training step, in the weights and in their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.autograd.graph import increment_version

from gpsearch.kernels.native import native
from gpsearch.kernels.threads import each_in_threads, slices


def prepared(mask: Bool[Tensor, "*shape"], like: Tensor) -> Shaped[Tensor, "*shape"]:
    """Return a copy of a mask (True is awake) in the form that `clear_dormant` takes.

    Args:
        mask: Where weights are awake.
        like: A tensor of the type, and on the device, of those that will be cleared.
    """
    # In torch, masks cost a third as floats of what they cost as booleans.
    if native() is None or not _fits(like):
        return mask.to(like.dtype)
    return mask.clone(memory_format=torch.contiguous_format)


def clear_dormant(tensors: Sequence[Tensor], awake: Sequence[Shaped[Tensor, "*_shape"]]) -> None:
    """Set what sleeps to zero, in place; autograd records it where it is at work.

    In C whatever sleeps becomes zero; torch multiplies, and NaN stays NaN.

    Args:
        tensors: Weights, gradients or moments.
        awake: The mask of each, as `prepared` returned it.
    """
    kernels, threads, rest = native(), torch.get_num_threads(), []
    for tensor, mask in zip(tensors, awake, strict=True):
        if kernels is None or mask.dtype is not torch.bool or not _fits(tensor):
            rest.append((tensor, mask))
            continue
        at, of, count = tensor.data_ptr(), mask.data_ptr(), tensor.numel()
        increment_version(tensor)  # as whatever torch changes has it
        if threads == 1:
            kernels.clear_dormant(at, of, count)
            continue
        size = tensor.element_size()
        jobs = [(at + a * size, of + a, b - a) for a, b in slices(count, threads)]
        each_in_threads(kernels.clear_dormant, jobs)
    if rest:
        torch._foreach_mul_(*map(list, zip(*rest, strict=True)))


def _fits(tensor: Tensor) -> bool:
    recorded = tensor.grad_fn is not None  # a gradient that is to be differentiated again
    plain = tensor.is_cpu and tensor.dtype is torch.float32 and tensor.is_contiguous()
    return plain and not recorded
