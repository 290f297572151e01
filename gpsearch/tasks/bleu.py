"""BLEU of translations, by sacrebleu, with its signature: what a score was computed of, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence

LOWER = "bleu_lower_tok"
"""Lower-cased BLEU of tokenised text, as the literature on IWSLT has it (Moses' multi-bleu)."""


def bleu(
    translations: Sequence[str],
    references: Sequence[str],
    *,
    language: str,
    tokenised: bool = False,
) -> tuple[dict[str, float], dict[str, str]]:
    """Return "bleu" of detokenised text and `LOWER`, as fractions, and their signatures.

    Args:
        translations: What is judged.
        references: One for each.
        language: Of both, for detokenising ("en").
        tokenised: Whether both are in Moses' tokens, as IWSLT's prepared data is. They are joined
            by Moses' rules for "bleu", and compared as they are for `LOWER`; plain text is split
            by sacrebleu's own tokeniser, 13a, for both.

    Source: Post, "A Call for Clarity in Reporting BLEU Scores" (WMT 2018).
    """
    from sacrebleu.metrics.bleu import BLEU

    own = "none" if tokenised else "13a"
    lower = BLEU(lowercase=True, tokenize=own, force=True)
    plain = BLEU(tokenize="13a")
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
