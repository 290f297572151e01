import math
from statistics import median
from typing import Any

import optuna
import pytest

from gpsearch.sampling import POPULATION, SpaceExhausted, propose
from gpsearch.space import Space

SPACE = Space.read("tests/toy.toml")


def finish(proposal, values=(0.5, 1.0)):
    return optuna.trial.create_trial(
        values=list(values), params=proposal.params, distributions=proposal.distributions,
        system_attrs=proposal.system_attrs,
    )  # fmt: skip


def ask(finished, **more):
    flags: dict[str, Any] = {"goals": 2, "sampler": "tpe", "seed": 0} | more
    return propose(finished, SPACE, **flags)


def walk(count, seed=0, sampler="tpe"):
    finished: list[Any] = []
    proposals = []
    for number in range(count):
        proposals.append(ask(finished, seed=seed, sampler=sampler))
        finished.append(finish(proposals[-1], (1 / (1 + number), number)))
    return proposals, finished


def test_the_baselines_come_first():
    proposals, _ = walk(3)

    assert [p.baseline for p in proposals] == ["dense_lstm", "pruned_lstm", ""]
    assert proposals[2].candidate.in_short() == "H-LSTM 2x8, gates 1x6, gp 20.0%"
    assert proposals[0].candidate == SPACE.baseline_candidates()["dense_lstm"]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_a_proposal_depends_on_the_finished_trials_and_the_seed_alone(sampler):
    proposals, finished = walk(16, sampler=sampler)

    for number in (2, 9, 15):
        again = ask(finished[:number], sampler=sampler)
        assert again.candidate == proposals[number].candidate
    assert ask(finished[:9], seed=1, sampler=sampler).candidate != proposals[9].candidate


def test_optuna_says_nothing_of_it(capfd):
    optuna.logging.set_verbosity(optuna.logging.INFO)
    ask([])

    assert capfd.readouterr().err == ""


def test_no_candidate_is_proposed_twice():
    candidates = [proposal.candidate for proposal in walk(25)[0]]

    assert len(set(candidates)) == len(candidates)


def test_the_defaults_follow_by_every_schedule():
    candidates = [proposal.candidate for proposal in walk(5)[0]]

    assert [one.in_short() for one in candidates[2:]] == [
        "H-LSTM 2x8, gates 1x6, gp 20.0%",
        "H-LSTM 2x8, gates 1x6, gmp 20.0%",
        "H-LSTM 2x8, gates 1x6, dense",
    ]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_then_every_schedule_has_its_turn(sampler):
    proposals, _ = walk(5 + 3, sampler=sampler)

    names = [proposal.candidate.schedule.name for proposal in proposals[5:]]
    assert names == ["gp", "gmp", "dense"]


def test_nsga2_goes_where_the_better_ones_are():
    def rates(best):
        finished: list[Any] = []
        for _ in range(4 * POPULATION):
            proposal = ask(finished, sampler="nsga2", goals=1)
            rate = proposal.params["learning_rate"]
            finished.append(finish(proposal, [abs(math.log(rate / best))]))
        return [trial.params["learning_rate"] for trial in finished]

    low, high = rates(best=0.005), rates(best=0.05)

    assert low[:POPULATION] == high[:POPULATION]
    assert median(low[-POPULATION:]) < 0.01
    assert median(high[-POPULATION:]) > 0.02


def test_what_had_begun_is_proposed_again():
    params = ask([], seed=5).params | {"learning_rate": 0.01}

    assert ask([], params=params).candidate.training.learning_rate == 0.01


def test_conditional_parameters_are_only_there_where_they_mean_something():
    for proposal in walk(20)[0]:
        deep = proposal.candidate.architecture.gate_depth > 0
        assert any("gate_width" in name for name in proposal.params) == deep


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_space_is_searched_to_its_last_candidate(tmp_path, sampler):
    (tmp_path / "few.toml").write_text(
        "[architecture]\nhidden_size = { low = 8, high = 40, step = 8 }\n"
        'activation = ["relu", "tanh", "gelu"]\ngate_depth = 1\ngate_width = [4, 8]\n'
        "[baselines.a]\narchitecture.hidden_size = 8\n"
    )
    space = Space.read(str(tmp_path / "few.toml"))
    finished: list[Any] = []
    for number in range(5 * 3 * 2):
        proposal = propose(finished, space, goals=2, sampler=sampler, seed=0)
        finished.append(finish(proposal, (1.0 * number, 1.0)))

    assert len({str(trial.params) for trial in finished}) == 30
    with pytest.raises(SpaceExhausted):
        propose(finished, space, goals=2, sampler=sampler, seed=0)
