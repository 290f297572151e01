"""A stream's steps are those of the whole sequence, in C and in torch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gpsearch import HLSTM, HLSTMCell, Stream, UserError
from gpsearch.kernels import native
from tests.recurrent import as_buffers

needs_kernels = pytest.mark.skipif(native.native() is None, reason="the kernels were not built")
ways = pytest.mark.parametrize("way", ["torch", pytest.param("C", marks=needs_kernels)])


def made(layer: Any, way: str) -> Any:
    if way == "C":
        layer.formats = {name: "dense" for name, p in layer.named_parameters() if p.dim() == 2}
    return layer.eval()


@ways
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 3}, {"batch_first": True}, {"gate_hidden": ()}, {"gate_direct": True}],
    ids=str,
)
def test_steps_are_those_of_the_whole_sequence(way, options):
    layer = made(HLSTM(5, 7, **{"gate_hidden": (6,), **options}), way)
    x = torch.randn(9, 2, 5)
    stream = Stream(layer, batch=2)

    steps = torch.stack([stream(one) for one in x])

    with torch.no_grad():
        whole, state = layer(x.transpose(0, 1) if layer.batch_first else x)
    torch.testing.assert_close(steps, whole.transpose(0, 1) if layer.batch_first else whole)
    torch.testing.assert_close(stream.state, state)
    assert (stream._running is not None) == (way == "C")


@ways
def test_a_cell_goes_on_from_a_state(way):
    cell = made(HLSTMCell(5, 7, gate_hidden=(6,)), way)
    x, state = torch.randn(1, 5), (torch.randn(1, 7), torch.randn(1, 7))
    stream = Stream(cell, state=state)

    h = stream(x)

    with torch.no_grad():
        wanted = cell(x, state)
    torch.testing.assert_close(h, wanted[0])
    torch.testing.assert_close(stream.state, wanted)


@ways
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_goes_on_from_the_same_state(way, copied):
    stream, x = Stream(made(HLSTM(3, 4, 2, gate_hidden=(5,)), way)), torch.randn(3, 1, 3)
    stream(x[0])

    other = copied(stream)

    steps = [other(one) for one in x[1:]]
    assert all(step.equal(stream(one)) for step, one in zip(steps, x[1:], strict=True))
    assert (other._running is not None) == (way == "C")


@ways
def test_outputs_of_earlier_steps_stay(way):
    stream = Stream(made(HLSTM(3, 4, gate_hidden=(5,)), way))

    first = stream(torch.ones(1, 3))
    before = first.clone()
    state = stream.state
    stream(torch.ones(1, 3))

    assert first.equal(before)
    assert state[0][0].equal(before)


@ways
def test_inputs_of_any_layout_and_precision(way):
    layer = made(HLSTM(4, 4, gate_hidden=(5,)), way)
    x = torch.randn(4, 3, requires_grad=True)

    plain = Stream(layer, batch=3)(x.detach().t().contiguous())

    assert Stream(layer, batch=3)(x.t()).equal(plain)
    torch.testing.assert_close(Stream(layer, batch=3)(x.t().double()), plain)


@ways
def test_numbers_whose_signs_are_only_noted(way):
    layer = made(HLSTM(3, 4, gate_hidden=(5,)), way)
    x = torch.randn(1, 3)

    assert Stream(layer)(torch._neg_view(x)).equal(Stream(layer)(-x))


@needs_kernels
def test_more_sequences_than_the_kernels_like_run_in_torch():
    layer = made(HLSTM(3, 4, gate_hidden=(5,)), "C")
    x = torch.randn(5, 3)

    many = Stream(layer, batch=5)

    one = torch.cat([Stream(layer)(row[None]) for row in x])
    torch.testing.assert_close(many(x), one)
    assert many._running is None
    assert Stream(layer, batch=4)._running is not None


@needs_kernels
def test_a_stream_keeps_the_weights_that_it_began_with():
    layer = made(HLSTM(3, 4, gate_hidden=(5,)), "C")
    stream, x = Stream(layer), torch.randn(1, 3)
    wanted = Stream(layer)(x)
    with torch.no_grad():
        layer.weight_gate1_l0 += 1
    del layer

    assert stream(x).equal(wanted)


@ways
def test_what_cannot_be_a_step_is_named(way):
    stream = Stream(made(HLSTM(4, 4), way))

    with pytest.raises(UserError, match=r"a step is \[1, 4\], not \[1, 3\]"):
        stream(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("layer", "state", "message"),
    [
        (HLSTM(2, 3), None, "call eval"),
        (HLSTM(2, 3, bidirectional=True).eval(), None, "bidirectional"),
        (HLSTM(2, 3).eval(), (torch.zeros(1, 1, 3), torch.zeros(1, 1, 4)), "the initial c is"),
        (HLSTM(2, 3).eval(), (torch.zeros(1, 1, 3),), "h and c, not 1 tensors"),
        (nn.LSTM(2, 3).eval(), None, "HLSTM.from_lstm"),
        (nn.Linear(2, 3).eval(), None, "not a Linear"),
    ],
)
def test_what_cannot_be_a_stream_is_named(layer, state, message):
    with pytest.raises(UserError, match=message):
        Stream(layer, state=state)


@ways
@pytest.mark.usefixtures("untyped")
def test_what_is_of_another_type_is_named(way):
    layer = made(HLSTM(2, 3), way)
    with pytest.raises(UserError, match=r"batch=1\.5 should be a whole number"):
        Stream(layer, batch=1.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a step is a tensor, not of the type ndarray"):
        Stream(layer)(np.zeros((1, 2), np.float32))  # type: ignore[arg-type]


def test_a_layer_that_trains_again_is_no_stream():
    layer = HLSTM(3, 8, gate_hidden=(6,), gate_dropout=0.5).eval()
    stream = Stream(layer)
    layer.train()
    with pytest.raises(UserError, match="in training mode; call eval"):
        stream(torch.randn(1, 3))


def test_a_model_goes_on_from_a_stream():
    layer, head = made(HLSTM(3, 4), "torch"), nn.Linear(4, 2)
    stream = Stream(layer)

    with torch.inference_mode():
        assert head(stream(torch.ones(1, 3))).shape == (1, 2)
    assert head(stream(torch.ones(1, 3))).requires_grad


def test_weights_may_be_buffers():
    layer, x = HLSTM(5, 7, gate_hidden=(6,)).eval(), torch.randn(1, 5)
    wanted = Stream(layer)(x)
    torch.testing.assert_close(Stream(as_buffers(layer))(x), wanted)
