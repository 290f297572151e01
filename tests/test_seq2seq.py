from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gpsearch.candidate import Architecture
from gpsearch.compact import compact
from gpsearch.errors import UserError
from gpsearch.flops import count, hlstm_flops, lstm_flops
from gpsearch.growprune import sketch
from gpsearch.schedule import GP
from gpsearch.space import Space
from gpsearch.tasks import beam
from gpsearch.tasks.seq2seq import Seq2Seq
from gpsearch.tasks.subwords import END, PAD, START

SOURCES, TARGETS = 23, 29
SMALL = Architecture(
    layers=2, hidden_size=10, gate_width=7, bidirectional=False, norm="none", embedding_size=6
)
SHAPES = [
    SMALL,
    replace(SMALL, gate_depth=0),
    replace(SMALL, gate_direct=True, layers=1),
    replace(SMALL, input_feeding=False),
    replace(SMALL, bidirectional=True, norm="layer"),
    replace(SMALL, bidirectional=True, merge="sum"),
]
shapes = pytest.mark.parametrize("shape", SHAPES)


def translator(shape: Architecture, seed: int = 0) -> Seq2Seq:
    torch.manual_seed(seed)
    return Seq2Seq(shape, SOURCES, TARGETS).eval()


def sentence(length: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(4, SOURCES, (1, length), generator=random)


@shapes
def test_a_sentence_scores_the_same_alone_and_in_a_batch(shape):
    model, lengths = translator(shape), torch.tensor([3, 7, 5])
    rows = [sentence(int(n), seed) for seed, n in enumerate(lengths)]
    source = nn.utils.rnn.pad_sequence([row[0] for row in rows], True, PAD)
    target = torch.tensor([[START, 5, 9, 4]] * 3)
    scores = model.scores(source, lengths, target)
    assert scores.shape == (3, 4, TARGETS)
    for row, alone in enumerate(rows):
        own = model.scores(alone, lengths[row : row + 1], target[:1])
        torch.testing.assert_close(own[0], scores[row], rtol=1e-4, atol=1e-5)


@shapes
def test_what_is_said_step_by_step_is_what_teacher_forcing_scores(shape):
    model, source = translator(shape), sentence(6)
    said = model(source, torch.tensor(8))
    before = torch.cat([torch.tensor([[START]]), said[:, :-1]], 1)
    scores = model.scores(source, torch.tensor([6]), before)
    assert torch.equal(scores.argmax(-1), said)


@shapes
def test_one_sentence_is_translated_as_a_batch_is(shape):
    model, source = translator(shape), sentence(6)
    [alone] = model(source, torch.tensor(12)).tolist()
    found, _ = beam.search(
        model.decoder.stepper(), model.start(source, torch.tensor([6])),
        batch=1, start=START, end=END, longest=12,
    )  # fmt: skip
    assert found == [[token for token in alone if token != END]]
    wide, _ = beam.search(
        model.decoder.stepper(), model.start(source.expand(3, -1), torch.tensor([6, 6, 6])),
        batch=3, start=START, end=END, longest=12, width=4,
    )  # fmt: skip
    assert wide[0] == wide[1] == wide[2]


def test_decoding_stops_at_the_end_or_at_the_longest():
    model = translator(SMALL)
    assert model(sentence(5), torch.tensor(3)).shape == (1, 3)
    with torch.no_grad():
        model.decoder.output.bias[END] = 1e3
    assert model(sentence(5)).tolist() == [[END]]


def test_every_word_of_the_source_matters_to_every_step():
    model, source = translator(SMALL), sentence(6)
    target = torch.tensor([[START, 5]])
    scores = model.scores(source, torch.tensor([6]), target)
    for place in range(6):
        other = source.clone()
        other[0, place] = 4 + (other[0, place] - 3) % (SOURCES - 4)
        changed = model.scores(other, torch.tensor([6]), target) - scores
        assert (changed.abs().amax(-1) > 1e-6).all()


def test_input_feeding_tells_the_decoder_what_it_looked_at():
    # With the embeddings of two tokens equal, only what is fed can differ after them.
    fed, unfed = translator(SMALL), translator(replace(SMALL, input_feeding=False))
    assert fed.decoder.layers[0].input_size == 12
    assert unfed.decoder.layers[0].input_size == 6
    assert fed.start(sentence(4)).fed is not None
    assert unfed.start(sentence(4)).fed is None


def test_the_output_layer_is_the_targets_embedding():
    model = translator(SMALL)
    assert model.decoder.output.weight is model.decoder.embedding.weight
    names = [name for name, _ in model.named_parameters()]
    assert "decoder.embedding.weight" in names
    assert "decoder.output.weight" not in names


def test_a_norm_over_batches_is_refused():
    with pytest.raises(UserError, match='"batch" cannot be'):
        translator(replace(SMALL, norm="batch"))


@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, gate_depth=0, layers=1)])
def test_flops_are_those_of_the_sentence_decoded_to_its_end(shape):
    model, steps, source = translator(shape), 9, sentence(6)
    with torch.no_grad():
        model.decoder.output.bias[END] = -1e3  # so that it ends at the longest
    hidden, size, gates, depth = 10, 6, shape.gate_hidden, shape.layers
    encoder = hlstm_flops(size, hidden, gates, steps=6, layers=depth)
    decoder = hlstm_flops(2 * size, hidden, gates, steps=steps)
    if depth == 2:
        decoder += hlstm_flops(hidden, hidden, gates, steps=steps)
    keys = 2 * 6 * hidden * hidden
    attention = 2 * steps * (2 * 6 * hidden + 2 * hidden * size)
    output = 2 * steps * size * TARGETS
    found = count(model, (source, torch.tensor(steps)))
    assert found["flops_dense"].value == encoder + decoder + keys + attention + output
    assert found["flops_effective"].value == found["flops_dense"].value


def test_zero_weights_save_flops_in_every_step():
    model, steps = translator(replace(SMALL, gate_depth=0, layers=1)), 9
    with torch.no_grad():
        model.decoder.output.bias[END] = -1e3
        model.get_parameter("decoder.layers.0.weight_hh").zero_()
    found = count(model, (sentence(6), torch.tensor(steps)))
    saved = found["flops_dense"].number - found["flops_effective"].number
    assert saved == lstm_flops(10, 10, steps) / 2 == 2 * steps * 4 * 10 * 10


@pytest.mark.parametrize("structure", ["element", "row_column"])
def test_a_pruned_translator_is_the_same_when_compact(structure):
    model = translator(SMALL)
    sketch(model, GP(final_density=0.3, structure=structure), lambda name: ".layers." in name)
    small = compact(model)
    assert isinstance(small, Seq2Seq)
    source, lengths, target = sentence(6), torch.tensor([6]), torch.tensor([[START, 7, 9]])
    torch.testing.assert_close(
        small.scores(source, lengths, target), model.scores(source, lengths, target)
    )
    assert torch.equal(small(source, torch.tensor(9)), model(source, torch.tensor(9)))
    sizes = [sum(p.numel() for p in one.parameters()) for one in (small, model)]
    assert sizes[0] < sizes[1] if structure == "row_column" else sizes[0] <= sizes[1]


def test_the_paper_scale_baseline_has_4_and_5_million_recurrent_weights():
    shape = Space.read("seq2seq").baseline_candidates()["dense_lstm"].architecture
    with torch.device("meta"):
        model = Seq2Seq(shape, 8_000, 8_000)

    def weights(layers: nn.Module) -> int:
        return sum(p.numel() for n, p in layers.named_parameters() if "weight" in n)

    assert weights(model.encoder.layers) == 4_000_000
    assert weights(model.decoder.layers) == 5_000_000
