"""The one file that runs on a device, asked as a device is: by lines."""

from __future__ import annotations

import ast
import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gpsearch.exporting import AGENT, exported
from gpsearch.exporting.agent import Agent, Busy, alone, answer, erfc, serve
from gpsearch.exporting.program import checksum, packed


def test_it_needs_an_old_python_and_numpy_only() -> None:
    tree = ast.parse(AGENT.read_text(encoding="utf-8"), feature_version=(3, 8))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("gpsearch" in ast.unparse(one) or "torch" in ast.unparse(one) for one in imports)


def test_erfc_is_good_to_seven_digits() -> None:
    x = np.linspace(-4, 4, 101)
    exact = np.array([math.erfc(one) for one in x])
    np.testing.assert_allclose(erfc(x), exact, rtol=2e-7)


def ask(agent: Agent, do: str, **request: Any) -> Any:
    return answer(agent, {"do": do, "deadline_s": 60.0, **request})


def load_request(model: nn.Module, *example: torch.Tensor) -> tuple[dict[str, Any], list[bytes]]:
    program = exported(model, example)
    layout, values = packed(program.example)
    names = {"weights": checksum(program.weights), "example": checksum(values)}
    return {"name": "m", "program": program.text, "layout": layout, **names}, [
        program.weights,
        values,
    ]


def put(agent: Agent, name: str, data: bytes) -> Any:
    text = base64.b64encode(data).decode()
    return ask(agent, "put", blob=name, data=text, first=True, last=True)


def test_weights_are_sent_once_and_a_damaged_copy_is_missing(tmp_path: Path) -> None:
    agent = Agent(tmp_path / "weights")
    request, blobs = load_request(nn.Linear(3, 2), torch.ones(1, 3))
    assert ask(agent, "load", **request) == {"missing": [checksum(blob) for blob in blobs]}
    for blob in blobs:
        assert put(agent, checksum(blob), blob) == {}
    assert "outputs" in ask(Agent(tmp_path / "weights"), "load", **request)  # another day
    (tmp_path / "weights" / checksum(blobs[0])).write_bytes(b"damaged")
    assert ask(agent, "load", **request) == {"missing": [checksum(blobs[0])]}
    assert "damaged on their way" in put(agent, checksum(blobs[0]), b"damaged")["reason"]


def test_what_is_loaded_next_outlives_the_oldest(tmp_path: Path) -> None:
    agent = Agent(tmp_path, kept_bytes=100)
    for n in range(1, 5):  # the example is the oldest
        request, blobs = load_request(nn.Linear(3, 10 * n), torch.ones(1, 3))
        missing = ask(agent, "load", **request)["missing"]
        for blob in blobs:
            if checksum(blob) in missing:
                put(agent, checksum(blob), blob)
        assert "outputs" in ask(agent, "load", **request)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_unknown_operation_is_unsupported(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    request, blobs = load_request(nn.Linear(3, 2), torch.ones(1, 3))
    for blob in blobs:
        put(agent, checksum(blob), blob)
    request["program"]["ops"][0]["op"] = "fold"
    assert ask(agent, "load", **request) == {
        "error": "unsupported",
        "reason": "the agent knows no operation fold",
    }


def test_it_answers_line_by_line() -> None:
    requests = [{"id": 7, "do": "unload", "deadline_s": 9.0, "name": "x"}, {"id": 8, "do": "fly"}]
    requests[1]["deadline_s"] = 9
    sink = io.StringIO()
    serve([json.dumps(one).encode() for one in requests], sink)
    hello, done, failed = map(json.loads, sink.getvalue().splitlines())
    assert hello["numpy"] == np.__version__
    assert done == {"id": 7}
    assert (failed["id"], failed["error"]) == (8, "failed")


def test_two_never_measure_at_once(tmp_path: Path) -> None:
    folder, refused = str(tmp_path), r"others measure or train there, after 0.05 s"
    with alone(5.0, folder), pytest.raises(Busy, match=refused), alone(0.05, folder):
        pass
    with alone(5.0, folder):
        pass
