"""A program as an ONNX graph: LSTMs as ONNX's own, H-LSTMs as a Scan over time.

torch.export unrolls the time loop instead: 3449 nodes for 300 frames through two layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpsearch.errors import Unsupported, UserError
from gpsearch.exporting.program import Array, Op, Program

OPSET = 20
"""The first one with Gelu."""

_SAME = {
    "matmul": "MatMul",
    "relu": "Relu",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "gelu": "Gelu",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "abs": "Abs",
    "neg": "Neg",
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "maximum": "Max",
    "minimum": "Min",
    "eq": "Equal",
    "lt": "Less",
    "gt": "Greater",
    "where": "Where",
}
"""Operations that differ in name only."""


def to_onnx(program: Program) -> Any:
    """Return the program as an ``onnx.ModelProto``.

    Raises:
        UserError: onnx is not installed, or has no counterpart of an operation.
    """
    onnx = _onnx()
    graph = _Graph(onnx, program.constants)
    for op in program.ops:
        graph.add(op)
    inputs = _values(onnx, program.inputs, program.example)
    names = [f"y{i}" for i in range(len(program.outputs))]
    outputs = _values(onnx, names, program.expected)
    for name, given in zip(names, program.outputs, strict=True):
        graph.node("Identity", [given], [name])
    whole = onnx.helper.make_graph(graph.nodes, "gpsearch", inputs, outputs, graph.initializers)
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    return onnx.helper.make_model(whole, opset_imports=opsets, ir_version=10)


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise UserError("onnx is missing: pip install onnx") from error
    return onnx


class _Graph:
    """Nodes and constants, while they are put together."""

    def __init__(self, onnx: Any, constants: Any = (), prefix: str = "n") -> None:
        self.onnx, self.constants, self.prefix = onnx, constants, prefix
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._made: set[str] = set()

    def add(self, op: Op) -> None:
        """Add an operation of a program."""
        name, attributes = op["op"], {k: op[k] for k in op if k not in ("op", "in", "out")}
        if name in _SAME:
            self.node(_SAME[name], op["in"], op["out"])
        elif name in _WRITERS:
            _WRITERS[name](self, op["in"], op["out"], **attributes)
        else:
            raise Unsupported(f"ONNX has no counterpart of {name}")

    def node(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str] | None = None, **attrs: Any
    ) -> str:
        """Add a node and return the name of its first output."""
        names = list(outputs or [self.fresh()])
        used = [self.use(one) for one in inputs]
        self.nodes.append(self.onnx.helper.make_node(kind, used, names, **attrs))
        return names[0]

    def fresh(self) -> str:
        """Return a new name."""
        return f"{self.prefix}{len(self.nodes)}.{len(self.initializers)}"

    def use(self, name: str) -> str:
        """Return a name, which is a constant's only once it is used."""
        if name in self.constants and name not in self._made:
            self._made.add(name)
            self._initialize(self.constants[name], name)
        return name

    def const(self, value: Any, dtype: Any = None) -> str:
        """Add a constant and return its name."""
        return self._initialize(np.asarray(value, dtype), f"{self.prefix}k{len(self.initializers)}")

    def ints(self, values: Sequence[int]) -> str:
        """Add a list of whole numbers."""
        return self.const(values, np.int64)

    def _initialize(self, value: Array, name: str) -> str:
        value = np.ascontiguousarray(value).reshape(value.shape)
        self.initializers.append(self.onnx.numpy_helper.from_array(value, name))
        return name


# Single operations: the graph, names of inputs and outputs, attributes

_In = Sequence[str]
_Out = Sequence[str]


def _linear(g: _Graph, ins: _In, outs: _Out) -> None:
    if ins[1] in g.constants:
        turned = g.const(g.constants[ins[1]].T)
    else:
        turned = g.node("Transpose", [ins[1]], perm=[1, 0])
    if len(ins) == 2:
        g.node("MatMul", [ins[0], turned], outs)
    else:
        g.node("Add", [g.node("MatMul", [ins[0], turned]), ins[2]], outs)


def _conv(g: _Graph, ins: _In, outs: _Out, **attributes: Any) -> None:
    spans = {"strides": attributes["stride"], "dilations": attributes["dilation"]}
    pads = list(attributes["padding"]) * 2
    g.node("Conv", ins, outs, pads=pads, group=attributes["groups"], **spans)


def _layer_norm(g: _Graph, ins: _In, outs: _Out, axes: int, eps: float) -> None:
    if len(ins) == 1:
        raise Unsupported("ONNX has no layer norm without a weight")
    g.node("LayerNormalization", ins, outs, axis=-axes, epsilon=eps)


def _leaky_relu(g: _Graph, ins: _In, outs: _Out, slope: float) -> None:
    g.node("LeakyRelu", ins, outs, alpha=slope)


def _softmax(g: _Graph, ins: _In, outs: _Out, axis: int) -> None:
    g.node("Softmax", ins, outs, axis=axis)


def _log_softmax(g: _Graph, ins: _In, outs: _Out, axis: int) -> None:
    g.node("LogSoftmax", ins, outs, axis=axis)


def _reducer(kind: str) -> Callable[..., None]:
    def write(g: _Graph, ins: _In, outs: _Out, axes: list[int], keepdims: bool) -> None:
        g.node(kind, [ins[0], g.ints(axes)], outs, keepdims=int(keepdims))

    return write


def _argmax(g: _Graph, ins: _In, outs: _Out, axis: int, keepdims: bool) -> None:
    g.node("ArgMax", ins, outs, axis=axis, keepdims=int(keepdims))


def _reshape(g: _Graph, ins: _In, outs: _Out, shape: list[int]) -> None:
    g.node("Reshape", [ins[0], g.ints(shape)], outs, allowzero=1)


def _expand(g: _Graph, ins: _In, outs: _Out, shape: list[int]) -> None:
    g.node("Expand", [ins[0], g.ints(shape)], outs)


def _transpose(g: _Graph, ins: _In, outs: _Out, order: list[int]) -> None:
    g.node("Transpose", ins, outs, perm=order)


def _slice(
    g: _Graph, ins: _In, outs: _Out, starts: list[int], stops: list[int], steps: list[int]
) -> None:
    axes = list(range(len(starts)))
    g.node("Slice", [ins[0], *map(g.ints, (starts, stops, axes, steps))], outs)


def _concat(g: _Graph, ins: _In, outs: _Out, axis: int) -> None:
    g.node("Concat", ins, outs, axis=axis)


def _gather(g: _Graph, ins: _In, outs: _Out, axis: int) -> None:
    g.node("Gather", ins, outs, axis=axis)


def _cast(g: _Graph, ins: _In, outs: _Out, dtype: str) -> None:
    g.node("Cast", ins, outs, to=_type(g.onnx, np.dtype(dtype)))


# Recurrent layers

_TO_ONNX = [0, 3, 1, 2]
"""torch's gates i, f, g, o in ONNX's order i, o, f, c."""
_SIGMOIDS_FIRST = [0, 1, 3, 2]
"""So that one sigmoid serves i, f and o."""


def _lstm(g: _Graph, ins: _In, outs: _Out, cells: list[dict[str, Any]]) -> None:
    def stacked(name: str) -> Array:
        return np.stack([_gates_moved(g.constants[cell[name]], _TO_ONNX) for cell in cells])

    hidden = g.constants[cells[0]["hh"]].shape[1]
    bias = ""
    if cells[0]["bias"]:
        both = stacked("bias")
        bias = g.const(np.concatenate([both, np.zeros_like(both)], 1))
    way = "bidirectional" if len(cells) == 2 else "forward"
    weights = [g.const(stacked("ih")), g.const(stacked("hh")), bias, "", ins[1], ins[2]]
    y = g.fresh()
    g.node(
        "LSTM", [ins[0], *weights], [y, *outs[1:]], hidden_size=hidden, direction=way
    )  # y: [time, dir, batch, hidden]
    turned = g.node("Transpose", [y], perm=[0, 2, 1, 3])
    g.node("Reshape", [turned, g.ints([0, 0, len(cells) * hidden])], outs[:1])


def _recurrence(g: _Graph, ins: _In, outs: _Out, cells: list[dict[str, Any]]) -> None:
    """Write a Scan over ``[time, dir, 1, batch, rows]``, all directions in one."""
    body = _Step(g, cells)
    products = [_products(g, x, body.weights[d]) for d, x in enumerate(ins[:-2])]
    xs = g.node("Concat", products, axis=1)
    states = [g.node("Unsqueeze", [state, g.ints([1])]) for state in ins[-2:]]
    last, stacked = [g.fresh() + end for end in "hc"], [g.fresh() + end for end in "HC"]
    g.node("Scan", [*states, xs], [*last, *stacked], body=body.graph(), num_scan_inputs=1)
    for one, out in zip(stacked, outs, strict=True):  # [time, dir, 1, batch, hidden]
        flat = g.node("Squeeze", [one, g.ints([2])])
        g.node("Transpose", [flat], [out], perm=[1, 0, 2, 3])


def _products(g: _Graph, x: str, weights: dict[str, Any]) -> str:
    """Multiply the inputs of all steps at once: ``[time, 1, 1, batch, rows]``."""
    y = g.node("MatMul", [x, g.const(weights["ih"].T)])
    if weights["bias"] is not None:
        y = g.node("Add", [y, g.const(weights["bias"])])
    return g.node("Unsqueeze", [y, g.ints([1, 2])])


class _Step:
    """One step of an H-LSTM layer as the body of a Scan: h, c, x -> h, c, h, c."""

    def __init__(self, outer: _Graph, cells: list[dict[str, Any]]) -> None:
        self.g = _Graph(outer.onnx, prefix=f"s{len(outer.nodes)}.")
        self.cells = cells
        self.weights = [_moved(outer.constants, cell) for cell in cells]
        one = self.weights[0]
        self.dtype, self.hidden = one["hh"].dtype, one["hh"].shape[1]
        self.first = _first(one["dense"])

    def graph(self) -> Any:
        """Return the graph, its results written twice: as states, and to be stacked."""
        g = self.g
        hh = g.const(np.stack([w["hh"].T[None] for w in self.weights]))  # [dir, 1, hidden, rows]
        z = g.node("Add", ["x", g.node("MatMul", ["h", hh])])
        gates = self._gates(z)
        open_, new = g.fresh() + "s", g.fresh() + "g"
        g.node("Split", [gates, g.ints([3, 1])], [open_, new], axis=1)
        i, f, o = (g.fresh() + gate for gate in "ifo")
        g.node("Split", [g.node("Sigmoid", [open_])], [i, f, o], axis=1, num_outputs=3)
        kept = g.node("Mul", [f, "c"])
        added = g.node("Mul", [i, g.node("Tanh", [new])])
        g.node("Add", [kept, added], ["c_next"])
        g.node("Mul", [o, g.node("Tanh", ["c_next"])], ["h_next"])
        g.node("Identity", ["h_next"], ["h_out"])
        g.node("Identity", ["c_next"], ["c_out"])
        make, kind = g.onnx.helper.make_tensor_value_info, _type(g.onnx, self.dtype)
        names = ("h", "c", "x"), ("h_next", "c_next", "h_out", "c_out")
        ins, outs = ([make(name, kind, None) for name in some] for some in names)
        return g.onnx.helper.make_graph(g.nodes, "step", ins, outs, g.initializers)

    def _gates(self, z: str) -> str:
        g, rows = self.g, self.weights[0]["hh"].shape[0]
        width = self.first // 4
        if not width:
            return self._per_gate(z, self.hidden)
        if rows == self.first:
            return self._hidden(self._per_gate(z, width))
        inner, direct = g.fresh() + "a", g.fresh() + "b"
        g.node("Split", [z, g.ints([self.first, rows - self.first])], [inner, direct], axis=3)
        hidden = self._hidden(self._per_gate(inner, width))
        return g.node("Add", [hidden, self._per_gate(direct, self.hidden)])

    def _per_gate(self, z: str, width: int) -> str:
        """Take ``[dir, 1, batch, 4 * width]`` to ``[dir, 4, batch, width]``."""
        apart = self.g.node("Reshape", [z, self.g.ints([len(self.cells), -1, 4, width])])
        return self.g.node("Transpose", [apart], perm=[0, 2, 1, 3])

    def _hidden(self, a: str) -> str:
        """Go through the hidden layers, and onto the gates."""
        g, activation = self.g, self.cells[0]["activation"]
        for j, (_, bias) in enumerate(self.weights[0]["dense"]):
            if self.weights[0]["norms"]:
                a = self._norm(a, j)
            kind, slope = _ACTIVATIONS[activation]
            a = g.node(kind, [a], **slope)
            weight = np.stack([w["dense"][j][0].swapaxes(1, 2) for w in self.weights])
            a = g.node("MatMul", [a, g.const(weight)])
            if bias is not None:
                a = g.node("Add", [a, self._per_unit("dense", j, 1)])
        return a

    def _norm(self, a: str, j: int) -> str:
        g, width = self.g, self.weights[0]["norms"][j][0].shape[1]
        plain = g.node("LayerNormalization", [a, g.const(np.ones(width, self.dtype))], axis=-1)
        scaled = g.node("Mul", [plain, self._per_unit("norms", j, 0)])
        if self.weights[0]["norms"][j][1] is None:
            return scaled
        return g.node("Add", [scaled, self._per_unit("norms", j, 1)])

    def _per_unit(self, kind: str, j: int, which: int) -> str:
        """Add a constant ``[dir, 4, 1, width]``."""
        return self.g.const(np.stack([w[kind][j][which][:, None] for w in self.weights]))


_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.01}),
    "tanh": ("Tanh", {}),
    "gelu": ("Gelu", {}),
}


def _moved(constants: Any, cell: dict[str, Any]) -> dict[str, Any]:
    """Return a cell's arrays with the gates in the order of `_SIGMOIDS_FIRST`."""

    def get(name: str | None) -> Any:
        return None if name is None else constants[name]

    first = _first([[get(weight)] for weight, _ in cell["dense"]])

    def rows(name: str | None) -> Any:
        if name is None:
            return None
        parts = np.split(get(name), [first])
        return np.concatenate([_gates_moved(p, _SIGMOIDS_FIRST) for p in parts if len(p)])

    def by_gate(pairs: list[list[str | None]]) -> list[list[Any]]:
        moved = [[get(one) for one in pair] for pair in pairs]
        return [[None if one is None else one[_SIGMOIDS_FIRST] for one in pair] for pair in moved]

    whole = {name: rows(cell[name]) for name in ("ih", "hh", "bias")}
    return {**whole, "dense": by_gate(cell["dense"]), "norms": by_gate(cell["norms"])}


def _first(dense: list[Any]) -> int:
    """Return the rows of the gates' first hidden layer, 0 for flat gates."""
    return 4 * int(dense[0][0].shape[2]) if dense else 0


def _gates_moved(rows: Array, order: list[int]) -> Array:
    """Put the four gates of a parameter's rows into another order."""
    return rows.reshape(4, -1, *rows.shape[1:])[order].reshape(rows.shape)


_WRITERS: dict[str, Callable[..., None]] = {
    "linear": _linear,
    "conv": _conv,
    "layer_norm": _layer_norm,
    "leaky_relu": _leaky_relu,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "sum": _reducer("ReduceSum"),
    "mean": _reducer("ReduceMean"),
    "max": _reducer("ReduceMax"),
    "argmax": _argmax,
    "reshape": _reshape,
    "expand": _expand,
    "transpose": _transpose,
    "slice": _slice,
    "concat": _concat,
    "gather": _gather,
    "cast": _cast,
    "lstm": _lstm,
    "recurrence": _recurrence,
}


def _type(onnx: Any, dtype: Any) -> int:
    kind: int = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return kind


def _values(onnx: Any, names: Sequence[str], arrays: Sequence[Array]) -> list[Any]:
    pairs = zip(names, arrays, strict=True)
    return [
        onnx.helper.make_tensor_value_info(name, _type(onnx, one.dtype), one.shape)
        for name, one in pairs
    ]
