import pytest

from gpsearch.tasks.bitext import load
from gpsearch.tasks.subwords import END, PAD, START, UNKNOWN, Subwords

SENTENCES = ["the cat sat", "the cat ran", "a cat sits on the mat", "the rat ran to the cat"] * 5


@pytest.fixture(scope="module")
def subwords() -> Subwords:
    return Subwords.learn(SENTENCES, 40)


def test_text_comes_back_from_its_sub_words(subwords):
    assert subwords.decode(subwords.encode(SENTENCES)) == SENTENCES
    assert subwords.decode(subwords.encode(["a mat ran to the hats"])) == ["a mat ran to the hats"]


def test_frequent_words_are_one_sub_word_and_no_more_are_made_than_asked_for(subwords):
    assert len(subwords) <= 40
    [cat] = subwords.encode(["cat"])
    assert len(cat) == 1
    assert cat[0] > END


def test_special_tokens_say_nothing_and_what_is_unknown_is_shown(subwords):
    [coded] = subwords.encode(["the cat"])
    assert subwords.decode([[START, *coded, END, PAD]]) == ["the cat"]
    [coded] = subwords.encode(["the Ω"])
    assert coded[-1] == UNKNOWN
    assert subwords.decode([coded])[0].split() == ["the", "⁇"]


def test_the_same_sentences_give_the_same_sub_words(subwords):
    again = Subwords.learn(SENTENCES, 40)
    assert again.encode(SENTENCES) == subwords.encode(SENTENCES)


def test_a_script_of_many_letters_has_them_all() -> None:
    letters = [chr(0x4E00 + i) for i in range(1200)]
    sentences = ["".join(letters[i : i + 12]) for i in range(0, 1200, 6)] * 2
    vocabulary = Subwords.learn(sentences, 500)
    numbers = [number for sentence in vocabulary.encode(sentences) for number in sentence]
    assert numbers.count(UNKNOWN) < 0.01 * len(numbers)


WRITTEN = ["「你好\uff0c世界\uff01」", "Le 1ᵉʳ mai… ﬁn", "H₂O à 100 ºC"] * 5


def test_exact_sub_words_give_back_what_was_written():
    exact, folded = Subwords.learn(WRITTEN, 200, exact=True), Subwords.learn(WRITTEN, 200)
    assert exact.decode(exact.encode(WRITTEN)) == WRITTEN
    assert folded.decode(folded.encode(WRITTEN[1:2])) == ["Le 1er mai... fin"]


@pytest.mark.parametrize("exact", [False, True])
def test_every_space_is_one_space(exact):
    subwords = Subwords.learn(SENTENCES, 40, exact=exact)
    for space in ("\u00a0", "\u202f", "\u3000", "\u2581", "\t", " \u2009 "):
        assert subwords.encode([f"{space}the{space}cat"]) == subwords.encode(["the cat"])


def test_sentences_as_long_as_a_line_may_be_are_learnt_from():
    assert len(Subwords.learn(["the cat " * 600], 40)) > END


def test_of_the_packages_translations_exact_sub_words_are_the_ones_models_were_trained_with():
    targets = [pair.target for pair in load().splits["train"]]
    folded, exact = (Subwords.learn(targets, 1_534, exact=exact) for exact in (False, True))
    assert exact.encode(targets) == folded.encode(targets)
