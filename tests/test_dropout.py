"""Dropout: how many elements fall, what is left of the others, and what flows back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpsearch.dropout import Dropout, dropout


@given(p=st.floats(0.01, 0.95), shape=st.sampled_from([(1,), (3, 5), (2, 7, 9)]))
def test_an_element_is_zero_or_scaled(p: float, shape: tuple[int, ...]) -> None:
    x = torch.rand(shape) + 1
    kept = (dropout(x, p) / x).unique()
    for factor in kept:
        assert factor == 0 or float(factor) == pytest.approx(1 / (1 - p), rel=1e-3)


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
def test_so_many_fall_wherever_they_stand_among_the_draws(p: float) -> None:
    torch.manual_seed(0)  # so that four sigmas are never passed by chance
    fallen = (dropout(torch.ones(100_000, 4), p) == 0).float()
    four_sigmas = 4 * (p * (1 - p) / 100_000) ** 0.5
    assert fallen.mean(0) == pytest.approx([p] * 4, abs=four_sigmas)
    # ... and independently: neighbours of one draw, and of two that follow one another.
    flat = fallen.flatten()
    for distance in (1, 2, 3, 4):
        together = float((flat[distance:] * flat[:-distance]).mean())
        assert together == pytest.approx(p * p, abs=four_sigmas)


def test_the_mean_stays() -> None:
    torch.manual_seed(0)
    assert float(dropout(torch.ones(10**6), 0.3).mean()) == pytest.approx(1, abs=3e-3)


def test_the_gradient_falls_with_its_element() -> None:
    x = torch.randn(50, 6, requires_grad=True)
    out = dropout(x, 0.4)
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), out.detach())


def test_a_seed_repeats_the_draws_and_the_next_ones_differ() -> None:
    torch.manual_seed(5)
    first, second = dropout(torch.ones(99), 0.5), dropout(torch.ones(99), 0.5)
    torch.manual_seed(5)
    assert torch.equal(dropout(torch.ones(99), 0.5), first)
    assert not torch.equal(first, second)


def test_nothing_falls_outside_training_or_at_zero() -> None:
    x = torch.randn(4, 4)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(dropout(x, 0.0), x)
    assert not torch.equal(Dropout(0.5)(x), x)


def test_all_shapes_and_types_of_torch_s_own() -> None:
    for x in (torch.ones(0, 3), torch.ones(()), torch.ones(5, dtype=torch.float64)):
        assert dropout(x, 0.5).shape == x.shape
        assert dropout(x, 0.5).dtype == x.dtype
    turned = torch.ones(4, 6).mT
    assert dropout(turned, 0.5).shape == (6, 4)


def test_the_ends_of_the_range_are_torch_s_own() -> None:
    assert torch.equal(dropout(torch.ones(9), 1.0), torch.zeros(9))
    for make in (Dropout, lambda p: dropout(torch.ones(1), p)):
        with pytest.raises(ValueError, match="probability"):
            make(1.5)


def test_elements_fall_where_they_are_wherever_tensors_are_made_by_default() -> None:
    x = torch.ones(9)
    with torch.device("meta"):
        dropped = dropout(x, 0.5)
    assert dropped.device == x.device


def test_each_of_many_functions_at_once_may_have_draws_of_its_own() -> None:
    torch.manual_seed(0)
    many = torch.vmap(lambda x: dropout(x, 0.5), randomness="different")(torch.ones(2, 99))
    assert not torch.equal(many[0], many[1])


def test_it_may_work_in_place() -> None:
    x = torch.ones(99)
    assert Dropout(0.5, inplace=True)(x) is x
    assert not x.all()
