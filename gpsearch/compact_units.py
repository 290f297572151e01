"""What `gpsearch.compact` can take away: a network's units, what computes and what reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gpsearch.cell import HLSTM, HLSTMCell
from gpsearch.kernels.plain import ACTIVATIONS


class Place(NamedTuple):
    """A parameter or buffer of a module."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        """What is there now."""
        return cast(Tensor, getattr(self.module, self.name))


class Rows(NamedTuple):
    """A place in which unit u owns row ``first + u``."""

    place: Place
    first: int = 0


class Reader(NamedTuple):
    """Rows ``first`` to ``last`` of a weight; they read unit u by column ``column + u``."""

    weight: Place
    bias: Place | None
    first: int
    last: int
    column: int = 0
    sees: Callable[[Tensor], Tensor] = lambda value: value
    """What the reader gets when the units have these values."""

    @property
    def rows(self) -> slice:
        """The rows, as an index."""
        return slice(self.first, self.last)

    def columns(self, count: int) -> Float[Tensor, "rows count"]:
        """Return a view of the columns of all units."""
        return self.weight.tensor[self.rows, self.column : self.column + count]


@dataclass(frozen=True)
class Units:
    """A family of like units.

    Attributes:
        group: Families of one group keep equal counts of units.
        count: Units in the family.
        makers: All the rows they own.
        readers: All that reads them.
        sums: The rows that decide about a constant: their biases' sum, where the weights are zero.
        state: The sums are those of gate g: the units are constant (zero) only where it is zero.
    """

    group: tuple[nn.Module, str]
    count: int
    makers: list[Rows]
    readers: list[Reader]
    sums: list[list[Rows]]
    state: bool = False

    def constants(self) -> tuple[Bool[Tensor, " count"], Float[Tensor, " count"]]:
        """Tell which units are constant, and the values of those."""
        constant = self.makers[0].place.tensor.new_ones(self.count, dtype=torch.bool)
        value = self.makers[0].place.tensor.new_zeros(self.count)
        for rows in self.sums:
            value = torch.zeros_like(value)
            for place, first in rows:
                owned = place.tensor[first : first + self.count]
                if owned.dim() == 1:
                    value += owned
                else:
                    constant &= (owned == 0).all(1)
            if self.state:
                constant &= value == 0
        return constant, value

    def read(self, live: dict[Place, Tensor]) -> Bool[Tensor, " count"]:
        """Tell which units a live row reads."""
        found = [
            ((r.columns(self.count) != 0) & live[r.weight][r.rows, None]).any(0)
            for r in self.readers
        ]
        return torch.stack(found).any(0)


# The families of a module


class Link(NamedTuple):
    """Where a layer's output goes: through some elementwise modules to a reader."""

    passes: list[nn.Module]
    reader: nn.Module


def families(module: nn.Module, link: Link | None) -> Iterator[Units]:
    """Yield the units of a module that may go; without a link its outputs have to stay."""
    if isinstance(module, HLSTM | HLSTMCell) and not module.gate_norm:
        for end in ends(module):
            yield from _gate_units(module, end)
    if link and isinstance(module, nn.LSTM | HLSTM):
        yield from _state_units(module, link)
    if link and isinstance(module, nn.Linear):
        made = [Rows(place) for place in places(module, "weight", "bias")]
        count, makers = module.out_features, made + _norm_rows(link, 0)
        yield Units((module, "out"), count, makers, _outer_readers(link, 0, count), [made])


def _gate_units(module: HLSTM | HLSTMCell, end: str) -> Iterator[Units]:
    """Yield the hidden units of one cell, a family for each hidden layer and gate."""
    made = ["weight_gate_ih", "weight_gate_hh", "bias_gate"]
    sees = ACTIVATIONS[module.activation]
    for j, (width, out) in enumerate(pairwise((*module.gate_hidden, module.hidden_size)), 1):
        weight = Place(module, f"weight_gate{j}{end}")
        flat = module.gate_direct and j == len(module.gate_hidden)
        bias = next(places(module, f"bias_gate{j}{end}", *[f"bias_ih{end}"] * flat), None)
        for gate in range(4):
            makers = [Rows(p, gate * width) for p in places(module, *(name + end for name in made))]
            reader = Reader(weight, bias, gate * out, (gate + 1) * out, 0, sees)
            yield Units((module, f"gate{j}"), width, makers, [reader], [makers])
        made = [f"weight_gate{j}", f"bias_gate{j}"]


def _state_units(module: nn.LSTM | HLSTM, link: Link) -> Iterator[Units]:
    """Yield the state units, a family for each layer and direction."""
    *lower, top = _ends_by_layer(module)
    for cells, above in pairwise((*lower, top)):
        for d, end in enumerate(cells):
            first = d * module.hidden_size
            readers = [r for one in above for r in reading(module, one, "ih")]
            yield _states(module, [end], [r._replace(column=first) for r in readers])
    # Directions that are added up on the way to the reader live and die together.
    added = input_size(link.reader) == module.hidden_size
    for d, together in enumerate([top] if added else [[end] for end in top]):
        first = d * module.hidden_size
        readers = _outer_readers(link, first, module.hidden_size)
        yield _states(module, together, readers, _norm_rows(link, first))


def _states(
    module: nn.LSTM | HLSTM, cells: list[str], readers: list[Reader], norms: Sequence[Rows] = ()
) -> Units:
    """Return the state units of some cells as one family, whose outputs are read by ``readers``."""
    size = module.hidden_size
    made = [(place, gate) for end in cells for place in _made(module, end) for gate in range(4)]
    makers = [Rows(place, gate * size) for place, gate in made]
    own = [reader for end in cells for reader in reading(module, end, "hh")]
    sums = [[Rows(place, 2 * size) for place in _made(module, end)] for end in cells]
    return Units((module, "state"), size, [*makers, *norms], own + readers, sums, state=True)


def _made(module: nn.LSTM | HLSTM, end: str) -> list[Place]:
    """List the parameters whose rows are the gates of one cell's state units."""
    depth = 0 if isinstance(module, nn.LSTM) else len(module.gate_hidden)
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    names += [f"weight_gate{depth}", f"bias_gate{depth}"]
    return list(places(module, *(name + end for name in names)))


def reading(module: nn.Module, end: str, what: str) -> list[Reader]:
    """List the weights with which one cell reads its input ("ih") or its state ("hh")."""
    biases = {
        f"weight_{what}{end}": f"bias_{what}{end}",
        f"weight_gate_{what}{end}": f"bias_gate{end}",
    }
    return [
        Reader(weight, next(places(module, biases[weight.name]), None), 0, len(weight.tensor))
        for weight in places(module, *biases)
    ]


def _outer_readers(link: Link, column: int, count: int) -> list[Reader]:
    """List the weights that read units ``column`` to ``column + count`` of a layer's output."""
    reader, width = link.reader, input_size(link.reader)

    def sees(value: Tensor) -> Tensor:
        everything = value.new_zeros(width)
        everything[column : column + count] = value
        for module in link.passes:
            everything = _passed(module, everything)
        return everything[column : column + count]

    if isinstance(reader, nn.Linear):
        weight, bias = Place(reader, "weight"), next(places(reader, "bias"), None)
        return [Reader(weight, bias, 0, len(weight.tensor), column, sees)]
    assert isinstance(reader, nn.LSTM | HLSTM)
    found = [r for end in _ends_by_layer(reader)[0] for r in reading(reader, end, "ih")]
    return [r._replace(column=column, sees=sees) for r in found]


def _passed(module: nn.Module, value: Tensor) -> Tensor:
    if isinstance(module, nn.BatchNorm1d):  # whose forward may want more dimensions
        norm = module.running_mean, module.running_var, module.weight, module.bias
        return F.batch_norm(value[None], *norm, eps=module.eps)[0]
    return cast(Tensor, module(value))


def _norm_rows(link: Link, first: int) -> list[Rows]:
    """List the entries, from ``first`` on, of the batch norms on the way to the reader."""
    names = "running_mean", "running_var", "weight", "bias"
    norms = [module for module in link.passes if isinstance(module, nn.BatchNorm1d)]
    return [Rows(place, first) for norm in norms for place in places(norm, *names)]


def places(module: nn.Module, *names: str) -> Iterator[Place]:
    """Yield those of these names that the module has."""
    for name in names:
        if getattr(module, name, None) is not None:
            yield Place(module, name)


def ends(module: nn.LSTM | HLSTM | HLSTMCell) -> list[str]:
    """Return how the names of each cell's parameters end."""
    if isinstance(module, HLSTMCell):
        return [""]
    return [end for cells in _ends_by_layer(module) for end in cells]


def _ends_by_layer(module: nn.LSTM | HLSTM) -> list[list[str]]:
    ways = ("", "_reverse")[: 1 + module.bidirectional]
    return [[f"_l{layer}{way}" for way in ways] for layer in range(module.num_layers)]


def input_size(module: nn.Module) -> int:
    """Return the width of what a linear or recurrent layer reads."""
    return int(module.in_features if isinstance(module, nn.Linear) else module.input_size)  # type: ignore[arg-type]
