import pytest
from torch import nn

from gpsearch.cell import HLSTM, HLSTMCell
from gpsearch.errors import UserError
from gpsearch.groups import groups, units, weights


def sizes(model, scope):
    return [
        sum(model.get_parameter(name)[a:b].numel() for name, a, b in pieces)
        for pieces in groups(weights(model), scope)
    ]


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("matrix", [6] * 4 + [4] * 4),  # four gates of [2, 3], four of [2, 2]
        ("gates", [24, 16]),
        ("layer", [40]),
        ("global", [40]),
    ],
)
def test_an_lstms_groups(scope, expected):
    assert sizes(nn.LSTM(3, 2), scope) == expected


@pytest.mark.parametrize("prefix", ["", "0."])
def test_an_lstms_projection_is_one_matrix(prefix):
    lstm = nn.LSTM(3, 8, proj_size=6)  # by no means four gates of 6 / 4 rows
    pieces = groups(weights(nn.Sequential(lstm) if prefix else lstm), "matrix")

    assert [one for one in pieces if "hr" in one[0][0]] == [[(f"{prefix}weight_hr_l0", 0, 6)]]
    assert len(pieces) == 4 + 4 + 1


def test_layers_and_directions_are_told_apart():
    assert len(sizes(nn.LSTM(3, 2, num_layers=2, bidirectional=True), "layer")) == 4


def test_an_h_lstms_first_and_second_gate_layers_are_sorted_apart():
    names = [pieces[0][0] for pieces in groups(weights(HLSTM(3, 2, gate_hidden=(5,))), "gates")]

    # What reads the inputs and what reads the state are apart, too: two matrices of one layer.
    assert names == ["weight_gate_ih_l0", "weight_gate_hh_l0", "weight_gate1_l0"]


def test_biases_norms_and_what_the_caller_excludes_are_not_prunable():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 2))

    assert list(weights(model)) == ["0.weight", "2.weight"]
    assert list(weights(model, lambda name: name.startswith("2."))) == ["2.weight"]


def test_a_linear_layers_units_are_its_rows_with_their_biases():
    model = nn.Linear(3, 5)
    (family,) = units(model, weights(model))

    assert (family.count, family.rows, family.columns) == (5, [("weight", 0), ("bias", 0)], [])


def test_a_state_unit_owns_a_row_of_every_gate_and_what_reads_it():
    model = nn.LSTM(3, 2)
    (family,) = units(model, weights(model))

    assert family.count == 2
    assert ("weight_hh_l0", 6) in family.rows  # the output gate's first row
    assert ("bias_ih_l0", 4) in family.rows
    assert family.columns == [("weight_hh_l0", 0, 8)]


@pytest.mark.parametrize("direct", [True, False])
def test_an_h_lstms_families(direct):
    model = HLSTM(3, 2, gate_hidden=(5, 4), gate_direct=direct, bidirectional=True)
    found = units(model, weights(model))

    assert len(found) == 2 * (1 + 2 * 4)  # directions x (states + layers x gates)
    forget = next(u for u in found if u.name == "gate f, hidden layer 2_l0")
    assert forget.count == 4
    assert forget.rows == [("weight_gate1_l0", 4), ("bias_gate1_l0", 4)]
    assert forget.columns == [("weight_gate2_l0", 2, 4)]


def test_a_cell_has_the_families_of_a_layer():
    model = HLSTMCell(3, 2, gate_hidden=(5,))

    assert len(units(model, weights(model))) == 1 + 4


class Own(nn.LSTM):
    pass


class OwnHLSTM(HLSTM):
    pass


@pytest.mark.parametrize(("own", "known"), [(Own, nn.LSTM), (OwnHLSTM, HLSTM)])
def test_a_subclass_has_the_gates_and_units_of_its_class(own, known):
    a, b = own(3, 2), known(3, 2)
    assert sizes(a, "matrix") == sizes(b, "matrix")
    assert [u.name for u in units(a, weights(a))] == [u.name for u in units(b, weights(b))]


def test_what_needs_no_gradient_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert weights(model).keys() == {"1.weight"}


def test_tied_weights_go_by_their_first_name():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "output": nn.Linear(3, 5)})
    model["output"].weight = model["embedding"].weight

    assert weights(model).keys() == {"embedding.weight"}
    assert weights(model, lambda name: "embedding" not in name) == {}
    assert weights(model, lambda name: "output" not in name).keys() == {"embedding.weight"}


def test_the_rows_of_a_transposed_convolution_are_its_inputs():
    layer = nn.ConvTranspose1d(6, 4, 3)
    (rows,) = units(layer, weights(layer))
    assert (rows.count, rows.rows) == (6, [("weight", 0)])


def test_gradients_without_places_for_masks_are_refused():
    with pytest.raises(UserError, match=r"0.weight: gradients of sparse=True have no masks"):
        weights(nn.Sequential(nn.Embedding(5, 3, sparse=True)))
