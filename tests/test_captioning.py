import sys

import numpy as np
import pytest
import torch

from gpsearch import tasks
from gpsearch.candidate import Architecture, Training
from gpsearch.errors import UserError
from gpsearch.schedule import Dense
from gpsearch.tasks.captioning import NO_TARGET, CaptioningTask
from gpsearch.train import grow_and_prune
from tests import captioned

SMALL = Architecture(
    layers=1, hidden_size=24, embedding_size=16, gate_depth=0, norm="layer", dropout=0.0
)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return CaptioningTask(captioned.folder(tmp_path_factory.mktemp("made"), "vgg_feats.mat"))


@pytest.fixture(scope="module")
def trained(task):
    torch.manual_seed(0)
    training = Training(epochs=40, batch_size=8, learning_rate=0.02)
    return grow_and_prune(task.build(SMALL), task, Dense(), training)


def test_it_learns_to_say_what_is_seen(task, trained):
    metrics = task.evaluate(trained, "test")

    assert metrics["cider_d"] > 3
    assert metrics["cider_d_beam"] > 3
    assert metrics["bleu_1"] > 0.8
    said = task.caption(trained, "test", beam_width=2)
    assert [set(words.split()) >= {image.captions[0][1], image.captions[0][2]}
            for words, image in zip(said, task.corpus.split("test"), strict=True)
            ].count(True) >= 5  # fmt: skip


def test_the_error_falls_as_cider_d_rises_and_is_never_below_0(task, trained):
    fresh, good = task.evaluate(task.build(SMALL)), task.evaluate(trained)

    for metrics in (fresh, good):
        assert tasks.error(task, metrics) == 1 / (1 + metrics["cider_d"])
    assert 0 < good["error"] < fresh["error"] <= 1


def test_an_epoch_shows_every_image_once_and_epochs_show_every_caption(task):
    seen = set()
    for epoch in (4, 5):
        batches = list(task.batches(Training(batch_size=5), epoch, 0))
        rows = [row for batch in batches for row in batch.following.tolist()]
        assert len(rows) == 24
        for batch in batches:
            for features, row in zip(
                batch.features.tolist(), batch.following.tolist(), strict=True
            ):
                seen.add((*features, *(token for token in row if token != NO_TARGET)))
    places = range(24)
    assert len(seen) == len({c for p in places for c in captioned.captions(p)})


def test_what_follows_a_token_is_the_next_one(task):
    for batch in task.batches(Training(batch_size=5), 0, 0):
        lengths = (batch.following != NO_TARGET).sum(1).tolist()
        for tokens, following, length in zip(batch.tokens, batch.following, lengths, strict=True):
            assert tokens[0] == following[length - 1] == 0
            assert tokens[1:length].equal(following[: length - 1])


def test_batches_are_the_same_for_the_same_seed_and_epoch(task):
    first, again, later = (
        next(iter(task.batches(Training(batch_size=24), epoch, 7))) for epoch in (3, 3, 4)
    )
    assert first.tokens.equal(again.tokens)
    assert first.features.equal(again.features)
    assert not first.features.equal(later.features)


def test_label_smoothing_reaches_the_loss(task):
    model = task.build(SMALL).eval()
    plain, smooth = (
        task.loss(model, next(iter(task.batches(Training(label_smoothing=share), 0, 0))))
        for share in (0.0, 0.5)
    )
    assert plain != smooth


def test_one_inference_is_one_image_and_the_usual_captions_length(task):
    features, words = task.example()

    assert features.shape == (1, captioned.SIZE)
    assert int(words) == 8  # half of the captions have three words, half have seven, and the end
    assert task.build(SMALL).eval()(features, words).shape == (1, 8)


def test_a_schedule_says_whether_embeddings_are_pruned(task):
    names = [name for name, _ in task.build(SMALL).named_parameters()]

    assert [n for n in names if task.embeds(n)] == ["image.weight", "words.weight", "output.weight"]
    assert {n.split(".")[0] for n in names if task.prunable(n)} == {"layers"}


def test_show_lets_a_reader_judge(task, trained):
    first, second = task.show(trained, "dev", 2)

    assert first.splitlines()[:3] == [
        "image      24.jpg", "reference  a red dog", "reference  there is a dog that is red",
    ]  # fmt: skip
    assert second.splitlines()[-1].startswith("model      ")


def test_the_task_is_found_by_name_and_wants_data():
    assert tasks.default_space("captioning") == "captioning"
    with pytest.raises(UserError, match=r"^captioning needs --data, .*vgg_feats\.mat"):
        tasks.find("captioning")


def test_other_features_of_the_same_size_are_other_data(tmp_path, task):
    folder = captioned.folder(tmp_path)
    assert tasks.digest(CaptioningTask(folder)) == tasks.digest(task)  # vgg_feats.mat

    np.save(folder / "feats.npy", captioned.features()[::-1])
    assert tasks.digest(CaptioningTask(folder)) != tasks.digest(task)


def test_what_scores_the_captions_is_wanted_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider_scorer", None)
    with pytest.raises(UserError, match=r"extra captioning: pip install pycocoevalcap$"):
        CaptioningTask(tmp_path / "nowhere")
