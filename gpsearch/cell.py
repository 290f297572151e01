"""The H-LSTM: an LSTM whose four gates are small networks, as a drop-in for `torch.nn.LSTM`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Integer
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from gpsearch.dropout import dropout
from gpsearch.errors import UserError
from gpsearch.gated import Gated, check_shares, size
from gpsearch.kernels.gates import Gates
from gpsearch.kernels.pattern import Patterns
from gpsearch.kernels.recurrence import kernels_for, recurrence
from gpsearch.kernels.sequence import Padded
from gpsearch.kernels.sparse import PAYS_BELOW

State = tuple[Tensor, Tensor]

_FREEZE = 1e4
"""A gate's sum at which it is shut or open to the last bit, within the range of half precision."""


class HLSTMCell(Gated):
    """One step of an H-LSTM; without hidden layers in the gates, `torch.nn.LSTMCell`.

    The arguments are those of `HLSTM`. Gate dropout draws a new mask at every call; a loop over
    many steps goes faster, and keeps its mask, with the weights put together once:

        gates = cell.gates(batch)
        for x in inputs:
            h, c = cell(x, (h, c), gates)

    Shape:
        Input ``[B, X]`` or ``[X]``; the state ``(h, c)`` likewise, ``[B, H]`` or ``[H]``.

    Raises:
        UserError: Input, state or gates are of other sizes.
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

    def gates(self, batch: int) -> Gates | None:
        """Put the weights together for many steps, and draw the dropout masks of ``batch`` rows."""
        return self._gates("", batch) if self.gate_hidden else None

    def forward(self, input: Tensor, hx: State | None = None, gates: Gates | None = None) -> State:
        """Return the next ``(h, c)``; ``gates`` is what the method of that name gave."""
        _check_input(input, self.input_size, (1, 2))
        shape = (*input.shape[:-1], self.hidden_size)
        if hx is None:
            zeros = input.new_zeros(shape)
            hx = zeros, zeros
        elif not (len(hx) == 2 and hx[0].shape == hx[1].shape == shape):
            _check_state(hx, shape)  # whose call would cost more, at every step
        if input.dim() == 2:
            return self._step(input, *hx, gates)
        h, c = self._step(input.unsqueeze(0), hx[0].unsqueeze(0), hx[1].unsqueeze(0), gates)
        return h.squeeze(0), c.squeeze(0)

    def _step(self, x: Tensor, h: Tensor, c: Tensor, gates: Gates | None) -> State:
        batch = x.shape[0]  # len(x) takes three times as long, at every step
        if decoder := self.decoder(batch, x, h, c):
            return decoder.step(x, h, c)
        if gates is None:
            gates = self.gates(batch)
        else:
            self._check_gates(gates, batch)
        if gates is not None:
            hs, cs = recurrence([x[None]], h[None], c[None], [gates])
            return hs[0, 0], cs[0, 0]
        following: State = torch.lstm_cell(x, [h, c], *self._flat_weights(""))
        return following

    def _check_gates(self, gates: Gates, batch: int) -> None:
        """Refuse another cell's gates, by whose sizes the kernels would read and write."""
        own = self.input_size, self.hidden_size, self.gate_hidden, self.gate_direct
        widths = tuple([dense.weight.shape[2] for dense in gates.dense])
        given = gates.ih.shape[1], gates.hh.shape[1], widths, gates.direct
        if given != own:
            names = "input_size, hidden_size, gate_hidden and gate_direct"
            raise UserError(f"the gates have {names} {given}; those of this cell are {own}")
        if gates.masks and gates.masks[0].shape[1] != batch:
            rows = gates.masks[0].shape[1]
            raise UserError(f"the gates are those of {rows} rows; the input has {batch}")


class HLSTM(Gated):
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
        proj_size: 0, in its place among `torch.nn.LSTM`'s arguments: no H-LSTM projects its state.
        device: Device of the parameters.
        dtype: Type of the parameters.
        gate_hidden: Widths of the hidden layers in each gate; ``()`` is the LSTM.
        activation: Of the hidden layers: relu, leaky_relu, tanh or gelu.
        gate_dropout: Dropout on the outputs of the gates' hidden layers. A mask is drawn for each
            sequence and holds for all its steps (the paper does not say; this is the cheaper).
        gate_direct: Add a direct affine path beside the hidden layers.
        gate_norm: Layer norm over each gate's hidden units, before the activation.

    Raises:
        UserError: An option is none of those, or a size is below 1.
    """

    proj_size = 0
    """As of a `torch.nn.LSTM` that does not project its state."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
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
        if proj_size:
            raise UserError(f"proj_size={proj_size!r} has no H-LSTM; use proj_size=0")
        self.num_layers, self.batch_first = size("num_layers", num_layers), batch_first
        self.dropout, self.bidirectional = dropout, bidirectional
        check_shares(dropout=dropout)
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
        weight: Any = lstm.weight_ih_l0  # a parameter, or a buffer, or computed
        hlstm = cls(
            lstm.input_size,
            lstm.hidden_size,
            lstm.num_layers,
            lstm.bias,
            lstm.batch_first,
            lstm.dropout,
            lstm.bidirectional,
            device=weight.device,
            dtype=weight.dtype,
            gate_hidden=(),
        )
        own = {name: getattr(lstm, name) for name, _ in hlstm.named_parameters()}  # or computed
        hlstm.load_state_dict({name: weight.detach() for name, weight in own.items()})
        for name, parameter in hlstm.named_parameters():
            parameter.requires_grad_(own[name].requires_grad)
        return hlstm.train(lstm.training)

    def use_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Let training compute with awake weights only, where that is faster.

        It is in layers that have few of them, for batches that half fill the processor's vectors.
        Dormant weights have to be zero from then on; they may get gradients or not.

        Args:
            masks: By the parameters' names, True where a weight is awake; all weights of a
                parameter without a mask are. ``{}`` goes back to computing with all weights, and
                so does a module of which some are computed, as by `torch.nn.utils.prune`.

        Raises:
            UserError: A mask is of another shape than its parameter.
        """
        self._patterns = {}
        if not masks or self.is_parametrized():  # what is computed is no parameter with a mask
            return
        found = {suffix: self._layer_masks(suffix, masks) for suffix, _ in self._cells()}
        self._patterns = {
            suffix: Patterns.of(ih, hh, dense)
            for suffix, (ih, hh, *dense) in found.items()
            if _density(ih, hh, *dense) < PAYS_BELOW
        }

    def _layer_masks(self, suffix: str, masks: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the masks of one layer's ih, hh and dense maps, as `Gates` joins them."""

        def of(name: str) -> Tensor:
            weight = self.get_parameter(name + suffix)
            mask = masks.get(name + suffix, torch.ones_like(weight, dtype=torch.bool))
            if mask.shape != weight.shape:
                wanted = f"{[*weight.shape]}, not {[*mask.shape]}"
                raise UserError(f"the mask of {name + suffix} should be {wanted}")
            return mask

        flat = ["weight_ih", "weight_hh"] if self.gate_direct or not self.gate_hidden else []
        hidden = ["weight_gate_ih", "weight_gate_hh"] if self.gate_hidden else []
        firsts = [[of(name) for name in names[k::2]] for k in range(2) for names in [hidden + flat]]
        dense = [of(f"weight_gate{j}") for j in range(1, len(self.gate_hidden) + 1)]
        return [*map(torch.cat, firsts), *(one.view(4, -1, one.shape[1]) for one in dense)]

    def flatten_parameters(self) -> None:
        """Do nothing; here for code that calls it on any recurrent layer."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Integer[Tensor, " batch"] | None = None,
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

        Raises:
            UserError: Input or state are of other sizes, or packed sequences come with ``lengths``.
        """
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise UserError("packed sequences have lengths of their own: leave out lengths=")
            return self._forward_packed(input, hx)
        _check_input(input, self.input_size, (2, 3))
        if input.dim() == 2:
            if hx is not None:
                _check_state(hx, (self.num_layers * self._directions, self.hidden_size))
                hx = hx[0].unsqueeze(1), hx[1].unsqueeze(1)
            output, (h, c) = self._run(input.unsqueeze(1), hx, lengths)
            return output.squeeze(1), (h.squeeze(1), c.squeeze(1))
        output, state = self._run(input.transpose(0, 1) if self.batch_first else input, hx, lengths)
        return output.transpose(0, 1) if self.batch_first else output, state

    def _forward_packed(self, packed: PackedSequence, hx: State | None) -> tuple[Any, State]:
        _check_input(packed.data, self.input_size, (2, 2))
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
        if hx is not None:
            _check_pair(hx)
        if decoder := self.decoder(batch, x, *(hx or ())):
            return decoder.run(x, hx and self._initial(x, hx), lengths)
        hx = self._initial(x, hx)
        sparse = self._patterns and batch and kernels_for(x) is not None
        if not self.gate_hidden and lengths is None and not sparse:
            return self._run_lstm(x, hx)
        padded = Padded(steps, batch, 1 + self.bidirectional, lengths, x.device)
        x, h_n, c_n = padded.zeroed(x), [], []
        for layer, (h0, c0) in enumerate(zip(*self._by_layer(hx), strict=True)):
            if layer:
                x = dropout(x, self.dropout, training=self.training)
            by_recurrence = self.gate_hidden or kernels_for(x) is not None
            run = self._recurrent_layer if by_recurrence else self._flat_layer
            hs, c = run(layer, padded, padded.split(x), h0, c0)
            x = padded.join(hs)
            h_n.append(padded.last(hs))
            c_n.append(c)
        return x, (torch.cat(h_n), torch.cat(c_n))

    def _recurrent_layer(
        self, layer: int, padded: Padded, xs: Sequence[Tensor], h0: Tensor, c0: Tensor
    ) -> State:
        """Return one layer's outputs at all steps, and its last c."""
        make = self._gates if self.gate_hidden else self._flat_gates
        gates = [make(suffix, h0.shape[1]) for suffix in self._suffixes(layer)]
        hs, cs = recurrence(xs, h0, c0, gates)
        return hs, padded.last(cs)

    def _flat_gates(self, suffix: str, batch: int) -> Gates:
        w_ih, w_hh, *biases = self._flat_weights(suffix)
        bias = biases[0] + biases[1] if biases else None
        patterns = self._patterns.get(suffix)
        return Gates(w_ih, w_hh, bias, (), (), (), self.activation, patterns)

    def _flat_layer(
        self, layer: int, padded: Padded, xs: Sequence[Tensor], h0: Tensor, c0: Tensor
    ) -> State:
        """Do the same for flat gates by torch's fused LSTM, a direction at a time.

        It gives c at the last step of the padding only, so the padding has to keep c: an added
        input, 1 there, shuts the input gates and opens the forget gates all the way.
        """
        assert padded.padding is not None
        frozen = padded.padding.to(h0.dtype)
        # Where cuDNN is told that this is no training it keeps nothing for the backward pass.
        training, hs, cs = torch.is_grad_enabled(), [], []
        for d, suffix in enumerate(self._suffixes(layer)):
            w_ih, *rest = self._flat_weights(suffix)
            column = w_ih.new_zeros(4, self.hidden_size, 1)
            column[0], column[1] = -_FREEZE, _FREEZE
            weights = [torch.cat([w_ih, column.flatten(0, 1)], 1), *rest]
            x, state = torch.cat([xs[d], frozen], 2), (h0[d : d + 1], c0[d : d + 1])
            out, _, c = torch.lstm(x, state, weights, self.bias, 1, 0.0, training, False, False)
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

    @property
    def _directions(self) -> int:  # type: ignore[override]
        return 1 + self.bidirectional

    def _sizes(self) -> list[Any]:
        return [*super()._sizes(), self.num_layers]

    def _flags(self) -> list[Any]:
        return [*super()._flags(), self.batch_first, self.bidirectional]

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}{way}" for way in ("", "_reverse")[: 1 + self.bidirectional]]

    def _initial(self, x: Tensor, hx: State | None) -> State:
        shape = self.num_layers * (1 + self.bidirectional), x.shape[1], self.hidden_size
        if hx is None:
            zeros = x.new_zeros(shape)
            return zeros, zeros
        _check_state(hx, shape)
        return hx

    def _by_layer(self, hx: State) -> State:
        h, c = (state.reshape(self.num_layers, self._directions, *state.shape[1:]) for state in hx)
        return h, c

    _OPTIONS = {  # noqa: RUF012 - read only
        "num_layers": 1,
        "batch_first": False,
        "dropout": 0.0,
        "bidirectional": False,
        **Gated._OPTIONS,
    }


def _density(*masks: Tensor) -> float:
    return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def _check_input(input: Tensor, size: int, dims: tuple[int, int]) -> None:
    shape = input.shape
    if len(shape) not in dims:
        wanted = " or ".join(map(str, sorted(set(dims))))
        raise UserError(f"the input has {len(shape)} dimensions; it should have {wanted}")
    if shape[-1] != size:
        raise UserError(f"the input has {shape[-1]} features; input_size is {size}")


def _check_pair(hx: State) -> None:
    if isinstance(hx, Tensor) or len(hx) != 2:
        raise UserError("the initial state is no pair (h, c) of tensors")


def _check_state(hx: State, shape: tuple[int, ...]) -> None:
    """Refuse a state of another shape, naming the part."""
    _check_pair(hx)
    for name, state in zip(("h", "c"), hx, strict=True):
        if state.shape != shape:
            raise UserError(f"the initial {name} is {list(state.shape)}, not {list(shape)}")


def _checked_lengths(lengths: Tensor | None, steps: int, batch: int) -> Tensor | None:
    """Return the lengths as int64, or None where no sequence is padded."""
    if not steps:
        raise UserError("the input has no time steps; it should have at least 1")
    if lengths is None or not batch:
        return None
    if not isinstance(lengths, Tensor):
        raise UserError(f"lengths is a {type(lengths).__name__}; it should be a tensor of integers")
    if lengths.shape != (batch,):
        raise UserError(f"lengths has the shape {list(lengths.shape)}; it should be [{batch}]")
    if lengths.dtype is torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise UserError(f"lengths is of {lengths.dtype}; it should be of integers: torch.int64")
    lengths = lengths.to(torch.int64)  # as an index uint8 would be a mask
    shortest, longest = (int(end) for end in lengths.aminmax())
    if shortest < 1 or longest > steps:
        raise UserError(f"lengths go from {shortest} to {longest}; they should lie in 1 to {steps}")
    return None if shortest == steps else lengths
