"""Decoding CTC outputs: greedy, and a prefix beam search."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

BLANK = 0


def greedy(
    log_probs: Float[Tensor, "batch steps characters"],
    steps: Int[Tensor, " batch"] | None,
    alphabet: Sequence[str],
) -> list[str]:
    """Return the text of the best path: the likeliest output at every step, collapsed.

    Args:
        log_probs: Log-probabilities; output 0 is the blank.
        steps: Each sequence's length; None means all are full.
        alphabet: What every output stands for; the blank for "".
    """
    texts = []
    for row, path in enumerate(log_probs.argmax(-1)):
        kept = path if steps is None else path[: int(steps[row])]
        collapsed = kept.unique_consecutive().tolist()
        texts.append("".join(alphabet[c] for c in collapsed if c != BLANK))
    return texts


def beam_search(
    log_probs: Float[Tensor, "steps characters"],
    alphabet: Sequence[str],
    *,
    width: int = 16,
    threshold: float = -8.0,
) -> str:
    """Return the likeliest text, summed over all its alignments, that a beam of ``width`` finds.

    Args:
        log_probs: One sequence's log-probabilities; output 0 is the blank.
        alphabet: What every output stands for; the blank for "".
        width: Prefixes kept after every step.
        threshold: Outputs below this log-probability do not extend a prefix.

    Source: Hannun et al., "First-Pass Large Vocabulary Continuous Speech Recognition using
    Bi-Directional Recurrent DNNs" (arXiv 1408.2873), algorithm 1, without a language model.
    """
    # For every prefix the log-probabilities of its alignments that end in a blank, and that don't.
    beam: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    for row in log_probs.tolist():
        likely = [c for c, p in enumerate(row) if c != BLANK and p > threshold]
        grown: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [-math.inf, -math.inf])
        for prefix, (blank, other) in beam.items():
            both = _log_add(blank, other)
            same = grown[prefix]
            same[0] = _log_add(same[0], both + row[BLANK])
            if prefix:
                same[1] = _log_add(same[1], other + row[prefix[-1]])
            for c in likely:
                # A repeated character is a new one only after a blank.
                source = blank if prefix and c == prefix[-1] else both
                longer = grown[(*prefix, c)]
                longer[1] = _log_add(longer[1], source + row[c])
        ranked = sorted(grown.items(), key=lambda item: -_log_add(*item[1]))
        beam = {prefix: (scores[0], scores[1]) for prefix, scores in ranked[:width]}
    best = max(beam, key=lambda prefix: _log_add(*beam[prefix]))
    return "".join(alphabet[c] for c in best)


def _log_add(a: float, b: float) -> float:
    if a == -math.inf:
        return b
    if b == -math.inf:
        return a
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high))
