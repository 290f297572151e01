"""The H-LSTM against `torch.nn.LSTM`, and against gates written out one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from gpsearch.cell import HLSTM, HLSTMCell
from gpsearch.compact import compact
from gpsearch.deploy import load_model, save_model
from gpsearch.errors import UserError
from gpsearch.kernels.native import native
from gpsearch.kernels.sparse import kernels_for_sparse
from tests.recurrent import as_buffers

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}
LENGTHS = torch.tensor([3, 6, 1, 6, 2])


# A gate, written out --------------------------------------------------------------------------


def written_out_gate(model: HLSTM, suffix: str, gate: int, x: Tensor, h: Tensor) -> Tensor:
    """One gate's sum before its sigmoid or tanh, from the rows of the parameters it owns."""

    def own(name: str) -> Tensor:
        return model.get_parameter(name + suffix).chunk(4)[gate]

    a = own("weight_gate_ih") @ x + own("weight_gate_hh") @ h + own("bias_gate")
    depth = len(model.gate_hidden)
    for j in range(1, depth + 1):
        if model.gate_norm:
            spread = (a.var(unbiased=False) + 1e-5).sqrt()
            a = (a - a.mean()) / spread
            a = a * own(f"norm_weight_gate{j}") + own(f"norm_bias_gate{j}")
        a = own(f"weight_gate{j}") @ ACTIVATIONS[model.activation](a)
        if j < depth or not model.gate_direct:
            a = a + own(f"bias_gate{j}")
    if model.gate_direct:
        a = a + own("weight_ih") @ x + own("bias_ih") + own("weight_hh") @ h + own("bias_hh")
    return a


def written_out(
    model: HLSTM, suffix: str, xs: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of one layer over one sequence, step by step and gate by gate."""
    outputs = []
    for x in xs:
        i, f, g, o = (written_out_gate(model, suffix, gate, x, h) for gate in range(4))
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs), h, c


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("direct", "norm"), [(False, False), (True, False), (True, True)])
def test_layer_equals_its_gates_written_out(
    depth: int, activation: str, direct: bool, norm: bool
) -> None:
    model = HLSTM(
        3,
        4,
        bidirectional=True,
        dtype=torch.float64,
        gate_hidden=(5, 2, 3)[:depth],
        activation=activation,
        gate_direct=direct,
        gate_norm=norm,
    )
    x, h0, c0 = (torch.randn(*s, dtype=torch.float64) for s in [(6, 5, 3), (2, 5, 4), (2, 5, 4)])
    output, (h, c) = model(x, (h0, c0), lengths=LENGTHS)
    for b, end in enumerate(LENGTHS.tolist()):
        ahead = written_out(model, "_l0", x[:end, b], h0[0, b], c0[0, b])
        back = written_out(model, "_l0_reverse", x[:end, b].flip(0), h0[1, b], c0[1, b])
        torch.testing.assert_close(output[:end, b], torch.cat([ahead[0], back[0].flip(0)], 1))
        torch.testing.assert_close(h[:, b], torch.stack([ahead[1], back[1]]))
        torch.testing.assert_close(c[:, b], torch.stack([ahead[2], back[2]]))
        assert not output[end:, b].any()


# Without hidden layers it is torch's LSTM -----------------------------------------------------


def results(model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Outputs, states and all gradients of one pass; the loss reads outputs and states."""
    model.zero_grad()
    x = args[0]
    leaf = x.data if isinstance(x, PackedSequence) else x
    leaf.requires_grad_()
    leaf.grad = None
    output, (h, c) = model(*args, **kwargs)
    flat = output.data if isinstance(output, PackedSequence) else output
    (flat.sin().sum() + (h * 2).cos().sum() + (c * 3).sin().sum()).backward()
    grads = [p.grad.clone() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return [flat, h, c, leaf.grad, *grads]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def state_for(lstm: nn.LSTM, batch: int | None) -> tuple[Tensor, Tensor]:
    directions = 1 + lstm.bidirectional
    size = [lstm.num_layers * directions, *([] if batch is None else [batch]), lstm.hidden_size]
    return torch.randn(size), torch.randn(size)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (1, True), (3, True)])
def test_equals_lstm(layers: int, bidirectional: bool, bias: bool, batch_first: bool) -> None:
    lstm = nn.LSTM(4, 3, layers, bias, batch_first, bidirectional=bidirectional)
    model = HLSTM.from_lstm(lstm)
    x = torch.randn(6, 5, 4)
    assert_same(results(model, x), results(lstm, x))
    hx = state_for(lstm, 6 if batch_first else 5)
    assert_same(results(model, x, hx), results(lstm, x, hx))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_equals_lstm_on_one_unbatched_sequence(bidirectional: bool) -> None:
    lstm = nn.LSTM(4, 3, 2, bidirectional=bidirectional, batch_first=True)
    x, hx = torch.randn(6, 4), state_for(lstm, None)
    assert_same(results(HLSTM.from_lstm(lstm), x, hx), results(lstm, x, hx))


@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (1, True), (2, True)])
def test_equals_lstm_on_packed_sequences(
    layers: int, bidirectional: bool, bias: bool, enforce_sorted: bool
) -> None:
    lstm = nn.LSTM(4, 3, layers, bias, bidirectional=bidirectional)
    model, hx = HLSTM.from_lstm(lstm), state_for(lstm, 5)
    lengths = LENGTHS.sort(descending=True).values if enforce_sorted else LENGTHS
    packed = pack_padded_sequence(torch.randn(6, 5, 4), lengths, enforce_sorted=enforce_sorted)
    assert_same(results(model, packed), results(lstm, packed))
    assert_same(results(model, packed, hx), results(lstm, packed, hx))


def test_packed_output_is_packed_as_the_input() -> None:
    packed = pack_padded_sequence(torch.randn(6, 5, 4), LENGTHS, enforce_sorted=False)
    output, _ = HLSTM(4, 3, gate_hidden=(2,))(packed)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(output, field), getattr(packed, field))


@pytest.mark.parametrize("gate_hidden", [(), (3,)])
def test_lengths_do_what_packing_does(gate_hidden: tuple[int, ...]) -> None:
    model = HLSTM(4, 3, 2, bidirectional=True, gate_hidden=gate_hidden)
    x = torch.randn(6, 5, 4)
    packed, (h, c) = model(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
    x[3:, 0] = torch.nan  # what the padding holds never matters
    output, state = model(x, lengths=LENGTHS)
    assert_same([output, *state], [pad_packed_sequence(packed)[0], h, c])
    unpadded, state = model(x[:, 1:2], lengths=torch.tensor([6]))
    assert_same([unpadded, *state], [output[:, 1:2], h[:, 1:2], c[:, 1:2]])


@pytest.mark.parametrize("formats", [{}, {"weight_gate_hh_l0": "dense"}])  # in torch, and in C
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_lengths_may_be_of_any_type_of_integers(
    dtype: torch.dtype, formats: dict[str, str]
) -> None:
    model, x = HLSTM(4, 3, gate_hidden=(2,)).eval(), torch.randn(3, 3, 4)
    model.formats, lengths = formats, torch.tensor([3, 2, 2])
    with torch.no_grad():
        output, state = model(x, lengths=lengths.to(dtype))
        wanted, last = model(x, lengths=lengths)
    assert_same([output, *state], [wanted, *last])


@pytest.mark.parametrize("formats", [{}, {"weight_gate_hh_l0": "dense"}])
@pytest.mark.parametrize("lengths", [torch.tensor([2.5, 1.0]), torch.tensor([True, True])])
def test_lengths_that_are_no_integers_are_refused(lengths: Tensor, formats: dict[str, str]) -> None:
    model = HLSTM(4, 3, gate_hidden=(2,)).eval()
    model.formats = formats
    with torch.no_grad(), pytest.raises(UserError, match="it should be of integers"):
        model._run(torch.randn(3, 2, 4), None, lengths)  # forward's types refuse them in tests


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous")
@pytest.mark.parametrize("training", [True, False])
def test_flat_gates_have_the_gradients_of_padded_sequences_on_a_gpu(training: bool) -> None:
    model, x = HLSTM(4, 3, bidirectional=True, gate_hidden=()).train(training), torch.randn(6, 5, 4)
    wanted = results(model, x.clone(), lengths=LENGTHS)
    found = results(model.cuda(), x.cuda(), lengths=LENGTHS)
    for one, other in zip(found, wanted, strict=True):  # cuDNN rounds what it multiplies
        torch.testing.assert_close(one.cpu(), other, rtol=0.01, atol=0.01)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_of_another_type_is_torchs_error_with_flat_gates_too(dtype: torch.dtype) -> None:
    model, state = HLSTM(4, 3, gate_hidden=()), torch.randn(1, 5, 3, dtype=dtype)
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(6, 5, 4), (state, state), lengths=LENGTHS)


def test_autocast_takes_a_narrower_state_with_flat_gates_too() -> None:
    model, x, state = HLSTM(4, 3, gate_hidden=()), torch.randn(6, 5, 4), torch.randn(1, 5, 3)
    wanted, _ = model(x, (state, state), lengths=LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = model(x, (state.bfloat16(), state.bfloat16()), lengths=LENGTHS)
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)


def test_padding_has_no_gradient() -> None:
    model, x = HLSTM(4, 3, bidirectional=True, gate_hidden=(2,)), torch.randn(6, 5, 4)
    gradient = results(model, x, lengths=LENGTHS)[3]
    padding = torch.arange(6)[:, None] >= LENGTHS
    assert not gradient[padding].any()
    assert gradient[~padding].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # in C, and fused in torch
@pytest.mark.parametrize("gate_norm", [False, True])
@pytest.mark.parametrize("gate_hidden", [(), (4,), (4, 3)])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_a_batch_may_be_empty(
    density: float, gate_hidden: tuple[int, ...], gate_norm: bool, dtype: torch.dtype
) -> None:
    options: Any = {"gate_hidden": gate_hidden, "gate_norm": gate_norm, "dtype": dtype}
    model = HLSTM(6, 5, 2, bidirectional=True, **options)
    masks = {n: torch.rand_like(p) < density for n, p in model.named_parameters() if p.dim() == 2}
    model.use_masks(masks if density < 1 else {})
    x = torch.randn(3, 0, 6, dtype=dtype)
    output, h, c, *gradients = results(model, x)
    assert (output.shape, h.shape, c.shape) == ((3, 0, 10), (4, 0, 5), (4, 0, 5))
    assert len(gradients) == 1 + len([*model.parameters()])
    assert not any(gradient.any() for gradient in gradients)
    assert HLSTMCell(6, 5, **options)(x[0])[0].shape == (0, 5)
    model.eval().formats = dict.fromkeys(masks, "dense")
    with torch.no_grad():
        assert model(x, lengths=torch.zeros(0, dtype=torch.long))[0].shape == (3, 0, 10)


@given(
    inputs=st.integers(1, 5),
    hidden=st.integers(1, 5),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
)
@settings(max_examples=25)
def test_equals_lstm_at_any_size(
    inputs: int, hidden: int, layers: int, bidirectional: bool, lengths: list[int]
) -> None:
    lstm = nn.LSTM(inputs, hidden, layers, bidirectional=bidirectional)
    x = torch.randn(max(lengths), len(lengths), inputs)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    assert_same(results(HLSTM.from_lstm(lstm), packed), results(lstm, packed))


# Parameters -----------------------------------------------------------------------------------


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("layers", "count"), [(1, 2_097_152), (2, 4_194_304), (3, 6_291_456)])
def test_weights_of_the_captioning_lstms(layers: int, count: int) -> None:
    assert weights(HLSTM(512, 512, layers, bias=False, device="meta", gate_hidden=())) == count


def test_weights_of_the_captioning_hlstm() -> None:
    model = HLSTM(512, 512, bias=False, device="meta", gate_hidden=(512,))
    assert weights(model) == 3_145_728


def test_weights_of_deepspeech2() -> None:
    """Its directions are summed, so that every layer above the first reads 800 features."""
    layers = [
        HLSTM(inputs, 800, bias=False, bidirectional=True, device="meta", gate_hidden=())
        for inputs in (672, 800, 800, 800, 800)
    ]
    assert sum(map(weights, layers)) == 50_380_800


def test_names_and_shapes_of_the_parameters() -> None:
    model = HLSTM(3, 4, gate_hidden=(5, 6), gate_direct=True, gate_norm=True)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "weight_ih_l0": (16, 3),
        "weight_hh_l0": (16, 4),
        "bias_ih_l0": (16,),
        "bias_hh_l0": (16,),
        "weight_gate_ih_l0": (20, 3),
        "weight_gate_hh_l0": (20, 4),
        "bias_gate_l0": (20,),
        "norm_weight_gate1_l0": (20,),
        "norm_bias_gate1_l0": (20,),
        "weight_gate1_l0": (24, 5),
        "bias_gate1_l0": (24,),
        "norm_weight_gate2_l0": (24,),
        "norm_bias_gate2_l0": (24,),
        "weight_gate2_l0": (16, 6),
    }


def test_last_gate_layer_starts_small_beside_a_direct_path() -> None:
    torch.manual_seed(0)
    usual = HLSTM(8, 64, gate_hidden=(64,)).weight_gate1_l0
    small = HLSTM(8, 64, gate_hidden=(64,), gate_direct=True).weight_gate1_l0
    assert isinstance(usual, Tensor)
    assert isinstance(small, Tensor)
    assert (small.std() / usual.std()).item() == pytest.approx(0.3, rel=0.05)


def test_state_dict_and_copies_keep_the_numbers() -> None:
    options: dict[str, Any] = {"gate_hidden": (3, 2), "gate_direct": True, "gate_norm": True}
    model = HLSTM(4, 3, 2, bidirectional=True, **options)
    loaded = HLSTM(4, 3, 2, bidirectional=True, **options)
    loaded.load_state_dict(model.state_dict())
    x = torch.randn(6, 5, 4)
    for other in (loaded, copy.deepcopy(model)):
        assert torch.equal(other(x)[0], model(x)[0])


def test_from_lstm_takes_over_the_issue_example() -> None:
    lstm = nn.LSTM(40, 64, 2, bidirectional=True)
    x = torch.randn(7, 2, 40)
    assert torch.equal(HLSTM.from_lstm(lstm)(x)[0], lstm(x)[0])


def test_from_lstm_keeps_options() -> None:
    lstm = nn.LSTM(4, 3, 2, False, True, 0.5, dtype=torch.float64).eval()
    model = HLSTM.from_lstm(lstm)
    assert repr(model) == (
        "HLSTM(4, 3, gate_hidden=(), num_layers=2, batch_first=True, dropout=0.5, bias=False)"
    )
    assert not model.training
    assert next(model.parameters()).dtype == torch.float64


# Gradients, dropout, one step -----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"gate_direct": True}, {"gate_norm": True}])
@pytest.mark.parametrize("gate_hidden", [(), (3,), (3, 2)])
def test_gradients_are_those_of_finite_differences(
    gate_hidden: tuple[int, ...], options: dict[str, Any]
) -> None:
    torch.manual_seed(1)
    shared: dict[str, Any] = {"dtype": torch.float64, "activation": "tanh", **options}
    model = HLSTM(1, 2, bidirectional=True, gate_hidden=gate_hidden, **shared)
    x = torch.randn(3, 2, 1, dtype=torch.float64, requires_grad=True)
    hx = [torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def outputs(x: Tensor, h: Tensor, c: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        output, state = model(x, (h, c), lengths=torch.tensor([3, 2]))
        return output, *state

    assert torch.autograd.gradcheck(outputs, (x, *hx, *model.parameters()))


def test_gate_dropout_holds_one_mask_for_the_sequence() -> None:
    """With no path from h to the gates, i * g is c - f * c_last: alike at every step, or masked."""
    torch.manual_seed(0)
    model = HLSTM(1, 1, gate_hidden=(1,), gate_dropout=0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(0.0 if "hh" in name else 1.0)
        hidden = model(torch.ones(2, 256, 1))[0].squeeze(2)
    # 4 gates, each in or out; without i, f, g, o alike, a mask for each step would give 2^8 pairs
    assert 1 < len(hidden.unique(dim=1).T) <= 2**4


@pytest.mark.parametrize("options", [{}, {"gate_direct": True}, {"gate_hidden": ()}])
def test_a_cells_gates_put_together_once_do_for_all_its_steps(options: dict[str, Any]) -> None:
    cell = HLSTMCell(3, 5, **{"gate_hidden": (4,), **options})
    xs, state, same = torch.randn(6, 2, 3), None, None
    gates = cell.gates(2)
    for x in xs:
        state, same = cell(x, state), cell(x, same, gates)
        torch.testing.assert_close(same, state)


def test_replicas_of_data_parallel_draw_their_dropout() -> None:
    model = HLSTM(4, 3, gate_hidden=(8,), gate_dropout=0.5)
    replica = model._replicate_for_data_parallel()
    for name, parameter in model.named_parameters():
        setattr(replica, name, parameter * 1)  # on a replica weights are plain attributes
    x = torch.randn(6, 5, 4)
    assert not torch.equal(replica(x)[0], replica(x)[0])


def test_dropout_is_off_in_evaluation() -> None:
    model = HLSTM(4, 3, 2, dropout=0.5, gate_hidden=(8,), gate_dropout=0.5)
    x = torch.randn(6, 5, 4)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize("gate_hidden", [(), (4,), (4, 2)])
def test_cell_takes_the_steps_of_the_layer(gate_hidden: tuple[int, ...]) -> None:
    layer, cell = (kind(3, 2, gate_hidden=gate_hidden) for kind in (HLSTM, HLSTMCell))
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in layer.state_dict().items()})
    x, state = torch.randn(6, 5, 3), None
    outputs = []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0])
    torch.testing.assert_close(torch.stack(outputs), layer(x)[0])
    torch.testing.assert_close(cell(x[0, 0])[0], layer(x[:1, 0])[0][0])


@pytest.mark.parametrize("name", ["weight_gate_ih_l0", "weight_gate1_l0", "bias_gate1_l0"])
def test_torch_may_prune_any_parameter(name: str) -> None:
    layer, x = HLSTM(4, 3, gate_hidden=(5,)), torch.randn(6, 2, 4)
    masked = copy.deepcopy(layer)
    mask = torch.rand_like(layer.get_parameter(name)) < 0.5
    prune.custom_from_mask(layer, name, mask)
    with torch.no_grad():
        masked.get_parameter(name).mul_(mask)
    assert torch.equal(layer(x)[0], masked(x)[0])


# Mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"gate_hidden": (4, 0)}, r"gate_hidden\[1\]=0"),
        ({"activation": "swish"}, "'swish' is not one of relu, leaky_relu, tanh, gelu"),
        ({"gate_dropout": 1.5}, "gate_dropout=1.5"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"dropout": -1.0}, "dropout=-1.0"),
        ({"proj_size": 2}, "proj_size=2 has no H-LSTM; use proj_size=0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HLSTM(**{"input_size": 3, "hidden_size": 2, **options})


def test_arguments_stand_where_those_of_torch_s_lstm_do() -> None:
    given: Any = (3, 4, 2, False, True, 0.5, True, 0, "meta", torch.float64)
    lstm, model = nn.LSTM(*given), HLSTM(*given, gate_hidden=())
    assert {n: (p.shape, p.device, p.dtype) for n, p in model.named_parameters()} == {
        n: (p.shape, p.device, p.dtype) for n, p in lstm.named_parameters()
    }
    assert (model.dropout, model.proj_size) == (lstm.dropout, lstm.proj_size)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("kind", [HLSTM, HLSTMCell])
def test_sizes_may_be_numpys(kind: Any, tmp_path: Path) -> None:
    sizes = np.arange(6)
    model = kind(sizes[3], sizes[4], gate_hidden=[sizes[5], 2])
    save_model(compact(model), tmp_path / "model.pt")
    assert load_model(tmp_path / "model.pt").gate_hidden == (5, 2)
    with pytest.raises(UserError, match=r"hidden_size=4\.5 should be a whole number"):
        kind(3, 4.5)


def test_projection_is_refused() -> None:
    with pytest.raises(UserError, match="proj_size=2"):
        HLSTM.from_lstm(nn.LSTM(3, 4, proj_size=2))


@pytest.mark.parametrize(
    ("args", "lengths", "message"),
    [
        ((torch.zeros(4, 2, 5),), None, "5 features"),
        ((torch.zeros(3),), None, "1 dimensions"),
        ((torch.zeros(0, 2, 3),), None, "no time steps"),
        ((torch.zeros(4, 2, 3),), torch.tensor([4, 5]), "from 4 to 5"),
        ((torch.zeros(4, 2, 3),), torch.tensor([4]), "should be"),
        ((torch.zeros(4, 2, 3), (torch.zeros(1, 1, 2),) * 2), None, "initial h"),
    ],
)
def test_wrong_inputs_are_named(args: tuple[Any], lengths: Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        HLSTM(3, 2)(*args, lengths=lengths)


@pytest.mark.parametrize("gate_hidden", [(), (6,), (5, 4)])
@pytest.mark.parametrize("gate_direct", [False, True])
@pytest.mark.parametrize("repeats", [1, 4])  # 5 sequences leave vectors empty, 20 fill them
def test_with_masks_the_awake_weights_get_the_gradients_they_had(
    gate_hidden: tuple[int, ...], gate_direct: bool, repeats: int
) -> None:
    torch.manual_seed(0)
    hlstm = HLSTM(
        3, 4, num_layers=2, bidirectional=True, gate_hidden=gate_hidden, gate_direct=gate_direct
    )
    lengths = torch.tensor([7, 1, 3, 6, 2]).repeat(repeats)
    x = torch.randn(7, len(lengths), 3)
    masks = {n: torch.rand(p.shape) < 0.1 for n, p in hlstm.named_parameters() if p.dim() > 1}
    with torch.no_grad():
        for name, mask in masks.items():
            hlstm.get_parameter(name).mul_(mask)

    def run() -> list[torch.Tensor]:
        output, (h, c) = hlstm(x, lengths=lengths)
        loss = output.sin().sum() + c.sum()
        return [output, h, c, *torch.autograd.grad(loss, list(hlstm.parameters()))]

    dense = run()
    hlstm.use_masks(masks)
    sparse = run()
    ones = [torch.ones(())] * 3
    for a, b, mask in zip(
        dense, sparse, [*ones, *(masks.get(n, ones[0]) for n, _ in hlstm.named_parameters())],
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a * mask, b * mask)
    kernels = native()
    patterns = list(hlstm._patterns.values())
    if kernels is not None and kernels_for_sparse(kernels, len(lengths), patterns):
        grads = dict(zip(dict(hlstm.named_parameters()), sparse[3:], strict=True))
        assert not any(grads[name][~mask].any() for name, mask in masks.items())
    hlstm.use_masks({})
    assert all(torch.equal(a, b) for a, b in zip(dense, run(), strict=True))


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1_reverse"])
def test_where_weights_are_computed_masks_are_not_told(name: str) -> None:
    model = HLSTM(3, 4, num_layers=2, bidirectional=True, gate_hidden=())
    prune.random_unstructured(model, name, 0.5)
    for masks in {}, {"weight_hh_l1": torch.zeros(16, 4, dtype=torch.bool)}:
        model.use_masks(masks)
        assert model._patterns == {}


@pytest.mark.parametrize("gate_hidden", [(), (12,)])
@pytest.mark.parametrize("shape", [(1, 16), (8, 10), (8, 20), (16, 16), (16,)])
def test_a_cells_state_of_another_shape_is_named(
    gate_hidden: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    cell, x = HLSTMCell(8, 16, gate_hidden=gate_hidden), torch.randn(8, 8)
    good, bad = torch.zeros(8, 16), torch.zeros(shape)
    with pytest.raises(UserError, match=r"the initial h is .*, not \[8, 16\]"):
        cell(x, (bad, good))
    with pytest.raises(UserError, match=r"the initial c is .*, not \[8, 16\]"):
        cell(x, (good, bad))


def test_a_cells_gates_are_for_as_many_rows_as_were_said() -> None:
    cell = HLSTMCell(3, 5, gate_hidden=(4,), gate_dropout=0.5)
    with pytest.raises(UserError, match="the gates are those of 2 rows; the input has 6"):
        cell(torch.randn(6, 3), None, cell.gates(2))


@pytest.mark.parametrize(
    "other",
    [
        HLSTMCell(4, 5, gate_hidden=(6,)),
        HLSTMCell(3, 90, gate_hidden=(6,)),
        HLSTMCell(3, 5, gate_hidden=(90,)),
        HLSTMCell(3, 5, gate_hidden=(6, 6)),
        HLSTMCell(3, 5, gate_hidden=(6,), gate_direct=True),
    ],
    ids=lambda other: other.extra_repr(),
)
def test_a_cell_refuses_gates_of_other_sizes(other: HLSTMCell) -> None:
    cell = HLSTMCell(3, 5, gate_hidden=(6,))
    with pytest.raises(UserError, match=r"the gates have .*; those of this cell are \(3, 5, \(6,"):
        cell(torch.randn(2, 3), None, other.gates(2))


def test_a_cell_without_hidden_layers_has_no_gates_to_take() -> None:
    cell = HLSTMCell(3, 5, gate_hidden=())
    with pytest.raises(UserError, match="the gates have"):
        cell(torch.randn(2, 3), None, HLSTMCell(3, 5, gate_hidden=(5,)).gates(2))


def test_a_copy_computes_with_all_weights() -> None:
    layer = HLSTM(16, 32, gate_hidden=(24,))
    masks = {n: torch.rand(p.shape) < 0.05 for n, p in layer.named_parameters() if p.dim() > 1}
    layer.use_masks(masks)  # dormant weights would have to be zero, and are not
    copied, x = copy.deepcopy(layer), torch.randn(5, 16, 16)
    layer.use_masks({})
    assert torch.equal(copied(x)[0], layer(x)[0])


def test_packed_sequences_bring_their_own_lengths() -> None:
    packed = pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 2]))
    with pytest.raises(UserError, match="leave out lengths="):
        HLSTM(3, 4)(packed, lengths=torch.tensor([5, 2]))


@pytest.mark.parametrize("training", [True, False])
def test_weights_elsewhere_than_the_input_are_torchs_error(training: bool) -> None:
    layer = HLSTM(3, 4, gate_hidden=(2,), device="meta")
    with torch.set_grad_enabled(training), pytest.raises(RuntimeError, match="device"):
        layer(torch.randn(5, 2, 3))


@pytest.mark.parametrize("features", [1, 6, 60])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_packed_sequences_of_other_features_are_refused(features: int, density: float) -> None:
    model = HLSTM(8, 64, gate_hidden=(24,))
    if density < 1:  # the kernels of few weights read by the sizes of the masks
        masks = {n: torch.rand(p.shape) < density for n, p in model.named_parameters()}
        model.use_masks({name: mask for name, mask in masks.items() if mask.dim() == 2})
    packed = pack_padded_sequence(torch.randn(2, 32, features), [2] * 32)
    for mode in (True, False):
        with pytest.raises(UserError, match=f"has {features} features; input_size is 8"):
            model.train(mode)(packed)


@pytest.mark.usefixtures("untyped")
def test_what_is_of_another_type_is_named() -> None:
    with pytest.raises(UserError, match=r"gate_hidden=32 should be a sequence of widths: \(128,\)"):
        HLSTM(3, 4, gate_hidden=32)  # type: ignore[arg-type]
    for options, message in (
        ({"dropout": "x"}, "dropout='x' should be a number from 0 to 1"),
        ({"gate_dropout": None}, "gate_dropout=None should be a number from 0 to 1"),
        ({"activation": ["relu"]}, r"activation=\['relu'\] is not one of"),
        ({"bias": "no"}, "bias='no' should be True or False"),
        ({"gate_direct": None}, "gate_direct=None should be True or False"),
        ({"gate_hidden": [True]}, r"gate_hidden\[0\]=True should be a whole number"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            HLSTM(3, 4, **options)
    with pytest.raises(UserError, match="lengths is a list; it should be a tensor of integers"):
        HLSTM(3, 4)(torch.zeros(5, 2, 3), lengths=[5, 3])


@pytest.mark.usefixtures("untyped")
def test_a_state_that_is_no_pair_is_refused() -> None:
    model, cell = HLSTM(3, 4), HLSTMCell(3, 4)
    h = torch.zeros(1, 2, 4)
    for state in (h, (h,), (h, h, h)):
        with pytest.raises(UserError, match=r"no pair \(h, c\)"):
            model(torch.zeros(5, 2, 3), state)
    with pytest.raises(UserError, match=r"no pair \(h, c\)"):
        cell(torch.zeros(2, 3), (h[0], h[0], h[0]))


def test_the_state_of_one_sequence_is_named_as_it_should_be() -> None:
    state = torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)
    with pytest.raises(UserError, match=r"the initial h is \[1, 1, 4\], not \[1, 4\]"):
        HLSTM(3, 4)(torch.zeros(5, 3), state)


def test_a_frozen_lstm_stays_frozen() -> None:
    lstm = nn.LSTM(3, 4, bidirectional=True)
    lstm.weight_hh_l0.requires_grad_(False)
    frozen = [n for n, p in HLSTM.from_lstm(lstm).named_parameters() if not p.requires_grad]
    assert frozen == ["weight_hh_l0"]


def test_an_lstm_that_torch_prunes_is_taken_over_as_it_computes() -> None:
    lstm, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    prune.random_unstructured(lstm, "weight_hh_l0", 0.5)
    torch.testing.assert_close(HLSTM.from_lstm(lstm)(x)[0], lstm(x)[0])


def test_an_lstm_whose_weights_are_buffers_is_taken_over() -> None:
    lstm, x = as_buffers(nn.LSTM(3, 4)), torch.randn(5, 2, 3)
    torch.testing.assert_close(HLSTM.from_lstm(lstm)(x)[0], lstm(x)[0])
