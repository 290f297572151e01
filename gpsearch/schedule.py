"""Schedules: when connections grow or are pruned, and how many. Pure: no tensor is touched here.

A schedule is asked before every epoch (`Schedule.update`) and answers with the densities to go
through, or with None. Times are shares of the run, so the same schedule fits any number of epochs.

    seed         gp starts sparse; gmp and dense start with every weight
    grow         gp wakes the dormant weights with the largest gradients
    prune        gp and gmp put the smallest weights to sleep, step by step, and retrain in between
    rewire       set, rigl and selfish prune and grow at once and keep their density
    retrain      no update any more
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

from gpsearch.errors import UserError

Growth = Literal["gradient", "random"]
GrownInit = Literal["zero", "step"]
Scope = Literal["matrix", "gates", "layer", "global"]
Structure = Literal["element", "row_column", "16x1", "8x1", "4x4"]


@dataclass(frozen=True)
class Progress:
    """What a schedule may look at before an epoch begins."""

    epoch: int
    """The epoch about to begin, from 0."""
    epochs: int
    """Epochs in the whole run."""
    density: float
    """Share of the prunable weights that is awake now."""
    error: float | None = None
    """Development error after the last epoch; None if unknown."""
    reference: float | None = None
    """Lowest development error of any epoch before the first pruning; None if unknown."""
    gate_closed: bool = False
    """Whether the accuracy gate has already stopped the pruning."""


@dataclass(frozen=True)
class Update:
    """One change of the masks: prune to a density, then grow to a density; or step back.

    To rewire is to grow as much as was pruned: the count stays, also where blocks differ in size.
    """

    event: Literal["grow", "prune", "rewire", "restore"]
    prune_to: float | None = None
    grow_to: float | None = None
    error: float | None = None
    """Development error of the network that was taken back, once it is; None if unknown."""


@runtime_checkable
class Schedule(Protocol):
    """Answers "is there an update now, and how much"; a frozen dataclass with a name."""

    name: ClassVar[str]

    @property
    def seed_density(self) -> float:
        """Share of the prunable weights awake at the start."""

    @property
    def final_density(self) -> float:
        """Share of the prunable weights awake at the end, if no gate stops the pruning."""

    @property
    def growth(self) -> Growth:
        """By what score dormant weights are woken."""

    @property
    def growth_batches(self) -> int:
        """Batches over which the growth gradient is averaged; 0 is a full pass."""

    @property
    def grown_init(self) -> GrownInit:
        """Where a grown weight starts: at zero, or one gradient step from it."""

    @property
    def scope(self) -> Scope:
        """Over what the weights to prune are compared."""

    @property
    def structure(self) -> Structure:
        """What is pruned together."""

    @property
    def embeddings(self) -> bool:
        """Whether embeddings and the output layer grow and are pruned, too."""

    def phase(self, now: Progress) -> str:
        """Name the phase of the epoch about to begin, for people."""

    def update(self, now: Progress) -> Update | None:
        """Return the change to make before the epoch about to begin, or None."""


@dataclass(frozen=True, kw_only=True)
class _Sparse:
    """The numbers that every sparse schedule has."""

    final_density: float = 0.1
    """Share of the prunable weights awake at the end."""
    scope: Scope = "gates"
    """Compare weights within a "matrix", over the four "gates" jointly, a "layer", or "global". The
    first two keep what reads the inputs and what reads the state apart."""
    structure: Structure = "element"
    """Prune single weights ("element"), whole units ("row_column") or blocks ("16x1": 16 rows of
    one column; "8x1", "4x4")."""
    embeddings: bool = False
    """Grow and prune embeddings and the output layer, too, where the task has them."""
    growth: Growth = "gradient"
    """Wake dormant weights by "gradient" or at "random"."""
    growth_batches: int = 0
    """Batches over which the growth gradient is averaged: 0 a full pass, 1 instantaneous."""
    grown_init: GrownInit = "zero"
    """Start grown weights at zero, or one gradient "step" from it."""

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, Scope)
        check_choice("structure", self.structure, Structure)
        check_choice("growth", self.growth, Growth)
        check_choice("grown_init", self.grown_init, GrownInit)
        _check_share("final_density", self.final_density, above_zero=True)
        if self.growth_batches < 0:
            raise ValueError(f"growth_batches = {self.growth_batches} should be 0 or more")


@dataclass(frozen=True)
class _Window:
    """The epochs in which weights are woken, or pruned: from one to another, every so many."""

    first: int
    last: int
    every: int

    def due(self, epoch: int) -> bool:
        """Say whether a step is taken before this epoch."""
        return self.first <= epoch <= self.last and (epoch - self.first) % self.every == 0

    def part(self, epoch: int) -> float:
        """Return how much of the way is done with the step before this epoch.

        The last step completes it even where ``every`` does not divide the window.
        """
        is_last = epoch + self.every > self.last
        return 1.0 if is_last else (epoch + 1 - self.first) / (self.last + 1 - self.first)


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Every weight, all the time: no masks."""

    name: ClassVar[str] = "dense"
    seed_density: ClassVar[float] = 1.0
    final_density: ClassVar[float] = 1.0
    growth: ClassVar[Growth] = "random"
    growth_batches: ClassVar[int] = 0
    grown_init: ClassVar[GrownInit] = "zero"
    scope: ClassVar[Scope] = "matrix"
    structure: ClassVar[Structure] = "element"
    embeddings: ClassVar[bool] = False

    def phase(self, now: Progress) -> str:
        """Name the only phase."""
        return "dense"

    def update(self, now: Progress) -> Update | None:
        """Never change anything."""
        return None


@dataclass(frozen=True, kw_only=True)
class _Pruning(_Sparse):
    """Prune step by step between two times, behind an accuracy gate.

    A step is taken only if retraining has brought the error back to within `tolerance` of the best
    error before pruning. When it has not by the time the next step is due, the schedule asks for
    the last good network back and prunes no further (Dai et al., section 3: "stop when the
    accuracy cannot be regained").
    """

    prune_start: float = 0.35
    """When pruning begins, as a share of the run."""
    prune_end: float = 0.75
    """When the last pruning step is taken, as a share of the run."""
    prune_every: int = 1
    """Epochs of retraining after each pruning step."""
    tolerance: float = 0.25
    """Largest error above the reference at which pruning goes on; inf opens the gate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_order(prune_start=self.prune_start, prune_end=self.prune_end)
        _check_positive(prune_every=self.prune_every)
        if not self.tolerance >= 0:  # nor is NaN
            raise ValueError(f"tolerance = {self.tolerance} should be 0 or more")

    def _pruning_window(self, epochs: int) -> _Window:
        last = min(round(self.prune_end * epochs), epochs - 1)
        return _Window(min(round(self.prune_start * epochs), last), last, self.prune_every)

    def _pruning(self, now: Progress, peak: float, *, again: bool = False) -> Update | None:
        """Return the pruning step due now on the cubic fall from ``peak``.

        Args:
            now: The progress.
            peak: The density before the first step.
            again: The network was pruned before, so that the first step is judged, too.
        """
        window = self._pruning_window(now.epochs)
        if now.gate_closed or now.epoch < window.first:
            return None
        if now.epoch == now.epochs:
            return None if self._regained(now) else Update("restore")
        if not window.due(now.epoch):
            return None
        if (again or now.epoch > window.first) and not self._regained(now):
            return Update("restore")
        target = cubic(peak, self.final_density, window.part(now.epoch))
        return Update("prune", prune_to=target) if target < now.density else None

    def _regained(self, now: Progress) -> bool:
        if now.error is None or now.reference is None:
            return True
        return now.error <= now.reference + self.tolerance


@dataclass(frozen=True, kw_only=True)
class GMP(_Pruning):
    """Gradual magnitude pruning: from dense, the cubic fall of Zhu & Gupta (arXiv 1710.01878)."""

    name: ClassVar[str] = "gmp"
    seed_density: ClassVar[float] = 1.0

    def phase(self, now: Progress) -> str:
        """Name the phase: dense, prune, retrain."""
        window = self._pruning_window(now.epochs)
        return _phase(now, dense=window.first, prune=window.last + 1)

    def update(self, now: Progress) -> Update | None:
        """Prune along the cubic curve."""
        return self._pruning(now, peak=1.0)


@dataclass(frozen=True, kw_only=True)
class GP(_Pruning):
    """Grow-and-prune (Dai, Yin, Jha, IEEE TC 2020; arXiv 1805.11797, section 3).

    A sparse seed grows by gradient magnitude, then is pruned by magnitude with retraining. The
    paper leaves ratios and times open; these defaults did well on AN4's development split. With
    ``cycles`` > 1 growth and fall repeat within equal parts of the run (as in SCANN): every part
    grows by the same ratio and ends at a density on the geometric way to `final_density`. A part
    takes two epochs or more, so a short run has fewer. The gate judges the last step of a part as
    the next one begins, before anything grows.
    """

    name: ClassVar[str] = "gp"
    seed_density: float = 0.4
    """Share of the prunable weights awake at the start."""
    peak_density: float = 0.6
    """Share awake when the first growth ends."""
    grow_start: float = 0.1
    """When growth begins, as a share of the run (of a cycle, if there are several)."""
    grow_end: float = 0.2
    """When growth ends."""
    grow_every: int = 1
    """Epochs between growth steps."""
    cycles: int = 1
    """How many times the network grows and is pruned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("seed_density", self.seed_density, above_zero=True)
        _check_share("peak_density", self.peak_density, above_zero=True)
        _check_order(seed_density=self.seed_density, peak_density=self.peak_density)
        _check_order(final_density=self.final_density, peak_density=self.peak_density)
        _check_order(
            grow_start=self.grow_start, grow_end=self.grow_end, prune_start=self.prune_start
        )
        _check_positive(cycles=self.cycles, grow_every=self.grow_every)

    def phase(self, now: Progress) -> str:
        """Name the phase: seed, grow, train, prune, retrain."""
        part, now = self._cycle(now)
        growth, pruning = part._growth_window(now.epochs), part._pruning_window(now.epochs)
        return _phase(
            now, seed=growth.first, grow=growth.last + 1, train=pruning.first,
            prune=pruning.last + 1,
        )  # fmt: skip

    def update(self, now: Progress) -> Update | None:
        """Grow in the growth window of a cycle, prune in its pruning window."""
        part, own = self._cycle(now)
        again = own.epoch < now.epoch
        if again and own.epoch == 0 and not now.gate_closed and not self._regained(now):
            return Update("restore")
        return part._growing(own) or part._pruning(own, peak=part.peak_density, again=again)

    def _growth_window(self, epochs: int) -> _Window:
        """Return when to grow: before pruning begins, also where rounding puts both in one epoch.

        A run of a single epoch has no such time, unless growth alone leads to its end.
        """
        last = min(round(self.grow_end * epochs), self._pruning_window(epochs).first - 1)
        if epochs == 1 and self.seed_density < self.final_density:
            last = 0
        return _Window(max(0, min(round(self.grow_start * epochs), last)), last, self.grow_every)

    def _pruning_window(self, epochs: int) -> _Window:
        """Return when to prune: not in the first epoch, which a sparse seed needs to grow in."""
        window = super()._pruning_window(epochs)
        first = min(max(window.first, 1), epochs - 1)
        return replace(window, first=first, last=max(window.last, first))

    def _growing(self, now: Progress) -> Update | None:
        """Return the growth step due now on the straight way from the seed to the peak."""
        window = self._growth_window(now.epochs)
        if now.gate_closed or not window.due(now.epoch):
            return None
        # What a single epoch grows it cannot prune any more.
        peak = self.peak_density if now.epochs > 1 else self.final_density
        part = window.part(now.epoch)
        target = self.seed_density + part * (peak - self.seed_density)
        return Update("grow", grow_to=target) if target > now.density else None

    def _cycle(self, now: Progress) -> tuple[GP, Progress]:
        """Return the current cycle as a run of its own: its schedule and the progress within it."""
        cycles = max(1, min(self.cycles, now.epochs // 2))  # each grows, then prunes
        if cycles == 1:
            return self, now
        index = min(now.epoch * cycles // now.epochs, cycles - 1)
        # The first epoch of part k is the first whose index is k: the ceiling of k E / cycles.
        begin, end = (-(-k * now.epochs // cycles) for k in (index, index + 1))
        fall = (self.final_density / self.seed_density) ** (1 / cycles)
        seed = self.seed_density * fall**index
        part = replace(
            self,
            cycles=1,
            seed_density=seed,
            peak_density=max(seed, min(1.0, seed * self.peak_density / self.seed_density)),
            final_density=self.final_density if index == cycles - 1 else seed * fall,
        )
        return part, replace(now, epoch=now.epoch - begin, epochs=end - begin)


@dataclass(frozen=True, kw_only=True)
class _Rewiring(_Sparse):
    """Keep the density; every few epochs replace the smallest awake weights by dormant ones."""

    drop_fraction: float = 0.3
    """Share of the awake weights that an update at the run's begin would replace; those to come
    replace less, along a cosine of the training's time that is zero at `rewire_end`."""
    rewire_every: int = 1
    """Epochs between updates."""
    rewire_end: float = 0.75
    """When updates end, as a share of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("drop_fraction", self.drop_fraction)
        _check_share("rewire_end", self.rewire_end, above_zero=True)
        _check_positive(rewire_every=self.rewire_every)
        if self.structure == "row_column":
            raise ValueError("structure = 'row_column': rewiring moves weights or blocks only")

    @property
    def seed_density(self) -> float:
        """The density is the same from start to end."""
        return self.final_density

    def phase(self, now: Progress) -> str:
        """Name the phase: rewire, retrain."""
        return _phase(now, rewire=round(self.rewire_end * now.epochs))

    def update(self, now: Progress) -> Update | None:
        """Replace a share of the awake weights, annealed from the run's begin (RigL, section 3)."""
        end = round(self.rewire_end * now.epochs)
        if not 0 < now.epoch < end or now.epoch % self.rewire_every:
            return None
        drop = self.drop_fraction * (1 + math.cos(math.pi * now.epoch / end)) / 2
        return Update(
            "rewire", prune_to=self.final_density * (1 - drop), grow_to=self.final_density
        )


@dataclass(frozen=True, kw_only=True)
class SET(_Rewiring):
    """Sparse evolutionary training: random regrowth (Mocanu et al., arXiv 1707.04780)."""

    name: ClassVar[str] = "set"
    scope: Scope = "matrix"
    growth: Growth = "random"


@dataclass(frozen=True, kw_only=True)
class RigL(_Rewiring):
    """Rigged lottery: regrowth by one batch's gradient (Evci et al., arXiv 1911.11134)."""

    name: ClassVar[str] = "rigl"
    scope: Scope = "matrix"
    growth_batches: int = 1


@dataclass(frozen=True, kw_only=True)
class Selfish(_Rewiring):
    """Selfish-RNN: random regrowth, the four gates pruned jointly (Liu et al., ICML 2021)."""

    name: ClassVar[str] = "selfish"
    growth: Growth = "random"
    drop_fraction: float = 0.5
    rewire_end: float = 1.0


SCHEDULES: dict[str, type[Any]] = {kind.name: kind for kind in (GP, GMP, SET, RigL, Selfish, Dense)}
"""Every schedule by name; adding a class here makes it searchable."""


def cubic(start: float, end: float, part: float) -> float:
    """Return the density after ``part`` (0 to 1) of a cubic fall from ``start`` to ``end``."""
    return end + (start - end) * (1 - part) ** 3


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuse what is none of the values of the Literal ``choices``, by its name."""
    if value not in get_args(choices):
        known = ", ".join(map(repr, get_args(choices)))
        raise UserError(f"{name} = {value!r} is not one of {known}")


def _phase(now: Progress, **ends: int) -> str:
    """Return the first phase whose end, an epoch that is not its own any more, is yet to come.

    Behind a closed gate only retraining is left.
    """
    if now.gate_closed:
        return "retrain"
    found = (name for name, end in ends.items() if now.epoch < end)
    return next(found, "retrain")


def _check_share(name: str, value: float, *, above_zero: bool = False) -> None:
    if not (0 < value <= 1 or (value == 0 and not above_zero)):
        raise ValueError(f"{name} = {value} should be a share between 0 and 1")


def _check_order(**shares: float) -> None:
    """Check that the named shares lie in 0..1 and do not fall."""
    for name, value in shares.items():
        _check_share(name, value)
    for (low, first), (high, second) in pairwise(shares.items()):
        if first > second:
            raise ValueError(f"{low} = {first} is above {high} = {second}")


def _check_positive(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} = {value} should be 1 or more")
