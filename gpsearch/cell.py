"""The H-LSTM: an LSTM whose four gates are small networks, as a drop-in for `torch.nn.LSTM`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from gpsearch.errors import UserError
from gpsearch.kernels.gates import Dense, Gates, Norm
from gpsearch.kernels.recurrence import ACTIVATIONS, recurrence
from gpsearch.kernels.sequence import Padded

State = tuple[Tensor, Tensor]

_DIRECT_SCALE = 0.3
"""Start of the last gate layer beside a direct path: the gates begin close to flat ones."""

_FREEZE = 1e4
"""A gate's sum at which it is shut or open to the last bit, within the range of half precision."""


class _Spec(NamedTuple):
    """One parameter: drawn from U(-bound, bound), or constant where it belongs to a norm."""

    name: str
    shape: tuple[int, ...]
    bound: float = 0.0


class _Gated(nn.Module):
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
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self.gate_hidden, self.activation = tuple(gate_hidden), activation
        self.gate_dropout, self.gate_direct, self.gate_norm = gate_dropout, gate_direct, gate_norm
        _check_sizes(input_size=input_size, hidden_size=hidden_size)
        _check_sizes(**{f"gate_hidden[{j}]": m for j, m in enumerate(self.gate_hidden)})
        _check_shares(gate_dropout=gate_dropout)
        if activation not in ACTIVATIONS:
            raise UserError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")

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

    def _specs(self, inputs: int) -> Iterator[_Spec]:
        """Yield the parameters of one cell that reads ``inputs`` features."""
        for spec in (*self._flat_specs(inputs), *self._hidden_specs(inputs)):
            if self.bias or not spec.name.startswith(("bias", "norm_bias")):
                yield spec

    def _flat_specs(self, inputs: int) -> Iterator[_Spec]:
        if self.gate_hidden and not self.gate_direct:
            return
        state, bound = self.hidden_size, 1 / math.sqrt(self.hidden_size)
        yield _Spec("weight_ih", (4 * state, inputs), bound)
        yield _Spec("weight_hh", (4 * state, state), bound)
        yield _Spec("bias_ih", (4 * state,), bound)
        yield _Spec("bias_hh", (4 * state,), bound)

    def _hidden_specs(self, inputs: int) -> Iterator[_Spec]:
        if not self.gate_hidden:
            return
        first, state = self.gate_hidden[0], self.hidden_size
        bound = 1 / math.sqrt(inputs + state)
        yield _Spec("weight_gate_ih", (4 * first, inputs), bound * self._gain())
        yield _Spec("weight_gate_hh", (4 * first, state), bound * self._gain())
        yield _Spec("bias_gate", (4 * first,), bound)
        for j, (width, following) in enumerate(pairwise((*self.gate_hidden, state)), 1):
            last, bound = j == len(self.gate_hidden), 1 / math.sqrt(width)
            if self.gate_norm:
                yield _Spec(f"norm_weight_gate{j}", (4 * width,))
                yield _Spec(f"norm_bias_gate{j}", (4 * width,))
            scale = self._gain() if not last else _DIRECT_SCALE if self.gate_direct else 1.0
            yield _Spec(f"weight_gate{j}", (4 * following, width), bound * scale)
            if not (last and self.gate_direct):
                yield _Spec(f"bias_gate{j}", (4 * following,), bound)

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
            self._masks(batch),
            self.activation,
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
        parameter = self._parameters.get(name)
        return None if parameter is None else parameter.view(4, -1, *parameter.shape[1:])

    def _masks(self, batch: int) -> tuple[Tensor, ...]:
        if not (self.training and self.gate_dropout):
            return ()
        like = next(self.parameters())
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


class HLSTMCell(_Gated):
    """One step of an H-LSTM; without hidden layers in the gates, `torch.nn.LSTMCell`.

    The arguments are those of `HLSTM`. Gate dropout draws a new mask at every call.

    Shape:
        Input ``[B, X]`` or ``[X]``; the state ``(h, c)`` likewise, ``[B, H]`` or ``[H]``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate_hidden: Sequence[int] = (128,),
        activation: str = "relu",
        gate_dropout: float = 0.0,
        gate_direct: bool = False,
        gate_norm: bool = False,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            bias,
            gate_hidden,
            activation,
            gate_dropout,
            gate_direct,
            gate_norm,
        )
        self._register(device, dtype)

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """Return the next ``(h, c)``."""
        _check_input(input, self.input_size, (1, 2))
        x = input if input.dim() == 2 else input.unsqueeze(0)
        if hx is None:
            zeros = x.new_zeros(len(x), self.hidden_size)
            h, c = zeros, zeros
        else:
            h, c = (s if input.dim() == 2 else s.unsqueeze(0) for s in hx)
        h, c = self._step(x, h, c)
        return (h, c) if input.dim() == 2 else (h.squeeze(0), c.squeeze(0))

    def _step(self, x: Tensor, h: Tensor, c: Tensor) -> State:
        if self.gate_hidden:
            hs, cs = recurrence([x[None]], h[None], c[None], [self._gates("", len(x))])
            return hs[0, 0], cs[0, 0]
        following: State = torch.lstm_cell(x, [h, c], *self._flat_weights(""))
        return following


class HLSTM(_Gated):
    """A stack of H-LSTM layers, with the interface of `torch.nn.LSTM`.

    Each gate (i, f, g, o) is its own network on the input and the last state: zero or more hidden
    layers, then a sigmoid (tanh for g). Without hidden layers it is the LSTM, runs as fast, and
    has its parameters.

    Args:
        input_size: Features of the input.
        hidden_size: State units of a layer, in each direction.
        num_layers: Recurrent layers.
        bias: Affine maps have biases.
        batch_first: Batched input is ``[B, T, X]`` rather than ``[T, B, X]``.
        dropout: Dropout on the output of every layer but the last.
        bidirectional: Read the sequence in both directions; outputs are concatenated.
        device: Device of the parameters.
        dtype: Type of the parameters.
        gate_hidden: Widths of the hidden layers in each gate; ``()`` is the LSTM.
        activation: Of the hidden layers: relu, leaky_relu, tanh or gelu.
        gate_dropout: Dropout on the outputs of the gates' hidden layers. A mask is drawn for each
            sequence and holds for all its steps (the paper does not say; this is the cheaper).
        gate_direct: Add a direct affine path beside the hidden layers.
        gate_norm: Layer norm over each gate's hidden units, before the activation.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate_hidden: Sequence[int] = (128,),
        activation: str = "relu",
        gate_dropout: float = 0.0,
        gate_direct: bool = False,
        gate_norm: bool = False,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            bias,
            gate_hidden,
            activation,
            gate_dropout,
            gate_direct,
            gate_norm,
        )
        self.num_layers, self.batch_first = num_layers, batch_first
        self.dropout, self.bidirectional = dropout, bidirectional
        _check_sizes(num_layers=num_layers)
        _check_shares(dropout=dropout)
        self._register(device, dtype)

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM) -> HLSTM:
        """Return an HLSTM without hidden layers in its gates that equals ``lstm``.

        Raises:
            UserError: The LSTM projects its state (``proj_size``).
        """
        if lstm.proj_size:
            raise UserError(
                f"an LSTM with proj_size={lstm.proj_size} has no H-LSTM; use proj_size=0"
            )
        weight = next(lstm.parameters())
        hlstm = cls(
            lstm.input_size,
            lstm.hidden_size,
            lstm.num_layers,
            lstm.bias,
            lstm.batch_first,
            lstm.dropout,
            lstm.bidirectional,
            weight.device,
            weight.dtype,
            gate_hidden=(),
        )
        hlstm.load_state_dict(lstm.state_dict())
        return hlstm.train(lstm.training)

    def flatten_parameters(self) -> None:
        """Do nothing; here for code that calls it on any recurrent layer."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run the stack over a batch of sequences.

        Args:
            input: ``[T, B, X]`` (``[B, T, X]`` with batch_first), ``[T, X]``, or packed sequences.
            hx: The initial state ``(h, c)``, each ``[layers * directions, B, H]``; absent is zero.
            lengths: True lengths of padded sequences, in any order: states and outputs are those
                of packed sequences, without the cost of packing; outputs are zero at the padding.

        Returns:
            The output of the last layer in the layout of the input, and the state ``(h, c)`` after
            the last step of each sequence.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        _check_input(input, self.input_size, (2, 3))
        if input.dim() == 2:
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
            output, (h, c) = self._run(input.unsqueeze(1), hx, lengths)
            return output.squeeze(1), (h.squeeze(1), c.squeeze(1))
        output, state = self._run(input.transpose(0, 1) if self.batch_first else input, hx, lengths)
        return output.transpose(0, 1) if self.batch_first else output, state

    def _forward_packed(self, packed: PackedSequence, hx: State | None) -> tuple[Any, State]:
        x, lengths = pad_packed_sequence(packed)
        output, state = self._run(x, hx, lengths)
        order = packed.sorted_indices
        if order is not None:
            output, lengths = output.index_select(1, order), lengths[order.to(lengths.device)]
        data = pack_padded_sequence(output, lengths).data
        indices = order, packed.unsorted_indices
        return PackedSequence(data, packed.batch_sizes, *indices), state

    def _run(self, x: Tensor, hx: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        """Run time-major sequences through all layers."""
        steps, batch = x.shape[:2]
        lengths = _checked_lengths(lengths, steps, batch)
        hx = self._initial(x, hx)
        if not self.gate_hidden and lengths is None:
            return self._run_lstm(x, hx)
        padded = Padded(steps, batch, 1 + self.bidirectional, lengths, x.device)
        x, h_n, c_n = padded.zeroed(x), [], []
        for layer, (h0, c0) in enumerate(zip(*self._by_layer(hx), strict=True)):
            if layer:
                x = F.dropout(x, self.dropout, self.training)
            run = self._hidden_layer if self.gate_hidden else self._flat_layer
            hs, c = run(layer, padded, padded.split(x), h0, c0)
            x = padded.join(hs)
            h_n.append(padded.last(hs))
            c_n.append(c)
        return x, (torch.cat(h_n), torch.cat(c_n))

    def _hidden_layer(
        self, layer: int, padded: Padded, xs: Sequence[Tensor], h0: Tensor, c0: Tensor
    ) -> State:
        """Return one layer's outputs at all steps, and its last c."""
        gates = [self._gates(suffix, h0.shape[1]) for suffix in self._suffixes(layer)]
        hs, cs = recurrence(xs, h0, c0, gates)
        return hs, padded.last(cs)

    def _flat_layer(
        self, layer: int, padded: Padded, xs: Sequence[Tensor], h0: Tensor, c0: Tensor
    ) -> State:
        """Do the same by torch's fused LSTM, a direction at a time.

        It gives c at the last step of the padding only, so the padding has to keep c: an added
        input, 1 there, shuts the input gates and opens the forget gates all the way.
        """
        assert padded.padding is not None
        frozen = padded.padding.to(h0.dtype)
        hs, cs = [], []
        for d, suffix in enumerate(self._suffixes(layer)):
            w_ih, *rest = self._flat_weights(suffix)
            column = w_ih.new_zeros(4, self.hidden_size, 1)
            column[0], column[1] = -_FREEZE, _FREEZE
            weights = [torch.cat([w_ih, column.flatten(0, 1)], 1), *rest]
            x, state = torch.cat([xs[d], frozen], 2), (h0[d : d + 1], c0[d : d + 1])
            out, _, c = torch.lstm(x, state, weights, self.bias, 1, 0.0, False, False, False)
            hs.append(out)
            cs.append(c)
        return torch.stack(hs), torch.cat(cs)

    def _run_lstm(self, x: Tensor, hx: State) -> tuple[Tensor, State]:
        """Run unpadded sequences through torch's fused LSTM, all layers at once."""
        weights = [w for suffix, _ in self._cells() for w in self._flat_weights(suffix)]
        options = self.bias, self.num_layers, self.dropout, self.training, self.bidirectional
        output, h, c = torch.lstm(x, hx, weights, *options, False)
        return output, (h, c)

    def _cells(self) -> Iterator[tuple[str, int]]:
        for layer in range(self.num_layers):
            below = self.hidden_size * (1 + self.bidirectional)
            for suffix in self._suffixes(layer):
                yield suffix, below if layer else self.input_size

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}{way}" for way in ("", "_reverse")[: 1 + self.bidirectional]]

    def _initial(self, x: Tensor, hx: State | None) -> State:
        shape = self.num_layers * (1 + self.bidirectional), x.shape[1], self.hidden_size
        if hx is None:
            zeros = x.new_zeros(shape)
            return zeros, zeros
        for name, state in zip(("h", "c"), hx, strict=True):
            if state.shape != shape:
                raise UserError(f"the initial {name} is {list(state.shape)}, not {list(shape)}")
        return hx

    def _by_layer(self, hx: State) -> State:
        h, c = (state.reshape(self.num_layers, -1, *state.shape[1:]) for state in hx)
        return h, c

    _OPTIONS = {  # noqa: RUF012 - read only
        "num_layers": 1,
        "batch_first": False,
        "dropout": 0.0,
        "bidirectional": False,
        **_Gated._OPTIONS,
    }


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name}={size} should be at least 1")


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"{name}={share} should lie within 0 and 1")


def _check_input(input: Tensor, size: int, dims: tuple[int, int]) -> None:
    if input.dim() not in dims:
        raise UserError(
            f"the input has {input.dim()} dimensions; it should have {dims[0]} or {dims[1]}"
        )
    if input.shape[-1] != size:
        raise UserError(f"the input has {input.shape[-1]} features; input_size is {size}")


def _checked_lengths(lengths: Tensor | None, steps: int, batch: int) -> Tensor | None:
    """Return the lengths, or None where no sequence is padded."""
    if not steps:
        raise UserError("the input has no time steps; it should have at least 1")
    if lengths is None or not batch:
        return None
    if lengths.shape != (batch,):
        raise UserError(f"lengths has the shape {list(lengths.shape)}; it should be [{batch}]")
    shortest, longest = (int(end) for end in lengths.aminmax())
    if shortest < 1 or longest > steps:
        raise UserError(f"lengths go from {shortest} to {longest}; they should lie in 1 to {steps}")
    return None if shortest == steps else lengths
