"""The gates' options and their parameters: what `HLSTM` and `HLSTMCell` share."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpsearch.errors import UserError
from gpsearch.inference import Packable, Spec
from gpsearch.kernels.gates import Dense, Gates, Norm
from gpsearch.kernels.pattern import Patterns
from gpsearch.kernels.plain import ACTIVATIONS

_DIRECT_SCALE = 0.3
"""Start of the last gate layer beside a direct path: the gates begin close to flat ones."""


class Gated(Packable):
    """What `HLSTM` and `HLSTMCell` share: the gates' options and their parameters."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        gate_hidden: Sequence[int],
        activation: str,
        gate_dropout: float,
        gate_direct: bool,
        gate_norm: bool,
    ) -> None:
        super().__init__()
        if not isinstance(gate_hidden, Sequence):
            raise UserError(f"gate_hidden={gate_hidden!r} should be a sequence of widths: (128,)")
        self.input_size = size("input_size", input_size)
        self.hidden_size = size("hidden_size", hidden_size)
        self.gate_hidden = tuple(size(f"gate_hidden[{j}]", m) for j, m in enumerate(gate_hidden))
        self.bias, self.activation = bias, activation
        self.gate_dropout, self.gate_direct, self.gate_norm = gate_dropout, gate_direct, gate_norm
        self._patterns: dict[str, Patterns] = {}
        check_shares(gate_dropout=gate_dropout)
        for name in ("bias", "gate_direct", "gate_norm"):
            if getattr(self, name) not in (True, False):
                raise UserError(f"{name}={getattr(self, name)!r} should be True or False")
        if activation not in tuple(ACTIVATIONS):  # a list has no hash to be looked up by
            raise UserError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the masks out as well: a copy computes with all its weights.

        For nobody would tell it when other ones wake, or when it shrinks.
        """
        return super().__getstate__() | {"_patterns": {}}

    def _cells(self) -> Iterator[tuple[str, int]]:
        """Yield the suffix of each cell's parameters, and its input size."""
        yield "", self.input_size

    def _register(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        for suffix, inputs in self._cells():
            for name, shape, _ in self._specs(inputs):
                empty = torch.empty(shape, device=device, dtype=dtype)
                setattr(self, name + suffix, nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew.

        The flat path is drawn as in `torch.nn.LSTM`, from U(-1/sqrt(H), 1/sqrt(H)), the forget
        gate's bias included. A hidden layer's weights keep the variance of what they read through
        its activation (Kaiming: gain * sqrt(3 / fan_in), fan_in = X + H for the first one); the
        layer onto the gates is drawn from U(-1/sqrt(m), 1/sqrt(m)), at 0.3 of that beside a
        direct path. Their biases lie within 1/sqrt(fan_in); norms start as the identity.
        """
        for suffix, inputs in self._cells():
            for name, _, bound in self._specs(inputs):
                parameter = getattr(self, name + suffix)
                if name.startswith("norm"):
                    nn.init.constant_(parameter, float(name.startswith("norm_weight")))
                else:
                    nn.init.uniform_(parameter, -bound, bound)

    def _specs(self, inputs: int) -> Iterator[Spec]:
        """Yield the parameters of one cell that reads ``inputs`` features."""
        for spec in (*self._flat_specs(inputs), *self._hidden_specs(inputs)):
            if self.bias or not spec.name.startswith(("bias", "norm_bias")):
                yield spec

    def _flat_specs(self, inputs: int) -> Iterator[Spec]:
        if self.gate_hidden and not self.gate_direct:
            return
        state, bound = self.hidden_size, 1 / math.sqrt(self.hidden_size)
        yield Spec("weight_ih", (4 * state, inputs), bound)
        yield Spec("weight_hh", (4 * state, state), bound)
        yield Spec("bias_ih", (4 * state,), bound)
        yield Spec("bias_hh", (4 * state,), bound)

    def _hidden_specs(self, inputs: int) -> Iterator[Spec]:
        if not self.gate_hidden:
            return
        first, state = self.gate_hidden[0], self.hidden_size
        bound = 1 / math.sqrt(inputs + state)
        yield Spec("weight_gate_ih", (4 * first, inputs), bound * self._gain())
        yield Spec("weight_gate_hh", (4 * first, state), bound * self._gain())
        yield Spec("bias_gate", (4 * first,), bound)
        for j, (width, following) in enumerate(pairwise((*self.gate_hidden, state)), 1):
            last, bound = j == len(self.gate_hidden), 1 / math.sqrt(width)
            if self.gate_norm:
                yield Spec(f"norm_weight_gate{j}", (4 * width,))
                yield Spec(f"norm_bias_gate{j}", (4 * width,))
            scale = self._gain() if not last else _DIRECT_SCALE if self.gate_direct else 1.0
            yield Spec(f"weight_gate{j}", (4 * following, width), bound * scale)
            if not (last and self.gate_direct):
                yield Spec(f"bias_gate{j}", (4 * following,), bound)

    def _gain(self) -> float:
        """What takes the bound 1/sqrt(fan_in) to one that keeps variance (gelu: as relu)."""
        relus = {"relu": 2.0, "gelu": 2.0, "leaky_relu": 2 / (1 + 0.01**2)}
        return math.sqrt(3 * relus.get(self.activation, (5 / 3) ** 2))

    def _gates(self, suffix: str, batch: int) -> Gates:
        """Put together the weights of the cell with this suffix; draw its dropout masks."""
        depth = range(1, len(self.gate_hidden) + 1)
        by_gate = self._by_gate
        return Gates(
            self._joined("weight_gate_ih", "weight_ih", suffix),
            self._joined("weight_gate_hh", "weight_hh", suffix),
            self._first_bias(suffix),
            tuple(
                Dense(by_gate(f"weight_gate{j}{suffix}"), by_gate(f"bias_gate{j}{suffix}"))
                for j in depth
            ),
            tuple(
                Norm(by_gate(f"norm_weight_gate{j}{suffix}"), by_gate(f"norm_bias_gate{j}{suffix}"))
                for j in depth
                if self.gate_norm
            ),
            self._masks(batch, like=getattr(self, "weight_gate_hh" + suffix)),
            self.activation,
            self._patterns.get(suffix),
        )

    def _joined(self, hidden: str, flat: str, suffix: str) -> Tensor:
        """Put the direct path's rows below those of the hidden one."""
        rows: Tensor = getattr(self, hidden + suffix)
        return torch.cat([rows, getattr(self, flat + suffix)]) if self.gate_direct else rows

    def _first_bias(self, suffix: str) -> Tensor | None:
        if not self.bias:
            return None
        hidden: Tensor = getattr(self, "bias_gate" + suffix)
        if not self.gate_direct:
            return hidden
        flat = getattr(self, "bias_ih" + suffix) + getattr(self, "bias_hh" + suffix)
        return torch.cat([hidden, flat])

    def _by_gate(self, name: str) -> Any:
        """Split a parameter's rows into the four gates; None where it is absent."""
        parameter = getattr(self, name, None)
        return None if parameter is None else parameter.view(4, -1, *parameter.shape[1:])

    def _masks(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        """Draw dropout masks of the type of a weight; a replica has no parameters to ask."""
        if not (self.training and self.gate_dropout):
            return ()
        return tuple(
            F.dropout(like.new_ones(4, batch, width), self.gate_dropout)
            for width in self.gate_hidden
        )

    def _flat_weights(self, suffix: str) -> list[Tensor]:
        return [getattr(self, spec.name + suffix) for spec in self._specs(1)]

    _OPTIONS: dict[str, Any] = {  # noqa: RUF012 - read only
        "bias": True,
        "activation": "relu",
        "gate_dropout": 0.0,
        "gate_direct": False,
        "gate_norm": False,
    }

    def extra_repr(self) -> str:
        """Show the sizes, and the options that are not at their defaults."""
        chosen = {n: getattr(self, n) for n, usual in self._OPTIONS.items()}
        options = "".join(
            f", {name}={value}" for name, value in chosen.items() if value != self._OPTIONS[name]
        )
        return f"{self.input_size}, {self.hidden_size}, gate_hidden={self.gate_hidden}{options}"


def size(name: str, given: SupportsIndex) -> int:
    """Return a size as an int, be it numpy's; refuse one below 1, by its name."""
    try:
        whole = int(operator.index(given))
        if isinstance(given, bool):
            raise TypeError
    except TypeError:
        raise UserError(f"{name}={given!r} should be a whole number") from None
    if whole < 1:
        raise UserError(f"{name}={whole} should be at least 1")
    return whole


def check_shares(**shares: float) -> None:
    """Refuse what is no share between 0 and 1, by its name."""
    for name, share in shares.items():
        if not isinstance(share, Real) or not 0 <= share <= 1:
            raise UserError(f"{name}={share!r} should be a number from 0 to 1")
