import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from gpsearch import blocks
from gpsearch.blocks import SHAPES, spread
from gpsearch.cell import HLSTM
from gpsearch.compact import compact
from gpsearch.errors import Unsupported, UserError
from gpsearch.groups import groups, weights
from gpsearch.growprune import GrowPrune, sketch
from gpsearch.schedule import GMP, GP, SET, Dense, RigL, Selfish

UNITS_GROW_ONCE = GP(
    structure="row_column", seed_density=0.3, grow_start=0.5, grow_end=0.5,
    prune_start=0.9, prune_end=0.9,
)  # fmt: skip


def losses(model, count=3):
    """Return a function that gives one pass of losses, as a training loop would."""
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(5, 4, 6, generator=random) for _ in range(count)]

    def one_pass():
        for x in inputs:
            y = model(x)
            yield (y[0] if isinstance(y, tuple) else y).square().mean()

    return one_pass


def a_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8))


def step(model, optimizer, batches):
    for loss in batches():
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def awake(masks):
    return {name: mask.clone() for name, mask in masks.masks.items()}


def dormant_weights(model, masks):
    return torch.cat([model.get_parameter(n)[~m].flatten() for n, m in masks.masks.items()])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 12),
    "conv": lambda: nn.Conv1d(4, 8, 3),
    "embedding": lambda: nn.Embedding(20, 6),
    "lstm": lambda: nn.LSTM(6, 8, 2, bidirectional=True),
    "projected lstm": lambda: nn.LSTM(6, 8, proj_size=3),
    "gru": lambda: nn.GRU(6, 8),
    "hlstm": lambda: HLSTM(6, 8, gate_hidden=(7, 5), gate_direct=True),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scope", ["matrix", "gates", "layer", "global"])
def test_counts_are_exact_for_any_module_and_scope(kind, scope):
    model = MODELS[kind]()
    masks = GrowPrune(model, None, GMP(final_density=0.3, scope=scope, prune_start=0.0), 4)
    size = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    masks.update(3, lambda: iter(()))

    # The last step of the window reaches 0.3; every group rounds once.
    groups = {"matrix": 4 * len(masks.masks), "gates": len(masks.masks), "layer": 4, "global": 1}
    assert abs(masks.nonzeros - 0.3 * size) <= 0.5 * groups[scope]
    assert masks.nonzeros == sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() > 1)


def test_the_scope_decides_what_competes():
    # Gate 0 of this tiny LSTM has only large weights, gate 3 only small ones.
    lstm = nn.LSTM(2, 1, bias=False)
    with torch.no_grad():
        lstm.get_parameter("weight_ih_l0").copy_(
            torch.tensor([[8.0, 7.0], [6.0, 5.0], [4.0, 3.0], [2.0, 1.0]])
        )

    def kept(scope):
        lstm_copy = nn.LSTM(2, 1, bias=False)
        lstm_copy.load_state_dict(lstm.state_dict())
        schedule = GMP(final_density=0.5, scope=scope, prune_start=0.0, prune_end=0.0)
        masks = GrowPrune(lstm_copy, None, schedule, 1, prunable=lambda n: n == "weight_ih_l0")
        masks.update(0, lambda: iter(()))
        return masks.masks["weight_ih_l0"].int().tolist()

    assert kept("matrix") == [[1, 0], [1, 0], [1, 0], [1, 0]]
    assert kept("gates") == [[1, 1], [1, 1], [0, 0], [0, 0]]


def test_the_seed_is_sparse_and_every_neuron_is_connected():
    model = HLSTM(20, 16, gate_hidden=(12,))
    masks = GrowPrune(model, None, GP(seed_density=0.2, final_density=0.1), 10, seed=3)

    assert masks.density == pytest.approx(0.2, abs=1e-3)
    for name, mask in masks.masks.items():
        gates = mask.view(4, -1, mask.shape[1])
        assert gates.any(1).all(), name
        assert gates.any(2).all(), name


def test_growth_wakes_the_weights_with_the_largest_mean_gradient_at_zero():
    model = a_model()
    optimizer = torch.optim.Adam(model.parameters())
    schedule = GP(
        seed_density=0.3, peak_density=0.5, final_density=0.2, grow_start=0.0, grow_end=0.0
    )
    masks = GrowPrune(model, optimizer, schedule, 10)
    before = awake(masks)
    batches = losses(model)
    mean = torch.autograd.grad(sum(batches()) / 3, model[0].weight)[0].abs()

    masks.update(0, batches)

    woken = masks.masks["0.weight"] & ~before["0.weight"]
    left = ~masks.masks["0.weight"]
    assert woken.sum() == round(0.5 * 60) - round(0.3 * 60)
    assert mean[woken].min() >= mean[left].max()
    assert not model[0].weight[woken].any()


def test_grown_weights_can_start_one_gradient_step_away():
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = GP(
        seed_density=0.3, final_density=0.2, grow_start=0.0, grow_end=0.0, grown_init="step"
    )
    masks = GrowPrune(model, optimizer, schedule, 10)
    before = awake(masks)
    slope = torch.autograd.grad(sum(losses(model)()) / 3, model[0].weight)[0]

    masks.update(0, losses(model))

    woken = masks.masks["0.weight"] & ~before["0.weight"]
    assert woken.any()
    torch.testing.assert_close(model[0].weight[woken].detach(), -0.5 * slope[woken])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1),
    "asgd": lambda p: torch.optim.ASGD(p, 0.1, t0=0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_dormant_weights_and_their_moments_stay_exactly_zero(optimizer):
    model = a_model()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    masks = GrowPrune(model, optimizer, GP(), 10)
    for epoch in range(10):
        masks.update(epoch, losses(model))
        step(model, optimizer, losses(model))
        assert not dormant_weights(model, masks).any()
        for name, mask in masks.masks.items():
            for moment in optimizer.state[model.get_parameter(name)].values():
                if torch.is_tensor(moment) and moment.shape == mask.shape:
                    assert not moment[~mask].any()
    assert masks.density == pytest.approx(0.1, abs=0.01)


def test_clipping_sees_only_the_awake_weights():
    model = a_model()
    masks = GrowPrune(model, None, SET(final_density=0.2), 10)
    next(losses(model)()).backward()

    for name, mask in masks.masks.items():
        assert not model.get_parameter(name).grad[~mask].any()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_gradients_that_are_differentiated_again_are_masked_ones():
    model = a_model()
    masks = GrowPrune(model, None, GMP(final_density=0.5), 1)
    masks._prune(0.5)
    masks.hold()
    x = torch.randn(5, 6)
    model(x).square().mean().backward(create_graph=True)
    slopes = {name: p.grad for name, p in model.named_parameters() if name in masks.masks}
    awake = sum(slope.sum() for slope in slopes.values())
    masked = sum((s * masks.masks[name]).sum() for name, s in slopes.items())
    weights = [model.get_parameter(name) for name in slopes]
    both = [torch.autograd.grad(one, weights, retain_graph=True) for one in (awake, masked)]
    for own, wanted in zip(*both, strict=True):
        torch.testing.assert_close(own, wanted)
        assert wanted.abs().max() > 0


def test_an_average_of_the_weights_is_held_too():
    model = a_model()
    average = torch.optim.swa_utils.AveragedModel(model)  # every weight is still awake
    masks = GrowPrune(model, None, SET(final_density=0.2), 10)

    masks.hold(average.module)

    assert not dormant_weights(average.module, masks).any()


def test_rewiring_takes_the_gradient_before_it_prunes():
    model, seen = a_model(), []
    masks = GrowPrune(model, None, RigL(final_density=0.5), 8)

    def one_pass():
        seen.append(model[0].weight.detach().clone())
        yield from losses(model)()

    before = model[0].weight.detach().clone()
    masks.update(1, one_pass)

    assert len(seen) == 1
    assert seen[0].equal(before)
    assert not model[0].weight.equal(before)


@pytest.mark.parametrize("schedule", [SET(), RigL(), Selfish()])
def test_rewiring_keeps_the_count_of_every_group(schedule):
    model = nn.LSTM(6, 8)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    masks = GrowPrune(model, optimizer, schedule, 8)
    counts = {name: int(mask.sum()) for name, mask in masks.masks.items()}
    moved = 0
    for epoch in range(8):
        before = awake(masks)
        masks.update(epoch, losses(model))
        moved += sum(int((before[n] != m).sum()) for n, m in masks.masks.items())
        step(model, optimizer, losses(model))
        assert {name: int(mask.sum()) for name, mask in masks.masks.items()} == counts
    assert moved > 0


@pytest.mark.parametrize("structure", ["16x1", "8x1", "4x4"])
@pytest.mark.parametrize("schedule", [GP, GMP, SET, RigL, Selfish])
def test_blocks_live_and_die_whole_under_every_schedule(schedule, structure):
    torch.manual_seed(0)
    model = HLSTM(6, 18, gate_hidden=(17,), gate_direct=True)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
    chosen = schedule(final_density=0.3, structure=structure)
    masks = GrowPrune(model, optimizer, chosen, 8)
    batches, shape = losses(model, 2), SHAPES[structure]
    first, moved = torch.stack([*batches()]).sum(), 0
    for epoch in range(8):
        before = awake(masks)
        masks.update(epoch, batches)
        moved += sum(int((before[n] != m).sum()) for n, m in masks.masks.items())
        step(model, optimizer, batches)
        for name, mask in masks.masks.items():
            assert model.get_parameter(name).detach().bool().le(mask).all(), name
            for gate in mask.chunk(4):
                assert spread(blocks.awake(gate, shape), shape, gate.shape).equal(gate)

    # Below the density, by less than a block for each group of weights that compete.
    competing = len(groups(weights(model), chosen.scope))
    left = 0.3 * sum(mask.numel() for mask in masks.masks.values()) - masks.nonzeros
    assert -0.5 * competing <= left < (shape[0] * shape[1] - 0.5) * competing
    assert moved > 0
    assert torch.stack([*batches()]).sum() < first


@pytest.mark.parametrize("structure", ["16x1", "8x1", "4x4"])
@pytest.mark.parametrize("schedule", [SET, RigL, Selfish])
def test_rewiring_blocks_keeps_the_count_of_weights(schedule, structure):
    torch.manual_seed(0)
    model = HLSTM(6, 18, gate_hidden=(17,), gate_direct=True)  # edges are smaller blocks
    masks = GrowPrune(model, None, schedule(final_density=0.3, structure=structure), 8)
    counts, moved = {masks.nonzeros}, False
    for epoch in range(8):
        before = awake(masks)
        masks.update(epoch, losses(model))
        counts.add(masks.nonzeros)
        moved |= any(not before[n].equal(m) for n, m in masks.masks.items())

    assert len(counts) == 1
    assert moved


def test_an_average_computes_with_the_weights_that_are_awake_now():
    torch.manual_seed(0)
    model, x = HLSTM(8, 32, gate_hidden=(32,)), torch.randn(6, 16, 8)
    masks = GrowPrune(model, None, SET(final_density=0.1), 4)
    average = torch.optim.swa_utils.AveragedModel(model)
    masks.update(2, losses(model))  # other weights are awake now
    with torch.no_grad():
        for name, mask in masks.masks.items():
            model.get_parameter(name).copy_(torch.randn(mask.shape) * mask)
    average.module.load_state_dict(model.state_dict())
    masks.hold(average.module)

    torch.testing.assert_close(average.module(x)[0], model(x)[0])


def test_what_is_compact_while_masks_are_held_is_small_and_equal():
    torch.manual_seed(0)
    model, x = HLSTM(8, 32, gate_hidden=(32,)), torch.randn(6, 64, 8)
    GrowPrune(model, None, GP(seed_density=0.08, final_density=0.05, structure="row_column"), 4)
    small = compact(model)

    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(small(x)[0], model(x)[0])


def test_growing_leaves_the_gradients_as_they_were():
    model = a_model()
    masks = GrowPrune(model, None, GP(seed_density=0.3), 10)
    torch.stack([*losses(model)()]).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}

    update = masks.update(1, losses(model))
    assert update is not None
    assert update.event == "grow"
    for name, parameter in model.named_parameters():
        assert parameter.grad.equal(before[name])


def test_weights_with_two_names_are_masked_once():
    embedding, output = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
    output.weight = embedding.weight
    model = nn.Sequential(embedding, output)
    masks = GrowPrune(model, None, GMP(final_density=0.5), 4)
    masks.update(3, lambda: iter(()))

    assert list(masks.masks) == ["0.weight"]
    assert int(output.weight.count_nonzero()) == masks.nonzeros < 60


@pytest.mark.parametrize(
    ("model", "schedule", "message"),
    [
        (nn.Linear(3, 2), "gpx", "schedule 'gpx' is unknown; one of gp, gmp"),
        (
            nn.LSTMCell(3, 2),
            GP(structure="row_column"),
            "takes whole units, .* choose another structure",
        ),
        (nn.LSTM(3, 4, proj_size=2), GP(structure="row_column"), "use proj_size=0"),
    ],
)
def test_what_cannot_be_grown_and_pruned_says_why(model, schedule, message):
    with pytest.raises(UserError, match=message):
        GrowPrune(model, None, schedule, 4)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm])
@pytest.mark.parametrize("layer", [nn.Linear(4, 3), HLSTM(4, 3, gate_hidden=(2,))])
def test_what_weight_norm_makes_weights_of_is_not_pruned(norm, layer):
    name = "weight" if isinstance(layer, nn.Linear) else "weight_gate_hh_l0"
    model = nn.Sequential(nn.Linear(4, 4), norm(copy.deepcopy(layer), name))
    optimizer = torch.optim.SGD(model.parameters())

    with pytest.raises(Unsupported, match=r"1\..*: weights are computed of it .* leave it out"):
        GrowPrune(model, optimizer, "gp", 4)
    GrowPrune(model, optimizer, "dense", 4)
    masks = GrowPrune(model, optimizer, "gp", 4, prunable=lambda name: name.startswith("0."))
    assert list(masks.masks) == ["0.weight"]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_is_only_called_like_that_is_pruned():
    model = weight_norm(nn.LSTM(3, 4, bidirectional=True), "weight_hh_l0")
    model.weight_ih = torch.arange(4.0)  # no weight is made of it
    of_reverse = GrowPrune(model, None, "gp", 4, prunable=lambda name: "reverse" in name)
    of_inputs = GrowPrune(model, None, "gp", 4, prunable=lambda name: name == "weight_ih_l0")

    assert sorted(of_reverse.masks) == ["weight_hh_l0_reverse", "weight_ih_l0_reverse"]
    assert list(of_inputs.masks) == ["weight_ih_l0"]


def test_the_optimizer_is_the_one_that_steps_all_prunable_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    first, last = (torch.optim.SGD(layer.parameters()) for layer in model)

    with pytest.raises(UserError, match=r"1\.weight is in no group of the optimizer"):
        GrowPrune(model, first, "gp", 4)
    GrowPrune(model, first, "gp", 4, prunable=lambda name: name.startswith("0."))
    GrowPrune(model, last, "gp", 4, prunable=lambda name: name.startswith("1."))


def test_a_model_with_nothing_to_prune_is_left_alone():
    model = nn.BatchNorm1d(4)
    masks = GrowPrune(model, None, GMP(prune_start=0.0), 4)
    masks.update(3, lambda: iter(()))

    assert masks.density == 1.0


def test_dense_masks_nothing():
    assert GrowPrune(a_model(), None, Dense(), 5).density == 1.0


def test_a_network_that_does_not_recover_is_exchanged_for_the_last_good_one():
    model = a_model()
    schedule = GMP(final_density=0.1, prune_start=0.25, prune_end=0.75, tolerance=0.05)
    masks = GrowPrune(model, torch.optim.Adam(model.parameters()), schedule, 8)
    errors = [None, 0.30, 0.20, 0.22, 0.40, 0.10, 0.10, 0.10]  # after each epoch but the last
    events, densities, weights, phases = [], [], [], []
    for epoch, error in enumerate(errors):
        update = masks.update(epoch, losses(model), error)
        events.append(update.event if update else "")
        phases.append(masks.phase(epoch))
        if update is not None:
            assert update.error == (0.22 if update.event == "restore" else None)
        densities.append(masks.density)
        weights.append(model[0].weight.detach().clone())

    assert events == ["", "", "prune", "prune", "restore", "", "", ""]
    assert phases == ["dense"] * 2 + ["prune"] * 2 + ["retrain"] * 4
    assert densities[4:] == [densities[2]] * 4  # the network before the step that did not recover
    assert weights[4].equal(weights[2])


@pytest.mark.parametrize(
    ("bad", "good"),  # epochs before which the error is too high, and which the last good one began
    [(4, 3), (6, 4)],
    ids=["after a cycle's pruning", "after the next one's growth"],
)
def test_a_cycle_that_goes_wrong_is_exchanged_for_the_last_good_network(bad, good):
    model = a_model()
    schedule = GP(
        cycles=2, tolerance=0.05, grow_start=0.0, grow_end=0.25, prune_start=0.5, prune_end=0.75,
        final_density=0.1,
    )  # fmt: skip
    masks = GrowPrune(model, torch.optim.Adam(model.parameters()), schedule, 8)
    events, before = [], []
    for epoch in range(8):
        before.append((masks.density, model[0].weight.detach().clone()))
        update = masks.update(epoch, losses(model), 0.9 if epoch == bad else 0.2)
        events.append(update.event if update else "")
        if epoch == bad:
            assert masks.density == before[good][0]
            assert model[0].weight.equal(before[good][1])
        step(model, masks.optimizer, losses(model))

    usual = ["grow", "grow", "prune", "prune"] * 2
    assert events == [*usual[:bad], "restore", *[""] * (7 - bad)]


class TestWholeUnits:
    def test_a_gates_hidden_unit_dies_with_its_inputs_bias_and_readers(self):
        model = HLSTM(5, 4, gate_hidden=(6,))
        schedule = GMP(final_density=0.5, structure="row_column", prune_start=0.0, prune_end=0.0)
        masks = GrowPrune(model, None, schedule, 1)
        masks.update(0, lambda: iter(()))

        assert 0.3 < masks.density <= 0.5
        inputs = masks.masks["weight_gate_ih_l0"].view(4, 6, 5)
        states = masks.masks["weight_gate_hh_l0"].view(4, 6, 4)
        biases = masks.masks["bias_gate_l0"].view(4, 6)
        readers = masks.masks["weight_gate1_l0"].view(4, 4, 6)
        alive = inputs.any(2)
        assert alive.equal(inputs.all(2))
        assert not states[~alive].any()
        assert alive.equal(biases)
        assert not readers.transpose(1, 2)[~alive].any()
        assert not alive.all()

    def test_a_state_unit_dies_in_all_four_gates(self):
        lstm = nn.LSTM(3, 8)
        schedule = GMP(final_density=0.4, structure="row_column", prune_start=0.0, prune_end=0.0)
        masks = GrowPrune(lstm, None, schedule, 1)
        masks.update(0, lambda: iter(()))

        rows = masks.masks["weight_ih_l0"].view(4, 8, 3).any(2)
        assert rows.equal(rows[:1].expand(4, 8))
        assert masks.masks["weight_hh_l0"].any(0).equal(rows[0])
        dead = int((~rows[0]).sum())
        assert dead > 0
        assert lstm.get_parameter("bias_ih_l0").view(4, 8)[:, ~rows[0]].count_nonzero() == 0

    def test_gp_seeds_grows_and_prunes_units_and_leaves_none_empty(self):
        model = HLSTM(6, 8, gate_hidden=(8,))
        schedule = GP(structure="row_column", final_density=0.2)
        masks = GrowPrune(model, None, schedule, 20)
        densities = []
        for epoch in range(20):
            masks.update(epoch, losses(model))
            densities.append(masks.density)

        assert densities[0] < densities[6] > densities[-1]
        assert densities[-1] <= 0.2
        assert masks.masks["bias_gate_l0"].view(4, 8).any(1).all()

    def test_a_woken_gate_unit_learns(self):
        torch.manual_seed(0)
        model = HLSTM(6, 8, gate_hidden=(8,))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        masks = GrowPrune(model, optimizer, UNITS_GROW_ONCE, 4)
        before = masks.masks["bias_gate_l0"].clone()
        for epoch in range(3):
            masks.update(epoch, losses(model))
            step(model, optimizer, losses(model))

        woken = masks.masks["bias_gate_l0"] & ~before
        assert woken.any()
        readers = model.get_parameter("weight_gate1_l0").view(4, 8, 8).transpose(1, 2)
        assert readers.reshape(32, 8)[woken].any(1).all()

    def test_a_woken_row_learns_though_a_relu_reads_it(self):
        torch.manual_seed(0)
        first = nn.Linear(6, 16)
        model = nn.Sequential(first, nn.ReLU(), nn.Linear(16, 2))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        masks = GrowPrune(model, optimizer, UNITS_GROW_ONCE, 4)
        before = masks.masks["0.bias"].clone()
        x, wanted = torch.randn(64, 6), torch.randn(64, 2)

        def loss():
            yield (model(x) - wanted).square().mean()

        for epoch in range(3):
            masks.update(epoch, loss)
            step(model, optimizer, loss)

        woken = masks.masks["0.bias"] & ~before
        assert woken.any()
        grown = first.weight.detach()[woken].abs().amax(1)
        assert (grown > 0.005).all(), "a step of Adam, where there is a gradient"


def test_a_sketch_has_the_final_density_before_any_training():
    model = sketch(nn.LSTM(10, 10), GP(final_density=0.15))

    assert sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() > 1) == 120


@settings(max_examples=15)
@given(st.integers(0, 1000), st.sampled_from(["gp", "gmp", "set", "rigl", "selfish"]))
def test_state_can_be_taken_up_again_at_any_epoch(seed, name):
    def fresh():
        model = a_model()
        return model, GrowPrune(model, None, name, 6, seed=seed)

    model, masks = fresh()
    for epoch in range(3):
        masks.update(epoch, losses(model))
    other_model, other = fresh()
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(masks.state_dict())
    for epoch in range(3, 6):
        masks.update(epoch, losses(model))
        other.update(epoch, losses(other_model))

    for key, mask in masks.masks.items():
        assert mask.equal(other.masks[key])


def test_dormant_weights_of_a_sparse_layer_have_gradients_where_growth_looks() -> None:
    torch.manual_seed(0)
    hlstm = HLSTM(3, 8, gate_hidden=(8,))
    masks = GrowPrune(hlstm, None, GP(seed_density=0.1), 10)
    x = torch.randn(4, 2, 3)
    slopes = masks._slopes(lambda: iter([hlstm(x)[0].sin().sum()]))
    assert masks.density == pytest.approx(0.1, abs=0.01)
    assert all(slope[~masks.masks[name]].any() for name, slope in slopes.items())
    hlstm(x)[0].sin().sum().backward()
    for name in slopes:
        grad = hlstm.get_parameter(name).grad
        assert grad is not None
        assert not grad[~masks.masks[name]].any()


def test_frozen_weights_and_biases_stay_as_they_are():
    model = a_model()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    before = model[0].weight.clone()
    for structure in ("element", "row_column"):
        masks = GrowPrune(model, None, GMP(structure=structure, prune_start=0.0), 4)
        masks.update(0, losses(model))
        assert masks.masks.keys() >= {"2.weight"}
    assert torch.equal(model[0].weight, before)


def test_an_error_that_is_no_number_is_no_reference():
    model = a_model()
    masks = GrowPrune(model, None, GMP(prune_start=0.5, prune_end=1.0, final_density=0.1), 6)
    for epoch, error in enumerate([None, 0.3, float("nan"), 0.3, 0.3, 0.3]):
        masks.update(epoch, losses(model), error)
    assert masks.density == pytest.approx(0.1, abs=0.01)


def test_a_state_is_no_view_of_what_comes_after():
    model = a_model()
    for structure in ("element", "row_column"):
        masks = GrowPrune(model, None, GMP(structure=structure, prune_start=0.0), 2)
        state, before = masks.state_dict(), masks.density
        masks.update(0, losses(model))
        assert masks.density < before
        masks.load_state_dict(state)
        assert masks.density == before


def test_a_state_of_another_kind_is_refused_and_changes_nothing():
    def of(model, **options):
        return GrowPrune(model, None, GMP(prune_start=0.0, **options), 2)

    masks = of(nn.Linear(9, 6))
    for other, fault in (
        (of(nn.Linear(1, 6)), "of another model"),
        (of(nn.Linear(9, 6, bias=False), structure="row_column"), "another structure"),
    ):
        other.update(0, losses(other.model))
        with pytest.raises(UserError, match=fault):
            masks.load_state_dict(other.state_dict())
        assert masks.density == 1


def test_what_would_lose_its_hooks_is_refused():
    model = a_model()
    masks = GrowPrune(model, None, "gmp", 2)
    with pytest.raises(UserError, match="cannot be copied"):
        copy.deepcopy(masks)
    average = torch.optim.swa_utils.AveragedModel(model)
    masks.hold(average.module)
    with pytest.raises(UserError, match=r"no parameter '0.weight'; is it its module"):
        masks.hold(average)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(UserError, match=r"0.weight is another parameter .* make GrowPrune anew"):
        masks.update(0, losses(model))


def test_a_run_has_an_epoch():
    with pytest.raises(UserError, match="epochs = 0 should be 1 or more"):
        GrowPrune(a_model(), None, "gp", 0)


def test_two_may_have_parts_of_one_model():
    model = nn.Sequential(HLSTM(6, 64, gate_hidden=(32,)), HLSTM(64, 64, gate_hidden=(32,)))
    at_once = GMP(prune_start=0.0, prune_end=0.0)
    both = [
        GrowPrune(model, None, at_once, 1, prunable=lambda name: name.startswith("0.")),
        GrowPrune(model, None, at_once, 1, prunable=lambda name: name.startswith("1.")),
    ]
    for masks in both:
        masks.update(0, list)
    assert all(layer._patterns for layer in model)


def test_a_step_is_for_what_was_not_awake_before():
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e6)
    schedule = RigL(final_density=0.5, drop_fraction=0.9, grown_init="step")
    masks = GrowPrune(model, optimizer, schedule, 4)
    before, awake_before = {n: p.clone() for n, p in model.named_parameters()}, awake(masks)
    masks.update(1, losses(model))
    for name, mask in masks.masks.items():
        kept = mask & awake_before[name]
        assert torch.equal(model.get_parameter(name)[kept], before[name][kept])
