"""Decoding one token after another: greedy, and a beam search over a batch, for any decoder.

A decoder is a function ``step(tokens [N], state) -> (log_probs [N, V], state)``. Its state is a
tensor with N rows, None, or a tuple of such states; the search repeats, reorders and drops rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

S = TypeVar("S")
Step = Callable[[Tensor, S], tuple[Tensor, S]]


@torch.inference_mode()
def search(
    step: Step[S],
    state: S,
    *,
    batch: int,
    start: int,
    end: int,
    longest: int,
    width: int = 1,
    length_penalty: float = 1.0,
    device: torch.device | str = "cpu",
) -> tuple[list[list[int]], list[float]]:
    """Return the best token sequence that a beam finds for every sentence, and its score.

    The score is the sum of log-probabilities over length ** ``length_penalty``, where the length
    counts the end. A sentence is finished when ``width`` of its hypotheses have ended, or when none
    of the open ones can still win. Where none has ended within ``longest`` tokens, the best open
    one is returned. A ``width`` of 1 is greedy decoding.

    Args:
        step: The decoder.
        state: Its state before the first token, with ``batch`` rows.
        batch: Sentences.
        start: The token that every sentence begins with; it is not returned.
        end: The token that ends a sentence; it is not returned.
        longest: Most tokens of a sentence, the end included.
        width: Open hypotheses of a sentence.
        length_penalty: 0 compares sums, 1 means; above 1 longer sentences win.
        device: Where the tokens live.

    Source: Wu et al., "Google's Neural Machine Translation System" (arXiv 1609.08144), section 7,
    with the plain power of the length in place of its formula.
    """
    if width == 1:
        tokens, totals = greedy(
            step, state, batch=batch, start=start, end=end, longest=longest, device=device
        )
        lengths = [min(len(one) + 1, longest) for one in tokens]
        return tokens, [t / n**length_penalty for t, n in zip(totals, lengths, strict=True)]
    beam = _Beam(batch, width, end, longest**length_penalty, torch.device(device))
    last = torch.full((batch * width,), start, device=device)
    state = _rows(state, torch.arange(batch, device=device).repeat_interleave(width))
    for length in range(1, longest + 1):
        log_probs, state = step(last, state)
        kept = beam.extend(log_probs, length**length_penalty)
        if not beam.open:
            break
        last, state = beam.last, _rows(state, kept)
    return beam.results()


@torch.inference_mode()
def greedy(
    step: Step[S],
    state: S,
    *,
    batch: int,
    start: int,
    end: int,
    longest: int,
    device: torch.device | str = "cpu",
) -> tuple[list[list[int]], list[float]]:
    """Return the likeliest next tokens of every sentence, and the sum of their log-probabilities.

    The arguments are those of `search`.
    """
    tokens: list[list[int]] = [[] for _ in range(batch)]
    totals = [0.0] * batch
    open_, last = list(range(batch)), torch.full((batch,), start, device=device)
    for _ in range(longest):
        log_probs, state = step(last, state)
        best, last = log_probs.max(-1)
        chosen = last.tolist()
        for sentence, token, value in zip(open_, chosen, best.tolist(), strict=True):
            totals[sentence] += value
            if token != end:
                tokens[sentence].append(token)
        going = [row for row, token in enumerate(chosen) if token != end]
        if not going:
            break
        if len(going) < len(open_):
            open_ = [open_[row] for row in going]
            rows = torch.tensor(going, device=device)
            last, state = last[rows], _rows(state, rows)
    return tokens, totals


class _Beam:
    """The hypotheses of a batch: `width` open ones a sentence, and the best that has ended.

    Args:
        batch: Sentences.
        width: Open hypotheses of a sentence.
        end: The token that ends one.
        largest: The largest divisor of a score: no open hypothesis can reach its sum over this.
        device: Where the tokens live.
    """

    def __init__(
        self, batch: int, width: int, end: int, largest: float, device: torch.device
    ) -> None:
        self.width, self.end, self.largest = width, end, largest
        self.open = list(range(batch))
        """The sentences not finished."""
        self.sums = torch.full((batch, width), -torch.inf, device=device)
        self.sums[:, 0] = 0  # the others only once there is something to tell them apart
        self.tokens = torch.zeros(batch, width, 0, dtype=torch.long, device=device)
        self.ended = [0] * batch
        self.best: list[tuple[float, list[int]]] = [(-torch.inf, [])] * batch

    @property
    def last(self) -> Int[Tensor, " rows"]:
        """The last token of every open hypothesis."""
        return self.tokens[..., -1].flatten()

    def extend(
        self, log_probs: Float[Tensor, "rows vocabulary"], divisor: float
    ) -> Int[Tensor, " kept_rows"]:
        """Go on by one token, and return the rows that the open hypotheses come from."""
        size = log_probs.shape[-1]
        totals = (self.sums[..., None] + log_probs.view(*self.sums.shape, size)).flatten(1)
        # Every hypothesis can end once: of twice as many, enough are left to go on.
        sums, places = totals.topk(min(2 * self.width, totals.shape[1]))
        parents, tokens = places // size, places % size
        ends = tokens == self.end
        self._note_ended(sums / divisor, parents, ends)
        sums, going = sums.masked_fill(ends, -torch.inf).topk(self.width)
        parents, tokens = parents.gather(1, going), tokens.gather(1, going)
        history = self.tokens.gather(1, parents[..., None].expand(-1, -1, self.tokens.shape[2]))
        self.sums, self.tokens = sums, torch.cat([history, tokens[..., None]], 2)
        return self._drop_finished(parents)

    def _note_ended(self, scores: Tensor, parents: Tensor, ends: Tensor) -> None:
        """Remember the best of those that end here, if they are among the `width` best."""
        valid = ends[:, : self.width] & scores[:, : self.width].isfinite()
        for row, rank in valid.nonzero().tolist():
            sentence, score = self.open[row], float(scores[row, rank])
            self.ended[sentence] += 1
            if score > self.best[sentence][0]:
                self.best[sentence] = score, self.tokens[row, parents[row, rank]].tolist()

    def _drop_finished(self, parents: Tensor) -> Int[Tensor, " kept_rows"]:
        reachable = (self.sums[:, 0] / self.largest).tolist()
        going = [
            row
            for row, sentence in enumerate(self.open)
            if self.ended[sentence] < self.width and reachable[row] > self.best[sentence][0]
        ]
        rows = torch.tensor(going, dtype=torch.long, device=parents.device)
        self.open = [self.open[row] for row in going]
        self.sums, self.tokens = self.sums[rows], self.tokens[rows]
        return (rows[:, None] * self.width + parents[rows]).flatten()

    def results(self) -> tuple[list[list[int]], list[float]]:
        """Return the best hypothesis of every sentence, and its score."""
        for row, sentence in enumerate(self.open):
            if not self.ended[sentence]:
                score = float(self.sums[row, 0]) / self.largest
                self.best[sentence] = score, self.tokens[row, 0].tolist()
        return [tokens for _, tokens in self.best], [score for score, _ in self.best]


def _rows(state: S, rows: Tensor) -> S:
    """Select rows of every tensor in a state."""
    if state is None:
        return state
    if isinstance(state, Tensor):
        return state.index_select(0, rows)  # type: ignore[return-value]
    assert isinstance(state, tuple)
    parts: list[Any] = [_rows(part, rows) for part in state]
    named = hasattr(state, "_fields")
    return type(state)(*parts) if named else tuple(parts)  # type: ignore[return-value]
