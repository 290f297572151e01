import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gpsearch.block_masks import BlockMasks
from gpsearch.blocks import SHAPES, awake
from gpsearch.cell import HLSTM
from gpsearch.groups import groups, weights

STRUCTURES = st.sampled_from(list(SHAPES))
SCOPES = st.sampled_from(["matrix", "gates", "layer", "global"])
SHARES = st.floats(0, 1)
MODELS = {
    "linear": lambda: nn.Linear(5, 18),
    "conv": lambda: nn.Conv1d(3, 9, 3),
    "lstm": lambda: nn.LSTM(7, 9),
    "gru": lambda: nn.GRU(5, 17),
    "hlstm": lambda: HLSTM(5, 9, gate_hidden=(17,), gate_direct=True),
}


def masks_of(model, structure, scope="gates"):
    """Return the block masks of a model, and the masks they change."""
    found = weights(model)
    masks = {n: torch.ones_like(w.parameter, dtype=torch.bool) for n, w in found.items()}
    return BlockMasks(found, masks, structure, scope), masks


def matrices(model, mask_or_weight):
    """Yield every gate's matrix: of the parameters' rows, what each gate owns."""
    for weight in weights(model).values():
        yield from mask_or_weight[weight.name].flatten(1).chunk(weight.gates)


def tiles(matrix, shape):
    for rows in matrix.split(shape[0]):
        yield from rows.split(shape[1], 1)


def awake_in(masks, pieces):
    return sum(int(masks[name].flatten(1)[a:b].sum()) for name, a, b in pieces)


def test_the_blocks_with_the_smallest_weights_sleep():
    model = nn.Linear(2, 8, bias=False)
    blocks, masks = masks_of(model, "4x4")
    small, large = torch.full((4, 2), 0.1), torch.full((4, 2), 0.2)
    small[0, 0] = 0.25  # the largest of all, but alone
    blocks.prune(blocks.scores({"weight": torch.cat([small, large])}), 0.5)

    assert masks["weight"].int().tolist() == [[0, 0]] * 4 + [[1, 1]] * 4


def test_scores_are_drawn_wherever_tensors_are_made_by_default():
    blocks, masks = masks_of(nn.Linear(3, 8), "4x4")
    with torch.device("meta"):
        scores = blocks.random(torch.Generator())
    assert scores.device == masks["weight"].device


def test_the_dormant_blocks_with_the_largest_scores_wake():
    model = nn.Linear(3, 8, bias=False)
    blocks, masks = masks_of(model, "8x1")
    blocks.prune(torch.tensor([3.0, 1.0, 2.0]), 0.4)
    assert masks["weight"].int().tolist() == [[1, 0, 0]] * 8

    blocks.grow(torch.tensor([0.0, 1.0, 2.0]), 0.7)
    assert masks["weight"].int().tolist() == [[1, 0, 1]] * 8


def test_of_equal_scores_the_lower_index_stays_awake():
    blocks, masks = masks_of(nn.Linear(4, 8, bias=False), "8x1")
    blocks.prune(torch.ones(4), 0.5)

    assert masks["weight"].int().tolist() == [[1, 1, 0, 0]] * 8


def test_the_tiling_starts_anew_with_every_gate():
    # Gates of 3 rows: a 16x1 block is one gate's 3 rows of a column, never two gates' rows.
    blocks, masks = masks_of(nn.LSTM(1, 3), "16x1")
    score = torch.arange(4.0).repeat_interleave(3)[:, None]
    blocks.prune(blocks.scores({"weight_ih_l0": score, "weight_hh_l0": torch.rand(12, 3)}), 0.5)

    assert masks["weight_ih_l0"].flatten().int().tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_a_convolution_is_the_matrix_of_its_outputs_by_its_inputs_and_taps():
    blocks, masks = masks_of(nn.Conv1d(2, 8, 3, bias=False), "8x1")
    score = torch.zeros(8, 2, 3)
    score[:, 1, 2] = 1.0
    blocks.prune(blocks.scores({"weight": score}), 1 / 6)

    assert masks["weight"].equal(score.bool())


def test_single_weights_are_counted_exactly():
    blocks, masks = masks_of(nn.Linear(5, 7), "element")
    blocks.prune(torch.rand(35), 0.3)
    assert masks["weight"].sum() == round(0.3 * 35)


@pytest.mark.parametrize("structure", SHAPES)
def test_a_seed_connects_as_many_rows_and_columns_as_it_has_blocks(structure):
    model = HLSTM(20, 16, gate_hidden=(12,))
    blocks, masks = masks_of(model, structure)
    blocks.seed(0.4, torch.Generator().manual_seed(3))

    for matrix in matrices(model, masks):
        grid = awake(matrix, SHAPES[structure])
        assert grid.any(1).sum() == min(int(grid.sum()), grid.shape[0])
        assert grid.any(0).sum() == min(int(grid.sum()), grid.shape[1])


def test_a_seed_fills_what_its_group_has_room_for():
    # Gates of 8 x 6: 0.3 of one are 14.4 weights, a block of 8 and most of a second.
    blocks, masks = masks_of(nn.LSTM(6, 8), "8x1")
    blocks.seed(0.3, torch.Generator().manual_seed(0))

    assert masks["weight_ih_l0"].sum() == 56  # of at most 57.6, where 4 x 8 were


def test_as_many_blocks_of_every_size_wake_as_were_put_to_sleep():
    # Gates of 9 rows: of a column the first 8 are a block, and the last one is another.
    model = nn.LSTM(6, 9)
    blocks, masks = masks_of(model, "8x1")
    random = torch.Generator().manual_seed(0)
    blocks.seed(0.5, random)
    before = {name: mask.clone() for name, mask in masks.items()}
    blocks.prune(blocks.random(random), 0.2)
    slept = {name: mask.clone() for name, mask in masks.items()}
    blocks.regrow(blocks.random(random), before)

    for name, mask in masks.items():
        assert slept[name].sum() < before[name].sum() == mask.sum()
        assert (slept[name] <= mask).all()
        assert not mask.equal(before[name])


def test_random_scores_are_drawn_for_blocks_so_that_small_ones_have_the_same_chance():
    model = nn.Linear(1, 17)
    blocks, _ = masks_of(model, "16x1")
    random = torch.Generator().manual_seed(0)
    first = sum(int(blocks.random(random).argmax()) for _ in range(1000))

    assert 400 < first < 600


@settings(max_examples=40)
@given(st.sampled_from(list(MODELS)), STRUCTURES, SCOPES, SHARES, SHARES, st.integers(0, 1000))
def test_whatever_happens_blocks_are_whole_and_densities_kept_to_within_one(
    kind, structure, scope, low, high, seed
):
    model = MODELS[kind]()
    blocks, masks = masks_of(model, structure, scope)
    random = torch.Generator().manual_seed(seed)
    shape = SHAPES[structure]
    pieces = groups(weights(model), scope)

    blocks.seed(high, random)
    seeded = {name: mask.clone() for name, mask in masks.items()}
    blocks.prune(blocks.random(random), low)
    pruned = {name: mask.clone() for name, mask in masks.items()}
    blocks.grow(blocks.random(random), high)

    for matrix in matrices(model, masks):
        assert all(tile.all() or not tile.any() for tile in tiles(matrix, shape))
    for name, mask in masks.items():
        assert (pruned[name] <= seeded[name]).all()  # pruning wakes nothing
        assert (pruned[name] <= mask).all()  # growth puts nothing to sleep
    for group in pieces:
        size = sum(masks[name].flatten(1)[a:b].numel() for name, a, b in group)
        block = shape[0] * shape[1]
        reached = awake_in(pruned, group)
        assert reached <= round(low * size)
        assert reached > round(low * size) - block or reached == awake_in(seeded, group)
        grown = awake_in(masks, group)
        assert grown <= max(round(high * size), reached)
        assert grown > round(high * size) - block
