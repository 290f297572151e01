import math

import pytest

from gpsearch.tasks.bleu import LOWER, bleu, tokeniser_of

REFERENCES = ["The cat sat on the mat.", "It was a cold day."]


def test_a_perfect_translation_has_1_and_a_wrong_one_0():
    assert bleu(REFERENCES, REFERENCES, language="en")[0] == {"bleu": 1.0, LOWER: 1.0}
    wrong = bleu(["x", "y"], REFERENCES, language="en")[0]
    assert wrong["bleu"] == wrong[LOWER] == pytest.approx(0, abs=0.01)


def test_bleu_is_as_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 quadruples (13a splits off the dot).
    found, _ = bleu(["a b c d x ."], ["a b c d e ."], language="en")
    assert found["bleu"] == pytest.approx(math.prod([5 / 6, 3 / 5, 2 / 4, 1 / 3]) ** (1 / 4))


def test_only_the_literatures_bleu_is_blind_to_case():
    found, signatures = bleu([text.lower() for text in REFERENCES], REFERENCES, language="en")
    assert found[LOWER] == 1
    assert found["bleu"] < 1
    assert "case:mixed" in signatures["bleu"]
    assert "tok:13a" in signatures["bleu"]
    assert "case:lc" in signatures[LOWER]


def test_tokenised_text_is_joined_for_one_and_compared_as_it_is_for_the_other():
    reference, said = ["it &apos;s 5 a.m. , right ?"], ["it &apos;s 5 a.m. , right !"]
    found, signatures = bleu(said, reference, language="en", tokenised=True)
    assert "tok:none" in signatures[LOWER]
    # Seven tokens, of which the last is wrong: 6/7, 5/6, 4/5, 3/4.
    assert found[LOWER] == pytest.approx((3 / 7) ** (1 / 4))
    # Joined and split again by 13a: it ' s 5 a . m . , right ?
    assert found["bleu"] != pytest.approx(found[LOWER], abs=0.01)


@pytest.mark.parametrize(
    ("references", "tokeniser"),
    [
        (["The cat sat on the mat."], "13a"),
        (["고양이가 매트 위에 앉았다."], "13a"),  # Korean has spaces
        (["猫坐在垫子上。", "我爱 Microsoft。"], "zh"),
        (["猫坐在垫子上。"] * 5 + ["我很喜欢《となり》。"], "zh"),
        (["猫がマットの上に座った。"], "char"),
        (["ﾏｯﾄ"], "char"),
        (["แมวนั่งบนเสื่อ"], "char"),
        (["ແມວນັ່ງ"], "char"),
        (["ឆ្មាអង្គុយ"], "char"),
        (["ကြောင်ထိုင်သည်"], "char"),
        (["Tōkyō (東京) is large."], "13a"),
        (["1.", "?"], "13a"),
        ([], "13a"),
    ],
)
def test_the_tokeniser_goes_by_the_script_of_the_references(references, tokeniser):
    assert tokeniser_of(references) == tokeniser


@pytest.mark.parametrize(
    ("reference", "nearly"),
    [("猫坐在我的垫子上面。", "狗坐在我的垫子上面。"), ("แมวนั่งบนเสื่อ", "หมานั่งบนเสื่อ")],
)
def test_a_translation_into_a_script_without_spaces_is_seen_to_be_nearly_right(reference, nearly):
    tokeniser = tokeniser_of([reference])
    found, signatures = bleu([nearly], [reference], language="xx", tokeniser=tokeniser)
    assert 0.5 < found["bleu"] < 1
    assert found[LOWER] == found["bleu"]
    assert all(f"tok:{tokeniser}" in signature for signature in signatures.values())
    blind, _ = bleu([nearly], [reference], language="xx")
    assert blind["bleu"] < 0.5
