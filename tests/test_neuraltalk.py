import pytest
import torch
from torch import nn

from gpsearch.candidate import Architecture
from gpsearch.compact import compact
from gpsearch.errors import UserError
from gpsearch.flops import count
from gpsearch.space import Space
from gpsearch.tasks.neuraltalk import BOUNDARY, NeuralTalk

FEATURES, WORDS, LONGEST = 7, 11, 6
SHAPES = [
    Architecture(layers=1, hidden_size=6, embedding_size=5, gate_depth=0, norm="none"),
    Architecture(layers=2, hidden_size=6, embedding_size=5, gate_width=4, norm="layer"),
    Architecture(layers=2, hidden_size=5, embedding_size=5, gate_width=4, gate_direct=True),
]


def network(shape, seed=0):
    torch.manual_seed(seed)
    return NeuralTalk(shape, FEATURES, WORDS, LONGEST).eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_stepping_says_what_teacher_forcing_does(shape):
    model, features = network(shape), torch.randn(3, FEATURES)
    tokens = torch.randint(WORDS, (3, 5))
    at_once, state = model.scores(features, tokens).log_softmax(-1), model.start(features)
    for place in range(5):
        scores, state = model.step(tokens[:, place], state)
        torch.testing.assert_close(scores, at_once[:, place])


def test_greedy_captions_take_the_likeliest_word_up_to_their_ends():
    model, features = network(SHAPES[1]), torch.randn(4, FEATURES)
    said = model(features)
    given = torch.cat([torch.full((4, 1), BOUNDARY), said[:, :-1]], 1)
    likeliest = model.scores(features, given).argmax(-1)
    ended = (said == BOUNDARY).cumsum(1) > 0

    assert said[~ended].equal(likeliest[~ended])
    assert (said[ended] == BOUNDARY).all()
    assert said.shape[1] <= LONGEST + 1


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("words", [1, 4])
def test_so_many_words_are_said_as_are_asked_for(width, words):
    model = network(SHAPES[0])
    with torch.no_grad():
        model.output.bias[BOUNDARY] = 50  # it would say nothing at all
    model.beam_width = width

    assert model(torch.randn(1, FEATURES)).shape[1] == 0
    assert model(torch.randn(1, FEATURES), torch.tensor(words)).shape == (1, words)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize(
    ("shape", "recurrent"),
    [(SHAPES[0], 4 * (5 + 6) * 6), (SHAPES[1], 4 * ((5 + 6) * 4 + 4 * 6 + (6 + 6) * 4 + 4 * 6))],
)
def test_flops_are_those_of_image_and_words(shape, recurrent, width):
    model, words = network(shape), 5
    model.beam_width = width
    found = count(model, (torch.randn(1, FEATURES), torch.tensor(words)))["flops_dense"].number

    assert found == 2 * (FEATURES * 5 + recurrent + words * width * (recurrent + 6 * WORDS))


@pytest.mark.parametrize("shape", SHAPES)
def test_compact_keeps_what_is_said(shape):
    model, features = network(shape), torch.randn(2, FEATURES)
    with torch.no_grad():
        for name, weight in model.layers.named_parameters():
            if weight.dim() == 2 and "hh" not in name:
                weight[: len(weight) // 2] = 0
        for layer in model.layers:  # two state units that nobody reads
            for name, weight in layer.named_parameters():
                if "hh" in name and weight.dim() == 2:
                    weight[:, :2] = 0
        model.output.weight[:, :2] = 0
    small = compact(model)
    assert isinstance(small, NeuralTalk)

    tokens = torch.randint(WORDS, (2, 5))
    torch.testing.assert_close(small.scores(features, tokens), model.scores(features, tokens))
    assert small(features).equal(model(features))


def test_state_units_that_nobody_reads_go():
    model = network(SHAPES[0])
    with torch.no_grad():
        model.layers[0].weight_hh_l0[:, :2] = 0
        model.output.weight[:, :2] = 0
    assert compact(model).get_submodule("layers.0").hidden_size == 4


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("lstm_x1", 2_097_152),
        ("lstm_x2", 4_194_304),
        ("lstm_x3", 6_291_456),
        ("dense_hlstm", 3_145_728),
    ],
)
def test_the_papers_decoders_have_its_recurrent_weights(name, weights):
    shape = Space.read("neuraltalk").baseline_candidates()[name].architecture
    with torch.device("meta"):
        layers: nn.Module = NeuralTalk(shape, 4096, 9567, 16).layers
    assert sum(p.numel() for p in layers.parameters() if p.dim() == 2) == weights


def test_a_norm_over_the_batch_is_refused():
    with pytest.raises(UserError, match='norm = "batch" cannot be'):
        network(Architecture(norm="batch"))
