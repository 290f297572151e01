import sys

import pytest

from gpsearch.errors import UserError
from gpsearch.tasks.cider import scores

REFERENCES = [
    ["a red dog runs on grass", "the red dog is running"],
    ["a blue boat floats on a lake", "there is a blue boat on water"],
    ["two cats sleep under a tree", "cats sleeping by the tree"],
]


def test_peoples_own_captions_score_best_and_others_nothing():
    own = scores([captions[0] for captions in REFERENCES], REFERENCES)
    strange = scores(["completely different words here", "no", ""], REFERENCES)

    assert own["cider_d"] > 4
    assert [own[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx([1, 1, 1, 1])
    assert strange["cider_d"] == 0
    assert strange["bleu_1"] < 1e-6


def test_one_reference_said_again_is_the_most_there_can_be():
    single = [captions[:1] for captions in REFERENCES]
    assert scores([one for (one,) in single], single)["cider_d"] == pytest.approx(10)


def test_a_word_that_all_images_have_counts_for_nothing():
    references = [[f"a {thing}"] for thing in ("dog", "cat", "boat")]
    assert scores(["a", "a", "a"], references)["cider_d"] == 0


def test_nothing_is_printed(capsys):
    scores([captions[1] for captions in REFERENCES], REFERENCES)
    assert capsys.readouterr() == ("", "")


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider_scorer", None)
    with pytest.raises(UserError, match=r"extra captioning: pip install pycocoevalcap$"):
        scores(["a red dog"], REFERENCES[:1])
