"""Narrow weights: small errors, zeros kept, exact where they are packed."""

from __future__ import annotations

import copy
import math
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, weight_norm

from gpsearch import HLSTM, HLSTMCell, UserError, compact
from gpsearch.candidate import Deployment
from gpsearch.flops import weights as count
from gpsearch.kernels import native
from gpsearch.kernels.decode import Packed
from gpsearch.quantize import TYPES, narrow_bytes, quantize_weights, rounded

KERNELS = native.native()

matrices = st.builds(
    lambda rows, columns, size, seed: (
        size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    ),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    size=st.sampled_from([1e-6, 0.1, 1.0, 1e6]),
    seed=st.integers(0, 2**20),
)


def test_whole_numbers_times_a_scale_of_the_row():
    weight = torch.tensor([[127.0, 63.4, -0.4], [2.0, -1.01, 0.0]])

    first, second = rounded(weight, "int8")

    assert first.tolist() == [127, 63, 0]
    torch.testing.assert_close(second, torch.tensor([2, -2 * 64 / 127, 0]), rtol=1e-4, atol=0)


def test_eight_significant_bits():
    assert rounded(torch.tensor([[1.0, 1 + 2**-7, 1 + 2**-9]]), "bfloat16").tolist() == [
        [1, 1 + 2**-7, 1]
    ]


@given(matrices)
def test_no_weight_moves_by_more_than_half_a_step(weight: Tensor):
    step = weight.abs().amax(1, keepdim=True) / 127

    moved = (rounded(weight, "int8") - weight).abs()

    assert (moved <= 0.502 * step).all()
    assert ((rounded(weight, "bfloat16") - weight).abs() <= weight.abs() / 256).all()


@given(matrices, st.sampled_from(["bfloat16", "int8"]))
def test_rounding_twice_is_rounding_once(weight: Tensor, type: Any):
    once = rounded(weight, type)

    assert rounded(once, type).equal(once)


@pytest.mark.skipif(KERNELS is None, reason="the kernels were not built")
@given(matrices)
def test_what_is_rounded_can_be_packed(weight: Tensor):
    assert KERNELS is not None
    assert Packed.bytes_of(KERNELS, rounded(weight, "int8"), "dense-int8") > 0
    assert Packed.bytes_of(KERNELS, rounded(weight, "bfloat16"), "dense-bfloat16") > 0


def test_what_is_no_number_stays_none():
    assert rounded(torch.tensor([[1.0, float("nan")]]), "int8").isnan().any()


def test_bytes_are_those_of_the_narrowest_exact_type():
    weight = torch.randn(6, 10)

    assert narrow_bytes(weight) == 6 * 10 * 4
    assert narrow_bytes(rounded(weight, "bfloat16")) == 6 * 10 * 2
    assert narrow_bytes(rounded(weight, "int8")) == 6 * (10 + 4)
    assert narrow_bytes(weight.double()) == 6 * 10 * 8


@pytest.mark.parametrize("make", [HLSTM, nn.LSTM])
@pytest.mark.parametrize(("type", "near"), [("bfloat16", 2e-3), ("int8", 4e-3)])
def test_a_models_recurrent_matrices_are_rounded_and_nothing_else(make, type, near):
    model = nn.ModuleList([nn.Linear(5, 5), make(5, 16)]).eval()
    before = copy.deepcopy(model)

    quantize_weights(model, type)

    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert old.equal(new) == (name.startswith("0") or "bias" in name)
    x = torch.randn(30, 1, 5)
    torch.testing.assert_close(model[1](x)[0], before[1](x)[0], atol=near, rtol=0)


@pytest.mark.parametrize(
    "make", [HLSTM, HLSTMCell, nn.LSTM, nn.LSTMCell, nn.GRU], ids=lambda make: make.__name__
)
def test_a_second_time_nothing_changes(make):
    layer = make(3, 4)

    assert not quantize_weights(layer, "float32")
    assert quantize_weights(layer, "int8")
    assert not quantize_weights(layer, "int8")


def test_weights_that_are_no_numbers_come_to_an_end():
    layer: Any = HLSTM(3, 4)
    with torch.no_grad():
        layer.weight_gate_ih_l0[0, 0] = float("inf")

    small: Any = compact(layer, weights="int8")
    assert small.weight_gate_ih_l0[0].equal(layer.weight_gate_ih_l0[0])


def test_parameters_of_16_bits_stay():
    assert not quantize_weights(HLSTM(3, 4).half(), "int8")


def test_an_unknown_type_is_named():
    with pytest.raises(UserError, match="weights='bf16' should be one of float32, bfloat16, int8"):
        compact(HLSTM(3, 4), weights="bf16")


def test_candidates_know_the_same_types():
    assert get_args(get_type_hints(Deployment)["weights"]) == TYPES


@torch.no_grad()
def test_what_dies_of_the_rounding_is_cut_out():
    layer: Any = HLSTM(5, 6, gate_hidden=(12,)).eval()
    for unit in range(4):
        layer.weight_gate1_l0[:, unit] *= 1e-4

    small: Any = compact(layer, weights="int8")

    assert small.gate_hidden == (8,)
    again: Any = compact(small, weights="int8")
    assert all(a.equal(b) for a, b in zip(small.parameters(), again.parameters(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("type", ["bfloat16", "int8"])
def test_a_compact_model_with_narrow_weights(type):
    layer: Any = HLSTM(96, 80, gate_hidden=(72,)).eval()
    layer.weight_gate_hh_l0 *= torch.rand_like(layer.weight_gate_hh_l0) < 0.1
    zero, x = layer.weight_gate_hh_l0 == 0, torch.randn(20, 1, 96)

    small: Any = compact(layer, weights=type)

    plain = copy.deepcopy(small)
    plain.formats = {}
    torch.testing.assert_close(small(x)[0], plain(x)[0], atol=1e-5, rtol=1e-5)
    assert (small.weight_gate_hh_l0[zero] == 0).all()
    before, after = (count(one)["weight_bytes"].value for one in (layer, small))
    assert after is not None
    assert before is not None
    assert after < 0.55 * before


def test_a_row_that_is_no_number_stays_as_it_is() -> None:
    weight = torch.tensor([[1.0, math.inf, 0.1], [1.0, 0.5, 0.1]])
    found = rounded(weight, "int8")
    assert torch.equal(found[0], weight[0])
    assert found[1].isfinite().all()
    assert narrow_bytes(found) == found.nbytes


WAYS: dict[str, Any] = {
    "new": (parametrizations.weight_norm, parametrize.remove_parametrizations),
    "old": (weight_norm, remove_weight_norm),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("make", [HLSTM, nn.LSTM])
@pytest.mark.parametrize(("compute", "make_permanent"), WAYS.values(), ids=WAYS.keys())
def test_a_matrix_that_is_computed_is_refused_until_it_is_permanent(make, compute, make_permanent):
    layer = make(3, 4)
    name = "weight_gate_hh_l0" if make is HLSTM else "weight_hh_l0"
    compute(layer, name)
    before = copy.deepcopy(layer.state_dict())

    assert not quantize_weights(layer, "float32")
    said = rf"^weights='int8': rnn\.{name} is computed anew at every call; make it permanent first"
    with pytest.raises(UserError, match=said):
        quantize_weights(nn.ModuleDict({"first": nn.LSTM(3, 4), "rnn": layer}), "int8")
    assert all(one.equal(before[name]) for name, one in layer.state_dict().items())

    make_permanent(layer, name)
    assert quantize_weights(layer, "int8")
    assert rounded(getattr(layer, name), "int8").equal(getattr(layer, name))


def test_a_computed_bias_is_no_matrix():
    layer = nn.LSTM(3, 4)
    parametrize.register_parametrization(layer, "bias_hh_l0", nn.Tanh())

    assert quantize_weights(layer, "int8")


@torch.no_grad()
def test_what_torchs_masks_leave_is_rounded_and_read_at_once():
    cell: Any = nn.LSTMCell(2, 1, bias=False)
    cell.weight_ih.copy_(torch.tensor([[9.0, 1.0], [127.0, 1.4], [0.0, 0.0], [1.0, 1.0]]))
    mask = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    prune.custom_from_mask(cell, "weight_ih", mask)

    assert quantize_weights(cell, "int8")
    assert cell.weight_ih[:2].tolist() == [[0, pytest.approx(1, 1e-4)], [127, 1]]
    assert cell.weight_ih_orig[0, 0] == 9
    assert not quantize_weights(cell, "int8")
    prune.remove(cell, "weight_ih")
    assert not quantize_weights(cell, "int8")


@torch.no_grad()
@pytest.mark.parametrize("make", [HLSTM, nn.LSTM])
def test_a_compact_model_that_torch_prunes_has_narrow_weights(make):
    layer, x = make(3, 8), torch.randn(5, 1, 3)
    for name in [name for name, p in layer.named_parameters() if p.dim() == 2]:
        prune.random_unstructured(layer, name, 0.5)

    small: Any = compact(layer, weights="int8")

    left = [getattr(small, name.removesuffix("_orig")) for name, _ in small.named_parameters()]
    narrow = [one for one in left if one.dim() == 2]
    assert all(rounded(one, "int8").equal(one) for one in narrow)
    torch.testing.assert_close(small(x)[0], layer(x)[0], atol=0.02, rtol=0)
    assert count(small)["weight_bytes"].value == sum(
        narrow_bytes(one) if one.dim() == 2 else one.nbytes for one in left
    )


@torch.no_grad()
def test_one_matrix_under_two_masks_is_rounded_once_for_both():
    one, other = nn.LSTMCell(4, 4), nn.LSTMCell(4, 4)
    other.weight_ih = one.weight_ih
    for cell in (one, other):
        prune.random_unstructured(cell, "weight_ih", 0.5)
    both = nn.ModuleList([one, other])

    assert quantize_weights(both, "int8")
    assert not quantize_weights(both, "int8")
