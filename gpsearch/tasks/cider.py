"""CIDEr-D and BLEU of captions, by pycocoevalcap, on captions that are tokenised already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpsearch.errors import UserError

SIGNATURE = "pycocoevalcap, n-grams to 4, sigma 6, document frequencies of the split, x10"
"""How CIDEr-D is computed."""


def scorers() -> tuple[Any, Any]:
    """Return pycocoevalcap's classes for CIDEr-D and BLEU.

    Raises:
        UserError: It is not installed.
    """
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider_scorer import CiderScorer
    except ImportError:
        raise UserError(
            "captions are scored by pycocoevalcap, of gpsearch's extra captioning: pip install "
            "pycocoevalcap"
        ) from None
    return CiderScorer, BleuScorer


def scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return "cider_d" and "bleu_1" to "bleu_4" of captions.

    CIDEr-D goes from 0 to 10, as pycocoevalcap and the literature have it: 0.45 where some papers
    write 45. BLEU is a fraction.

    Args:
        captions: What is judged, words separated by spaces.
        references: People's captions, some for each.

    Raises:
        UserError: pycocoevalcap is not installed.

    Source: Vedantam et al., "CIDEr" (arXiv 1411.5726), section 5 for CIDEr-D.
    """
    cider, bleu = (scorer() for scorer in scorers())
    for caption, own in zip(captions, references, strict=True):
        cider += (caption, list(own))
        bleu += (caption, list(own))
    found, _ = bleu.compute_score(option="closest", verbose=0)
    fractions = {f"bleu_{n}": float(value) for n, value in enumerate(found, 1)}
    return {"cider_d": float(cider.compute_score()[0]), **fractions}
