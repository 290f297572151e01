"""How calls of torch's functions are written down as operations of a program."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpsearch.errors import Unsupported
from gpsearch.exporting.recording import WRITERS, Recorder, writer

# Element by element

for _name in ("relu", "tanh", "sigmoid", "exp", "log", "sqrt", "abs", "neg"):

    @writer(_name, f"{_name}_")
    def _unary(r: Recorder, y: Tensor, x: Tensor, *_: Any, op: str = _name, **__: Any) -> None:
        r.write(op, [x], y)


@writer("gelu")
def _gelu(r: Recorder, y: Tensor, x: Tensor, approximate: str = "none") -> None:
    if approximate != "none":
        raise Unsupported(f"GELU with approximate={approximate!r}")
    r.write("gelu", [x], y)


@writer("leaky_relu", "leaky_relu_")
def _leaky_relu(
    r: Recorder, y: Tensor, x: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> None:
    r.write("leaky_relu", [x], y, slope=negative_slope)


@writer("silu")
def _silu(r: Recorder, y: Tensor, x: Tensor, inplace: bool = False) -> None:
    share = torch.sigmoid(x)
    r.write("sigmoid", [x], share)
    r.write("mul", [x, share], y)


@writer("clamp", "clip", "hardtanh")
def _clamp(
    r: Recorder, y: Tensor, x: Tensor, min: Any = None, max: Any = None, *_: Any, **limits: Any
) -> None:
    low, high = limits.get("min_val", min), limits.get("max_val", max)
    if low is not None:
        raised = torch.maximum(x, _like(low, x.dtype)) if high is not None else y
        r.write("maximum", [x, _like(low, x.dtype)], raised)
        x = raised
    if high is not None:
        r.write("minimum", [x, _like(high, x.dtype)], y)


@writer("clamp_min")
def _clamp_min(r: Recorder, y: Tensor, x: Tensor, min: Any) -> None:
    _clamp(r, y, x, min)


def _binary(op: str, names: Sequence[str], *, turned: bool = False) -> None:
    @writer(*names)
    def write(r: Recorder, y: Tensor, a: Any, b: Any, *, alpha: Any = 1, **options: Any) -> None:
        if alpha != 1 or options.get("rounding_mode"):
            raise Unsupported(f"{op} with alpha or rounding_mode")
        dtype = torch.result_type(a, b) if y.dtype == torch.bool else y.dtype
        a, b = (_cast(r, _like(one, dtype), dtype) for one in (a, b))
        r.write(op, [b, a] if turned else [a, b], y)


_binary("add", ["add", "__add__", "__radd__", "add_", "__iadd__"])
_binary("sub", ["sub", "subtract", "__sub__", "sub_"])
_binary("sub", ["__rsub__", "rsub"], turned=True)
_binary("mul", ["mul", "multiply", "__mul__", "__rmul__", "mul_", "__imul__"])
_binary("div", ["div", "divide", "true_divide", "__truediv__", "div_"])
_binary("div", ["__rtruediv__", "__rdiv__"], turned=True)
_binary("maximum", ["maximum"])
_binary("minimum", ["minimum"])
_binary("eq", ["eq", "__eq__"])
_binary("lt", ["lt", "__lt__"])
_binary("gt", ["gt", "__gt__"])


@writer("where")
def _where(r: Recorder, y: Tensor, condition: Tensor, a: Any, b: Any) -> None:
    r.write("where", [condition, *(_cast(r, _like(v, y.dtype), y.dtype) for v in (a, b))], y)


@writer("masked_fill")
def _masked_fill(r: Recorder, y: Tensor, x: Tensor, mask: Tensor, value: Any) -> None:
    r.write("where", [mask, _like(value, y.dtype), x], y)


@writer("to", "float", "double", "long", "int", "type", "type_as", "clone", "contiguous", "detach")
@writer("dropout", "feature_dropout", "alpha_dropout")
def _same(r: Recorder, y: Any, x: Tensor, *args: Any, training: bool = False, **_: Any) -> None:
    if isinstance(y, str):
        return  # what type() says without arguments
    if training:
        raise Unsupported("dropout in training mode; call eval() on the model")
    if y.dtype == x.dtype:
        r.alias(y, x)
    else:
        r.write("cast", [x], y, dtype=_dtype_name(y.dtype))


@writer("full_like")
def _full_like(r: Recorder, y: Tensor, x: Tensor, fill_value: Any, **_: Any) -> None:
    if r.is_recorded(fill_value):
        r.write("expand", [_cast(r, fill_value, y.dtype)], y, shape=list(y.shape))


# Shapes


@writer("reshape", "view", "view_as", "reshape_as", "flatten", "unflatten", "unsqueeze", "squeeze")
def _reshape(r: Recorder, y: Tensor, x: Tensor, *_: Any, **__: Any) -> None:
    r.write("reshape", [x], y, shape=list(y.shape))


@writer("expand", "expand_as", "broadcast_to")
def _expand(r: Recorder, y: Tensor, x: Tensor, *_: Any, **__: Any) -> None:
    r.write("expand", [x], y, shape=list(y.shape))


@writer("permute")
def _permute(r: Recorder, y: Tensor, x: Tensor, *dims: Any) -> None:
    order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    r.write("transpose", [x], y, order=[dim % x.dim() for dim in order])


@writer("transpose", "swapaxes", "swapdims")
def _transpose(r: Recorder, y: Tensor, x: Tensor, dim0: int, dim1: int) -> None:
    order = list(range(x.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    r.write("transpose", [x], y, order=order)


@writer("t", "T", "mT")
def _last_two(r: Recorder, y: Tensor, x: Tensor) -> None:
    _transpose(r, y, x, -2, -1)


@writer("cat", "concat", "concatenate")
def _cat(r: Recorder, y: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    some = [one for one in tensors if one.numel()] or tensors
    r.write("concat", [_cast(r, one, y.dtype) for one in some], y, axis=dim % y.dim())


@writer("stack")
def _stack(r: Recorder, y: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    parts = [one.unsqueeze(dim) for one in tensors]
    for one, part in zip(tensors, parts, strict=True):
        _reshape(r, part, one)
    r.write("concat", parts, y, axis=dim % y.dim())


# Parts


@writer("chunk", "split", "tensor_split", "split_with_sizes")
def _split(r: Recorder, ys: Sequence[Tensor], x: Tensor, sizes: Any, dim: int = 0) -> None:
    dim = dim % x.dim()
    ends = list(accumulate(y.shape[dim] for y in ys))
    for y, end in zip(ys, ends, strict=True):
        _slice(r, y, x, {dim: slice(end - y.shape[dim], end, 1)})


@writer("unbind")
def _unbind(r: Recorder, ys: Sequence[Tensor], x: Tensor, dim: int = 0) -> None:
    for i, y in enumerate(ys):
        _slice(r, y, x, {dim % x.dim(): slice(i, i + 1, 1)})


@writer("select")
def _select(r: Recorder, y: Tensor, x: Tensor, dim: int, index: int) -> None:
    index = index % x.shape[dim]
    _slice(r, y, x, {dim % x.dim(): slice(index, index + 1, 1)})


@writer("narrow")
def _narrow(r: Recorder, y: Tensor, x: Tensor, dim: int, start: int, length: int) -> None:
    start = start % x.shape[dim]
    _slice(r, y, x, {dim % x.dim(): slice(start, start + length, 1)})


@writer("__getitem__")
def _getitem(r: Recorder, y: Tensor, x: Tensor, index: Any) -> None:
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(one, int | slice | None | type(...)) for one in index):
        return _take(r, y, x, index)
    taken = sum(one is not None and one is not ... for one in index)
    rest = [slice(None)] * (x.dim() - taken)
    at = next((i for i, one in enumerate(index) if one is ...), len(index))
    whole = [*index[:at], *rest, *index[at + 1 :]]
    box = {}
    for dim, one in enumerate(part for part in whole if part is not None):
        if isinstance(one, int):
            one = slice(one % x.shape[dim], one % x.shape[dim] + 1)
        box[dim] = slice(*one.indices(x.shape[dim]))
    _slice(r, y, x, box)


def _take(r: Recorder, y: Tensor, x: Tensor, index: tuple[Any, ...]) -> None:
    """Write x[:, index] with whole numbers in a tensor."""
    before, last = index[:-1], index[-1]
    whole = all(isinstance(one, slice) and one == slice(None) for one in before)
    if not isinstance(last, Tensor) or last.dtype != torch.long or not whole:
        raise Unsupported("indexing by more than one tensor, or by a mask")
    r.write("gather", [x, last], y, axis=len(before))


@writer("index_select")
def _index_select(r: Recorder, y: Tensor, x: Tensor, dim: int, index: Tensor) -> None:
    r.write("gather", [x, index], y, axis=dim % x.dim())


@writer("embedding")
def _embedding(r: Recorder, y: Tensor, ids: Tensor, weight: Tensor, *_: Any, **__: Any) -> None:
    r.write("gather", [weight, ids], y, axis=0)


def _slice(r: Recorder, y: Tensor, x: Tensor, box: dict[int, slice]) -> None:
    whole = [box.get(dim, slice(0, size, 1)) for dim, size in enumerate(x.shape)]
    if any(one.step < 1 for one in whole):
        raise Unsupported("a slice with a negative step")
    part = x[tuple(whole)]
    starts, stops, steps = ([getattr(o, k) for o in whole] for k in ("start", "stop", "step"))
    r.write("slice", [x], part, starts=starts, stops=stops, steps=steps)
    _reshape(r, y, part)


# Sums


def _reduced(op: str, names: Sequence[str]) -> None:
    @writer(*names)
    def write(
        r: Recorder, y: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None
    ) -> None:
        dims = [dim] if isinstance(dim, int) else dim or range(x.dim())
        axes = [one % x.dim() for one in dims]
        r.write(op, [_cast(r, x, y.dtype)], y, axes=axes, keepdims=keepdim)


_reduced("sum", ["sum"])
_reduced("mean", ["mean"])
_reduced("max", ["amax"])


@writer("max")
def _max(r: Recorder, y: Any, x: Tensor, dim: Any = None, keepdim: bool = False) -> None:
    if isinstance(dim, Tensor):
        WRITERS["maximum"](r, y, x, dim)
    elif dim is None:
        r.write("max", [x], y, axes=list(range(x.dim())), keepdims=False)
    else:
        r.write("max", [x], y[0], axes=[dim % x.dim()], keepdims=keepdim)
        _argmax(r, y[1], x, dim, keepdim)


@writer("argmax")
def _argmax(
    r: Recorder, y: Tensor, x: Tensor, dim: int | None = None, keepdim: bool = False
) -> None:
    if dim is None:
        raise Unsupported("argmax over all axes at once; name one")
    r.write("argmax", [x], y, axis=dim % x.dim(), keepdims=keepdim)


for _name in ("softmax", "log_softmax"):

    @writer(_name)
    def _softmax(
        r: Recorder, y: Tensor, x: Tensor, dim: int | None, *_: Any, op: str = _name, **__: Any
    ) -> None:
        if dim is None:
            raise Unsupported(f"{op} without an axis; name one")
        r.write(op, [_cast(r, x, y.dtype)], y, axis=dim % x.dim())


# Layers


@writer("linear")
def _linear(r: Recorder, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    r.write("linear", [x, weight, *([] if bias is None else [bias])], y)


@writer("matmul", "__matmul__", "mm", "bmm")
def _matmul(r: Recorder, y: Tensor, a: Tensor, b: Tensor) -> None:
    r.write("matmul", [a, b], y)


@writer("conv1d", "conv2d")
def _conv(
    r: Recorder,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> None:
    if isinstance(padding, str):
        raise Unsupported(f"a convolution with padding={padding!r}; give a number")
    if x.dim() != weight.dim():
        raise Unsupported("a convolution without a batch axis")
    around = weight.dim() - 2
    spans = {"stride": stride, "padding": padding, "dilation": dilation}
    attributes = {
        name: [span] * around if isinstance(span, int) else (list(span) * around)[:around]
        for name, span in spans.items()
    }
    r.write("conv", [x, weight, *([] if bias is None else [bias])], y, groups=groups, **attributes)


@writer("layer_norm")
def _layer_norm(
    r: Recorder,
    y: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> None:
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    scales = [one for one in (weight, bias) if one is not None]
    r.write("layer_norm", [x, *scales], y, axes=len(normalized_shape), eps=eps)


@writer("batch_norm")
def _batch_norm(
    r: Recorder,
    y: Tensor,
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> None:
    if training or mean is None or variance is None:
        raise Unsupported("batch norm without running statistics")
    shape = (-1, *[1] * (x.dim() - 2))
    scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    scaled = x * scale.view(shape)
    r.write("mul", [x, scale.view(shape)], scaled)
    r.write("add", [scaled, shift.view(shape)], y)


# Recurrent layers


@writer("recurrence")
def _recurrence(
    r: Recorder,
    ys: Sequence[Tensor],
    xs: Sequence[Tensor],
    h0: Tensor,
    c0: Tensor,
    gates: Sequence[Any],
) -> None:
    if any(one.masks for one in gates):
        raise Unsupported("gate dropout in training mode; call eval() on the model")
    cells = [
        {
            "ih": r.constant(one.ih),
            "hh": r.constant(one.hh),
            "bias": _maybe(r, one.bias),
            "dense": [[r.constant(d.weight), _maybe(r, d.bias)] for d in one.dense],
            "norms": [[r.constant(n.weight), _maybe(r, n.bias)] for n in one.norms],
            "activation": one.activation,
        }
        for one in gates
    ]
    r.write("recurrence", [*xs, h0, c0], ys, cells=cells)


@writer("lstm")
def _lstm(
    r: Recorder,
    ys: Sequence[Tensor],
    x: Tensor,
    hx: Any,
    weights: Any,
    bias: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> None:
    if isinstance(weights, bool):
        raise Unsupported("packed sequences")
    directions, count = 1 + bidirectional, 4 if bias else 2
    if len(weights) != layers * directions * count:
        raise Unsupported("an LSTM with proj_size")
    x = _turned(r, x) if batch_first else x
    ends = []
    for layer in range(layers):
        rows = slice(layer * directions, (layer + 1) * directions)
        own = weights[count * rows.start : count * rows.stop]
        cells = [own[count * d : count * (d + 1)] for d in range(directions)]
        states = [_part(r, state, rows) for state in hx]
        found = torch.lstm(x, states, own, bias, 1, 0.0, False, bidirectional, False)
        r.write("lstm", [x, *states], found, cells=[_flat_cell(r, cell) for cell in cells])
        x, *end = found
        ends.append(end)
    r.alias(ys[0], _turned(r, x) if batch_first else x)
    for y, *parts in zip(ys[1:], *ends, strict=True):
        _cat(r, y, parts)


@writer("lstm_cell")
def _lstm_cell(r: Recorder, ys: Sequence[Tensor], x: Tensor, hx: Any, *weights: Any) -> None:
    x, h, c = (_unsqueezed(r, one) for one in (x, *hx))
    own = [one for one in weights if one is not None]
    found = torch.lstm(x, [h, c], own, len(own) == 4, 1, 0.0, False, False, False)
    r.write("lstm", [x, h, c], found, cells=[_flat_cell(r, own)])
    for y, one in zip(ys, found[1:], strict=True):
        _reshape(r, y, one)


def _flat_cell(r: Recorder, weights: Sequence[Tensor]) -> dict[str, Any]:
    bias = r.constant(weights[2] + weights[3]) if len(weights) == 4 else None
    return {"ih": r.constant(weights[0]), "hh": r.constant(weights[1]), "bias": bias}


def _turned(r: Recorder, x: Tensor) -> Tensor:
    y = x.transpose(0, 1)
    _transpose(r, y, x, 0, 1)
    return y


def _part(r: Recorder, state: Tensor, rows: slice) -> Tensor:
    part = state[rows]
    if r.is_recorded(state):
        _slice(r, part, state, {0: slice(rows.start, rows.stop, 1)})
    return part


def _unsqueezed(r: Recorder, x: Tensor) -> Tensor:
    y = x.unsqueeze(0)
    if r.is_recorded(x):
        _reshape(r, y, x)
    return y


# What the writers share


def _like(value: Any, dtype: torch.dtype) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)


def _cast(r: Recorder, value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.dtype == dtype:
        return value
    changed = value.to(dtype)
    if r.is_recorded(value):
        r.write("cast", [value], changed, dtype=_dtype_name(dtype))
    return changed


def _dtype_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if not hasattr(np, name):
        raise Unsupported(f"numbers of type {name}; use float32")
    return name


def _maybe(r: Recorder, value: Tensor | None) -> str | None:
    return None if value is None else r.constant(value)
