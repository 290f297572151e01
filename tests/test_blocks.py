import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpsearch.blocks import SHAPES, awake, fitting, pool, sizes, spread

MATRICES = st.tuples(st.integers(1, 40), st.integers(1, 10))
SHAPE = st.sampled_from(list(SHAPES.values()))


def test_a_block_is_rows_by_columns():
    assert SHAPES == {"element": (1, 1), "16x1": (16, 1), "8x1": (8, 1), "4x4": (4, 4)}


def test_a_blocks_score_is_the_root_mean_square_of_what_it_holds():
    score = torch.tensor([[3.0, 1.0, 2.0], [5.0, 1.0, 4.0], [6.0, 8.0, 7.0]])

    # Two rows of one column; the last row is all there is of the lower blocks.
    expected = torch.tensor([[17**0.5, 1.0, 10**0.5], [6.0, 8.0, 7.0]])
    torch.testing.assert_close(pool(score, (2, 1)), expected)
    assert pool(score, (1, 1)).equal(score)


def test_tiles_begin_at_the_first_row_and_column_and_may_be_smaller_at_the_edges():
    assert sizes((5, 3), (2, 2)).tolist() == [[4, 2], [4, 2], [2, 1]]

    blocks = torch.tensor([[True, False], [False, True], [True, False]])
    assert spread(blocks, (2, 2), (5, 3)).int().tolist() == [
        [1, 1, 0],
        [1, 1, 0],
        [0, 0, 1],
        [0, 0, 1],
        [1, 1, 0],
    ]


@pytest.mark.parametrize(
    ("weights", "count"), [(-1, 0), (0, 0), (1, 0), (2, 1), (3, 1), (5, 1), (6, 2), (7, 3), (9, 3)]
)
def test_blocks_fit_the_largest_score_first(weights, count):
    score, size = torch.tensor([0.1, 0.9, 0.5]), torch.tensor([1, 2, 4])

    assert fitting(score, size, size > 0, weights) == count


def test_of_equal_scores_the_lower_index_fits_first():
    everyone = torch.ones(3, dtype=torch.bool)

    assert fitting(torch.zeros(3), torch.tensor([4, 1, 1]), everyone, 3) == 0
    assert fitting(torch.zeros(3), torch.tensor([1, 1, 4]), everyone, 3) == 2


def test_only_the_blocks_asked_for_are_counted():
    score, among = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([False, True, True])

    assert fitting(score, torch.tensor([4, 4, 2]), among, 5) == 1
    assert fitting(score, torch.tensor([4, 4, 4]), among, 99) == 2


@settings(max_examples=50)
@given(MATRICES, SHAPE, st.integers(0, 2**31))
def test_a_mask_spread_over_the_weights_is_read_back(matrix, shape, seed):
    random = torch.Generator().manual_seed(seed)
    size = sizes(matrix, shape)
    blocks = torch.rand(size.shape, generator=random) < 0.5
    mask = spread(blocks, shape, matrix)

    assert mask.shape == matrix
    assert awake(mask, shape).equal(blocks)
    assert mask.sum() == size[blocks].sum()


@settings(max_examples=50)
@given(MATRICES, SHAPE, st.integers(0, 2**31))
def test_scores_keep_the_sum_of_squares(matrix, shape, seed):
    score = torch.rand(matrix, generator=torch.Generator().manual_seed(seed), dtype=torch.double)

    squares = pool(score, shape).square() * sizes(matrix, shape)
    torch.testing.assert_close(squares.sum(), score.square().sum())


@settings(max_examples=50)
@given(MATRICES, SHAPE, st.floats(0, 1.2), st.integers(0, 2**31))
def test_less_than_one_block_is_left_over(matrix, shape, share, seed):
    size = sizes(matrix, shape).flatten()
    score = torch.rand(len(size), generator=torch.Generator().manual_seed(seed))
    weights = round(share * int(size.sum()))
    among = torch.rand(len(size), generator=torch.Generator().manual_seed(seed + 1)) < 0.7
    count = fitting(score, size, among, weights)

    ranked = size[among][score[among].argsort(descending=True)]
    assert ranked[:count].sum() <= weights
    assert count == len(ranked) or weights < ranked[: count + 1].sum()
