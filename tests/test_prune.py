import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpsearch.prune import prune

MASK = torch.tensor([[True, False, True], [True, False, True]])


def test_the_awake_weights_with_the_smallest_score_sleep():
    score = torch.tensor([[0.3, 0.0, 0.1], [0.2, 0.0, 0.2]])

    assert prune(MASK, score, 1).int().tolist() == [[1, 0, 0], [1, 0, 1]]
    assert prune(MASK, score, 2).int().tolist() == [[1, 0, 0], [1, 0, 0]]  # 0.2 twice: lower stays
    assert prune(MASK, score, 4).any().item() is False


def test_more_than_all_awake_weights_cannot_sleep():
    with pytest.raises(ValueError, match="the 4 awake"):
        prune(MASK, torch.zeros(2, 3), 5)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.data())
def test_pruning_removes_exactly_count_even_if_every_awake_weight_is_zero(awake, data):
    mask = torch.tensor(awake)
    count = data.draw(st.integers(0, awake.count(True)))
    pruned = prune(mask, torch.zeros(len(awake)), count)

    assert not (pruned & ~mask).any()
    assert pruned.sum() == mask.sum() - count
