import pytest

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


def test_special_tokens_say_nothing_and_strange_letters_are_unknown(subwords):
    [coded] = subwords.encode(["the cat"])
    assert subwords.decode([[START, *coded, END, PAD]]) == ["the cat"]
    assert UNKNOWN in subwords.encode(["Ω"])[0]


def test_the_same_sentences_give_the_same_sub_words(subwords):
    again = Subwords.learn(SENTENCES, 40)
    assert again.encode(SENTENCES) == subwords.encode(SENTENCES)


def test_a_script_of_many_letters_has_them_all() -> None:
    letters = [chr(0x4E00 + i) for i in range(1200)]
    sentences = ["".join(letters[i : i + 12]) for i in range(0, 1200, 6)] * 2
    vocabulary = Subwords.learn(sentences, 500)
    numbers = [number for sentence in vocabulary.encode(sentences) for number in sentence]
    assert numbers.count(UNKNOWN) < 0.01 * len(numbers)
