import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gpsearch.groups import units, weights
from gpsearch.unit_masks import UnitMasks


def masks_of(model):
    """Return the unit masks of a model, and the masks they change."""
    found = weights(model)
    masks = {n: torch.ones_like(w.parameter, dtype=torch.bool) for n, w in found.items()}
    size = sum(w.size for w in found.values())

    def density():
        return sum(int(masks[name].sum()) for name in found) / size

    return UnitMasks(model, units(model, found), masks, density), masks


def test_the_units_with_the_smallest_scores_die_with_their_biases():
    units, masks = masks_of(nn.Linear(3, 4))
    units.prune(torch.tensor([0.3, 0.1, 0.2, 0.4]), 0.5)

    assert units.alive.tolist() == [True, False, False, True]
    assert masks["weight"].all(1).equal(units.alive)
    assert masks["bias"].equal(units.alive)


def test_scores_are_drawn_wherever_tensors_are_made_by_default():
    units, _ = masks_of(nn.Linear(3, 4))
    with torch.device("meta"):
        scores = units.random(torch.Generator())
    assert scores.device == units.alive.device


def test_of_equal_scores_the_lower_index_stays():
    units, _ = masks_of(nn.Linear(3, 4))
    units.prune(torch.ones(4), 0.5)

    assert units.alive.tolist() == [True, True, False, False]


def test_dead_units_with_the_largest_scores_wake_and_no_more_than_the_density_allows():
    units, masks = masks_of(nn.Linear(3, 4))
    units.prune(torch.tensor([4.0, 1.0, 2.0, 3.0]), 0.25)
    units.grow(torch.tensor([0.0, 5.0, 9.0, 7.0]), 0.8)

    assert units.alive.tolist() == [True, False, True, True]
    assert masks["weight"].float().mean() == 0.75


def test_a_units_score_is_the_root_mean_square_of_its_weights():
    model = nn.LSTM(1, 1, bias=False)
    units, _ = masks_of(model)
    ih, hh = torch.full((4, 1), 2.0), torch.full((4, 1), 4.0)

    # Its rows of both matrices, and the column that reads it: (4 x 2^2 + 4 x 4^2 + 4 x 4^2) / 12.
    assert units.scores({"weight_ih_l0": ih, "weight_hh_l0": hh}).item() == pytest.approx(12**0.5)


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(0, 100))
def test_densities_are_never_exceeded_and_no_family_dies_out(low, high, seed):
    units, masks = masks_of(nn.LSTM(3, 6, num_layers=2))
    random = torch.Generator().manual_seed(seed)
    scores = torch.rand(12, generator=random)
    size = sum(mask.numel() for name, mask in masks.items() if "weight" in name)

    def density():
        return sum(int(m.sum()) for n, m in masks.items() if "weight" in n) / size

    units.prune(scores, low)
    alive = units.alive.clone()
    assert alive[:6].any()
    assert alive[6:].any()
    assert density() <= low or alive.sum() == 2
    units.grow(torch.rand(12, generator=random), high)
    assert units.alive[alive].all()
    assert density() <= max(high, low) or alive.sum() == 2
