from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

from gpsearch.candidate import Architecture
from gpsearch.cell import HLSTM, HLSTMCell
from gpsearch.errors import UserError
from gpsearch.flops import count, hlstm_flops, lstm_flops
from gpsearch.tasks import find


def values(model: nn.Module, *example: Tensor) -> dict[str, float]:
    return {name: quantity.number for name, quantity in count(model, example).items()}


def test_an_lstm_counts_as_by_hand_and_not_as_0() -> None:
    # 2 FLOPs * 4 gates * 128 * (64 + 128) weights * 20 steps * 4 sequences
    found = values(nn.LSTM(64, 128, batch_first=True), torch.zeros(4, 20, 64))
    assert found == {
        "flops_dense": 15_728_640,
        "flops_effective": 15_728_640,
        "params": 99_328,
        "params_nonzero": 99_328,
        "weight_bytes": 4 * 99_328,
    }
    assert lstm_flops(64, 128, steps=20 * 4) == 15_728_640


def test_weights_may_be_computed() -> None:
    for parametrized in (parametrizations.spectral_norm, parametrizations.orthogonal):
        found = values(nn.Sequential(parametrized(nn.Linear(4, 4))), torch.zeros(2, 4))
        assert found["flops_dense"] >= 2 * 2 * 4 * 4


def test_an_input_is_known_by_its_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(1, 2, 4), x.new_zeros(1, 2, 4)
            output: Tensor = self.lstm(hx=state, input=x)[0]
            return output

    assert values(Named(), torch.zeros(5, 2, 3)) == values(nn.LSTM(3, 4), torch.zeros(5, 2, 3))


@pytest.mark.parametrize(
    ("module", "flops"),
    [
        (nn.GRU(64, 128), 11_796_480),
        (nn.RNN(64, 128), 3_932_160),
        pytest.param(
            nn.LSTM(64, 128, proj_size=32),
            2 * 80 * (4 * 128 * (64 + 32) + 128 * 32),
            marks=pytest.mark.filterwarnings("ignore:LSTM with projections is not supported"),
        ),
        (nn.Linear(64, 128), 2 * 80 * 64 * 128),
        (nn.Conv1d(20, 7, 3, padding=1), 2 * 4 * 64 * 7 * 20 * 3),
        (nn.Conv1d(20, 10, 3, groups=10), 2 * 4 * 62 * 10 * 2 * 3),
        (nn.ConvTranspose1d(20, 7, 3, stride=2), 2 * 4 * 64 * 7 * 20 * 3),
    ],
)
def test_other_modules_count_as_by_hand(module: nn.Module, flops: int) -> None:
    assert values(module, torch.zeros(4, 20, 64))["flops_dense"] == flops


@pytest.mark.parametrize(
    ("layers", "gate_hidden", "weights"),
    [(1, (), 2_097_152), (2, (), 4_194_304), (3, (), 6_291_456), (1, (512,), 3_145_728)],
)
def test_the_papers_decoders_have_the_known_weights(
    layers: int, gate_hidden: tuple[int, ...], weights: int
) -> None:
    assert hlstm_flops(512, 512, gate_hidden, 1, layers) == 2 * weights
    cell = HLSTM(512, 512, layers, bias=False, gate_hidden=gate_hidden)
    found = values(cell, torch.zeros(1, 1, 512))
    assert (found["params"], found["flops_dense"]) == (weights, 2 * weights)


def test_deep_speech_2_has_the_known_weights() -> None:
    # The directions are summed, so that layers 2 to 5 read 800 and not 1600.
    first, others = lstm_flops(672, 800, 1, directions=2), lstm_flops(800, 800, 1, directions=2)
    assert first + 4 * others == 2 * 50_380_800


@settings(max_examples=20)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)),
    gate_hidden=st.lists(st.integers(1, 4), max_size=3).map(tuple),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    gate_direct=st.booleans(),
)
def test_every_h_lstm_counts_as_its_closed_form(
    sizes: tuple[int, int, int, int],
    gate_hidden: tuple[int, ...],
    layers: int,
    bidirectional: bool,
    gate_direct: bool,
) -> None:
    inputs, hidden, steps, batch = sizes
    model = HLSTM(
        inputs,
        hidden,
        layers,
        bidirectional=bidirectional,
        gate_hidden=gate_hidden,
        gate_direct=gate_direct,
    )
    closed_form = hlstm_flops(
        inputs,
        hidden,
        gate_hidden,
        steps * batch,
        layers,
        1 + bidirectional,
        gate_direct=gate_direct,
    )
    assert values(model, torch.zeros(steps, batch, inputs))["flops_dense"] == closed_form


@settings(max_examples=10)
@given(density=st.floats(0.1, 0.9), seed=st.integers(0, 99))
def test_a_zero_weight_costs_nothing(density: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = HLSTM(6, 5, 2, bias=False, gate_hidden=(4,))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(torch.rand_like(weight) < density)
    found = values(model, torch.zeros(7, 3, 6))
    assert found["flops_effective"] == 2 * 7 * 3 * found["params_nonzero"]
    assert found["flops_dense"] == 2 * 7 * 3 * found["params"]


class Recogniser(nn.Module):
    """A speech model in small: convolution, packed recurrence, attention, output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv2d(1, 8, 3, padding=1)
        self.recurrent = HLSTM(
            64 * 8, 32, 2, bidirectional=True, batch_first=True, gate_hidden=(16,)
        )
        self.norm = nn.LayerNorm(64)
        self.out = nn.Linear(64, 10)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.front(features[:, None]).transpose(1, 2).flatten(2)
        packed = pack_padded_sequence(maps, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)
        states = self.norm(states)
        mixed = torch.softmax(states @ states.transpose(1, 2), dim=-1) @ states
        return self.out(mixed).log_softmax(dim=-1), lengths


FRONT = 2 * 8 * 9 * 64 * 20 * 4
OUT = 2 * 64 * 10 * 20 * 4
ATTENTION = 2 * 2 * 64 * 20 * 20 * 4
RECURRENT = hlstm_flops(512, 32, (16,), steps=20 + 10 + 5 + 5, layers=2, directions=2)


def test_a_whole_model_counts_as_the_sum_of_its_products() -> None:
    model = Recogniser()
    with torch.no_grad():
        model.out.weight[:5] = 0
        model.front.weight[:2] = 0
    found = values(model, torch.zeros(4, 20, 64), torch.tensor([20, 10, 5, 5]))
    assert found["flops_dense"] == FRONT + RECURRENT + ATTENTION + OUT
    assert found["flops_effective"] == FRONT * 3 // 4 + RECURRENT + ATTENTION + OUT // 2


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture(gate_depth=0, layers=1, hidden_size=16),
        Architecture(gate_depth=1, hidden_size=16, gate_width=8, merge="sum", norm="batch"),
        Architecture(gate_depth=2, hidden_size=16, gate_direct=True, gate_norm=True),
        Architecture(gate_depth=1, hidden_size=16, bidirectional=False, norm="none"),
    ],
)
def test_speech_models_count_as_by_torchs_counter_and_the_closed_form(
    architecture: Architecture,
) -> None:
    task = find("speech")
    model, example = task.build(architecture).eval(), task.example()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        log_probs, _ = model(*example)
    by_module, expected = counter.get_flop_counts(), counter.get_total_flops()
    for name, cell in model.named_modules():
        if isinstance(cell, HLSTM):
            # What torch's counter sees of a recurrence depends on the kernel that runs it.
            expected -= sum(by_module.get(f"{type(model).__name__}.{name}", {}).values())
            expected += hlstm_flops(
                cell.input_size,
                cell.hidden_size,
                cell.gate_hidden,
                log_probs.shape[1],
                cell.num_layers,
                1 + cell.bidirectional,
                gate_direct=cell.gate_direct,
            )
    assert values(model, *example)["flops_dense"] == expected


class Decoder(nn.Module):
    """Reads its own output back, for three steps."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.out = cell, nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for _ in range(3):
            state = self.cell(x, state)
            x = self.out(state[0])
        return x


@pytest.mark.parametrize("cell", [nn.LSTMCell(6, 5), HLSTMCell(6, 5, gate_hidden=())])
def test_a_cell_in_a_loop_counts_at_every_step(cell: nn.Module) -> None:
    flops = 3 * lstm_flops(6, 5, steps=2) + 3 * 2 * 2 * 5 * 6
    assert values(Decoder(cell), torch.zeros(2, 6))["flops_dense"] == flops


class Products(nn.Module):
    """Products outside any module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        attended = nn.functional.scaled_dot_product_attention(x, x, x)  # 2 * 4 * 4 * 6 a sequence
        vector = x @ torch.ones(6)  # 4 * 6
        broadcast = torch.ones(3, 1, 7, 4) @ x  # 3 * 7 * 4 * 6
        return (attended @ self.weight).sum() + vector.sum() + broadcast.sum()


def test_products_outside_modules_count_too() -> None:
    each = 2 * 4 * 4 * 6 + 4 * 6 + 3 * 7 * 4 * 6 + 4 * 6 * 5
    assert values(Products(), torch.zeros(2, 4, 6))["flops_dense"] == 2 * 2 * each


class SelfAttention(nn.Module):
    """Reads a sequence by itself, as torch has a fused way to do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        attended: Tensor = self.attention(y, y, y, need_weights=False)[0]
        return attended


def test_self_attention_counts_though_torch_would_fuse_it() -> None:
    attention = 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8  # by 4 matrices; queries by keys, and by values
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    counted = values(SelfAttention(), torch.zeros(1, 5, 8))
    assert counted["flops_dense"] == 2 * (5 * 8 * 8 + attention)
    assert values(layer, torch.zeros(1, 5, 8))["flops_dense"] == 2 * (attention + 2 * 5 * 8 * 16)
    assert torch.backends.mha.get_fastpath_enabled()


class Unhandled(nn.Module):
    """Multiplies what a linear layer gives in a way that nobody counts."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.product = nn.Linear(4, 4), product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.first(x), x)


@pytest.mark.parametrize(
    ("operator", "product"),
    [
        ("linalg_multi_dot", lambda a, b: torch.linalg.multi_dot([a, b])),
        ("tensordot", lambda a, b: torch.tensordot(a, b, 1)),
        ("inner", torch.inner),
        ("linalg_vecdot", torch.linalg.vecdot),
        ("addbmm", lambda a, b: torch.addbmm(a, a[None], b[None])),
        ("linalg_matrix_power", lambda a, b: torch.linalg.matrix_power(a, 3)),
        ("cdist", torch.cdist),
    ],
)
def test_a_product_that_no_handle_knows_is_named(
    operator: str, product: Callable[[Tensor, Tensor], Tensor]
) -> None:
    with pytest.raises(UserError, match=f"Unhandled calls aten::{operator}, whose FLOPs"):
        count(Unhandled(product), (torch.zeros(4, 4),))


class Hidden(nn.Module):
    """Calls the recurrent operator itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.GRU(6, 5, bias=False).parameters())

    def forward(self, x: Tensor) -> Tensor:
        return torch.gru(
            x, x.new_zeros(1, 2, 5), list(self.weights), False, 1, 0.0, False, False, False
        )[0]


def test_what_cannot_be_counted_is_an_error_and_not_0() -> None:
    with pytest.raises(UserError, match="Hidden calls aten::gru, whose FLOPs are not known"):
        count(Hidden(), (torch.zeros(3, 2, 6),))
    with pytest.raises(UserError, match="LayerNorm has weights, but no matrix product"):
        count(nn.LayerNorm(6), (torch.zeros(3, 6),))


def test_the_model_stays_as_it_is_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = Recogniser().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count(model, (torch.zeros(4, 20, 64), torch.tensor([20, 10, 5, 5])))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")


def test_buffers_are_stored_too() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    # 6*5 + 5 weights, 5 + 5 of the norm, and its two running statistics; its counter is no float
    assert values(model, torch.zeros(2, 6))["weight_bytes"] == 4 * (35 + 10 + 10)


class Chooser(nn.Module):
    """Says three words, each chosen outside of torch, as a beam search does."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.cell = nn.Embedding(9, 5), HLSTMCell(5, 5, gate_hidden=(4,))
        self.image, self.out = nn.Linear(7, 5), nn.Linear(5, 9)

    def forward(self, features: Tensor) -> Tensor:
        state, said = self.cell(self.image(features)), []
        for _ in range(3):
            said.append(self.out(state[0]).argmax(-1).tolist())
            state = self.cell(self.words(torch.tensor(said[-1])), state)
        return torch.tensor(said)


def test_products_count_though_what_they_choose_leaves_the_trace() -> None:
    found = values(Chooser(), torch.zeros(1, 7))
    cell = 4 * ((5 + 5) * 4 + 4 * 5)
    assert found["flops_dense"] == 2 * (7 * 5 + 4 * cell + 3 * 5 * 9)


def test_what_torch_prunes_counts_by_what_is_left() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.zeros(1, 8)
    prune.random_unstructured(model[0], "weight", 32)
    model(x)  # weights that have been computed with gradients cannot be copied as they are
    found = values(model, x)
    assert (found["flops_dense"], found["flops_effective"]) == (128, 64)


@pytest.mark.parametrize("make", [nn.LSTM, HLSTM])
def test_what_torch_masks_is_no_weight_and_its_mask_takes_no_bytes(make: type[nn.Module]) -> None:
    model, x = make(3, 8), torch.zeros(5, 1, 3)
    before = values(model, x)
    name, matrix = next((n, p) for n, p in model.named_parameters() if "hh" in n and p.dim() == 2)
    prune.random_unstructured(model, name, 40)
    assert values(model, x) == {
        **before,
        "flops_effective": before["flops_dense"] - 2 * 5 * 40,
        "params_nonzero": before["params"] - 40,
    }
    with torch.no_grad():  # what was computed before is not what counts
        matrix.zero_()
    assert values(model, x)["params_nonzero"] == before["params"] - matrix.numel()


def test_a_weight_that_is_masked_in_one_of_two_places_counts_once_and_in_full() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    prune.random_unstructured(model[1], "weight", 6)
    found = values(model, torch.zeros(1, 4))
    assert (found["params"], found["params_nonzero"], found["weight_bytes"]) == (16, 16, 64)
    assert found["flops_effective"] == 2 * (16 + 10)


@pytest.mark.parametrize("gate_hidden", [(), (4,)])
def test_padding_costs_nothing_as_in_packed_sequences(gate_hidden: tuple[int, ...]) -> None:
    class WithLengths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = HLSTM(3, 5, 2, bidirectional=True, gate_hidden=gate_hidden)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            output: Tensor = self.layer(x, lengths=lengths)[0]
            return output

    lengths = torch.tensor([7, 2, 4])
    found = values(WithLengths(), torch.zeros(7, 3, 3), lengths)
    by_hand = hlstm_flops(3, 5, gate_hidden, steps=7 + 2 + 4, layers=2, directions=2)
    assert found["flops_dense"] == found["flops_effective"] == by_hand
