import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpsearch.errors import UserError
from gpsearch.tasks.captions import Image, read, words
from tests import captioned

FIRST = (("a", "red", "dog"), ("there", "is", "a", "dog", "that", "is", "red"))


@pytest.mark.parametrize("name", ["dataset.json", "dataset.json.gz"])
def test_karpathys_layout(tmp_path, name):
    images = read(captioned.write_json(tmp_path / name, captioned.karpathy()))

    assert images[0] == Image("00.jpg", 0, FIRST, "train")
    assert [image.split for image in images[23:31]] == ["train", *["dev"] * 6, "test"]


def test_cocos_captions_are_found_by_image_in_the_order_of_images(tmp_path):
    images = read(captioned.write_json(tmp_path / "captions.json", captioned.coco()))

    assert set(images[0].captions) == set(FIRST)
    assert [image.row for image in images] == list(range(36))
    assert {image.split for image in images} == {None}


def test_restval_is_for_training_and_raw_sentences_are_split_into_words(tmp_path):
    content = captioned.karpathy()
    content["images"][0]["split"] = "restval"
    content["images"][0]["sentences"] = [{"raw": "A red dog ."}]
    first = read(captioned.write_json(tmp_path / "dataset.json", content))[0]

    assert (first.split, first.captions) == ("train", FIRST[:1])


def test_features_are_in_the_order_of_imgid(tmp_path):
    content = captioned.karpathy()
    content["images"].reverse()
    images = read(captioned.write_json(tmp_path / "dataset.json", content))

    assert [image.name for image in images[:2]] == ["00.jpg", "01.jpg"]


@settings(max_examples=40)
@given(st.text())
def test_words_have_neither_capitals_nor_spaces(text):
    assert all(word == word.lower() and not set(word) & set(" .,;!?\n") for word in words(text))
    assert words(" ".join(words(text))) == words(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Cafe\u0301, caf\u00e9!", ("caf\u00e9", "caf\u00e9")),
        ("कुत्ता दौड़ता है।", ("कुत्ता", "दौड़ता", "है")),
        ("หมาวิ่ง", ("หมาวิ่ง",)),
        ("I \u2764\ufe0f dogs", ("i", "dogs")),
        ("'Rock'n'roll' at 7_8 don\u2019t--stop", ("rock'n'roll", "at", "7", "8", "don't", "stop")),
    ],
)
def test_words_keep_their_marks_and_inner_apostrophes(text, found):
    assert words(text) == found


def _no_captions(content):
    content["images"][3]["sentences"] = []


def _no_words(content):
    content["images"][3]["sentences"][1] = {"tokens": []}


def _one_text(content):
    content["images"][3]["sentences"][1] = {"tokens": "a red dog"}


def _wrong_split(content):
    content["images"][3]["split"] = "validation"


def _twice(content):
    content["images"][3]["imgid"] = 4


def _no_sentences(content):
    del content["images"][3]["sentences"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_captions, "1 of 36 images cannot be used:\n  03.jpg: no captions"),
        (_no_words, "03.jpg: a caption without words"),
        (_one_text, "tokens 'a red dog' are no list of words"),
        (_wrong_split, "split 'validation' is none of train, restval, val, test"),
        (_twice, "imgid are not 0 to 35, each once"),
        (_no_sentences, "no 'sentences'"),
        (lambda content: content.pop("images"), "holds no images; it should be Karpathy's"),
    ],
)
def test_faults_are_named(tmp_path, spoil, message):
    content = captioned.karpathy()
    spoil(content)
    path = captioned.write_json(tmp_path / "dataset.json", content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"\x1f\x8b\x08"])
@pytest.mark.parametrize("name", ["dataset.json", "dataset.json.gz"])
def test_a_file_that_is_none_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read as JSON|holds no images"):
        read(tmp_path / name)


def test_a_caption_of_no_image_is_named(tmp_path):
    content = captioned.coco()
    content["annotations"].append({"image_id": 7, "caption": "A cat."})
    with pytest.raises(UserError, match="1 image_id are of no image, such as 7"):
        read(captioned.write_json(tmp_path / "captions.json", content))
