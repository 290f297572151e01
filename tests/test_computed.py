import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from gpsearch import HLSTM
from gpsearch.computed import apply_masks, computed_weights, copied, own_weights, remaining
from gpsearch.kernels import native


def test_what_is_masked_by_torch_can_be_copied():
    layer = nn.Linear(4, 3)
    prune.random_unstructured(layer, "weight", 0.5)
    x = torch.randn(2, 4)
    again = copied(layer)

    assert torch.equal(again(x), layer(x))
    with torch.no_grad():
        layer.get_parameter("weight_orig").zero_()
    assert again(x).abs().sum() != layer(x).abs().sum()


def test_weights_are_what_a_module_reads():
    plain, pruned, positive = (nn.Linear(4, 3) for _ in range(3))
    prune.random_unstructured(pruned, "weight", 6)
    parametrize.register_parametrization(positive, "weight", nn.ReLU())

    assert [*map(id, own_weights(plain))] == [id(plain.weight), id(plain.bias)]
    for layer in (pruned, positive):
        bias, weight = sorted(own_weights(layer), key=lambda one: one.dim())
        assert bias is layer.bias
        assert torch.equal(weight, layer.weight)
    assert (pruned.weight == 0).sum() == 6
    assert (positive.weight >= 0).all()


@pytest.mark.parametrize("made_within", [False, True])
def test_a_copy_that_is_made_in_inference_mode_is_an_ordinary_one(made_within: bool) -> None:
    with torch.inference_mode(made_within):
        model = nn.Sequential(nn.LSTM(3, 4), nn.BatchNorm1d(4))
    with torch.inference_mode():
        again = copied(model)
    assert not any(one.is_inference() for one in again.state_dict().values())
    assert all(one.requires_grad for one in again.parameters())
    assert all(map(torch.equal, again.parameters(), model.parameters()))


@pytest.mark.skipif(native.native() is None, reason="the kernels were not built")
def test_a_copy_that_is_made_in_inference_mode_runs_in_c() -> None:
    layer = HLSTM(3, 4).eval()
    layer.formats = {"weight_gate_hh_l0": "dense"}
    with torch.inference_mode():
        again = copied(layer)
        assert isinstance(again, HLSTM)
        assert again.decoder(1, torch.zeros(5, 1, 3)) is not None


def test_an_lstm_whose_weights_are_computed_can_be_copied() -> None:
    layer, x = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"), torch.ones(5, 1, 3)
    layer(x)  # which holds what it has computed, with gradients
    assert torch.equal(copied(layer)(x)[0], layer(x)[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_computed_weights_are_told_from_masked_ones() -> None:
    new, old, masked = (nn.LSTM(3, 4, bidirectional=True) for _ in range(3))
    parametrizations.weight_norm(new, "weight_hh_l0")
    weight_norm(old, "weight_hh_l0")
    prune.random_unstructured(masked, "weight_hh_l0", 6)
    assert computed_weights(new) == computed_weights(old) == ["weight_hh_l0"]
    assert computed_weights(masked) == computed_weights(nn.LSTM(3, 4)) == []


@torch.no_grad()
def test_masked_weights_follow_their_parameters_at_once() -> None:
    layer = nn.Linear(2, 1, bias=False)
    prune.custom_from_mask(layer, "weight", torch.tensor([[1.0, 0.0]]))
    layer.get_parameter("weight_orig").copy_(torch.tensor([[2.0, 3.0]]))
    apply_masks(layer)
    assert layer.weight.tolist() == [[2, 0]]


@torch.no_grad()
def test_of_a_weight_in_two_places_remains_what_one_of_them_reads() -> None:
    one, other, plain = (nn.Linear(3, 1, bias=False) for _ in range(3))
    other.weight = one.weight
    one.weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    for layer, mask in ((one, [[1.0, 0.0, 0.0]]), (other, [[0.0, 1.0, 0.0]])):
        prune.custom_from_mask(layer, "weight", torch.tensor(mask))

    shared, alone = remaining(nn.ModuleList([one, other, plain])).values()
    assert shared.tolist() == [[1, 2, 0]]
    assert alone is plain.weight
