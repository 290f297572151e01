"""A program as an ONNX graph, and ONNX Runtime as a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gpsearch.profilers.onnx import OnnxProfiler  # type: ignore[import-not-found]
from torch import nn

from gpsearch import HLSTM, HLSTMCell, UserError, measure
from gpsearch.exporting import Program, exported, to_onnx
from gpsearch.exporting.program import relative_error
from gpsearch.profiling import Host
from gpsearch.tasks.speech import SpeechModel
from tests.test_exporting import ARCHITECTURES, Assorted

onnx = pytest.importorskip("onnx", reason="needs pip install onnx")
ort = pytest.importorskip("onnxruntime", reason="needs pip install onnxruntime")


def error(program: Program) -> float:
    """Return how far ONNX Runtime's outputs are from the model's."""
    graph = to_onnx(program)
    onnx.checker.check_model(graph)
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, dict(zip(program.inputs, program.example, strict=True)))
    return max(relative_error(*pair) for pair in zip(found, program.expected, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=range(len(ARCHITECTURES)))
def test_the_packaged_speech_model_is_equal_in_onnx(architecture: object) -> None:
    torch.manual_seed(0)
    model = SpeechModel(architecture, 30).eval()  # type: ignore[arg-type]
    assert error(exported(model, (torch.randn(1, 60, 64),))) <= 1e-5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("gate_norm", [False, True])
def test_stacks_with_states_are_equal_in_onnx(batch: int, gate_norm: bool) -> None:
    x, state = torch.randn(5, batch, 3), (torch.randn(4, batch, 6), torch.randn(4, batch, 6))
    layer = HLSTM(3, 6, 2, bidirectional=True, gate_hidden=(4, 5), gate_norm=gate_norm)
    assert error(exported(layer, (x, state))) <= 1e-5
    assert error(exported(nn.LSTM(3, 6, 2, bidirectional=True), (x, state))) <= 1e-5


def test_flat_gates_of_the_recurrence_are_equal_in_onnx() -> None:
    lstm, x = nn.LSTM(3, 6), torch.randn(5, 2, 3)
    program = exported(lstm, (x,))
    (op,) = [one for one in program.ops if one["op"] == "lstm"]
    cells = [{**op["cells"][0], "dense": [], "norms": [], "activation": "relu"}]
    flat = {"op": "recurrence", "in": op["in"], "out": ["hs", "cs"], "cells": cells}
    wanted = program.expected[0][None]
    assert error(replace(program, ops=[flat], outputs=["hs"], expected=[wanted])) <= 1e-5


def test_assorted_functions_are_equal_in_onnx() -> None:
    assert error(exported(Assorted().eval(), (torch.randint(0, 7, (2, 9)),))) <= 1e-5


def test_steps_one_by_one_are_the_whole_sequence() -> None:
    cell, x = HLSTMCell(3, 6, gate_hidden=(4,)), torch.randn(5, 1, 3)
    h = c = torch.zeros(1, 6)
    graph = to_onnx(exported(cell, (x[0], (h, c))))
    step = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    state = [h.numpy(), c.numpy()]
    for one in x.numpy():
        state = step.run(None, dict(zip(("x0", "x1", "x2"), (one, *state), strict=True)))
    for one in x:
        h, c = cell(one, (h, c))
    np.testing.assert_allclose(state, [h.detach(), c.detach()], rtol=1e-5, atol=1e-6)


def test_the_graph_does_not_grow_with_time() -> None:
    layer = HLSTM(3, 6, gate_hidden=(4,))
    few, many = (
        to_onnx(exported(layer, (torch.randn(steps, 1, 3),))).graph.node for steps in (5, 50)
    )
    assert len(few) == len(many) < 30
    assert "Scan" in {node.op_type for node in many}


def test_an_lstm_is_onnxs_own() -> None:
    graph = to_onnx(exported(nn.LSTM(3, 6), (torch.randn(5, 1, 3),))).graph
    assert [node.op_type for node in graph.node].count("LSTM") == 1


def test_the_device_measures(tmp_path: Path) -> None:
    device, layer = OnnxProfiler(), HLSTM(3, 16, gate_hidden=(8,))
    assert device.probe().fingerprint["runtime"] == f"onnxruntime {ort.__version__}"
    reading = measure(
        device,
        nn.Linear(3, 4),
        (torch.ones(100, 1, 3),),
        reference=layer,
        max_seconds=0.2,
        host=Host(locks=tmp_path, recovery_s=0.0),
    )
    assert 0 < reading["latency_ratio"].number < 1


def test_what_cannot_be_exported_is_the_users_to_know() -> None:
    with pytest.raises(UserError, match=r"^unsupported: torch\.\S+ has no counterpart"):
        OnnxProfiler().load(nn.Fold(2, 1), (torch.ones(1, 1, 4),))
