"""Inference in C: a recurrent module's weights, packed by the formats that were found fastest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gpsearch.errors import UserError
from gpsearch.kernels import decode
from gpsearch.kernels.compiled import KINDS
from gpsearch.kernels.native import Native, native

T = TypeVar("T", bound="Packable")


class Spec(NamedTuple):
    """One parameter: drawn from U(-bound, bound), or constant where it belongs to a norm."""

    name: str
    shape: tuple[int, ...]
    bound: float = 0.0


class _Deployed(NamedTuple):
    """A module as its kernels have it, and what it was made of."""

    decoder: decode.Decoder
    native: Native
    formats: Mapping[str, str]
    options: tuple[Any, ...]
    marks: tuple[tuple[str, Tensor | None, int, int], ...]
    """Of every parameter, in order: its name, itself, its version, its address."""


class Packable(nn.Module):
    """What lets `HLSTM` and `HLSTMCell` run in C where there is no training to be done.

    Attributes:
        formats: How to pack every weight, by the parameter's name: one of
            `gpsearch.kernels.decode.FORMATS`. Where it is empty, torch does the work. `compact`
            fills it in. Packed weights follow their parameters, but for changes in eval mode that
            nobody can see: by way of ``.data`` or ``.numpy()``, or by another process.
    """

    formats: Mapping[str, str] = MappingProxyType({})
    _deployed: _Deployed | None = None
    _directions = 1

    input_size: int
    hidden_size: int
    bias: bool
    activation: str
    gate_hidden: tuple[int, ...]
    gate_direct: bool
    gate_norm: bool

    def _cells(self) -> Iterator[tuple[str, int]]:
        """Yield the suffix of each cell's parameters, and its input size."""
        raise NotImplementedError

    def _specs(self, inputs: int) -> Iterator[Spec]:
        """Yield the parameters of one cell that reads ``inputs`` features."""
        raise NotImplementedError

    def is_parametrized(self) -> bool:
        """Tell whether weights are no parameters: buffers, or computed, as by torch's pruning."""
        names = (
            spec.name + suffix for suffix, inputs in self._cells() for spec in self._specs(inputs)
        )
        return parametrize.is_parametrized(self) or any(n not in self._parameters for n in names)

    def check(self) -> None:
        """Refuse options, parameters and formats that do not go together, as in a damaged file.

        Raises:
            UserError: One is missing, of another shape, or unknown.
        """
        wrong = [size for size in self._sizes() if type(size) is not int or size < 1]
        wrong += [flag for flag in self._flags() if flag not in (False, True)]
        if wrong or self.activation not in KINDS:
            raise UserError(f"one of its options cannot be {(wrong or [self.activation])[0]!r}")
        names = {name for name, p in self._parameters.items() if p is not None}
        for suffix, inputs in self._cells():
            for name, shape, _ in self._specs(inputs):
                self._check_parameter(name + suffix, shape)
                names.discard(name + suffix)
        if names and not self.is_parametrized():
            raise UserError(f"{min(names)} does not belong to it")
        self._check_formats()

    def _sizes(self) -> list[Any]:
        hidden = self.gate_hidden if isinstance(self.gate_hidden, tuple) else (None,)
        return [self.input_size, self.hidden_size, *hidden]

    def _flags(self) -> list[Any]:
        return [self.bias, self.gate_direct, self.gate_norm]

    def _check_parameter(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._weight(name)
        if found is None or found.shape != shape:
            is_ = "missing" if found is None else f"of the shape {list(found.shape)}"
            raise UserError(f"{name} is {is_}; it should be {list(shape)}")

    def _weight(self, name: str) -> Tensor | None:
        """Return a parameter, or what is computed in its place."""
        found = getattr(self, name, None)
        return found if isinstance(found, Tensor) else None

    def _check_formats(self) -> None:
        if not isinstance(self.formats, Mapping):
            raise UserError(f"its formats cannot be {self.formats!r}")
        for name, format in self.formats.items():
            found = self._weight(name) if isinstance(name, str) else None
            if found is None or found.dim() != 2 or format not in decode.FORMATS:
                raise UserError(f"{name!r} cannot be packed as {format!r}")

    def decoder(self, batch: int, *inputs: Tensor) -> decode.Decoder | None:
        """Return what runs this module in C, where that may be done with these inputs."""
        if self._deployed is not None and torch.is_grad_enabled():
            self._deployed = None  # a step may follow, and torch's fused ones leave no trace
        if self.training or not self.formats or not decode.applies(batch, *inputs):
            return None
        kernels = native()
        deployed = self._deployed
        if deployed is None or not self._is_current(deployed, kernels):
            deployed = self._deployed = self._deploy(kernels)
        return deployed and deployed.decoder

    def _is_current(self, deployed: _Deployed, kernels: Native | None) -> bool:
        if deployed.native is not kernels or deployed.formats is not self.formats:
            return False
        if deployed.options != self._options():
            return False
        parameters = self._parameters.items()
        if len(parameters) != len(deployed.marks):
            return False
        for (name, own), (known, packed, version, address) in zip(
            parameters, deployed.marks, strict=True
        ):
            if own is not packed or name != known:
                return False
            if own is not None and (own._version != version or own.data_ptr() != address):
                return False
        return True

    def _deploy(self, kernels: Native | None) -> _Deployed | None:
        """Pack the parameters; None where there are no kernels for them, or some are computed."""
        own = [p for p in self._parameters.values() if p is not None]
        plain = decode.suits(*own) and not any(p.is_inference() for p in own)
        if kernels is None or self.gate_norm or not plain or self.is_parametrized():
            return None
        marks = tuple(
            (name, p, 0, 0) if p is None else (name, p, p._version, p.data_ptr())
            for name, p in self._parameters.items()
        )
        decoder = self.packed(kernels, self.formats)
        return _Deployed(decoder, kernels, self.formats, self._options(), marks)

    def _options(self) -> tuple[Any, ...]:
        return self.activation, self.gate_hidden, self.gate_direct

    def packed(
        self,
        kernels: Native,
        formats: Mapping[str, str],
        packed: dict[decode.Key, decode.Packed] | None = None,
    ) -> decode.Decoder:
        """Return what runs this module in C, with its weights in these formats.

        Args:
            kernels: Those of one instruction set.
            formats: As the attribute; what is missing is dense.
            packed: Matrices packed before; see `gpsearch.kernels.decode.Decoder`.

        Raises:
            UserError: A parameter does not go with the options.
        """
        self.check()
        cells = [self._cell_weights(suffix, formats) for suffix, _ in self._cells()]
        return decode.Decoder(kernels, cells, self._directions, packed)

    def _cell_weights(self, suffix: str, formats: Mapping[str, str]) -> decode.Cell:
        def own(name: str) -> Tensor | None:
            found = self._parameters.get(name + suffix)
            return None if found is None else found.detach()

        def matrix(name: str) -> decode.Matrix:
            name += suffix
            return decode.Matrix(getattr(self, name).detach(), formats.get(name, "dense"))

        def front(hidden: str, *biases: str) -> decode.Front:
            given = [bias for bias in map(own, biases) if bias is not None]
            bias = sum(given[1:], given[0]) if given else None
            return decode.Front(matrix(f"weight{hidden}_ih"), matrix(f"weight{hidden}_hh"), bias)

        backs = [
            decode.Back(matrix(f"weight_gate{j}"), own(f"bias_gate{j}"))
            for j in range(1, len(self.gate_hidden) + 1)
        ]
        flat = self.gate_direct or not backs
        return decode.Cell(
            front("_gate", "bias_gate") if backs else None,
            front("", "bias_ih", "bias_hh") if flat else None,
            tuple(backs),
            self.activation,
        )

    def train(self: T, mode: bool = True) -> T:
        """Set the mode; on the way to training the packed weights go."""
        if mode:
            self._deployed = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the packed weights out: they are made anew where they are used."""
        return {name: value for name, value in self.__dict__.items() if name != "_deployed"}
