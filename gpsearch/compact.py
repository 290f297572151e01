"""The smallest module with a masked network's outputs: a zero weight is a pruned weight.

A *unit* (a hidden neuron, a hidden unit of a gate, a state unit) owns rows of the parameters that
compute it and columns of the weights that read it. Two rewrites that leave all shapes alone are
repeated until neither finds anything: what a constant unit adds to its readers goes into their
biases, and a unit that no live row reads gets zero rows. Then the units without a reader go.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gpsearch.cell import HLSTM, HLSTMCell
from gpsearch.compact_units import Link, Place, Units, ends, families, input_size, reading
from gpsearch.computed import copied
from gpsearch.errors import UserError
from gpsearch.formats import choose, hooked
from gpsearch.quantize import quantize_weights


@runtime_checkable
class Chained(Protocol):
    """A model that says how its layers feed one another, so that `compact` can shrink them."""

    def compaction_chain(self) -> list[str]:
        """Name submodules in the order in which data flows through them.

        The output of each goes to the next, and nowhere else, on its last dimension; the two
        directions of a recurrent layer may be added up on the way (the next layer then has
        hidden_size inputs). Recurrent layers start from zero states, and only their outputs are
        used. What does nothing in eval mode may be left out, but anything else that stands between
        two of them (a residual connection, a softmax) has to be named or the chain has to end.
        """
        ...


@torch.inference_mode(False)  # within it a copy's weights could not be watched, nor run in C
@torch.no_grad()
def compact(model: nn.Module, *, weights: str = "float32", here: bool = True) -> nn.Module:
    """Return the smallest equal module (to 1e-5), in eval mode; ``model`` stays as it is.

    On this processor its recurrent layers then run, without gradients and few sequences at a time,
    in the way that is found to be fastest: by kernels in C, every weight in the format that its
    zeros call for (see `gpsearch.formats`), or by torch. The parameters are ordinary ones. An
    `nn.LSTM` may become an equal `HLSTM` for it, unless there is more to it than torch makes.

    Gates of an `HLSTM` lose hidden units wherever it stands in the model. State units, and neurons
    between linear layers, go where it is known who reads them: within an `nn.Sequential`, which has
    to be called as a whole (a forward that calls its layers one by one needs an `nn.ModuleList`),
    and along the `Chained.compaction_chain` of a model. There data passes through activations,
    dropout and batch norms (which are taken to be of rows of units, ``[N, units]``); any other
    module is a border, and so is any that has hooks; what is seen across a border keeps its shape.
    So does a layer norm, which reads every unit, and so do gates with ``gate_norm``.

    The four gates, and the layers and directions of one module, run at equal widths: they keep as
    many units as the widest of them needs, the others with dead units (all weights zero) among
    them, and at least one. An `HLSTM` whose hidden layers all die beside a direct path becomes a
    plain LSTM, ``gate_hidden=()``.

    Args:
        model: Any module; nothing in it that shares its parameters with another part shrinks, nor
            what has them computed, as by `torch.nn.utils.prune` or ``parametrize``.
        weights: Type that the recurrent layers' weights are rounded to, which changes the outputs;
            "float32" leaves them. What dies of the rounding is cut out, too.
        here: It will run on this processor, so that it pays to try what is fast here.

    Raises:
        UserError: A ``compaction_chain`` names no submodule, there is no such type of weights, or
            ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"compact takes a torch.nn.Module, not of the type {type(model).__name__}")
    small = copied(model).eval()
    _cut(small)
    while quantize_weights(small, weights):
        _cut(small)
    return choose(small) if here else small


def _cut(model: nn.Module) -> None:
    """Take everything out that has no effect."""
    gated = [module for module in model.modules() if isinstance(module, HLSTM | HLSTMCell)]
    units = _families(model)
    _simplify(units)
    while any([*map(_drop_dead_path, gated)]):  # less is read now, so another path may be dead
        units = _families(model)
        _simplify(units)
    _shrink(units)


def _families(model: nn.Module) -> list[Units]:
    """List all units of a model that may go."""
    links, shared = _links(model), _shared(model)
    own = [module for module in model.modules() if module not in shared]
    return [units for module in own for units in families(module, links.get(module))]


# The two rewrites


def _simplify(all_units: list[Units]) -> None:
    """Zero all that has no effect; shapes stay."""
    while any([*map(_fold, all_units)]) or _kill(all_units):
        pass


def _fold(units: Units) -> bool:
    """Move what constant units add to their readers into the readers' biases."""
    constant, value = units.constants()
    changed = False
    for reader in units.readers:
        columns, seen = reader.columns(units.count), reader.sees(value)
        folded = constant & (columns != 0).any(0)
        if reader.bias is None:
            folded &= seen == 0
        elif folded.any():
            reader.bias.tensor[reader.rows] += columns[:, folded] @ seen[folded]
        columns[:, folded] = 0
        changed |= bool(folded.any())
    return changed


def _kill(all_units: list[Units]) -> bool:
    """Zero the rows of units that are read by no live row, not even by way of a cycle."""
    live = _live_rows(all_units)
    changed = False
    for units in all_units:
        dead = ~units.read(live)
        for place, first in units.makers:
            owned = place.tensor[first : first + units.count]
            changed |= bool((owned[dead] != 0).any())
            owned[dead] = 0
    return changed


def _live_rows(all_units: list[Units]) -> dict[Place, Tensor]:
    """Find the rows that reach an output: first those of no unit, then those of units they read."""
    places = {r.weight for units in all_units for r in units.readers}
    places |= {place for units in all_units for place, _ in units.makers}
    live = {p: torch.ones(len(p.tensor), dtype=torch.bool, device=p.tensor.device) for p in places}
    for units in all_units:
        for place, first in units.makers:
            live[place][first : first + units.count] = False
    reached = -1
    while reached < (reached := sum(int(rows.sum()) for rows in live.values())):
        for units in all_units:
            read = units.read(live)
            for place, first in units.makers:
                live[place][first : first + units.count] |= read
    return live


# Cutting the units out


class Cut(NamedTuple):
    """Of the rows or columns ``first`` to ``first + len(kept)`` those marked stay."""

    first: int
    kept: Tensor


def _shrink(all_units: list[Units]) -> None:
    """Take the units without a reader out of all their places."""
    rows: dict[Place, list[Cut]] = defaultdict(list)
    columns: dict[Place, dict[tuple[int, int], list[Cut]]] = defaultdict(lambda: defaultdict(list))
    for units, kept in _kept(all_units):
        for place, first in units.makers:
            rows[place].append(Cut(first, kept))
        for r in units.readers:
            columns[r.weight][r.first, r.last].append(Cut(r.column, kept))
    for place in rows.keys() | columns.keys():
        tensor = place.tensor
        blocks = sorted(columns[place].items()) or [((0, len(tensor)), [])]
        tensor = torch.cat([_without(tensor[a:b], -1, cuts) for (a, b), cuts in blocks])
        _put(place, _without(tensor, 0, rows[place]))
    for module in {place.module for place in rows.keys() | columns.keys()}:
        _update_sizes(module)


def _kept(all_units: list[Units]) -> Iterator[tuple[Units, Bool[Tensor, " count"]]]:
    """Choose each family's units: those read, and the first dead ones up to the group's count."""
    groups: dict[tuple[nn.Module, str], list[Units]] = defaultdict(list)
    for units in all_units:
        groups[units.group].append(units)
    live = _live_rows(all_units)
    for group in groups.values():
        read = [units.read(live) for units in group]
        count = max(1, *(int(one.sum()) for one in read))
        for units, one in zip(group, read, strict=True):
            spare = ~one & ((~one).cumsum(0) <= count - one.sum())
            yield units, one | spare


def _without(tensor: Tensor, dim: int, cuts: list[Cut]) -> Tensor:
    kept = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
    for first, part in cuts:
        kept[first : first + len(part)] = part
    return tensor.index_select(dim, kept.nonzero().flatten()) if cuts else tensor


def _put(place: Place, tensor: Tensor) -> None:
    old = place.tensor
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor.clone(), requires_grad=old.requires_grad)
    setattr(place.module, place.name, tensor)


def _update_sizes(module: nn.Module) -> None:
    """Let a module's attributes say what its parameters are."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.BatchNorm1d):
        assert module.running_mean is not None
        module.num_features = len(module.running_mean)
    elif isinstance(module, nn.LSTM | HLSTM | HLSTMCell):
        end = ends(module)[0]
        module.input_size = reading(module, end, "ih")[0].weight.tensor.shape[1]
        module.hidden_size = reading(module, end, "hh")[0].weight.tensor.shape[1]
    if isinstance(module, nn.LSTM):
        module.flatten_parameters()
    if isinstance(module, HLSTM | HLSTMCell):
        depth = range(1, len(module.gate_hidden) + 1)
        weights = [Place(module, f"weight_gate{j}{end}").tensor for j in depth]
        module.gate_hidden = tuple(weight.shape[1] for weight in weights)


def _drop_dead_path(module: HLSTM | HLSTMCell) -> bool:
    """Leave only the direct path where the hidden one adds nothing to any gate."""
    if not (module.gate_direct and module.gate_hidden) or module.is_parametrized():
        return False
    last = f"weight_gate{len(module.gate_hidden)}"
    if any(Place(module, last + end).tensor.any() for end in ends(module)):
        return False
    for name in [name for name, _ in module.named_parameters() if "gate" in name]:
        delattr(module, name)
    module.gate_hidden, module.gate_direct, module.gate_norm = (), False, False
    return True


# What feeds what

_ELEMENTWISE = {
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid,
    nn.Hardswish, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold,
}  # fmt: skip


def _links(model: nn.Module) -> dict[nn.Module, Link]:
    """Find the layers whose outputs have a known reader."""
    shared, found = _shared(model), {}
    for module in model.modules():
        producer: nn.Module | None = None
        passes: list[nn.Module] = []
        for element in _elements(module):
            if _passes(element, element not in shared):
                passes.append(element)
            elif not _is_layer(element) or element in shared or hooked(element):
                producer = None
            else:
                if producer is not None and _fit(producer, passes, element):
                    found[producer] = Link(passes, element)
                producer, passes = element, []
    return found


def _elements(module: nn.Module) -> list[nn.Module]:
    """List what data flows through one after another, as far as the module says it."""
    if isinstance(module, Chained):
        parts = [_submodule(module, name) for name in module.compaction_chain()]
    elif _is_plain_sequential(module):
        parts = [part for part in module._modules.values() if part is not None]
    else:
        return []
    inner = [
        _elements(part) if _is_plain_sequential(part) and not hooked(part) else [part]
        for part in parts
    ]
    return [element for part in inner for element in part]


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise UserError(
            f"{type(model).__name__}.compaction_chain() names {name!r}, but has no such submodule"
        ) from error


def _is_plain_sequential(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and not isinstance(module, Chained)


def _is_layer(module: nn.Module) -> bool:
    """Tell whether this is a layer whose outputs or inputs may become fewer."""
    if isinstance(module, nn.LSTM):
        return type(module).forward is nn.LSTM.forward and not module.proj_size
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward and "weight" in module._parameters
    return isinstance(module, HLSTM) and type(module).forward is HLSTM.forward


def _passes(module: nn.Module, alone: bool) -> bool:
    """Tell whether units pass through this one by one; a norm must stand in one place alone."""
    is_norm = isinstance(module, nn.BatchNorm1d) and module.running_mean is not None
    return (type(module) in _ELEMENTWISE or (alone and is_norm)) and not hooked(module)


def _fit(producer: nn.Module, passes: list[nn.Module], reader: nn.Module) -> bool:
    """Tell whether a reader takes a layer's units one by one, its directions joined or added."""
    width = input_size(reader)
    if any(norm.num_features != width for norm in passes if isinstance(norm, nn.BatchNorm1d)):
        return False
    if isinstance(producer, nn.LSTM | HLSTM):
        return width in (producer.hidden_size, producer.hidden_size * (1 + producer.bidirectional))
    return width == producer.out_features


def _shared(model: nn.Module) -> set[nn.Module]:
    """Find the modules that stand in more than one place, or share a parameter with another.

    Or have some computed: what is written there lasts until the next call only.
    """
    paths = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for chained in model.modules():
        if isinstance(chained, Chained):
            named = Counter(_elements(chained))
            paths.update({element for element in named if named[element] > 1})
    owners = Counter(id(p) for module in paths for p in set(module.parameters(recurse=False)))
    tied = {m for m in paths for p in m.parameters(recurse=False) if owners[id(p)] > 1}
    computed = {module for module in paths if _is_parametrized(module)}
    return tied | computed | {module for module in paths if paths[module] > 1}


def _is_parametrized(module: nn.Module) -> bool:
    if isinstance(module, HLSTM | HLSTMCell):
        return module.is_parametrized()
    return parametrize.is_parametrized(module)
