"""BLEU of translations, by sacrebleu, with its signature: what a score was computed of, and how."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

LOWER = "bleu_lower_tok"
"""Lower-cased BLEU of tokenised text, as the literature on IWSLT has it (Moses' multi-bleu)."""
KANA = ("HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA")
UNSPACED = ("CJK", *KANA, "THAI", "LAO", "KHMER", "MYANMAR")
"""Scripts without spaces between words, as the names of their letters begin."""
MOSTLY, HARDLY = 0.3, 0.1
"""A script's share of the letters: a word of another script, a name say, has more of them."""


def tokeniser_of(references: Iterable[str]) -> str:
    """Return the tokeniser of sacrebleu's that fits the script of a corpus' references.

    13a goes by spaces: a Chinese sentence would be one word, and every score 0. Chinese is split by
    "zh"; Japanese, Thai, Lao, Khmer and Burmese by "char", as nothing that ships with sacrebleu
    finds their words.
    """
    found = Counter("".join(references))
    letters = {unicodedata.name(one, ""): n for one, n in found.items() if one.isalpha()}

    def count(scripts: tuple[str, ...]) -> int:
        return sum(n for name, n in letters.items() if name.startswith(scripts))

    unspaced = count(UNSPACED)
    if unspaced <= MOSTLY * sum(letters.values()):
        return "13a"
    is_chinese = count(("CJK",)) > unspaced / 2 and count(KANA) < HARDLY * unspaced
    return "zh" if is_chinese else "char"


def bleu(
    translations: Sequence[str],
    references: Sequence[str],
    *,
    language: str,
    tokenised: bool = False,
    tokeniser: str = "13a",
) -> tuple[dict[str, float], dict[str, str]]:
    """Return "bleu" of detokenised text and `LOWER`, as fractions, and their signatures.

    Args:
        translations: What is judged.
        references: One for each.
        language: Of both, for detokenising ("en").
        tokenised: Whether both are in Moses' tokens, as IWSLT's prepared data is. They are joined
            by Moses' rules for "bleu", and compared as they are for `LOWER`; plain text is split
            by ``tokeniser`` for both.
        tokeniser: One of sacrebleu's, the same for every score of a corpus: see `tokeniser_of`.

    Source: Post, "A Call for Clarity in Reporting BLEU Scores" (WMT 2018).
    """
    from sacrebleu.metrics.bleu import BLEU

    own = "none" if tokenised else tokeniser
    lower = BLEU(lowercase=True, tokenize=own, force=True)
    plain = BLEU(tokenize=tokeniser)
    join: Callable[[Sequence[str]], list[str]] = _joiner(language) if tokenised else list
    both = {
        "bleu": (plain, plain.corpus_score(join(translations), [join(references)])),
        LOWER: (lower, lower.corpus_score(list(translations), [list(references)])),
    }
    scores = {name: min(found.score / 100, 1.0) for name, (_, found) in both.items()}
    return scores, {name: str(metric.get_signature()) for name, (metric, _) in both.items()}


def _joiner(language: str) -> Callable[[Sequence[str]], list[str]]:
    from sacremoses import MosesDetokenizer

    detokenizer = MosesDetokenizer(lang=language)
    return lambda texts: [detokenizer.detokenize(text.split()) for text in texts]
