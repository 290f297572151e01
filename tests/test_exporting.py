"""A module as a flat program: its outputs in numpy are torch's."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from gpsearch import HLSTM, HLSTMCell, UserError, compact
from gpsearch.candidate import Architecture
from gpsearch.exporting import arguments_on, exported
from gpsearch.exporting.agent import Program as InNumpy
from gpsearch.exporting.program import checksum, packed, relative_error
from gpsearch.tasks.speech import SpeechModel

ARCHITECTURES = [
    Architecture(layers=1, hidden_size=8, gate_width=6, activation="relu"),
    Architecture(layers=2, hidden_size=8, gate_width=6, activation="tanh", merge="sum"),
    Architecture(layers=1, hidden_size=8, gate_depth=2, gate_width=6, activation="gelu"),
    Architecture(layers=2, hidden_size=8, gate_depth=0, norm="none"),
    Architecture(layers=1, hidden_size=8, gate_width=6, gate_direct=True, norm="batch"),
    Architecture(layers=1, hidden_size=8, gate_width=6, gate_direct=True, gate_norm=True),
    Architecture(layers=1, hidden_size=8, gate_width=6, activation="leaky_relu",
                 bidirectional=False),
    Architecture(layers=1, hidden_size=8, gate_depth=0, front="deepspeech2", merge="sum"),
]  # fmt: skip


def in_numpy(model: nn.Module, *example: object) -> float:
    """Export, send through JSON, run, and return how far the outputs are from torch's."""
    program = exported(model, example)
    text = json.loads(json.dumps(program.text))
    found = InNumpy(text, program.weights).run(*program.example)
    return max(relative_error(*pair) for pair in zip(found, program.expected, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_the_packaged_speech_model_is_equal_in_numpy(architecture: Architecture) -> None:
    torch.manual_seed(0)
    model = SpeechModel(architecture, 30)
    model(torch.randn(4, 60, 64), torch.tensor([60, 50, 40, 30]))  # batch norm has seen something
    assert in_numpy(compact(model), torch.randn(1, 60, 64)) <= 1e-5


@pytest.mark.parametrize(("bias", "batch"), [(True, 1), (True, 3), (False, 1), (False, 3)])
def test_stacks_with_states_are_equal_in_numpy(bias: bool, batch: int) -> None:
    options = {"num_layers": 2, "bias": bias, "bidirectional": True, "batch_first": True}
    x, state = torch.randn(batch, 5, 3), (torch.randn(4, batch, 6), torch.randn(4, batch, 6))
    for layer in (HLSTM(3, 6, gate_hidden=(4, 5), **options), nn.LSTM(3, 6, **options)):  # type: ignore[arg-type]
        assert in_numpy(layer, x, state) <= 1e-5


def test_steps_one_by_one_are_the_whole_sequence() -> None:
    cell, x = HLSTMCell(3, 6, gate_hidden=(4,), gate_direct=True), torch.randn(5, 1, 3)
    h = c = torch.zeros(1, 6)
    program = exported(cell, (x[0], (h, c)))
    step, state = InNumpy(program.text, program.weights), [h.numpy(), c.numpy()]
    for one in x.numpy():
        state = step.run(one, *state)
    for one in x:
        h, c = cell(one, (h, c))
    np.testing.assert_allclose(state, [h.detach(), c.detach()], rtol=1e-5, atol=1e-6)


class Assorted(nn.Module):
    """Something of every kind of function."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(7, 6), nn.Conv1d(6, 8, 3, 2, 1, 1, 2)
        self.norm, self.cell = nn.BatchNorm1d(8), nn.LSTMCell(8, 4)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(ids)  # [2, 9, 6]
        y = self.norm(self.conv(x.mT)).permute(2, 0, 1)  # [5, 2, 8]
        a, b = y.split([3, 5], dim=-1)
        z = torch.cat([a, b], -1) * 2 - y / 3 + (1 - y)
        z = nn.functional.silu(z, inplace=False).clamp(-0.5, 0.5)
        h, c = self.cell(z[1])
        top = z[..., None, 1::2].squeeze(-2).mean(0, keepdim=True).max(-1)
        masked = z.masked_fill(z > 0.1, -1.0).softmax(1)
        score = torch.matmul(masked, z.transpose(1, 2)).abs().sum((0, 1)).sqrt()
        picked = y[:, torch.tensor([1, 0])].relu_().exp().double()
        return h, c, top.values, top.indices, score, picked, torch.stack(y.unbind(0), 1)[:, -1]


def test_assorted_functions_are_equal_in_numpy() -> None:
    assert in_numpy(Assorted().eval(), torch.randint(0, 7, (2, 9))) <= 1e-5


class Typed(nn.Module):
    """What could be mistaken for a constant of the example."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        assert x.type() == "torch.DoubleTensor"
        first: Any = x[0, 0]
        filled = torch.full_like(x, first) + torch.full_like(x, 2.0)
        words: Tensor = self.embedding(ids.type(torch.long))
        return words + torch.max(x, filled).type(torch.float32)


def test_a_value_of_another_type_or_shape_is_no_constant() -> None:
    model = Typed().eval()
    ids, x = torch.tensor([0, 1, 2], dtype=torch.int32), torch.randn(3, 3, dtype=torch.float64)
    program = exported(model, (ids, x))
    other = torch.tensor([4, 4, 3], dtype=torch.int32), torch.randn(3, 3, dtype=torch.float64)
    (found,) = InNumpy(program.text, program.weights).run(*(one.numpy() for one in other))
    torch.testing.assert_close(torch.from_numpy(found), model(*other))


def test_no_sequences_are_a_batch_too() -> None:
    assert in_numpy(HLSTM(3, 4, gate_hidden=(2,)).eval(), torch.randn(5, 0, 3)) == 0


class Deciding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Summing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0)


class Overwriting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        view = y[1:]
        y.relu_()
        return view + 1


class Writing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(3)
        y[:] = x
        return y


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Deciding(), "depends on its data, by torch.Tensor.__bool__"),
        (Summing(), "torch.Tensor.cumsum has no counterpart"),
        (Overwriting(), "overwrites a value that it uses again"),
        (Half(), "bfloat16; use float32"),
        (Writing(), "writes into a tensor by its index"),
    ],
)
def test_what_cannot_be_exported_says_why(model: nn.Module, reason: str) -> None:
    with pytest.raises(UserError, match=f"^unsupported: .*{reason}"):
        exported(model, (torch.randn(3),))


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_a_softmax_needs_its_axis() -> None:
    with pytest.raises(UserError, match="softmax without an axis; name one"):
        exported(nn.Softmax(), (torch.randn(3),))


def test_an_example_is_a_tuple() -> None:
    with pytest.raises(UserError, match=r"\(x,\) instead of x"):
        arguments_on("cpu", torch.ones(1, 3))


def test_a_recurrent_layer_is_one_operation_however_long() -> None:
    layer = HLSTM(3, 6, gate_hidden=(4,))
    few, many = (exported(layer, (torch.randn(steps, 1, 3),)) for steps in (5, 50))
    assert [op["op"] for op in few.ops] == [op["op"] for op in many.ops]
    assert sum(op["op"] == "recurrence" for op in few.ops) == 1


def test_weights_are_packed_at_multiples_of_16_bytes_and_named_by_what_they_hold() -> None:
    layout, data = packed([np.ones(3, np.float32), np.arange(2)])
    assert [one["offset"] for one in layout] == [0, 16]
    assert len(data) == 32
    assert checksum(data) == checksum(bytes(data))
    assert checksum(data) != checksum(data[1:])


class Accumulating(nn.Module):
    """Sums up in what the model itself has made."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        total, product, apart = x.new_zeros(3), torch.full((3,), 2.0), torch.zeros(3)
        for row in x:
            total += row
            product.mul_(row)
        torch.sub(apart, total, out=apart)
        return total, product, apart


def test_what_a_model_sums_up_starts_from_what_it_was() -> None:
    model, other = Accumulating(), torch.randn(4, 3)
    program = exported(model, (torch.randn(4, 3),))
    found = InNumpy(program.text, program.weights).run(other.numpy())
    torch.testing.assert_close([*map(torch.from_numpy, found)], [*model(other)])


class Partly(nn.Module):
    """Writes into a part of what it uses as a whole."""

    def forward(self, x: Tensor) -> Tensor:
        whole = x.new_zeros(2, 3)
        whole[0].add_(x)
        return whole.sum(0)


def test_what_was_written_by_way_of_a_part_is_no_constant() -> None:
    with pytest.raises(UserError, match="overwrites a value that it uses again"):
        exported(Partly(), (torch.randn(3),))


class Reducing(nn.Module):
    """Names axes as numpy does."""

    def forward(self, x: Any) -> tuple[Tensor, ...]:
        stack: Any = torch.stack
        twice = stack([x, x], axis=1)
        rest = x - x.sum(dim=())
        return twice.sum(axis=0), x.mean(axis=1, keepdims=True), x.amax(axis=0), rest


def test_axes_may_be_named_as_in_numpy() -> None:
    assert in_numpy(Reducing(), torch.randn(3, 4)) <= 1e-5


class Into(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sum(x, 0, out=torch.empty(4))


def test_an_argument_that_is_not_known_is_named() -> None:
    with pytest.raises(UserError, match=r"torch\.sum got an unexpected keyword argument 'out'"):
        exported(Into(), (torch.randn(3, 4),))


def test_a_model_that_torch_has_pruned_can_be_exported() -> None:
    layer = HLSTM(3, 6, gate_hidden=(4,))
    prune.random_unstructured(layer, "weight_gate_hh_l0", 0.5)
    assert in_numpy(layer, torch.randn(5, 2, 3)) <= 1e-5


class NearZero(nn.Module):
    """A sum that is nearly taken away again."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0, keepdim=True) - 3.9994


def test_what_lies_near_0_by_chance_is_held_against_how_far_inputs_move_it() -> None:
    program = exported(NearZero(), (torch.tensor([0.0, 1.0, 1.0, 2.0]),))
    (wanted,) = program.expected
    assert 5e-4 < wanted < 7e-4
    rounding = np.float32(1e-7)  # 2e-4 of what is wanted, but little beside the sum, 4
    assert program.check([wanted + rounding]) is None
    for wrong in (wanted + np.float32(1e-3), wanted * np.float32(np.nan)):
        assert "its outputs differ from the model's by" in str(program.check([wrong]))


def test_what_no_input_moves_is_held_against_itself() -> None:
    program = exported(nn.Linear(2, 1), (torch.zeros(1, 2),))
    (wanted,) = program.expected
    assert program.check([wanted * np.float32(1.00001)]) is None
    assert "by 1.0e-03" in str(program.check([wanted * np.float32(1.001)]))


def test_a_model_is_exported_in_inference_mode_too() -> None:
    outside = HLSTM(3, 6, gate_hidden=(4,))
    with torch.inference_mode():
        for layer in (outside, HLSTM(3, 6, gate_hidden=(4,))):
            assert in_numpy(layer, torch.randn(5, 2, 3)) <= 1e-5
