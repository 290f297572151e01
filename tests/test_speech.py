from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from gpsearch.candidate import Architecture, Training
from gpsearch.compact import compact
from gpsearch.growprune import sketch
from gpsearch.schedule import GP
from gpsearch.tasks.speech import SpeechModel, SpeechTask

SMALL = Architecture(layers=2, hidden_size=12, gate_width=8, dropout=0.0)


@pytest.fixture(scope="module")
def task():
    return SpeechTask()


@pytest.fixture(scope="module")
def unlike(task):
    """Four utterances of unlike lengths, padded, and the lengths."""
    utterances = [u.features for u in task.corpus.split("train")[:200:50]]
    lengths = torch.tensor([len(one) for one in utterances])
    assert lengths.max() > 1.5 * lengths.min()
    return pad_sequence(utterances, batch_first=True), lengths


def test_an_utterance_reads_the_same_alone_and_in_a_batch(task, unlike):
    torch.manual_seed(0)
    model = task.build(SMALL).eval()
    features, lengths = unlike
    scores, steps = model(features, lengths)

    for row, frames in enumerate(lengths.tolist()):
        alone, _ = model(features[row : row + 1, :frames])
        assert alone.shape[1] == steps[row]
        torch.testing.assert_close(alone[0], scores[row, : steps[row]], rtol=1e-4, atol=1e-5)


def test_a_batch_has_the_gradients_of_its_utterances(task, unlike):
    torch.manual_seed(0)
    front = task.build(SMALL).front
    features, lengths = unlike
    slopes = torch.randn(front(features, lengths)[0].shape)

    def gradients(features, lengths, slopes):
        channels, _ = front(features, lengths)
        return torch.autograd.grad((channels * slopes).sum(), list(front.parameters()))

    whole = gradients(features, lengths, slopes)
    alone = [
        gradients(features[row : row + 1, :frames], None, slopes[: -(-frames // 4), row : row + 1])
        for row, frames in enumerate(lengths.tolist())
    ]
    for together, *each in zip(whole, *alone, strict=True):
        torch.testing.assert_close(together, sum(each), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("merge", ["concat", "sum"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_every_shape_runs_and_gives_probabilities(norm, merge, bidirectional):
    shape = Architecture(
        layers=2, hidden_size=6, gate_width=5, norm=norm, merge=merge, bidirectional=bidirectional
    )
    scores, steps = SpeechModel(shape, 9)(torch.randn(2, 30, 64), torch.tensor([30, 21]))

    assert scores.shape == (2, 8, 9)
    assert steps.tolist() == [8, 6]
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(2, 8))


def test_the_papers_baseline_has_its_50_million_recurrent_weights():
    shape = Architecture(
        layers=5, hidden_size=800, gate_depth=0, merge="sum", norm="batch", front="deepspeech2"
    )
    with torch.device("meta"):
        model = SpeechModel(shape, 29)
    weights = [p for n, p in model.layers.named_parameters() if "weight" in n]

    assert sum(w.numel() for w in weights) == 50_380_800


def test_show_sets_what_is_heard_beside_what_is_said(task):
    model = task.build(SMALL)
    utterances, heard = task.transcribe(model, "dev")
    shown = task.show(model, "dev", 2)

    middle = len(heard) // 2
    assert shown == [f"said   {utterances[i].text}\nheard  {heard[i]}" for i in (0, middle)]


def test_batches_are_the_same_for_the_same_seed_and_epoch(task):
    first, again, later = (
        next(iter(task.batches(Training(), epoch, 7))).features for epoch in (3, 3, 4)
    )
    assert first.equal(again)
    assert first.shape != later.shape or not first.equal(later)


def texts(task, batch):
    """What is said in a batch, in its order."""
    targets = torch.split_with_sizes(batch.targets, batch.target_lengths.tolist())
    return ["".join(task.alphabet[place] for place in one) for one in targets]


@pytest.mark.parametrize("augment", [0.0, 0.5, 1.0])
def test_an_epoch_shows_every_training_utterance_once(task, augment):
    batches = task.batches(Training(augment=augment), 1, 0)
    shown = [text for batch in batches for text in texts(task, batch)]

    assert sorted(shown) == sorted(u.text for u in task.corpus.split("train"))


@pytest.mark.parametrize(("augment", "most"), [(0.0, 0.06), (1.0, 0.03)])
def test_lengths_within_a_batch_are_alike(task, augment, most):
    batches = list(task.batches(Training(batch_size=16, augment=augment), 0, 0))
    padding = sum(b.features.shape[0] * b.features.shape[1] - int(b.lengths.sum()) for b in batches)

    assert padding / sum(int(b.lengths.sum()) for b in batches) < most


@pytest.mark.parametrize("augment", [0.0, 1.0])
def test_an_utterance_has_other_neighbours_in_another_epoch(task, augment):
    training = Training(batch_size=4, augment=augment)

    def together(epoch):
        return {tuple(sorted(texts(task, b))) for b in task.batches(training, epoch, 0)}

    once, again = together(0), together(1)
    assert len(once & again) < 0.05 * len(once)


def test_saved_models_go_on_reading_batches_first(task):
    # A stored model brings its layers' options, while the way through them is today's.
    assert all(layer.batch_first for layer in task.build(SMALL).layers)


def test_the_first_epochs_are_kicked(task):
    training = Training(kick_epochs=1)
    kick, ctc = (next(iter(task.batches(training, epoch, 0))) for epoch in (0, 1))

    assert kick.kick
    assert not ctc.kick
    model = task.build(SMALL)
    assert task.loss(model, kick).isfinite()
    assert task.loss(model, ctc).isfinite()


def test_a_few_steps_of_training_lower_the_loss(task):
    torch.manual_seed(0)
    model = task.build(SMALL)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    batch = next(iter(task.batches(Training(kick_epochs=0), 1, 0)))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.5 * losses[0]


def test_errors_are_counted_on_words_and_characters(task):
    class Parrot(torch.nn.Module):
        """Says nothing at all: every word is deleted."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, features, lengths):
            scores = torch.full((len(features), 5, len(task.alphabet)), -9.0)
            scores[..., 0] = 0.0
            return scores, torch.full_like(lengths, 5)

    assert task.evaluate(Parrot(), "dev") == {"wer": 1.0, "cer": 1.0}
    assert task.evaluate(Parrot(), "test") == {"wer": 1.0, "cer": 1.0, "wer_beam": 1.0}


def test_only_the_recurrent_layers_are_pruned(task):
    names = [name for name, _ in task.build(SMALL).named_parameters() if task.prunable(name)]

    assert names
    assert all(name.startswith("layers.") for name in names)


def test_the_example_is_one_whole_utterance(task):
    (features,) = task.example()

    assert features.shape[0] == 1
    assert features.shape[2] == 64
    assert 150 < features.shape[1] < 400


@pytest.mark.parametrize(
    ("norm", "structure"), [("batch", "row_column"), ("layer", "element"), ("layer", "16x1")]
)
def test_a_pruned_model_is_compacted_to_an_equal_one(task, norm, structure):
    torch.manual_seed(0)
    shape = Architecture(hidden_size=12, gate_width=10, norm=norm, gate_direct=True)
    schedule = GP(final_density=0.1, structure=structure)
    model = sketch(task.build(shape).eval(), schedule, task.prunable)
    small: Any = compact(model)

    features, lengths = torch.randn(2, 50, 64), torch.tensor([50, 37])
    torch.testing.assert_close(
        small(features, lengths)[0], model(features, lengths)[0], rtol=1e-5, atol=1e-5
    )
    if structure == "row_column":
        assert small.layers[0].hidden_size < 12
