from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpsearch import tasks
from gpsearch.candidate import Architecture, Training
from gpsearch.errors import UserError
from gpsearch.schedule import GMP, Dense
from gpsearch.tasks.bitext import Pair
from gpsearch.tasks.subwords import END, PAD, START
from gpsearch.tasks.translation import Example, TranslationTask, _batch
from gpsearch.train import grow_and_prune

SMALL = Architecture(
    layers=1, hidden_size=48, gate_width=16, gate_direct=True, bidirectional=False, norm="none",
    dropout=0.0, embedding_size=32,
)  # fmt: skip
TRAINING = Training(epochs=10, batch_tokens=50, learning_rate=0.01)

NAMES = ("Tom", "Maria", "Anna", "Paul")
VERBS = {
    "liest": "is reading",
    "schläft": "is sleeping",
    "singt": "is singing",
    "isst": "is eating",
}
ENDS = {"": "", " heute": " today", " hier": " here", " allein": " alone", " jetzt": " now"}


def corpus(folder: Path) -> Path:
    """Write a German the size of a phrase book; every seventh sentence is held out."""
    pairs = [
        Pair(f"{name} {verb}{end}.", f"{name} {VERBS[verb]}{ENDS[end]}.")
        for name in NAMES
        for verb in VERBS
        for end in ENDS
    ]
    held_out = pairs[::7]
    splits = {
        "train": [pair for pair in pairs if pair not in held_out],
        "valid": held_out[::2],
        "test": held_out[1::2],
    }
    for split, chosen in splits.items():
        for language, texts in zip(("de", "en"), zip(*chosen, strict=True), strict=True):
            (folder / f"{split}.{language}").write_text("".join(f"{text}\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> TranslationTask:
    return TranslationTask(corpus(tmp_path_factory.mktemp("phrases")))


@pytest.fixture(scope="module")
def trained(task):
    torch.manual_seed(0)
    return grow_and_prune(task.build(SMALL), task, Dense(), TRAINING)


def test_it_learns_to_translate_what_it_has_not_seen(task, trained):
    found = task.evaluate(trained)
    assert found["bleu"] > 0.2
    assert found["error"] == pytest.approx(1 - found["bleu"])
    assert tasks.error(task, found) == found["error"]
    assert set(task.evaluate(trained, "test")) == {
        "bleu", "bleu_lower_tok", "bleu_beam", "bleu_lower_tok_beam", "error"
    }  # fmt: skip


def test_scores_come_with_their_signatures(task, trained):
    task.evaluate(trained)
    assert "tok:13a" in tasks.signatures(task)["bleu"]
    assert set(tasks.signatures(task)) == {"bleu", "bleu_lower_tok"}


def test_show_sets_what_is_said_beside_the_reference(task, trained):
    shown = task.show(trained, "test", 3)
    assert len(shown) == 3
    pair, said = task.corpus.splits["test"][0], task.translate(trained, "test", n=1)
    assert shown[0] == f"source     {pair.source}\nreference  {pair.target}\nmodel      {said[0]}"


def test_translations_do_not_depend_on_their_neighbours(task, trained):
    assert task.translate(trained, "dev")[:3] == task.translate(trained, "dev", n=3)


def test_a_batch_holds_every_pair_from_its_start_to_its_end(task):
    batches = list(task.batches(TRAINING, 0, 0))
    assert sum(len(batch.lengths) for batch in batches) == 68
    for batch in batches:
        assert max(batch.source.numel(), batch.target.numel()) <= TRAINING.batch_tokens
        assert (batch.target[:, 0] == START).all()
        assert torch.equal(batch.target[:, 1:], batch.following[:, :-1].where(
            batch.following[:, :-1] != END, PAD
        ))  # fmt: skip
        assert ((batch.following == END).sum(1) == 1).all()
        assert torch.equal((batch.source != PAD).sum(1), batch.lengths)


def test_batches_of_sequences_where_tokens_are_not_counted(task):
    sizes = [len(batch.lengths) for batch in task.batches(Training(batch_size=10), 0, 0)]
    assert sorted(sizes) == [8, 10, 10, 10, 10, 10, 10]


def test_batches_are_the_same_for_the_same_seed_and_epoch(task):
    first, again, later = (
        [batch.source for batch in task.batches(TRAINING, epoch, 7)] for epoch in (3, 3, 4)
    )
    assert all(map(torch.equal, first, again))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, later))  # noqa: B905


def test_label_smoothing_raises_the_loss_of_a_sure_network(task, trained):
    plain, smooth = (
        task.loss(trained, next(iter(task.batches(training, 0, 0)))).item()
        for training in (TRAINING, Training(batch_tokens=50, label_smoothing=0.2))
    )
    assert smooth > plain + 0.1


def test_padding_costs_nothing(task):
    torch.manual_seed(0)
    model = task.build(SMALL).eval()
    batch = next(iter(task.batches(Training(batch_size=64), 0, 0)))
    total = task.loss(model, batch) * (batch.following != PAD).sum()
    alone = torch.zeros(())
    for i, length in enumerate(batch.lengths.tolist()):
        end = int((batch.following[i] != PAD).sum())
        scores = model.scores(
            batch.source[i : i + 1, :length],
            batch.lengths[i : i + 1],
            batch.target[i : i + 1, :end],
        )
        alone = alone + torch.nn.functional.cross_entropy(
            scores[0], batch.following[i, :end], reduction="sum"
        )
    torch.testing.assert_close(total, alone, rtol=1e-4, atol=1e-4)


def test_the_schedule_says_whether_embeddings_are_pruned(task):
    named = [name for name, _ in task.build(SMALL).named_parameters()]
    sides = {}
    for embeddings in (False, True):
        may = tasks.prunable(task, GMP(embeddings=embeddings))
        sides[embeddings] = {name for name in named if may(name)}
    assert sides[True] - sides[False] == {"encoder.embedding.weight", "decoder.embedding.weight"}
    assert all(".layers." in name for name in sides[False])


def test_embeddings_and_output_layer_end_at_the_density_together(task):
    torch.manual_seed(0)
    schedule = GMP(final_density=0.2, embeddings=True, tolerance=1.0)
    model = grow_and_prune(task.build(SMALL), task, schedule, Training(epochs=3, batch_tokens=500))
    for name in ("encoder.embedding", "decoder.output"):
        weight = model.get_parameter(f"{name}.weight")
        assert int(weight.count_nonzero()) == pytest.approx(0.2 * weight.numel(), abs=1)


def test_the_example_is_a_sentence_of_middle_length_and_ends_where_its_reference_does(task):
    source, longest = task.example()
    lengths = sorted(len(example.source) for example in task.examples["dev"])
    assert source.shape == (1, lengths[len(lengths) // 2])
    untrained = task.build(SMALL).eval()
    assert untrained(source, longest).shape[1] <= int(longest)


def test_pairs_too_long_to_be_decoded_are_left_out_of_training_and_told(tmp_path):
    folder = corpus(tmp_path)
    for language in ("de", "en"):
        path = folder / f"train.{language}"
        path.write_text("Tom " * 150 + "\n" + path.read_text())
    found = TranslationTask(folder)
    assert len(found.examples["train"]) == len(found.corpus.splits["train"]) == 68
    assert "1 of 69 training pairs left out" in found.notes[-1]
    assert found.notes[-1].endswith("the first is pair 1")


def test_a_corpus_of_nothing_but_long_pairs_is_refused(tmp_path):
    folder = corpus(tmp_path)
    for language in ("de", "en"):
        (folder / f"train.{language}").write_text(("Tom " * 1_200).strip() + "\n")
    with pytest.raises(UserError) as told:
        TranslationTask(folder)
    assert str(told.value) == (
        f"--data {folder}: all 1 training pairs have 100 or more sub-words on a side; a line "
        "should be one sentence"
    )


def test_a_perfect_translation_has_1_however_its_letters_are_written(tmp_path):
    folder = corpus(tmp_path)
    for path in folder.glob("*.en"):
        path.write_text(path.read_text().replace(".", "… ²ﬁ\uff01"))
    found = TranslationTask(folder)
    said = found.vocabularies[1].decode([e.target for e in found.examples["dev"]])
    assert said == [pair.target for pair in found.corpus.splits["dev"]]
    assert found._score(said, "dev")[0]["bleu"] == 1


def test_into_a_script_without_spaces_bleu_goes_by_the_scripts_tokeniser(tmp_path, task):
    folder = corpus(tmp_path)
    for path in folder.glob("*.en"):
        path.write_text("".join("猫坐在垫子上。\n" for _ in path.read_text().splitlines()))
    found = TranslationTask(folder)
    assert found.notes[-1] == "BLEU by sacrebleu's tokeniser zh, after the references' script"
    assert "tok:zh" in found._score(["猫坐在垫子上。"] * 14, "dev")[1]["bleu"]
    assert not any("tokeniser" in note for note in task.notes)


def test_a_batch_has_numbers_even_of_nothing():
    assert _batch([Example([], [])], 0.0).source.dtype == torch.long


def test_tokenised_text_is_known_and_told(tmp_path):
    folder = corpus(tmp_path)
    for path in folder.iterdir():
        path.write_text(path.read_text().replace(".", " ."))
    found = TranslationTask(folder)
    assert found.tokenised == {"train": True, "dev": True, "test": True}
    assert found.notes[-1].startswith("tokenised text (train, dev, test)")


def test_it_has_its_own_search_space():
    assert tasks.default_space("translation") == "translation"
    assert tasks.default_space("speech") == "hlstm"


@pytest.mark.parametrize(
    ("end", "is_other"), [("!", False), ("…", True), (" 你好世界你好世界你好世界", True)]
)
def test_folders_whose_models_know_other_sub_words_are_other_data(tmp_path, end, is_other):
    """Those of before, which took "…" for "...", and one sentence for one Chinese word."""
    folder = corpus(tmp_path)
    for path in folder.glob("*.en"):
        path.write_text(path.read_text().replace(".", end))
    task = TranslationTask(folder)
    assert (task.digest != tasks.digest_of(task.corpus.splits.items())) == is_other
