"""LSTMs of other makers to be held against, at batch 1: torch's int8 one, ONNX Runtime's two."""

from __future__ import annotations

import logging
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MISSING = "ONNX Runtime is not installed: pip install onnx onnxruntime"

State = tuple[Any, Any]


def has_onnx() -> bool:
    """Say whether ONNX Runtime and what writes its files are installed."""
    return find_spec("onnxruntime") is not None and find_spec("onnx") is not None


def int8(lstm: nn.LSTM) -> nn.Module:
    """Return torch's LSTM with weights of 8 bits and inputs quantised at every step."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves it to torchao, where there is no LSTM
        quantised: Any = quantize_dynamic(  # type: ignore[no-untyped-call]
            nn.Sequential(lstm), {nn.LSTM}, dtype=torch.qint8
        )
    layer: nn.Module = quantised[0]
    return layer


class OnnxLSTM:
    """ONNX Runtime's LSTM, in one thread; called like torch's.

    Args:
        lstm: Whose weights it has; one layer, one direction.
        int8: With weights of 8 bits.
    """

    def __init__(self, lstm: nn.LSTM, *, int8: bool = False) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            path = _quantised(_write(lstm, Path(folder))) if int8 else _write(lstm, Path(folder))
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        zeros = torch.zeros(1, 1, lstm.hidden_size).numpy()
        self._zeros = zeros, zeros

    def __call__(self, x: Tensor, state: State | None = None) -> tuple[Any, State]:
        """Return the outputs as an array [T, 1, B, H], and the state."""
        h, c = state or self._zeros
        output, h, c = self._session.run(None, {"x": x.numpy(), "h0": h, "c0": c})
        return output, (h, c)


def _write(lstm: nn.LSTM, folder: Path) -> Path:
    """Write a graph of one node; ONNX' gates come in the order i, o, f, g."""
    import onnx
    from onnx import helper, numpy_helper

    def gates(name: str) -> Tensor:
        i, f, g, o = lstm.get_parameter(name).detach().chunk(4)
        return torch.cat([i, o, f, g])

    weights = {
        "W": gates("weight_ih_l0")[None],
        "R": gates("weight_hh_l0")[None],
        "B": torch.cat([gates("bias_ih_l0"), gates("bias_hh_l0")])[None],
    }
    size, inputs = lstm.hidden_size, lstm.input_size

    def value(name: str, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    node = helper.make_node(
        "LSTM", ["x", "W", "R", "B", "", "h0", "c0"], ["y", "h", "c"], hidden_size=size
    )
    graph = helper.make_graph(
        [node],
        "lstm",
        [value("x", "time", 1, inputs), value("h0", 1, 1, size), value("c0", 1, 1, size)],
        [value("y", "time", 1, 1, size), value("h", 1, 1, size), value("c", 1, 1, size)],
        [numpy_helper.from_array(weight.numpy(), name) for name, weight in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)])
    model.ir_version = 8  # any runtime of the last years reads it
    path = folder / "lstm.onnx"
    onnx.save(model, str(path))
    return path


def _quantised(path: Path) -> Path:
    from onnxruntime.quantization import quantize_dynamic

    to = path.with_name("int8.onnx")
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises to simplify the graph, of one node
    try:
        # Full range, products saturate on processors without VNNI: errors of a third, same speed.
        quantize_dynamic(str(path), str(to), op_types_to_quantize=["LSTM"], reduce_range=True)
    finally:
        logging.root.setLevel(before)
    return to
