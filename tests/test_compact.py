from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from gpsearch.cell import HLSTM, HLSTMCell
from gpsearch.compact import compact
from gpsearch.errors import UserError

several = settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])


def linear(weight: list[list[float]], bias: list[float] | None) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.weight.data = torch.tensor(weight, dtype=torch.float)
    if bias is not None:
        layer.bias.data = torch.tensor(bias, dtype=torch.float)
    return layer


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """All tensors a model returns."""

    def flat(out: object) -> Iterator[Tensor]:
        if isinstance(out, Tensor):
            yield out
        elif isinstance(out, tuple):
            for part in out:
                yield from flat(part)

    with torch.no_grad():
        return list(flat(model(x)))


def assert_equal(model: nn.Module, small: nn.Module, x: Tensor) -> None:
    for big, little in zip(outputs(model.eval(), x), outputs(small, x), strict=True):
        torch.testing.assert_close(little, big, atol=1e-5, rtol=1e-5)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


# Linear layers, by hand


def test_a_neuron_that_nothing_reads_is_removed():
    model = nn.Sequential(
        linear([[1, 2], [3, 4], [5, 6]], [0.1, 0.2, 0.3]), nn.ReLU(), linear([[7, 0, 9]], [0.5])
    )

    small: Any = compact(model)

    assert small[0].weight.tolist() == [[1, 2], [5, 6]]
    assert small[0].bias.tolist() == pytest.approx([0.1, 0.3])
    assert small[2].weight.tolist() == [[7, 9]]
    assert (small[0].out_features, small[2].in_features) == (2, 2)
    assert not small.training


def test_a_neuron_that_reads_nothing_goes_into_the_bias_of_its_readers():
    model = nn.Sequential(
        linear([[1, 2], [0, 0], [0, 0]], [0.0, 3.0, -3.0]), nn.ReLU(), linear([[7, 8, 9]], [0.5])
    )

    small: Any = compact(model)

    assert small[0].weight.tolist() == [[1, 2]]
    assert small[2].weight.tolist() == [[7]]
    assert small[2].bias.tolist() == [0.5 + 8 * 3]  # relu(-3) adds nothing


def test_removal_goes_on_from_layer_to_layer():
    model = nn.Sequential(
        linear([[1], [1]], [0, 0]),
        nn.Tanh(),
        linear([[1, 0], [0, 1]], [0, 0]),
        nn.Dropout(0.5),
        nn.Sequential(nn.Tanh(), linear([[1, 0]], [0])),
    )

    assert [p.shape[0] for p in compact(model).parameters()] == [1] * 6


def test_batch_norms_shrink_with_the_units_and_take_part_in_their_constants():
    norm = nn.BatchNorm1d(2, eps=0.0)
    norm.running_mean, norm.running_var = torch.tensor([1.0, 1.0]), torch.tensor([4.0, 4.0])
    norm.weight.data, norm.bias.data = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0])
    model = nn.Sequential(linear([[1], [0]], [0.0, 5.0]), norm, linear([[1, 10]], [0.0]))

    small: Any = compact(model)

    assert small[1].num_features == 1
    assert small[1].running_mean.tolist() == [1]
    assert small[2].bias.tolist() == [10 * ((5 - 1) / 2 * 3 + 2)]
    assert_equal(model, small, torch.randn(4, 1))


def test_a_constant_stays_where_its_reader_has_no_bias_to_take_it():
    model = nn.Sequential(linear([[1], [0]], [0.0, 5.0]), linear([[1, 10]], None))

    assert size(compact(model)) == size(model)


def test_one_dead_neuron_is_left_where_all_die():
    small: Any = compact(nn.Sequential(linear([[1], [1]], [1, 1]), linear([[0, 0]], [4.0])))

    assert [p.tolist() for p in small.parameters()] == [[[0]], [0], [[0]], [4]]


@pytest.mark.parametrize("border", [nn.LayerNorm(2), nn.Softmax(-1), nn.Flatten()], ids=str)
def test_what_reads_all_units_at_once_is_a_border(border):
    model = nn.Sequential(linear([[1], [0]], [0, 0]), border, linear([[1, 0]], [0.0]))

    assert size(compact(model)) == size(model)


@pytest.mark.parametrize("place", [0, 1, 2, "1.0"])
def test_what_has_hooks_is_a_border(place):
    inner = nn.Sequential(nn.ReLU())
    model = nn.Sequential(linear([[1], [0]], [0.0, 0.5]), inner, linear([[1, 10]], [0.0]))
    assert size(compact(model)) < size(model)

    if place == 2:
        model[2].register_forward_pre_hook(lambda module, read: (read[0] * 2 + 1,))
    else:
        hooked = model.get_submodule(str(place))
        hooked.register_forward_hook(lambda module, read, out: out.roll(1, -1))

    assert_equal(model, compact(model), torch.randn(4, 1))
    assert size(compact(model)) == size(model)


def test_what_is_used_twice_does_not_shrink():
    middle = linear([[1, 0], [1, 0]], [1, 1])
    model = nn.Sequential(middle, nn.ReLU(), middle, nn.Tanh(), linear([[1, 0]], [0.0]))
    tied = nn.Sequential(linear([[1], [0]], None), linear([[1], [0]], None), linear([[1, 0]], None))
    tied[1].weight = tied[0].weight

    for one, x in (model, torch.randn(3, 2)), (tied[::2], torch.randn(3, 1)):
        assert_equal(one, compact(one), x)
    assert size(compact(model)) == size(model)
    assert size(compact(nn.ModuleList([nn.Sequential(tied[0], tied[2]), tied[1]]))) == size(tied)


# Gates, by hand


def test_every_gate_keeps_as_many_hidden_units_as_the_widest_needs():
    torch.manual_seed(0)
    model: Any = HLSTM(3, 2, gate_hidden=(5,))
    read = model.weight_gate1_l0.data.view(4, 2, 5)
    read[0, :, 1:] = 0  # of the input gate's units one is read, of the others' at most three
    read[1:, :, :2] = 0

    small: Any = compact(model)

    assert small.gate_hidden == (3,)
    assert small.weight_gate_ih_l0.shape == (4 * 3, 3)
    assert small.weight_gate1_l0.view(4, 2, 3)[0, :, 1:].abs().sum() == 0
    assert_equal(model, small, torch.randn(6, 2, 3))


def test_a_gate_unit_without_inputs_goes_into_the_bias():
    model: Any = HLSTM(1, 1, gate_hidden=(2,))
    for p in model.parameters():
        p.data.fill_(1.0)
    for name in ("weight_gate_ih_l0", "weight_gate_hh_l0"):
        getattr(model, name).data.view(4, 2, 1)[:, 1] = 0

    small: Any = compact(model)

    assert small.gate_hidden == (1,)
    assert small.bias_gate1_l0.tolist() == [2.0] * 4
    assert_equal(model, small, torch.randn(6, 2, 1))


@pytest.mark.parametrize("norm", [False, True])
def test_dead_hidden_layers_beside_a_direct_path_leave_a_plain_lstm(norm):
    torch.manual_seed(0)
    model: Any = HLSTM(
        3, 2, gate_hidden=(5, 4), gate_direct=True, gate_norm=norm, bidirectional=True
    )
    for name in ("weight_gate2_l0", "weight_gate2_l0_reverse"):
        getattr(model, name).data.zero_()
    x = torch.randn(6, 2, 3)

    small: Any = compact(model)

    assert (small.gate_hidden, small.gate_direct) == ((), False)
    assert size(small) == size(nn.LSTM(3, 2, bidirectional=True))
    assert_equal(model, small, x)


def test_dead_hidden_layers_without_a_direct_path_leave_constant_gates():
    torch.manual_seed(0)
    model: Any = HLSTM(3, 2, gate_hidden=(5, 4))
    model.weight_gate1_l0.data.zero_()

    small: Any = compact(model)

    assert small.gate_hidden == (1, 1)
    assert_equal(model, small, torch.randn(6, 2, 3))


@pytest.mark.parametrize("direct", [False, True])
def test_gates_whose_weights_are_computed_keep_their_units(direct):
    layer, x = HLSTM(3, 5, gate_hidden=(6,), gate_direct=direct), torch.randn(4, 1, 3)
    for name in ("weight_gate_ih_l0", "weight_gate_hh_l0"):
        prune.ln_structured(layer, name, 0.5, n=1, dim=0)

    check(layer, x)


def test_normed_gates_keep_their_units():
    model: Any = HLSTM(3, 2, gate_hidden=(5,), gate_norm=True)
    model.weight_gate1_l0.data[:, 0] = 0

    assert same_weights(compact(model), model)


# Chains of recurrent layers


class Stack(nn.Module):
    """Two recurrent layers with a norm between them, and a linear layer."""

    def __init__(self, first: Any, second: Any, features: int, add: bool, norm: bool) -> None:
        super().__init__()
        self.first, self.second, self.add = first, second, add
        self.norm: Any = nn.BatchNorm1d(second.input_size) if norm else nn.Identity()
        self.output = nn.Linear(features, 3)

    def compaction_chain(self) -> list[str]:
        return ["first", "norm", "second", "output"]

    def join(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, -1)).sum(-2) if self.add else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.join(self.first(x)[0])
        x = self.norm(x.flatten(0, 1)).view(x.shape)
        out: Tensor = self.output(self.join(self.second(x)[0]))
        return out


def stack(
    depth: int = 1,
    *,
    layers: int = 1,
    bidirectional: bool = False,
    add: bool = False,
    norm: bool = True,
    lstm: bool = False,
    hidden: int = 4,
    **options: Any,
) -> Any:
    ways = 1 if add else 1 + bidirectional
    if not lstm:
        options["gate_hidden"] = (3,) * depth
    layer: Any = nn.LSTM if lstm else HLSTM
    options["bidirectional"] = bidirectional
    first = layer(2, hidden, layers, **options)
    second = layer(ways * hidden, hidden, layers, **options)
    model = Stack(first, second, ways * hidden, add and bidirectional, norm)
    if norm:
        model.norm.running_mean.uniform_(-1, 1)
        model.norm.running_var.uniform_(0.5, 2)
        model.norm.bias.data.uniform_(-1, 1)
    return model


def test_a_state_unit_that_only_its_own_gates_read_is_removed():
    torch.manual_seed(0)
    model = stack()
    model.second.weight_gate_ih_l0.data[:, 1] = 0
    only = model.first.weight_gate_hh_l0.data.view(4, 3, 4)
    only[:, 1:, 1] = 0  # the gates' first hidden units read it,
    last = model.first.weight_gate1_l0.data.view(4, 4, 3)
    last[:, [0, 2, 3], 0] = 0  # and it alone reads those

    small: Any = compact(model)

    assert small.first.hidden_size == small.second.input_size == small.norm.num_features == 3
    assert small.first.gate_hidden == (2,)
    assert small.second.hidden_size == 4
    assert_equal(model, small, torch.randn(6, 2, 2))


@pytest.mark.parametrize("lstm", [True, False])
def test_a_state_unit_that_is_always_zero_is_removed(lstm):
    torch.manual_seed(0)
    model = stack(lstm=lstm)
    for p in model.first.parameters():
        if p.shape[0] == 16:
            p.data.view(4, 4, -1)[2, 1] = 0  # the candidate value of unit 1

    small: Any = compact(model)

    assert small.first.hidden_size == 3
    assert_equal(model, small, torch.randn(6, 2, 2))


def test_two_directions_keep_equally_many_units_though_not_the_same():
    torch.manual_seed(0)
    model = stack(lstm=True, bidirectional=True, hidden=3)
    model.second.weight_ih_l0.data[:, [0, 1, 5]] = 0  # forward 0 and 1, backward 2
    model.second.weight_ih_l0_reverse.data[:, [0, 1, 5]] = 0
    for name in ("weight_hh_l0", "weight_hh_l0_reverse"):
        getattr(model.first, name).data.zero_()

    small: Any = compact(model)

    assert (small.first.hidden_size, small.second.input_size) == (2, 4)
    assert_equal(model, small, torch.randn(6, 2, 2))


def test_directions_that_are_added_up_keep_the_same_units():
    torch.manual_seed(0)
    model = stack(lstm=True, bidirectional=True, add=True, hidden=3)
    for name in ("weight_ih_l0", "weight_ih_l0_reverse"):
        getattr(model.second, name).data[:, 1] = 0
    model.first.weight_hh_l0.data.zero_()
    model.first.weight_hh_l0_reverse.data[:, 1] = 0

    small: Any = compact(model)

    assert (small.first.hidden_size, small.second.input_size) == (2, 2)
    assert_equal(model, small, torch.randn(6, 2, 2))


def test_a_module_by_itself_keeps_the_shape_of_its_outputs():
    model = nn.LSTM(2, 3, 2)
    for p in model.parameters():
        p.data.zero_()

    assert same_weights(compact(model), model)


def test_a_chain_of_unknown_names_is_named():
    class Wrong(nn.Module):
        def compaction_chain(self) -> list[str]:
            return ["layer"]

    with pytest.raises(UserError, match="'layer'"):
        compact(Wrong())


@pytest.mark.usefixtures("untyped")
def test_what_is_no_module_is_named() -> None:
    with pytest.raises(UserError, match=r"takes a torch\.nn\.Module, not of the type dict"):
        compact({"weight": torch.zeros(2)})  # type: ignore[arg-type]


# Random masks


def mask(model: nn.Module, seed: int, dead: float) -> None:
    """Zero random elements, rows and columns (with their biases, at times)."""
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            continue
        for name, p in module.named_parameters(recurse=False):
            if "norm" in name:
                p.data += torch.rand(p.shape, generator=random)
            elif p.dim() == 2:
                p.data *= torch.rand(p.shape, generator=random) > 0.3
                p.data *= torch.rand(p.shape[0], 1, generator=random) > dead
                p.data *= torch.rand(1, p.shape[1], generator=random) > dead
            else:
                p.data *= torch.rand(p.shape, generator=random) > 2 * dead


def check(model: nn.Module, x: Tensor) -> Any:
    before = copy.deepcopy(model.state_dict())
    training = model.training
    small: Any = compact(model, here=False)

    assert model.training is training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert_equal(model, small, x)
    assert size(small) <= size(model)
    assert same_weights(compact(small, here=False), small)
    return small


@several
@given(
    seed=st.integers(0, 2**20),
    dead=st.sampled_from([0.2, 0.5, 0.8]),
    depth=st.integers(0, 2),
    options=st.fixed_dictionaries(
        {},
        optional={
            "bidirectional": st.just(True),
            "gate_direct": st.just(True),
            "gate_norm": st.just(True),
            "bias": st.just(False),
            "layers": st.just(2),
            "add": st.just(True),
            "norm": st.just(False),
            "activation": st.sampled_from(["leaky_relu", "tanh", "gelu"]),
        },
    ),
)
@example(  # one path's end is another's
    seed=199200,
    dead=0.8,
    depth=1,
    options={"bidirectional": True, "gate_direct": True, "gate_norm": True},
)
def test_chains_stay_equal_under_random_masks(seed, dead, depth, options):
    torch.manual_seed(seed)
    model = stack(depth, **options)
    mask(model, seed, dead)

    check(model, torch.randn(5, 2, 2))


@several
@given(
    seed=st.integers(0, 2**20),
    dead=st.sampled_from([0.2, 0.5]),
    depth=st.integers(1, 3),
    direct=st.booleans(),
    both=st.booleans(),
    bias=st.booleans(),
)
def test_single_modules_stay_equal_under_random_masks(seed, dead, depth, direct, both, bias):
    torch.manual_seed(seed)
    widths = (4, 3, 5)[:depth]
    options = {"bias": bias, "gate_hidden": widths, "gate_direct": direct}
    model: Any = HLSTM(3, 4, 2, bidirectional=both, **options)
    cell = HLSTMCell(3, 4, **options)
    for one, x in (model, torch.randn(5, 2, 3)), (cell, torch.randn(2, 3)):
        mask(one, seed, dead)
        check(one, x)


@several
@given(seed=st.integers(0, 2**20), dead=st.sampled_from([0.2, 0.5]), bias=st.booleans())
def test_feed_forward_networks_stay_equal_under_random_masks(seed, dead, bias):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, 6, bias=bias),
        nn.BatchNorm1d(6),
        nn.Sigmoid(),
        nn.Linear(6, 5, bias=bias),
        nn.GELU(),
        nn.LayerNorm(5),
        nn.Linear(5, 5),
        nn.ELU(),
        nn.Linear(5, 2, bias=bias),
    )
    mask(model, seed, dead)

    check(model, torch.randn(7, 4))


@several
@given(seed=st.integers(0, 2**20), layers=st.integers(1, 2), both=st.booleans())
def test_torchs_lstms_shrink_too(seed, layers, both):
    torch.manual_seed(seed)
    model = stack(lstm=True, layers=layers, bidirectional=both)
    mask(model, seed, 0.6)
    for lstm in (model.first, model.second):
        for p in lstm.parameters():  # chance may leave all units alive in one layer and direction
            p.data[:: lstm.hidden_size] = 0

    assert size(check(model, torch.randn(5, 2, 2))) < size(model)


def test_padding_changes_nothing():
    torch.manual_seed(0)
    model = stack(2, bidirectional=True, gate_direct=True)
    mask(model, 0, 0.4)
    small: Any = compact(model)
    x, lengths = torch.randn(5, 2, 2), torch.tensor([5, 3])

    for one, other in (model.first, small.first), (model.second, small.second):
        assert one.gate_hidden != other.gate_hidden
    with torch.no_grad():
        outs = []
        for one in model.eval(), small:
            h = one.first(x, lengths=lengths)[0]
            h = one.norm(h.flatten(0, 1)).view(h.shape)
            outs.append(one.output(one.second(h, lengths=lengths)[0]))
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)


# What comes back is an ordinary module


def test_it_saves_and_loads():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), HLSTM(4, 4, gate_hidden=(6,)))
    mask(model, 3, 0.5)
    small: Any = compact(model)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    fresh = nn.Sequential(
        nn.Linear(3, small[0].out_features),
        nn.Tanh(),
        HLSTM(small[2].input_size, 4, gate_hidden=small[2].gate_hidden),
    )
    fresh.load_state_dict(small.state_dict())

    assert size(small) < size(model)
    x = torch.randn(6, 2, 3)
    for one in again, fresh.eval():
        assert_equal(small, one, x)


def test_it_can_be_trained_on():
    model = compact(stack(lstm=True))
    model(torch.randn(5, 2, 2)).sum().backward()

    assert all(p.grad is not None for p in model.parameters())


class Residual(HLSTM):
    def forward(self, input: Any, *_: Any, **__: Any) -> Any:
        output, state = super().forward(input)
        return output + input, state


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Residual(8, 8, gate_hidden=(6,)), nn.Linear(8, 2)

    def compaction_chain(self) -> list[str]:
        return ["first", "last"]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x)[0])
        return out


def test_a_layer_with_a_forward_of_its_own_keeps_its_outputs() -> None:
    model = Chain()
    with torch.no_grad():
        model.last.weight[:, 2:] = 0
    assert_equal(model, compact(model), torch.randn(5, 3, 8))
