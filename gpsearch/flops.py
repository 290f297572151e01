"""1 multiply-add = 2 FLOPs, matrix products only: FLOPs of one inference, and weights.

fvcore traces the model and counts its products, but scores an LSTM as 0 and knows no sparsity.
So recurrent modules are counted here in closed form and skipped in the trace, and the effective
count leaves out what zero weights would have done: a zero weight is a pruned weight.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.rnn import PackedSequence

from gpsearch.cell import HLSTM
from gpsearch.computed import copied, masked_weights, own_weights, remaining
from gpsearch.errors import UserError
from gpsearch.profiling import Quantity, arguments_on
from gpsearch.quantize import RECURRENT, narrow_bytes, recurrent_matrices

_WEIGHTED = (*RECURRENT, nn.Linear, _ConvNd)
_UNKNOWN = {
    f"aten::{name}"
    for name in (
        "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell",
        "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
        "bilinear", "inner", "linalg_vecdot", "tensordot", "addbmm", "chain_matmul",
        "linalg_multi_dot", "linalg_matrix_power", "cdist", "conv_tbc",
        "_sparse_mm", "_sparse_addmm", "_addmm_activation", "mkldnn_linear",
    )
}  # fmt: skip
"""Matrix products that no handle knows: an error, where fvcore would score them as 0. It may do so
with those by which torch's parametrizations compute weights: vdot and matrix_exp."""

Handle = Callable[[list[Any], list[Any]], int]
"""From a traced operator's inputs and outputs to its multiply-adds."""


def count(model: nn.Module, example: tuple[Any, ...]) -> dict[str, Quantity]:
    """Count the FLOPs of ``model(*example)`` in evaluation mode, and the model's weights.

    Zero weights are found in linear, convolutional and recurrent modules; a product with a weight
    held by any other module counts in full in both numbers of FLOPs.

    Args:
        model: Any module; it stays as it is.
        example: The arguments of one inference.

    Returns:
        flops_dense, flops_effective (without the products of zero weights), params,
        params_nonzero, and weight_bytes: what parameters and float buffers need, where the matrices
        of recurrent layers that 8 or 16 bits hold exactly count as such (see `gpsearch.quantize`;
        torch, and a saved model, keep all of them in 32). What `torch.nn.utils.prune` masks is
        zero, and its masks take no bytes.

    Raises:
        UserError: The model has weights but no countable product, or one that cannot be counted.
    """
    own = copied(model).cpu().eval()
    inputs = arguments_on("cpu", example)
    with torch.no_grad(), _separate_attention():
        uses, outputs = _observe(own, inputs)
        products = {use: _products(use, calls) for use, calls in uses.items()}
        recurrent = sum(all_ for use, (all_, _) in products.items() if isinstance(use, RECURRENT))
        _replay(outputs)
        dense = 2 * (recurrent + _traced(own, inputs))
    effective = dense - 2 * sum(all_ - live for all_, live in products.values())
    if dense == 0 and any(True for _ in model.parameters()):
        raise UserError(f"{type(model).__name__} has weights, but no matrix product was found")
    return {"flops_dense": _flops(dense), "flops_effective": _flops(effective)} | weights(model)


def weights(model: nn.Module) -> dict[str, Quantity]:
    """Count parameters, those that are not zero, and the bytes that they take; see `count`."""
    parameters = remaining(model)
    masks = {id(mask) for module in model.modules() for _, _, mask in masked_weights(module)}
    buffers = [one for one in model.buffers() if one.is_floating_point() and id(one) not in masks]
    saved = sum(one.nbytes - narrow_bytes(left) for one, left in recurrent_matrices(model))

    def counted(value: int, unit: str) -> Quantity:
        return Quantity(value, unit, "analytic", method="counted", scope="model")

    return {
        "params": counted(sum(one.numel() for one in parameters), "1"),
        "params_nonzero": counted(sum(map(_nonzeros, parameters.values())), "1"),
        "weight_bytes": counted(sum(one.nbytes for one in (*parameters, *buffers)) - saved, "B"),
    }


def lstm_flops(
    input_size: int, hidden_size: int, steps: int, layers: int = 1, directions: int = 1
) -> int:
    """Return the FLOPs of a dense LSTM over so many time steps of one sequence."""
    return hlstm_flops(input_size, hidden_size, (), steps, layers, directions)


def hlstm_flops(
    input_size: int,
    hidden_size: int,
    gate_hidden: tuple[int, ...],
    steps: int,
    layers: int = 1,
    directions: int = 1,
    *,
    gate_direct: bool = False,
) -> int:
    """Return the FLOPs of a dense H-LSTM over so many time steps of one sequence."""
    multiply_adds = 0
    for layer in range(layers):
        read = (input_size if layer == 0 else directions * hidden_size) + hidden_size
        gate = sum(wide * next_ for wide, next_ in pairwise((read, *gate_hidden, hidden_size)))
        direct = read * hidden_size if gate_direct and gate_hidden else 0
        multiply_adds += directions * 4 * (gate + direct)
    return 2 * steps * multiply_adds


@contextmanager
def _separate_attention() -> Iterator[None]:
    """Keep torch from fusing attention, and a whole layer around it, into one operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _observe(
    model: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[dict[nn.Module, list[int]], dict[nn.Module, list[Any]]]:
    """Run the model once.

    Returns:
        How often each call of a weighted module applied its weights, and the outputs of every
        call of a recurrent one.
    """
    uses: dict[nn.Module, list[int]] = defaultdict(list)
    outputs: dict[nn.Module, list[Any]] = defaultdict(list)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        uses[module].append(_applications(module, args, kwargs, out))
        if isinstance(module, RECURRENT):
            outputs[module].append(out)

    modules = [module for module in model.modules() if isinstance(module, _WEIGHTED)]
    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    return uses, outputs


def _applications(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> int:
    """Return how often a call multiplies by each weight: once a position, or once a row."""
    read = _first(args, kwargs)
    if isinstance(module, HLSTM) and (lengths := kwargs.get("lengths")) is not None:
        return int(lengths.sum())  # what is padding would not be there in packed sequences
    if isinstance(module, _ConvNd):
        transposed = isinstance(module, _ConvTransposeNd)
        spread, channels = (read, module.in_channels) if transposed else (out, module.out_channels)
        return int(spread.numel()) // channels
    return math.prod(_rows(read).shape[:-1])


def _products(module: nn.Module, applications: list[int]) -> tuple[int, int]:
    """Return the multiply-adds of a module's weights, of all and of those that are not zero."""
    matrices = [one for one in own_weights(module) if one.dim() >= 2]
    times = sum(applications)
    return (
        times * sum(one.numel() for one in matrices),
        times * sum(_nonzeros(one) for one in matrices),
    )


def _replay(outputs: dict[nn.Module, list[Any]]) -> None:
    """Let each module give the outputs it gave before, in turn, without any product."""

    def player(given: list[Any]) -> Callable[..., Any]:
        again = iter(given)
        return lambda *args, **kwargs: _tied(next(again), _rows(_first(args, kwargs)).sum())

    for module, given in outputs.items():
        module.forward = player(given)


def _tied(given: Any, read: Tensor) -> Any:
    """Return an output that depends on the input, else the tracer drops all that comes before."""
    if isinstance(given, Tensor):
        return given + 0 * read
    if isinstance(given, PackedSequence):
        return PackedSequence(given.data + 0 * read, *given[1:])
    return tuple(_tied(one, read) for one in given)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("input", next(iter(kwargs.values())))


def _rows(read: Tensor | PackedSequence) -> Tensor:
    return read.data if isinstance(read, PackedSequence) else read


def _traced(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Return the multiply-adds of the matrix products that fvcore finds in a trace."""
    with warnings.catch_warnings():
        # Tracing freezes sizes, which is what is wanted; torch announces its end of life.
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis, jit_handles

        analysis = FlopCountAnalysis(_Kept(model), inputs).clear_op_handles()
        analysis.set_op_handle("aten::_convolution", jit_handles.conv_flop_jit)
        analysis.set_op_handle("aten::einsum", jit_handles.einsum_flop_jit)
        analysis.set_op_handle(**_own_handles(jit_handles.get_shape))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        total = int(analysis.total())
    unknown = sorted(_UNKNOWN & set(analysis.unsupported_ops()))
    if unknown:
        raise UserError(
            f"{type(model).__name__} calls {', '.join(unknown)}, whose FLOPs are not known; "
            "use matmul, einsum and the recurrent modules of torch.nn or gpsearch"
        )
    return total


class _Kept(nn.Module):
    """A model that returns what its weighted modules do, too.

    The tracer drops whatever no output depends on; a decoder that chooses words leaves the trace.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        kept: list[Tensor] = []
        modules = [module for module in self.modules() if isinstance(module, _WEIGHTED)]
        hooks = [
            module.register_forward_hook(lambda _m, _args, out: kept.extend(_tensors(out)))
            for module in modules
        ]
        result = self.model(*inputs)
        for hook in hooks:
            hook.remove()
        return [*kept, *_tensors(result)]


def _tensors(out: Any) -> Iterator[Tensor]:
    """Yield the tensors of floats in an output, however nested; lengths and words stay out."""
    if isinstance(out, Tensor) and out.is_floating_point():
        yield out
    elif isinstance(out, tuple | list | dict):
        for one in out.values() if isinstance(out, dict) else out:
            yield from _tensors(one)


def _own_handles(shape: Callable[[Any], list[int]]) -> dict[str, Handle]:
    """Return handles that hold for vectors and broadcast matrices too, where fvcore's do not.

    Args:
        shape: Tells the sizes of a value of the trace.
    """

    def product(first: int) -> Handle:
        return lambda read, out: math.prod(shape(out[0])) * shape(read[first])[-1]

    def attention(read: list[Any], out: list[Any]) -> int:
        query, key = shape(read[0]), shape(read[1])
        return (math.prod(query) + math.prod(shape(out[0]))) * key[-2]

    plain = dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "linear"), product(0))
    biased = dict.fromkeys(("addmm", "baddbmm", "addmv"), product(1))
    named = {**plain, **biased, "scaled_dot_product_attention": attention}
    return {f"aten::{name}": handle for name, handle in named.items()}


def _nonzeros(tensor: Tensor) -> int:
    return int(torch.count_nonzero(tensor))


def _flops(value: int) -> Quantity:
    return Quantity(value, "flop", "analytic", method="fvcore and closed forms", scope="inference")
