import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpsearch.tasks.ctc import beam_search, greedy

ALPHABET = ("", "A", "B")


def one_hot(path):
    """Return log-probabilities that leave no doubt about the outputs ``path``."""
    return torch.full((len(path), 3), -20.0).scatter(1, torch.tensor(path)[:, None], -1e-9)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ([0, 1, 1, 0, 2], "AB"),
        ([1, 0, 1], "AA"),
        ([1, 1, 1], "A"),
        ([0, 0], ""),
    ],
)
def test_repeats_collapse_and_blanks_vanish(path, text):
    assert greedy(one_hot(path)[None], None, ALPHABET) == [text]
    assert beam_search(one_hot(path), ALPHABET) == text


def test_greedy_stops_at_each_sequences_end():
    batch = torch.stack([one_hot([1, 2, 1]), one_hot([2, 1, 1])])

    assert greedy(batch, torch.tensor([3, 1]), ALPHABET) == ["ABA", "B"]


def test_the_beam_sums_alignments_that_the_best_path_does_not():
    # Best path: blank, blank (0.36). But "A" has three alignments: 0.24 + 0.24 + 0.16 = 0.64.
    log_probs = torch.tensor([[0.6, 0.4, 1e-9], [0.6, 0.4, 1e-9]]).log()

    assert greedy(log_probs[None], None, ALPHABET) == [""]
    assert beam_search(log_probs, ALPHABET) == "A"


def exhaustive(log_probs):
    """Sum every alignment of every text."""
    totals: dict[str, float] = {}
    for path in itertools.product(range(3), repeat=len(log_probs)):
        text = "".join(ALPHABET[c] for c, _ in itertools.groupby(path))
        probability = math.exp(sum(float(log_probs[t, c]) for t, c in enumerate(path)))
        totals[text] = totals.get(text, 0.0) + probability
    return totals


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(0, 10_000))
def test_a_wide_beam_finds_the_likeliest_text(steps, seed):
    random = torch.Generator().manual_seed(seed)
    log_probs = (2 * torch.randn(steps, 3, generator=random)).log_softmax(-1)
    totals = exhaustive(log_probs)

    found = beam_search(log_probs, ALPHABET, width=200, threshold=-math.inf)

    assert totals[found] == pytest.approx(max(totals.values()))
