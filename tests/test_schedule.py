import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpsearch.errors import UserError
from gpsearch.schedule import GMP, GP, SCHEDULES, SET, Dense, Progress, RigL, Selfish, Update, cubic


def walk(schedule, epochs, error=None, reference=None):
    """Follow a schedule as a training would; return (phase, density) before every epoch."""
    density, seen = schedule.seed_density, []
    for epoch in range(epochs):
        now = Progress(epoch, epochs, density, error, reference)
        update = schedule.update(now)
        if update is not None and update.event != "restore":
            density = update.grow_to or update.prune_to
        seen.append((schedule.phase(now), round(density, 3)))
    return seen


def test_gp_grows_a_seed_then_prunes_it_and_retrains():
    schedule = GP(
        seed_density=0.4, grow_start=0.2, grow_end=0.3, peak_density=0.6,
        prune_start=0.5, prune_end=0.7, final_density=0.1,
    )  # fmt: skip

    assert walk(schedule, 10) == [
        ("seed", 0.4),
        ("seed", 0.4),
        ("grow", 0.5),
        ("grow", 0.6),
        ("train", 0.6),
        ("prune", 0.248),  # 0.1 + 0.5 (2/3)^3
        ("prune", 0.119),  # 0.1 + 0.5 (1/3)^3
        ("prune", 0.1),
        ("retrain", 0.1),
        ("retrain", 0.1),
    ]


def test_gmp_starts_dense():
    assert walk(GMP(prune_start=0.25, prune_end=0.5, final_density=0.2), 4) == [
        ("dense", 1.0),
        ("prune", 0.3),
        ("prune", 0.2),
        ("retrain", 0.2),
    ]


def test_dense_never_changes():
    assert walk(Dense(), 3) == [("dense", 1.0)] * 3


@pytest.mark.parametrize("kind", [SET, RigL, Selfish])
def test_rewiring_keeps_the_density_and_drops_less_and_less(kind):
    schedule = kind(final_density=0.2, drop_fraction=0.5, rewire_end=0.75)
    updates = [schedule.update(Progress(epoch, 8, 0.2)) for epoch in range(8)]

    assert updates[0] is None
    assert updates[6:] == [None, None]
    drops = [0.2 - update.prune_to for update in updates[1:6]]
    assert drops == sorted(drops, reverse=True)
    assert all(update.grow_to == 0.2 for update in updates[1:6])


def test_the_first_update_drops_less_the_later_it_comes():
    def first(every):
        schedule = RigL(final_density=0.2, drop_fraction=0.3, rewire_every=every)
        update = schedule.update(Progress(every, 10, 0.2))
        assert update is not None
        assert update.prune_to is not None
        return 1 - update.prune_to / 0.2

    # Of the 8 epochs in which there are updates 1 and 5 are over: 0.15 (1 + cos(pi t / 8)).
    assert (round(first(1), 3), round(first(5), 3)) == (0.289, 0.093)


def test_what_tells_the_rewiring_schedules_apart():
    assert (SET().growth, RigL().growth, Selfish().growth) == ("random", "gradient", "random")
    assert (SET().scope, RigL().scope, Selfish().scope) == ("matrix", "matrix", "gates")
    assert RigL().growth_batches == 1


def test_cycles_grow_and_prune_again_each_ending_lower():
    phases_and_densities = walk(GP(cycles=2, seed_density=0.4, final_density=0.1), 40)

    assert phases_and_densities[19] == ("retrain", 0.2)  # the geometric mean of 0.4 and 0.1
    assert phases_and_densities[20] == ("seed", 0.2)
    assert max(density for _, density in phases_and_densities[20:]) == pytest.approx(0.3)
    assert phases_and_densities[-1] == ("retrain", 0.1)


@pytest.mark.parametrize("cycles", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("seed", [0.15, 0.3, 0.45, 0.6])
def test_cycles_may_begin_at_their_peak(seed, cycles):
    schedule = GP(cycles=cycles, seed_density=seed, peak_density=seed, final_density=seed / 2)
    assert walk(schedule, 30)[-1][1] == pytest.approx(seed / 2)


class TestTheAccuracyGate:
    schedule = GMP(prune_start=0.2, prune_end=0.8, prune_every=2, tolerance=0.1)

    def ask(self, epoch, error, **rest):
        return self.schedule.update(Progress(epoch, 10, 0.5, error, reference=0.3, **rest))

    def test_lets_a_regained_error_through(self):
        assert self.ask(4, 0.39).event == "prune"

    def test_asks_for_the_last_good_network_when_a_step_is_due_and_the_error_is_too_high(self):
        assert self.ask(4, 0.41) == Update("restore")

    def test_waits_while_retraining(self):
        assert self.ask(5, 0.9) is None

    def test_judges_the_last_step_after_the_last_epoch(self):
        assert self.ask(10, 0.41) == Update("restore")
        assert self.ask(10, 0.39) is None

    def test_stays_closed(self):
        assert self.ask(6, 0.2, gate_closed=True) is None


class TestTheAccuracyGateBetweenCycles:
    schedule = GP(cycles=2, grow_start=0.0, grow_end=0.1, tolerance=0.1)  # 10 epochs a cycle

    def ask(self, epoch, error, density=0.2, **rest):
        return self.schedule.update(Progress(epoch, 20, density, error, reference=0.3, **rest))

    def test_judges_a_cycles_last_step_before_the_next_one_grows(self):
        assert self.ask(10, 0.41) == Update("restore")
        assert self.ask(10, 0.39).event == "grow"

    def test_judges_the_first_step_of_a_further_cycle(self):
        assert self.ask(14, 0.41, density=0.3) == Update("restore")
        assert self.ask(14, 0.39, density=0.3).event == "prune"

    def test_does_not_judge_what_comes_before_the_first_pruning(self):
        assert self.ask(0, 0.9).event == "grow"
        assert self.ask(4, 0.9, density=0.6).event == "prune"

    def test_stays_closed(self):
        assert all(self.ask(epoch, 0.9, gate_closed=True) is None for epoch in range(4, 21))


@pytest.mark.parametrize("schedule", [GP(), GP(cycles=2), GMP()])
def test_behind_a_closed_gate_all_is_retraining(schedule):
    for epoch in range(20):
        assert schedule.phase(Progress(epoch, 20, 0.5, gate_closed=True)) == "retrain"


def test_a_gate_without_end_is_open_however_high_the_error():
    # A word error rate exceeds 1 where words are put in that nobody said.
    def asked(tolerance):
        schedule = GMP(prune_start=0.2, prune_end=0.8, tolerance=tolerance)
        update = schedule.update(Progress(4, 10, 0.5, error=2.5, reference=0.3))
        assert update is not None
        return update.event

    assert (asked(1.0), asked(math.inf)) == ("restore", "prune")


@pytest.mark.parametrize(("epochs", "cycles"), [(10, 3), (11, 4), (20, 3)])
def test_uneven_cycles_skip_no_epoch(epochs, cycles):
    schedule = GP(cycles=cycles, tolerance=0.0)
    seen = [schedule._cycle(Progress(epoch, epochs, 0.5))[1] for epoch in range(epochs)]

    assert all(part.epoch < part.epochs for part in seen)
    assert sum(part.epoch == 0 for part in seen) == cycles


def test_pruning_to_the_very_end_reaches_the_final_density():
    assert walk(GMP(prune_end=1.0, final_density=0.1), 10)[-1] == ("prune", 0.1)


@given(
    st.integers(1, 60), st.floats(0.02, 0.3), st.floats(0.3, 0.5), st.integers(1, 4),
    st.integers(1, 3),
)  # fmt: skip
def test_gp_ends_at_its_final_density_whatever_the_number_of_epochs(
    epochs, final, seed, every, cycles
):
    schedule = GP(final_density=final, seed_density=seed, prune_every=every, cycles=cycles)
    if epochs >= 4 * cycles:
        assert walk(schedule, epochs)[-1][1] == pytest.approx(final, abs=5e-4)


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_cubic_fall_is_monotone(a, b):
    low, high = sorted((a, b))
    assert cubic(1.0, 0.1, low) >= cubic(1.0, 0.1, high)


@pytest.mark.parametrize(
    ("kind", "numbers", "message"),
    [
        (GP, {"final_density": 0.0}, "final_density = 0.0 should be a share"),
        (GP, {"final_density": 0.7}, "final_density = 0.7 is above peak_density"),
        (GP, {"seed_density": 0.9}, "seed_density = 0.9 is above peak_density"),
        (GP, {"grow_end": 0.5}, "grow_end = 0.5 is above prune_start"),
        (GMP, {"prune_start": 0.9}, "prune_start = 0.9 is above prune_end"),
        (GMP, {"prune_every": 0}, "prune_every = 0 should be 1 or more"),
        (SET, {"structure": "row_column"}, "rewiring moves weights or blocks only"),
    ],
)
def test_impossible_numbers_are_named(kind, numbers, message):
    with pytest.raises(ValueError, match=message):
        kind(**numbers)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("scope", "'matrix', 'gates', 'layer', 'global'"),
        ("structure", "'element', 'row_column', '16x1', '8x1', '4x4'"),
        ("growth", "'gradient', 'random'"),
        ("grown_init", "'zero', 'step'"),
    ],
)
@pytest.mark.parametrize("kind", [GP, GMP, SET])
def test_a_misspelt_name_is_named_with_those_there_are(kind, name, choices):
    schedule = kind()
    vars(schedule)[name] = "foo"  # in tests the constructor's types refuse it first
    with pytest.raises(UserError, match=f"^{name} = 'foo' is not one of {choices}$"):
        schedule.__post_init__()


def test_every_schedule_is_known_by_its_name():
    assert list(SCHEDULES) == ["gp", "gmp", "set", "rigl", "selfish", "dense"]


shares = st.floats(0, 1)


@st.composite
def pruning_schedules(draw):
    """Draw any GP or GMP: its numbers only keep the order that their constructors ask for."""
    grow_start, grow_end, *pruning = sorted(draw(st.lists(shares, min_size=4, max_size=4)))
    low, middle, peak = sorted(draw(st.lists(st.floats(0.02, 1), min_size=3, max_size=3)))
    seed, final = draw(st.permutations([low, middle]))
    counts = st.integers(1, 6)
    numbers = {"prune_start": pruning[0], "prune_end": pruning[1], "prune_every": draw(counts)}
    if draw(st.booleans()):
        return GMP(final_density=final, **numbers)
    return GP(
        seed_density=seed, peak_density=peak, final_density=final, cycles=draw(counts),
        grow_start=grow_start, grow_end=grow_end, grow_every=draw(counts), **numbers,
    )  # fmt: skip


@given(schedule=pruning_schedules(), epochs=st.integers(1, 20))
@example(GP(seed_density=0.1, peak_density=0.6, final_density=0.3, cycles=5), 6)
@example(GP(seed_density=0.2, peak_density=0.4, final_density=0.3, cycles=2, prune_every=2), 3)
@example(GP(seed_density=0.3, final_density=0.4), 1)
@example(GP(seed_density=0.5, final_density=0.4), 1)
def test_a_run_ends_at_its_final_density_however_short_it_is(schedule, epochs):
    assert walk(schedule, epochs)[-1][1] == round(schedule.final_density, 3)


@given(
    epochs=st.integers(1, 15),
    cycles=st.integers(1, 3),
    start=st.floats(0, 1),
    kind=st.sampled_from([GP, GMP]),
)
def test_a_phase_is_called_by_what_happens_in_it(epochs, cycles, start, kind):
    gmp = GMP(prune_start=start, prune_end=max(start, 0.75))
    schedule = GP(cycles=cycles) if kind is GP else gmp
    density = schedule.seed_density
    for epoch in range(epochs):
        now = Progress(epoch, epochs, density)
        if update := schedule.update(now):
            density = update.grow_to or update.prune_to or density
            assert schedule.phase(now) == update.event
