"""A recurrent layer over sequences that come step by step, as speech does from a microphone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gpsearch.cell import HLSTM, HLSTMCell, State
from gpsearch.errors import UserError
from gpsearch.gated import size
from gpsearch.kernels.decode import Running


class Stream:
    """Runs a layer one step at a time, and keeps its state.

    What a module has to find out at every call, a stream finds out once: where the layer runs in C
    (see `gpsearch.compact`), a step takes a few microseconds less than a call of `HLSTMCell`, and
    the layer may have several layers. There are no gradients.

        stream = Stream(layer)
        for x in microphone:
            h = stream(x)

    Args:
        layer: An `HLSTM` of one direction or an `HLSTMCell`, in eval mode. In C its weights are
            those that it had at the beginning; in torch they follow the layer.
        batch: Sequences side by side. More than 4 run in torch.
        state: h and c to begin with, in the layer's own shapes; absent is zero.

    Raises:
        UserError: The layer is of another kind, in training mode or reads both directions, or the
            state does not fit.
    """

    def __init__(
        self, layer: nn.Module, batch: int = 1, state: Sequence[Tensor] | None = None
    ) -> None:
        layer, batch = _suitable(layer), size("batch", batch)
        self._layer, self._batch = layer, batch
        some = next(chain(layer.parameters(), layer.buffers()))  # weights may be either
        shape = layer.num_layers if isinstance(layer, HLSTM) else 1, batch, layer.hidden_size
        with torch.inference_mode(False), torch.no_grad():
            h, c = (some.new_zeros(shape) for _ in range(2))
            for to, given in zip((h, c), _pair(layer, shape, state), strict=False):
                to.copy_(given)
        self._h, self._c = h, c
        self._running = self._in_c()

    def _in_c(self) -> Running | None:
        """Return what goes on from h and c in C, where the layer runs there."""
        with torch.inference_mode(False), torch.no_grad():
            decoder = self._layer.decoder(self._batch, self._h.new_empty(0))
        return None if decoder is None else Running(decoder, self._h, self._c)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what points into memory: a copy makes its own, of the layer as it is then."""
        return {name: value for name, value in self.__dict__.items() if name != "_running"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on from the same h and c."""
        self.__dict__.update(state)
        self._running = self._in_c()

    @property
    def state(self) -> State:
        """The pair h, c after the last step, in the layer's own shapes."""
        h, c = self._h.clone(), self._c.clone()
        return (h, c) if isinstance(self._layer, HLSTM) else (h[0], c[0])

    def __call__(self, x: Float[Tensor, "batch in"]) -> Float[Tensor, "batch hidden"]:
        """Take the next step of every sequence, and return the last layer's outputs.

        Raises:
            UserError: The input is not ``[batch, input_size]``; or, where the layer runs by torch,
                it is in training mode.
        """
        running = self._running
        if running is None:
            return self._by_module(x)
        if not running.suits(x):
            x = self._suiting(x)
        return running.step(x)

    def _suiting(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise UserError(f"a step is a tensor, not of the type {type(x).__name__}")
        if x.shape != (self._batch, self._layer.input_size):
            raise UserError(
                f"a step is {[self._batch, self._layer.input_size]}, not {list(x.shape)}"
            )
        return x.detach().to(self._h).contiguous().resolve_neg()

    @torch.no_grad()
    def _by_module(self, x: Tensor) -> Tensor:
        layer: Any = self._layer
        if layer.training:
            raise UserError("the stream's layer is in training mode; call eval() on it first")
        x = self._suiting(x)
        if isinstance(layer, HLSTMCell):
            h, c = layer(x, (self._h[0], self._c[0]))
            self._h, self._c = h.unsqueeze(0), c.unsqueeze(0)
            return torch.clone(h)
        time = int(layer.batch_first)
        outputs, (self._h, self._c) = layer(x.unsqueeze(time), (self._h, self._c))
        output: Tensor = outputs.squeeze(time)
        return output


def _suitable(layer: nn.Module) -> HLSTM | HLSTMCell:
    """Return the layer if it can be a stream."""
    kind = type(layer).__name__
    if isinstance(layer, nn.LSTM):
        raise UserError("a stream takes an HLSTM; HLSTM.from_lstm(lstm) makes one of an LSTM")
    if not isinstance(layer, HLSTM | HLSTMCell):
        raise UserError(f"a stream takes an HLSTM or an HLSTMCell, not a {kind}")
    if layer.training:
        raise UserError("a stream is for eval mode; call eval() on the layer first")
    if isinstance(layer, HLSTM) and layer.bidirectional:
        raise UserError("a bidirectional layer needs whole sequences; it cannot be a stream")
    return layer


def _pair(
    layer: HLSTM | HLSTMCell, shape: tuple[int, ...], state: Sequence[Tensor] | None
) -> Sequence[Tensor]:
    """Return h and c as they are given; nothing where they are not."""
    if state is None:
        return ()
    wanted = shape if isinstance(layer, HLSTM) else shape[1:]
    if len(state) != 2:
        raise UserError(f"the initial state should be h and c, not {len(state)} tensors")
    for name, given in zip("hc", state, strict=True):
        if given.shape != wanted:
            raise UserError(f"the initial {name} is {list(given.shape)}, not {list(wanted)}")
    return state
