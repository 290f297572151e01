from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gpsearch.pareto import hypervolume, non_dominated

NAN, INF = math.nan, math.inf


def some_costs(largest: int = 12) -> st.SearchStrategy[np.ndarray]:
    """Small integers as floats, so that ties and duplicates are common; some NaNs."""
    value = st.integers(0, 4).map(float) | st.just(NAN)
    shape = st.tuples(st.integers(0, largest), st.integers(1, 4))
    return shape.flatmap(lambda size: arrays(float, size, elements=value))


#  cost 2
#  3 |  a
#  2 |     .  d
#  1 |     b  e
#    +--1--2--3   cost 1
def test_a_row_is_on_the_front_if_none_is_better_at_no_loss() -> None:
    a, b, d, e = (1.0, 3.0), (2.0, 1.0), (3.0, 2.0), (3.0, 1.0)
    assert non_dominated(np.array([a, b, d, e])).tolist() == [True, True, False, False]


def test_equal_rows_all_stay() -> None:
    costs = np.array([[1.0, 2.0], [1.0, 2.0], [2.0, 2.0]])
    assert non_dominated(costs).tolist() == [True, True, False]


def test_a_row_with_a_gap_is_never_on_the_front_and_keeps_nobody_off_it() -> None:
    costs = np.array([[0.0, NAN], [1.0, 1.0], [2.0, NAN]])
    assert non_dominated(costs).tolist() == [False, True, False]


def test_an_infinite_cost_is_only_very_bad() -> None:
    assert non_dominated(np.array([[0.0, INF], [1.0, INF]])).tolist() == [True, False]


def test_no_rows_have_an_empty_front() -> None:
    assert non_dominated(np.empty((0, 3))).tolist() == []


@settings(max_examples=100)
@given(some_costs())
def test_the_front_is_that_of_the_definition(costs: np.ndarray) -> None:
    def dominates(p: np.ndarray, q: np.ndarray) -> bool:
        return all(x <= y for x, y in zip(p, q, strict=True)) and any(
            x < y for x, y in zip(p, q, strict=True)
        )

    expected = [
        not np.isnan(q).any() and not any(dominates(p, q) for p in costs if not np.isnan(p).any())
        for q in costs
    ]
    assert non_dominated(costs).tolist() == expected


def test_the_hypervolume_is_the_area_under_a_staircase() -> None:
    costs = np.array([[1.0, 3.0], [2.0, 1.0], [3.0, 2.0], [9.0, 0.0], [NAN, 0.0]])
    # Against (4, 4): 3 x 1 above y = 3, then 2 x 2 down to y = 1; the last two lie outside.
    assert hypervolume(costs, np.array([4.0, 4.0])) == 7


def test_the_hypervolume_of_one_point_is_its_box() -> None:
    assert hypervolume(np.array([[1.0, 1.0, 1.0, 1.0]]), np.full(4, 3.0)) == 16


def test_the_hypervolume_of_nothing_is_zero() -> None:
    assert hypervolume(np.empty((0, 2)), np.array([1.0, 1.0])) == 0


@settings(max_examples=50)
@given(some_costs(7))
def test_the_hypervolume_counts_the_unit_cells_below(costs: np.ndarray) -> None:
    reference = np.full(costs.shape[1], 5.0)
    cells = np.stack(np.meshgrid(*[np.arange(5.0)] * costs.shape[1]), -1).reshape(
        -1, costs.shape[1]
    )
    covered = (costs[:, None] <= cells[None]).all(axis=2).any(axis=0).sum()
    assert hypervolume(costs, reference) == pytest.approx(covered)
