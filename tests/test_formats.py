"""The fastest way to run a layer is chosen among ways that give equal outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from gpsearch import HLSTM, HLSTMCell, compact
from gpsearch.deploy import load_model, save_model
from gpsearch.formats import choose
from gpsearch.kernels import native
from gpsearch.kernels.decode import FORMATS

needs_kernels = pytest.mark.skipif(native.native() is None, reason="there are no kernels here")


def thinned(module: Any, density: float) -> Any:
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 2:
                p *= torch.rand(p.shape) < density
    return module.eval()


def assert_equal(one: nn.Module, other: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(one(x), other(x), atol=1e-5, rtol=1e-5)


@needs_kernels
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_every_weight_of_a_layer_gets_its_format(density):
    torch.manual_seed(0)
    module = thinned(HLSTM(96, 96, gate_hidden=(96,)), density)

    small: Any = compact(module)

    assert module.formats == {}
    assert set(small.formats.values()) <= set(FORMATS)
    assert set(small.formats) == {n for n, p in small.named_parameters() if p.dim() == 2}
    assert_equal(module, small, torch.randn(40, 1, 96))


@needs_kernels
def test_the_kernels_run_what_was_made_compact_or_loaded_in_inference_mode(tmp_path):
    module, x = HLSTM(96, 96, gate_hidden=(96,)).eval(), torch.randn(1, 1, 96)
    save_model(compact(module), tmp_path / "model.pt")

    with torch.inference_mode():
        for small in list[Any]([compact(module), load_model(tmp_path / "model.pt")]):
            small.formats = {"weight_gate_hh_l0": "dense"}
            assert small.decoder(1, x) is not None


@needs_kernels
def test_where_nothing_is_zero_everything_is_dense():
    small: Any = compact(HLSTM(80, 64, gate_hidden=(70,)))

    assert set(small.formats.values()) <= {"dense"}


@needs_kernels
def test_one_step_of_a_cell():
    cell = thinned(HLSTMCell(60, 70, gate_hidden=(80,)), 0.1)

    small: Any = compact(cell)

    assert small.formats  # in C, as torch takes many calls for a step
    assert_equal(cell, small, torch.randn(1, 60))


def test_torchs_lstm_may_become_one_of_ours():
    model = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), thinned(nn.LSTM(64, 96), 0.05)).eval()

    small: Any = compact(model)

    assert type(small[2]) in (nn.LSTM, HLSTM)
    assert small.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(
            small(torch.ones(9, 1, 5))[0], model(torch.ones(9, 1, 5))[0], atol=1e-5, rtol=1e-5
        )


def test_an_lstm_on_which_something_hangs_stays():
    tied = nn.LSTM(64, 96)
    hooked = nn.LSTM(64, 96)
    hooked.register_forward_hook(lambda *args: None)
    other = nn.LSTM(64, 96)
    other.weight_hh_l0 = tied.weight_hh_l0
    scaled: Any = nn.LSTM(64, 96)
    scaled.scale = 2.0

    for model in nn.ModuleList([tied, other]), nn.ModuleList([hooked]), nn.ModuleList([scaled]):
        assert all(type(one) is nn.LSTM for one in choose(model.eval()).children())


def test_for_another_device_nothing_is_tried():
    model: Any = compact(nn.ModuleList([HLSTM(64, 96), nn.LSTM(64, 96)]), here=False)

    assert model[0].formats == {}
    assert type(model[1]) is nn.LSTM


@pytest.mark.parametrize("options", [{"gate_norm": True}, {"dtype": torch.float64}])
def test_what_the_kernels_cannot_do_stays_with_torch(options):
    chosen: Any = choose(HLSTM(3, 4, **options).eval())

    assert chosen.formats == {}


PARAMETRIZED = {
    "prune": lambda module, name: prune.l1_unstructured(module, name, 0.9),
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "weight_norm as a parametrization": parametrizations.weight_norm,
    "spectral_norm as a parametrization": parametrizations.spectral_norm,
}
parametrized = pytest.mark.parametrize("way", PARAMETRIZED.values(), ids=PARAMETRIZED)
deprecated = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


@deprecated
@parametrized
@pytest.mark.parametrize("name", ["weight_gate_hh", "weight_gate1"])
def test_weights_that_are_computed_stay_with_torch(way, name):
    cell = HLSTMCell(10, 16, gate_hidden=(32,))
    way(cell, name)

    small: Any = compact(cell)

    assert small.formats == {}
    assert_equal(cell.eval(), small, torch.randn(1, 10))


@needs_kernels
@deprecated
@parametrized
@pytest.mark.parametrize("name", ["weight_gate_hh_l0", "weight_gate1_l0"])
def test_weights_that_come_to_be_computed_go_back_to_torch(way, name):
    layer, x = HLSTM(10, 16, gate_hidden=(32,), bias=False).eval(), torch.randn(7, 1, 10)
    layer.formats = {name: "dense"}
    with torch.no_grad():
        assert layer.decoder(1, x) is not None
        way(layer, name)
        layer.eval()
        found = layer(x)[0]
        assert layer.decoder(1, x) is None
        layer.formats = {}
        torch.testing.assert_close(found, layer(x)[0])


def test_the_choice_leaves_torchs_threads_as_they_are():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        choose(HLSTM(3, 4).eval())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("batch_first", [False, True])
def test_torch_is_held_against_the_kernels_on_one_sequence(batch_first):
    seen = set()

    class Watched(HLSTM):
        def forward(self, input, *args, **kwargs):
            seen.add(tuple(input.shape))
            return super().forward(input, *args, **kwargs)

    choose(Watched(3, 4, batch_first=batch_first).eval())

    assert seen == {(1, 64, 3) if batch_first else (64, 1, 3)}


@needs_kernels
def test_an_lstm_that_stands_in_two_places_is_one_module_still():
    lstm = thinned(nn.LSTM(64, 96), 0.05)

    small: Any = compact(nn.ModuleDict({"first": lstm, "second": nn.Sequential(lstm)}))

    assert small["first"] is small["second"][0]
