"""A candidate: one point of the search space, as four frozen records and a TOML file.

Architecture (what is built), schedule (how its connections grow and are pruned; see
`gpsearch.schedule`), training (how its weights are trained) and deployment (how it is stored and
run in the end).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

from gpsearch.errors import UserError
from gpsearch.files import read_toml, toml_literal
from gpsearch.schedule import SCHEDULES, Dense, Schedule, check_choice

T = TypeVar("T")


@dataclass(frozen=True)
class Architecture:
    """The recurrent stack a task builds its model around."""

    layers: int = 2
    """Recurrent layers."""
    hidden_size: int = 128
    """State units of a layer, in each direction."""
    gate_depth: int = 1
    """Hidden layers in every gate; 0 is the plain LSTM."""
    gate_width: int = 64
    """Units of each gate's hidden layers."""
    activation: Literal["relu", "leaky_relu", "tanh", "gelu"] = "relu"
    """Activation of the gates' hidden layers."""
    gate_direct: bool = False
    """A direct affine path beside the gates' hidden layers."""
    gate_norm: bool = False
    """Layer norm on the gates' hidden layers."""
    gate_dropout: float = 0.0
    """Dropout on the outputs of the gates' hidden layers."""
    bidirectional: bool = True
    """Read the sequence in both directions."""
    merge: Literal["concat", "sum"] = "concat"
    """How the two directions are joined."""
    norm: Literal["layer", "batch", "none"] = "layer"
    """Normalisation between recurrent layers."""
    dropout: float = 0.1
    """Dropout between recurrent layers."""
    front: Literal["light", "deepspeech2"] = "light"
    """Convolutional front end, where the task has one: 16 channels, or the paper's 32."""
    embedding_size: int = 128
    """Width of a token's embedding, where the task reads or writes tokens."""
    input_feeding: bool = True
    """Feed the attention's outcome into the decoder's next step, where the task has attention."""

    def __post_init__(self) -> None:
        _at_least(1, layers=self.layers, hidden_size=self.hidden_size, gate_width=self.gate_width)
        _at_least(1, embedding_size=self.embedding_size)
        _at_least(0, gate_depth=self.gate_depth)
        _below_one(dropout=self.dropout, gate_dropout=self.gate_dropout)

    @property
    def gate_hidden(self) -> tuple[int, ...]:
        """The gates' hidden widths, as `gpsearch.HLSTM` takes them."""
        return (self.gate_width,) * self.gate_depth


@dataclass(frozen=True)
class Training:
    """How the weights are trained."""

    epochs: int = 30
    """Passes over the training split, growing and pruning included."""
    batch_size: int = 8
    """Sequences in a batch."""
    batch_tokens: int = 0
    """Tokens in a batch, padding included, where the task can count them; 0 counts sequences."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer; sgd has Nesterov momentum 0.9."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    rate_shape: Literal["cosine", "trapezoid", "constant"] = "cosine"
    """The learning rate over the run, after the warm-up."""
    warmup: float = 0.1
    """Share of the run in which the learning rate rises from zero."""
    weight_decay: float = 0.01
    """Weight decay: decoupled with adamw, a part of the gradient with sgd."""
    clip: float = 5.0
    """Largest norm of a step's gradient."""
    augment: float = 1.0
    """Strength of the task's augmentation, up to 5; 0 is off."""
    kick_epochs: int = 1
    """First epochs on the task's easier loss, where it has one."""
    label_smoothing: float = 0.0
    """Share of a token's probability spread over the vocabulary, where the task has one."""

    def __post_init__(self) -> None:
        _at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        _at_least(
            0, weight_decay=self.weight_decay, augment=self.augment, kick_epochs=self.kick_epochs,
            batch_tokens=self.batch_tokens,
        )  # fmt: skip
        _below_one(warmup=self.warmup, label_smoothing=self.label_smoothing)
        if self.augment > 5:
            raise ValueError(f"augment = {self.augment} should be at most 5")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} should be above 0")
        for name in ("learning_rate", "weight_decay"):
            if getattr(self, name) == math.inf:
                raise ValueError(f"{name} = inf should be finite")


@dataclass(frozen=True)
class Deployment:
    """How the trained model is stored and run."""

    weights: Literal["float32", "bfloat16", "int8"] = "float32"
    """Type of the recurrent layers' weights; a narrow one rounds them after the training."""


@dataclass(frozen=True)
class Candidate:
    """One point of the search space."""

    architecture: Architecture = field(default_factory=Architecture)
    schedule: Schedule = field(default_factory=Dense)
    training: Training = field(default_factory=Training)
    deployment: Deployment = field(default_factory=Deployment)

    def in_short(self) -> str:
        """Return the candidate in a few words: "H-LSTM 2x104, gates 1x32 direct, gp 10.0%"."""
        shape = self.architecture
        words = [f"{'H-LSTM' if shape.gate_depth else 'LSTM'} {shape.layers}x{shape.hidden_size}"]
        if shape.gate_depth:
            options = [name for name in ("direct", "norm") if getattr(shape, f"gate_{name}")]
            words.append(" ".join([f"gates {shape.gate_depth}x{shape.gate_width}", *options]))
        name = self.schedule.name
        if name != "dense":
            structure = self.schedule.structure
            together = {"element": "", "row_column": " units"}.get(structure, f" {structure}")
            reach = ", embeddings too" if self.schedule.embeddings else ""
            name += f" {self.schedule.final_density:.1%}{together}{reach}"
        narrow = [self.deployment.weights] * (self.deployment.weights != "float32")
        return ", ".join([*words, name, *narrow])

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the four tables of the TOML form."""
        return {
            "architecture": dataclasses.asdict(self.architecture),
            "schedule": {"name": self.schedule.name, **_fields(self.schedule)},
            "training": dataclasses.asdict(self.training),
            "deployment": dataclasses.asdict(self.deployment),
        }

    def to_toml(self) -> str:
        """Return the candidate as TOML; `from_dict(tomllib.loads(...))` gives it back."""
        return "\n".join(
            f"[{table}]\n" + "".join(f"{k} = {toml_literal(value)}\n" for k, value in rows.items())
            for table, rows in self.to_dict().items()
        )

    @classmethod
    def from_dict(cls, tables: dict[str, Any], where: str = "candidate") -> Candidate:
        """Build a candidate from its tables; what is absent takes its default.

        Raises:
            UserError: A table, key, type or value is not of the candidate's form.
        """
        refuse_unknown(tables, ("architecture", "schedule", "training", "deployment"), where)
        rows = tables.get("schedule", {})
        if not isinstance(rows, dict):
            raise UserError(f"{where}: [schedule] should be a table")
        rows = dict(rows)
        name = rows.pop("name", "dense")
        if not isinstance(name, str) or name not in SCHEDULES:
            raise UserError(
                f"{where}: [schedule] name = {name!r} is unknown; one of {', '.join(SCHEDULES)}"
            )
        return cls(
            record(Architecture, tables.get("architecture", {}), f"{where}: [architecture]"),
            record(SCHEDULES[name], rows, f"{where}: [schedule]"),
            record(Training, tables.get("training", {}), f"{where}: [training]"),
            record(Deployment, tables.get("deployment", {}), f"{where}: [deployment]"),
        )

    @classmethod
    def read(cls, path: Path) -> Candidate:
        """Read a candidate's TOML file.

        Raises:
            UserError: The file is missing, is no TOML, or has a wrong key or value.
        """
        tables = read_toml(path)
        return cls.from_dict(tables, str(path))


def record(kind: type[T], rows: Any, where: str) -> T:
    """Build the dataclass ``kind`` from ``rows``, checking every key and type.

    Raises:
        UserError: A key is unknown, or a value has the wrong type or is out of its range.
    """
    hints = get_type_hints(kind)
    refuse_unknown(rows, [f.name for f in dataclasses.fields(kind)], where)  # type: ignore[arg-type]
    values = {key: _checked(value, hints[key], f"{where} {key}") for key, value in rows.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{where} {error}") from error


def _checked(value: Any, hint: Any, where: str) -> Any:
    if get_origin(hint) is Literal:
        check_choice(where, value, hint)
        return value
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{where} has {len(str(value))} digits, too many") from None
    if hint in (int, float, bool, str) and type(value) is not hint:
        raise UserError(f"{where} = {value!r} should be of type {hint.__name__}")
    return value


def _at_least(least: int, **numbers: float | int) -> None:
    for name, number in numbers.items():
        if not number >= least:  # nor is NaN
            raise ValueError(f"{name} = {number} should be {least} or more")


def _below_one(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name} = {share} should be 0 or more and below 1")


def _fields(schedule: Any) -> dict[str, Any]:
    return dataclasses.asdict(schedule)


def refuse_unknown(rows: Any, known: Sequence[str], where: str) -> None:
    """Refuse keys that mean nothing, which would be believed to.

    Raises:
        UserError: There is one, or the rows are no table.
    """
    if not isinstance(rows, dict):
        raise UserError(f"{where} should be a table")
    for key in rows:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            mend = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise UserError(f"{where} has no key {key!r}; {mend}")
