import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpsearch.grow import gradients, grow

#        awake . awake
#        .   .   .
MASK = torch.tensor([[True, False, True], [False, False, False]])


def test_the_dormant_weights_with_the_largest_score_wake():
    score = torch.tensor([[9.0, 2.0, 9.0], [1.0, 4.0, 2.0]])

    assert grow(MASK, score, 1).int().tolist() == [[1, 0, 1], [0, 1, 0]]
    assert grow(MASK, score, 2).int().tolist() == [[1, 1, 1], [0, 1, 0]]  # 2.0 twice: lower index
    assert grow(MASK, score, 0).equal(MASK)


def test_more_than_all_dormant_weights_cannot_wake():
    with pytest.raises(ValueError, match="the 4 dormant"):
        grow(MASK, torch.zeros(2, 3), 5)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.data())
def test_growth_wakes_exactly_count_and_never_touches_an_awake_weight(awake, data):
    mask = torch.tensor(awake)
    count = data.draw(st.integers(0, awake.count(False)))
    grown = grow(mask, torch.rand(len(awake)), count)

    assert (grown & mask).equal(mask)
    assert grown.sum() == mask.sum() + count


def test_the_gradient_of_dormant_weights_is_that_of_the_masked_network():
    # loss = (w . x - 1)^2 with w = (2, 0): the gradient is 2 (w . x - 1) x, dormant or not.
    w = torch.nn.Parameter(torch.tensor([2.0, 0.0]))
    inputs = [torch.tensor([1.0, 3.0]), torch.tensor([2.0, -1.0])]
    losses = ((w @ x - 1) ** 2 for x in inputs)

    mean = gradients({"w": w}, losses)["w"]

    assert mean.tolist() == [(2 * 1 + 6 * 2) / 2, (2 * 3 + 6 * -1) / 2]
    assert w.grad is None
    assert w.tolist() == [2.0, 0.0]


def test_growth_can_look_at_the_first_batches_only():
    w = torch.nn.Parameter(torch.ones(1))
    losses = (w.sum() * k for k in (1.0, 2.0, 100.0))

    assert gradients({"w": w}, losses, batches=2)["w"].item() == 1.5


def test_no_batch_is_an_error():
    with pytest.raises(ValueError, match="no batch"):
        gradients({}, iter(()))
