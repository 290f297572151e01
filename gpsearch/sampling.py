"""What to try next: a pure function of the finished trials and the seed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpsearch.candidate import Candidate
from gpsearch.errors import UserError
from gpsearch.space import Space
from gpsearch.space.values import Choice, Fixed

if TYPE_CHECKING:
    import optuna

ATTEMPTS = 20
"""Proposals a sampler may repeat before candidates are drawn at random."""
RANDOM_ATTEMPTS = 500
"""Candidates drawn at random before a space is taken to hold nothing new: the last of a hundred
equally likely ones is overlooked once in 150 times."""
POPULATION = 12
"""Of a generation of NSGA-II. Optuna's 50 would be all trials of most studies, and the first
generation is random."""


class SpaceExhausted(Exception):
    """Every candidate that the sampler, or chance, comes up with has been tried."""


@dataclass(frozen=True)
class Proposal:
    """A candidate to try, and what Optuna must know of it."""

    candidate: Candidate
    params: dict[str, Any]
    distributions: dict[str, Any]
    system_attrs: dict[str, Any]
    baseline: str = ""
    """The baseline's name, if it is one."""


def propose(
    finished: Sequence[optuna.trial.FrozenTrial],
    space: Space,
    *,
    goals: int,
    sampler: str,
    seed: int,
    params: dict[str, Any] | None = None,
) -> Proposal:
    """Return the next candidate: baselines, the defaults by every schedule, the sampler's ideas.

    The first of these are ideas for every schedule in turn. Left to chance, TPE once met no GP at
    all among ten random trials, another time only GP that pruned too coarsely for the little
    networks it had drawn; in the forty trials after that it did not come to it any more.

    The sampler is made anew for every proposal, from the seed and the number of finished trials,
    and sees the finished trials only; so a study that is killed and resumed repeats nothing and
    misses nothing. A candidate that was tried before is not proposed again.

    Args:
        finished: The finished trials, in order.
        space: Where to look.
        goals: How many objectives there are.
        sampler: One of `gpsearch.settings.SAMPLERS`.
        seed: The study's seed.
        params: Propose exactly these parameters, as before an interruption.

    Raises:
        SpaceExhausted: Nothing new was found, neither by the sampler nor at random.
    """
    number = len(finished)
    tried = {_key(trial.params) for trial in finished}
    schedules = _schedules(space)
    given = [*space.baselines().items(), *(("", one) for one in _defaults(space, schedules))]
    name, start = given[number] if number < len(given) else ("", None)
    if start is not None and not name and _key(start) in tried:
        start = None
    fixed = params or start
    turn = dict(enumerate(schedules, len(given))).get(number) if fixed is None else fixed
    for attempt in range(ATTEMPTS):
        draw = _draw(finished, space, goals, sampler, (seed, number, attempt), turn)
        if fixed is not None or _key(draw.params) not in tried:
            candidate = space.suggest(_fixed_trial(draw))
            return Proposal(candidate, draw.params, draw.distributions, _generation(draw), name)
    return _any_other(tried, space, (seed, number, ATTEMPTS))


def refuse_other_choices(finished: Sequence[optuna.trial.FrozenTrial], space: Space) -> None:
    """Refuse a space whose parameters are chosen from other values than in the finished trials.

    Other bounds of a range are no matter.

    Raises:
        UserError: One is.
    """
    import optuna

    before = {name: one for trial in finished for name, one in trial.distributions.items()}
    for one in space.parameters.values():
        if one.name not in before or isinstance(one.values, Fixed):
            continue
        trial = optuna.trial.FixedTrial({one.name: one.values.default})
        one.values.suggest(trial, one.name)
        try:
            optuna.distributions.check_distribution_compatibility(
                before[one.name], trial.distributions[one.name]
            )
        except ValueError as error:
            values = getattr(before[one.name], "choices", None)
            told = f"one of {', '.join(map(str, values))}" if values else "from a range"
            raise UserError(
                f"{space.where}: {one.name} was {told} in the trials that are finished; bring "
                "that back, or begin in another folder"
            ) from error


def _schedules(space: Space) -> list[dict[str, Any]]:
    """Return the parameter that chooses the schedule, for each of them; none if one is fixed."""
    schedule = space.parameters.get(("schedule", "name"))
    if schedule is None or not isinstance(schedule.values, Choice):
        return []
    return [{schedule.name: name} for name in schedule.values.corners]


def _defaults(space: Space, schedules: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the candidate with every default, then the same by the other schedules."""
    found = [space.defaults(), *map(space.defaults, schedules)]
    return [one for place, one in enumerate(found) if one not in found[:place]]


def _draw(
    finished: Sequence[optuna.trial.FrozenTrial],
    space: Space,
    goals: int,
    sampler: str,
    seed: tuple[int, int, int],
    fixed: dict[str, Any] | None,
) -> optuna.trial.FrozenTrial:
    """Ask a sampler once."""
    study = _study(goals, _sampler(sampler, seed))
    study.add_trials(finished)
    if fixed is not None:
        study.enqueue_trial(fixed)
    space.suggest(study.ask())
    return study.trials[-1]


def _any_other(
    tried: set[tuple[tuple[str, Any], ...]], space: Space, seed: tuple[int, int, int]
) -> Proposal:
    """Return a random candidate that has not been tried."""
    study = _study(1, _sampler("random", seed))
    for _ in range(RANDOM_ATTEMPTS):
        trial = study.ask()
        candidate = space.suggest(trial)
        if _key(trial.params) not in tried:
            return Proposal(candidate, trial.params, trial.distributions, {})
    raise SpaceExhausted


def _study(goals: int, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    """Return a study in memory that nobody keeps, and of which Optuna says nothing."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=["minimize"] * goals, sampler=sampler)


def _sampler(name: str, entropy: tuple[int, int, int]) -> optuna.samplers.BaseSampler:
    import numpy as np
    import optuna

    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        # multivariate and group are marked experimental; without them a conditional space (gate
        # width only where there are gates) falls back to independent sampling.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)


def _generation(draw: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Return what NSGA-II notes of a trial: without a generation it would begin anew each time."""
    import optuna

    own = optuna.samplers.NSGAIISampler.__name__
    return {key: value for key, value in draw.system_attrs.items() if key.startswith(own)}


def _fixed_trial(draw: optuna.trial.FrozenTrial) -> Any:
    import optuna

    return optuna.trial.FixedTrial(draw.params)


def _key(params: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(params.items()))
