import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpsearch.mask import connecting, shares, top_k


def test_ties_go_to_the_lower_index():
    score = torch.tensor([[1.0, 3.0, 3.0], [3.0, 0.0, 3.0]])

    assert top_k(score, 2).tolist() == [[False, True, True], [False, False, False]]
    assert top_k(score, 3).tolist() == [[False, True, True], [True, False, False]]


@given(st.lists(st.sampled_from([-torch.inf, -1.0, 0.0, -0.0, 2.5, torch.inf])), st.data())
def test_the_largest_are_marked_and_of_equal_ones_the_first(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    marked = top_k(torch.tensor(scores), count).nonzero().flatten()

    best_first = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    assert marked.tolist() == sorted(best_first[:count])


@pytest.mark.parametrize("count", [-1, 4])
def test_an_impossible_count_is_refused(count):
    with pytest.raises(ValueError, match="between 0 and 3"):
        top_k(torch.zeros(3), count)


def test_a_nan_score_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        top_k(torch.tensor([0.0, torch.nan]), 1)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.data())
def test_the_largest_random_scores_connect_as_many_neurons_as_they_can(rows, columns, seed, data):
    count = data.draw(st.integers(0, rows * columns))
    mask = top_k(connecting(rows, columns, torch.Generator().manual_seed(seed)), count)

    assert mask.any(1).sum() == min(count, rows)
    assert mask.any(0).sum() == min(count, columns)


def test_what_is_drawn_lies_with_its_generator_wherever_tensors_are_made_by_default():
    with torch.device("meta"):
        score = connecting(3, 4, torch.Generator().manual_seed(0))
    assert torch.equal(score, connecting(3, 4, torch.Generator().manual_seed(0)))


@given(st.lists(st.integers(1, 50), min_size=1), st.floats(0, 1))
def test_shares_add_up_exactly(sizes, density):
    counts = shares(sizes, density)

    assert sum(counts) == round(density * sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
