import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpsearch.errors import UserError
from gpsearch.tasks.caption_corpus import load
from tests import captioned


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return load(captioned.folder(tmp_path_factory.mktemp("made")))


def counts(corpus):
    return [len(corpus.split(split)) for split in ("train", "dev", "test")]


def test_captions_and_features_stay_together(corpus):
    image = corpus.split("test")[2]
    row = corpus.features_of([image])[0]

    assert counts(corpus) == [24, 6, 6]
    assert image.captions[0] == ("a", captioned.COLOURS[row[:3].argmax()],
                                 captioned.THINGS[row[3:].argmax()])  # fmt: skip


def test_words_seen_five_times_in_training_are_learnt(tmp_path):
    content = captioned.karpathy()
    for count, word in ((4, "four"), (5, "five")):
        for image in content["images"][:count]:
            image["sentences"].append({"tokens": [word, "a"]})
    content["images"][-1]["sentences"] *= 5
    content["images"][-1]["sentences"][0]["tokens"] = ["tested"] * 9
    np.save(tmp_path / "f.npy", captioned.features())
    captioned.write_json(tmp_path / "dataset.json", content)
    corpus = load(tmp_path)

    assert corpus.vocabulary[0] == ""
    assert "five" in corpus.vocabulary
    assert not {"four", "tested"} & set(corpus.vocabulary)
    assert corpus.decode(corpus.encode(("four", "a", "dog"))) == "a dog"


@settings(max_examples=25)
@given(text=st.lists(st.sampled_from(["a", *captioned.COLOURS, *captioned.THINGS])))
def test_known_words_come_back_up_to_the_boundary(corpus, text):
    assert corpus.decode([*corpus.encode(tuple(text)), 0, 1, 2]) == " ".join(text)


def test_a_file_of_captions_is_as_good_as_its_folder(tmp_path, corpus):
    folder = captioned.folder(tmp_path)
    (folder / "other.json").write_text("{}")
    assert load(folder / "dataset.json").images == load(folder).images == corpus.images


def test_one_file_of_coco_with_columns_of_matlab_is_split_for_the_user(tmp_path):
    captioned.write_json(tmp_path / "captions_of_mine.json", captioned.coco())
    captioned.WRITERS["vgg_feats.mat"](tmp_path / "vgg_feats.mat", captioned.features())
    corpus = load(tmp_path)

    train, dev, test = counts(corpus)
    assert train + dev + test == 36
    assert (dev, test) == (4, 4)
    assert corpus.notes == (
        "no test split given: 4 of 36 train images taken",
        "no dev split given: 4 of 32 train images taken",
    )


def test_cocos_files_are_splits_with_features_of_their_names(tmp_path):
    (tmp_path / "annotations").mkdir()
    for name, places in (("captions_train2014", range(24)), ("captions_val2014", range(24, 36))):
        captioned.write_json(tmp_path / "annotations" / f"{name}.json", captioned.coco(places))
        np.save(tmp_path / f"{name}.npy", captioned.features()[list(places)])
    captioned.write_json(tmp_path / "annotations" / "instances_val2014.json", {"images": []})
    corpus = load(tmp_path)

    assert counts(corpus) == [24, 6, 6]
    assert corpus.features.numpy().tolist() == captioned.features().tolist()
    assert corpus.notes == ("no test split given: 6 of 12 dev images taken",)


def _without(split):
    content = captioned.karpathy()
    for image in content["images"]:
        if image["split"] == split:
            image["split"] = "train"
    return content


def _rare():
    content = captioned.karpathy()
    for image in content["images"]:
        image["sentences"] = [{"tokens": [f"word{image['imgid']}"]}]
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_without("val"), "too few images: 30 train, 0 dev, 6 test"),
        (_without("test"), "too few images: 30 train, 6 dev, 0 test"),
        (_rare(), "no word occurs 5 times"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(tmp_path, content, message):
    captioned.folder(tmp_path)
    captioned.write_json(tmp_path / "dataset.json", content)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_what_is_missing_is_said_in_one_line_with_what_to_get(tmp_path):
    for data in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError) as caught:
            load(data)
        message = str(caught.value)
        assert "\n" not in message
        for part in ("dataset.json", "vgg_feats.mat", "4096 x images", "deepimagesent", "cocodata"):
            assert part in message


@pytest.mark.parametrize("names", [[], ["a.npy", "b.mat"]])
def test_there_has_to_be_one_file_of_features(tmp_path, names):
    captioned.write_json(tmp_path / "dataset.json", captioned.karpathy())
    for name in names:
        (tmp_path / name).touch()
    said = ", ".join(names) or "no"
    with pytest.raises(UserError, match=rf"{said} features for dataset\.json; .* order of its"):
        load(tmp_path)


def test_files_of_captions_have_to_say_their_split(tmp_path):
    for name in ("captions_train", "captions_more"):
        captioned.write_json(tmp_path / f"{name}.json", captioned.coco())
        np.save(tmp_path / f"{name}.npy", captioned.features())
    with pytest.raises(UserError, match=r"captions_more\.json: its name should say train, val or"):
        load(tmp_path)


def test_features_are_of_one_size(tmp_path):
    for name, size in (("captions_train", 7), ("captions_val", 5)):
        captioned.write_json(tmp_path / f"{name}.json", captioned.coco())
        np.save(tmp_path / f"{name}.npy", captioned.features()[:, :size])
    with pytest.raises(UserError, match=r"different sizes, \[5, 7\]"):
        load(tmp_path)
