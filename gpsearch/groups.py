"""What is compared with what: a model's prunable weights, their gates, layers and whole units."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import nn

from gpsearch.cell import HLSTM, HLSTMCell
from gpsearch.computed import computed_weights
from gpsearch.errors import Unsupported
from gpsearch.schedule import Scope

GATES = {
    nn.LSTM: 4, nn.LSTMCell: 4, HLSTM: 4, HLSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3
}  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """One prunable parameter, seen as a matrix of gates stacked on dimension 0."""

    name: str
    parameter: nn.Parameter
    gates: int
    """Gates stacked in it: 4 in an LSTM's parameters, 1 in a linear layer's."""
    layer: str
    """The layer it belongs to: weights of one layer share this name."""

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.parameter.numel()


Piece = tuple[str, int, int]
"""One gate's matrix: a weight's name, its first row and the one after its last."""


@dataclass
class Units:
    """A family of like units (a gate's hidden units, a layer's state units) that live or die whole.

    Attributes:
        name: For people.
        count: Units in the family.
        rows: Parameters in which unit u owns row ``offset + u`` (its inputs, and its bias).
        columns: Parameters in which unit u owns column u of rows ``first`` to ``last`` (what
            reads it).
        hidden: Whether all its inputs and readers are its own, so that a dead unit has no gradient
            on either side.
    """

    name: str
    count: int
    rows: list[tuple[str, int]] = field(default_factory=list)
    columns: list[tuple[str, int, int]] = field(default_factory=list)
    hidden: bool = False


def weights(model: nn.Module, prunable: Callable[[str], bool] | None = None) -> dict[str, Weight]:
    """Collect the prunable weights of any module: its parameters of two or more dimensions.

    Those that need no gradient are left alone. One that has two names, as of tied weights, goes by
    the first.

    Args:
        model: Linear, Conv, Embedding, nn.LSTM, GRU, HLSTM and whatever is built of them.
        prunable: Says of a parameter's dotted name whether it may be pruned; None takes all.

    Raises:
        Unsupported: An embedding's gradients are sparse.
    """
    found: dict[str, Weight] = {}
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for short, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.dim() < 2 or not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            if prunable is not None and not prunable(short):
                continue
            if getattr(module, "sparse", False) is True:
                raise Unsupported(f"{short}: gradients of sparse=True have no masks; leave it out")
            gates, layer = _gates(module, short), _layer(prefix, short)
            found[short] = Weight(short, parameter, gates, layer)
    return found


def refuse_ingredients(model: nn.Module, names: Collection[str]) -> None:
    """Refuse parameters of which something other than a mask, such as weight norm, makes weights.

    Zeros in them are none in the weights, or even a norm that is divided by.

    Raises:
        Unsupported: One of ``names`` is of such a parameter.
    """
    for prefix, module in model.named_modules():
        parametrizes = "parametrizations" in prefix.split(".")
        made = {
            f"{name}_{part}" for name in computed_weights(module) for part in ("g", "v", "orig")
        }
        for name, _ in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if full in names and (parametrizes or name in made):
                raise Unsupported(
                    f"{full}: weights are computed of it at every call; make them permanent "
                    "(parametrize.remove_parametrizations, remove_weight_norm), or leave it out"
                )


def _gates(module: nn.Module, name: str = "") -> int:
    """Count the gates stacked in a parameter; what projects an LSTM's state is one matrix."""
    projects = name.rpartition(".")[2].startswith("weight_hr_")
    found = (count for kind, count in GATES.items() if isinstance(module, kind))
    return 1 if projects else next(found, 1)


def groups(weights: dict[str, Weight], scope: Scope) -> list[list[Piece]]:
    """Split the weights into the groups within which scores are compared.

    "matrix": every gate's matrix by itself; "gates": the gates stacked in one parameter jointly (of
    an H-LSTM: the four first-layer matrices together, the four second-layer ones together). In both
    what reads the inputs and what reads the state are matrices apart, as torch keeps them: only
    "layer", all weights of a layer and direction, and "global", all, let them compete.
    """
    pieces: dict[object, list[Piece]] = {}
    for weight in weights.values():
        step = len(weight.parameter) // weight.gates
        for gate in range(weight.gates):
            key = {
                "matrix": (weight.name, gate),
                "gates": weight.name,
                "layer": weight.layer,
                "global": None,
            }[scope]
            pieces.setdefault(key, []).append((weight.name, gate * step, (gate + 1) * step))
    return list(pieces.values())


def units(model: nn.Module, prunable: dict[str, Weight]) -> list[Units]:
    """List the whole units of a model's prunable layers: gates' hidden units, state units, rows.

    Only families all of whose matrices are prunable are listed, so that a unit dies whole.
    """
    found: list[Units] = []
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, HLSTM | HLSTMCell):
            found += _hlstm_units(dot, dict(module.named_parameters()), module)
        elif isinstance(module, nn.LSTM | nn.GRU):
            found += _rnn_units(dot, module, _gates(module))
        elif f"{dot}weight" in prunable:
            found.append(_row_units(dot, module))
    return [u for u in found if all(name in prunable for name in _matrices(model, u))]


def _matrices(model: nn.Module, units: Units) -> list[str]:
    owned = [name for name, _ in units.rows] + [name for name, *_ in units.columns]
    return [name for name in owned if model.get_parameter(name).dim() > 1]


def _row_units(dot: str, module: nn.Module) -> Units:
    """Units of a linear, convolutional or embedding layer: the rows of its weight."""
    weight = module.get_parameter("weight")
    # A transposed convolution's rows are its inputs.
    biased = getattr(module, "bias", None) is not None and not getattr(module, "transposed", False)
    bias = [(f"{dot}bias", 0)] if biased else []
    return Units(dot[:-1] or "rows", weight.shape[0], [(f"{dot}weight", 0), *bias])


def _rnn_units(dot: str, module: nn.Module, gates: int) -> list[Units]:
    """State units of nn.LSTM and nn.GRU, one family for a layer and direction."""
    if getattr(module, "proj_size", 0):
        raise Unsupported("an LSTM with proj_size has no whole state units; use proj_size=0")
    size = int(module.hidden_size)  # type: ignore[arg-type]
    names = dict(module.named_parameters())
    ends = sorted({name.split("_", 2)[2] for name in names if name.startswith("weight_hh")})
    return [_state_units(dot, f"_{end}", names, size, gates) for end in ends]


def _hlstm_units(
    dot: str, names: dict[str, nn.Parameter], module: HLSTM | HLSTMCell
) -> list[Units]:
    """State units of every layer and direction, then the hidden units of every gate."""
    ends = sorted({m[1] for name in names if (m := re.fullmatch(r"weight(?:_gate)?_hh(.*)", name))})
    found = []
    for end in ends:
        found.append(_state_units(dot, end, names, module.hidden_size, 4))
        for depth, width in enumerate(module.gate_hidden, start=1):
            found += _gate_units(dot, end, names, depth, width, module.gate_hidden)
    return found


def _state_units(
    dot: str, end: str, names: dict[str, nn.Parameter], size: int, gates: int
) -> Units:
    """The state units: rows of whatever computes the gates' values, columns of what reads h."""
    last = max(
        (int(m[1]) for name in names if (m := re.fullmatch(rf"weight_gate(\d+){end}", name))),
        default=0,
    )
    makers = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    makers += [f"weight_gate{last}", f"bias_gate{last}"] if last else []
    rows = [
        (f"{dot}{name}{end}", gate * size)
        for name in makers
        if f"{name}{end}" in names
        for gate in range(gates)
    ]
    readers = [name for name in (f"weight_hh{end}", f"weight_gate_hh{end}") if name in names]
    columns = [(dot + name, 0, names[name].shape[0]) for name in readers]
    return Units(f"{dot}state{end}", size, rows, columns)


def _gate_units(
    dot: str,
    end: str,
    names: dict[str, nn.Parameter],
    depth: int,
    width: int,
    hidden: tuple[int, ...],
) -> list[Units]:
    """The units of hidden layer ``depth``, one family for each of the four gates."""
    if depth == 1:
        makers = ["weight_gate_ih", "weight_gate_hh", "bias_gate"]
    else:
        makers = [f"weight_gate{depth - 1}", f"bias_gate{depth - 1}"]
    makers = [f"{name}{end}" for name in makers if f"{name}{end}" in names]
    reader = f"weight_gate{depth}{end}"
    out = names[reader].shape[0] // 4
    return [
        Units(
            f"{dot}gate {'ifgo'[gate]}, hidden layer {depth}{end}",
            width,
            [(dot + name, gate * width) for name in makers],
            [(dot + reader, gate * out, (gate + 1) * out)],
            hidden=True,
        )
        for gate in range(4)
    ]


def _layer(prefix: str, name: str) -> str:
    """A recurrent parameter's layer and direction, else its module."""
    end = re.search(r"_l\d+(_reverse)?$", name)
    return prefix + (end[0] if end else "")
