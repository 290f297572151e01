"""A table of log-probabilities is the decoder: what comes next depends on all that came before."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpsearch.tasks.beam import greedy, search

START, END = 0, 1


class Seen(NamedTuple):
    """What the decoder has read: a number for the tokens so far, and the sentence it belongs to."""

    prefix: Tensor
    sentence: tuple[Tensor, ...]


class Table:
    """Draws the log-probabilities of every prefix of every sentence at random, and keeps them."""

    def __init__(self, seed: int, vocabulary: int, sharpness: float = 1.0) -> None:
        self.seed, self.vocabulary, self.sharpness = seed, vocabulary, sharpness
        self.calls = 0

    def row(self, sentence: int, prefix: int) -> Tensor:
        random = torch.Generator().manual_seed(self.seed + 1009 * sentence + 7919 * prefix)
        scores = torch.randn(self.vocabulary, generator=random, dtype=torch.double)
        return (self.sharpness * scores).log_softmax(-1)

    def start(self, batch: int) -> Seen:
        return Seen(torch.zeros(batch, dtype=torch.long), (torch.arange(batch),))

    def step(self, tokens: Tensor, seen: Seen) -> tuple[Tensor, Seen]:
        self.calls += 1
        prefix = seen.prefix * (self.vocabulary + 1) + tokens + 1
        pairs = zip(seen.sentence[0].tolist(), prefix.tolist(), strict=True)
        return torch.stack([self.row(*pair) for pair in pairs]), Seen(prefix, seen.sentence)

    def total(self, sentence: int, tokens: tuple[int, ...]) -> float:
        """Return the log-probability of a sequence, its end included where it stands there."""
        prefix, total = START + 1, 0.0
        for token in tokens:
            total += float(self.row(sentence, prefix)[token])
            prefix = prefix * (self.vocabulary + 1) + token + 1
        return total


def exhaustive(table: Table, sentence: int, longest: int, penalty: float) -> float:
    """Return the best score of all sequences that end within ``longest`` tokens."""
    others = [token for token in range(table.vocabulary) if token != END]
    ended = [(*body, END) for length in range(longest) for body in product(others, repeat=length)]
    return float(max(table.total(sentence, one) / len(one) ** penalty for one in ended))


tables = st.builds(Table, st.integers(0, 10_000), st.integers(2, 4), st.sampled_from([0.5, 3.0]))


@settings(max_examples=15)
@given(tables, st.integers(1, 4), st.sampled_from([0.0, 0.6, 1.0, 1.5]), st.integers(1, 3))
def test_a_beam_as_wide_as_the_space_finds_the_best_of_all_sequences(
    table, longest, penalty, batch
):
    found, scores = search(
        table.step, table.start(batch), batch=batch, start=START, end=END,
        width=2 + table.vocabulary**longest, longest=longest, length_penalty=penalty,
    )  # fmt: skip
    for sentence in range(batch):
        assert scores[sentence] == pytest.approx(exhaustive(table, sentence, longest, penalty))
        whole = (*found[sentence], END)
        assert scores[sentence] == pytest.approx(
            table.total(sentence, whole) / len(whole) ** penalty
        )


@settings(max_examples=15)
@given(tables, st.integers(1, 6), st.integers(1, 4), st.sampled_from([0.0, 1.0]))
def test_a_sentence_comes_out_the_same_alone_and_in_a_batch(table, longest, width, penalty):
    options = {
        "start": START, "end": END, "width": width, "longest": longest, "length_penalty": penalty
    }  # fmt: skip
    together = search(table.step, table.start(3), batch=3, **options)
    for sentence in range(3):
        state = Seen(torch.zeros(1, dtype=torch.long), (torch.tensor([sentence]),))
        [tokens], [score] = search(table.step, state, batch=1, **options)
        assert together[0][sentence] == tokens
        assert together[1][sentence] == pytest.approx(score)


@settings(max_examples=15)
@given(tables, st.integers(1, 6))
def test_greedy_takes_the_likeliest_token_until_the_end(table, longest):
    [tokens], [total] = greedy(
        table.step, table.start(1), batch=1, start=START, end=END, longest=longest
    )
    prefix, expected = START + 1, list[int]()
    while len(expected) < longest and END not in expected:
        expected.append(int(table.row(0, prefix).argmax()))
        prefix = prefix * (table.vocabulary + 1) + expected[-1] + 1
    assert tokens == [token for token in expected if token != END]
    assert total == pytest.approx(table.total(0, tuple(expected)))


class Sure(Table):
    """Knows that every sentence is empty."""

    def row(self, sentence: int, prefix: int) -> Tensor:
        return torch.tensor([0.0, 1.0, 0.0], dtype=torch.double).log()


def fixed(rows: list[list[float]]):
    """Return a decoder with these probabilities at its first, second, ... step."""

    def step(tokens: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor(rows)[at].log(), at + 1

    return step, torch.zeros(1, dtype=torch.long)


def test_a_beam_finds_what_greedy_misses():
    # Token 2 looks best, but the only way on from it is unlikely; token 3 ends well.
    def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        after = {0: [0, 0, 0.6, 0.4], 2: [0.25] * 4, 3: [0, 1, 0, 0]}
        return torch.tensor([after[int(t)] for t in tokens]).log(), state

    options: dict[str, Any] = {"batch": 1, "start": 0, "end": 1, "longest": 2}
    assert search(step, torch.zeros(1), **options, width=1)[0] == [[2, 0]]
    found, [score] = search(step, torch.zeros(1), **options, width=2)
    assert found == [[3]]
    assert score == pytest.approx(float(torch.tensor(0.4).log()) / 2)


def test_the_length_penalty_lets_longer_sentences_win():
    step, state = fixed([[0.0, 0.45, 0.55], [0.0, 0.8, 0.2], [0.0, 1.0, 0.0]])
    lengths = [
        len(
            search(step, state, batch=1, start=0, end=1, width=4, longest=3, length_penalty=p)[0][0]
        )
        for p in (0.0, 1.0)
    ]
    assert lengths == [0, 1]


def test_what_never_ends_is_cut_at_the_longest():
    step, state = fixed([[0.0, 0.0, 0.3, 0.7]] * 3)
    for width in (1, 2):
        found, [score] = search(step, state, batch=1, start=0, end=1, width=width, longest=3)
        assert found == [[3, 3, 3]]
        assert score == pytest.approx(float(torch.tensor(0.7).log()))


def test_the_search_stops_when_no_open_hypothesis_can_win():
    table = Sure(0, 3)
    for width in (1, 2):
        table.calls = 0
        found, _ = search(
            table.step, table.start(2), batch=2, start=START, end=END, width=width, longest=50
        )
        assert found == [[], []]
        assert table.calls == 1
