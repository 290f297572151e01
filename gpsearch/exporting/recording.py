"""From a module to a `Program`: run it on its example and write down what it does with it.

Every call of a torch function on the example, or on what came of it, becomes operations; all else
(weights put together, orders of time) is computed here and now, and becomes constants. A recurrent
H-LSTM layer is one operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from gpsearch.errors import Unsupported, UserError
from gpsearch.exporting.program import Array, Op, Program

Writer = Callable[..., None]
"""Called with the recorder, the result and the arguments of one torch function."""

WRITERS: dict[str, Writer] = {}
"""How a call of each torch function is written down, by the function's name."""

_METADATA = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous",
    "is_floating_point", "is_complex", "data_ptr", "storage_offset", "element_size", "get_device",
    "__len__", "__hash__", "shape", "ndim", "device", "dtype", "layout", "requires_grad", "is_cuda",
    "is_meta", "is_sparse", "is_quantized", "is_leaf", "grad_fn", "grad", "names", "nbytes",
    "itemsize", "is_nested", "is_mkldnn", "is_inference", "is_same_size",
    "new_zeros", "new_ones", "new_empty", "zeros_like", "ones_like", "empty_like",
}  # fmt: skip
"""What may be asked of a value without looking at its numbers."""

_NUMPYS = {"axis": "dim", "keepdims": "keepdim"}
"""What torch takes for its own names of arguments, too."""


def writer(*names: str) -> Callable[[Writer], Writer]:
    """Register how calls of the torch functions of these names are written down."""

    def register(write: Writer) -> Writer:
        WRITERS.update(dict.fromkeys(names, write))
        return write

    return register


class _Named(NamedTuple):
    """A value's name; the value itself is kept, so that no other takes its id."""

    name: str
    value: Tensor
    version: int
    """How often it had been overwritten."""


class Recorder(TorchFunctionMode):
    """Writes a program down while a model runs.

    Args:
        example: The arguments; all that is computed from them is recorded.
    """

    def __init__(self, example: Sequence[Tensor]) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.constants: dict[str, Array] = {}
        self.inputs = [f"x{i}" for i in range(len(example))]
        self._count = 0
        self._names: dict[int, _Named] = {}
        self._known: dict[tuple[int, int], _Named] = {}
        self._overwritten: dict[int, Tensor] = {}
        for name, one in zip(self.inputs, example, strict=True):
            self._names[id(one)] = _Named(name, one, one._version)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute as ever, and write it down where it depends on the example."""
        name, kwargs = _name_of(func), kwargs or {}
        given = list(_tensors((args, kwargs)))
        if not any(self.is_recorded(one) or self._is_overwritten(one) for one in given):
            return func(*args, **kwargs)
        before = self._copies(given) if _overwrites(name, kwargs) else {}
        result = func(*args, **kwargs)
        if before:
            args, kwargs = self._as_given(before, args, kwargs)
        self._record(func, name, result, args, kwargs)
        return result

    def _copies(self, given: Iterable[Tensor]) -> dict[int, tuple[int, Tensor]]:
        """Copy what has no name yet, with its version: an accumulator that is about to get one."""
        return {id(one): (one._version, one.clone()) for one in given if not self.is_recorded(one)}

    def _as_given(self, before: Mapping[int, tuple[int, Tensor]], args: Any, kwargs: Any) -> Any:
        """Return a call's arguments with the copies of those that it has overwritten."""

        def as_given(one: Tensor) -> Tensor:
            version, copy = before.get(id(one), (None, one))
            if version in (None, one._version):
                return one
            self._overwritten[one.untyped_storage().data_ptr()] = one
            return copy

        return pytree.tree_map_only(Tensor, as_given, (args, kwargs))

    def _is_overwritten(self, value: Tensor) -> bool:
        """Tell whether what depends on the example was written where this value has its numbers."""
        return bool(self._overwritten) and value.untyped_storage().data_ptr() in self._overwritten

    def _record(self, func: Any, name: str, result: Any, args: Any, kwargs: Any) -> None:
        results = list(_tensors(result))
        if name in _METADATA or (results and all(self._is_unchanged(one) for one in results)):
            return  # nothing new: a shape, or x.contiguous()
        if name not in WRITERS:
            called = resolve_name(func) or name
            if results:
                raise Unsupported(f"{called} has no counterpart in an exported program")
            if name == "__setitem__":
                raise Unsupported("the model writes into a tensor by its index")
            raise Unsupported(f"what the model does depends on its data, by {called}")
        self._forgive_overwriting(results)
        kwargs = {_NUMPYS.get(key, key): value for key, value in kwargs.items()}
        try:
            call = signature(WRITERS[name]).bind(self, result, *args, **kwargs)
        except TypeError as error:
            raise Unsupported(f"{resolve_name(func) or name} {error}") from error
        WRITERS[name](*call.args, **call.kwargs)

    def is_recorded(self, value: Any) -> bool:
        """Tell whether a value depends on the example."""
        return isinstance(value, Tensor) and id(value) in self._names

    def _is_unchanged(self, value: Tensor) -> bool:
        return self.is_recorded(value) and self._names[id(value)].version == value._version

    def _forgive_overwriting(self, results: Iterable[Tensor]) -> None:
        """Let the result of relu_() stand, until it is written down, for what it was before."""
        for one in results:
            if self.is_recorded(one):
                self._names[id(one)] = self._names[id(one)]._replace(version=one._version)

    def write(
        self, op: str, inputs: Iterable[Any], outputs: Tensor | Sequence[Tensor], **attributes: Any
    ) -> None:
        """Add an operation whose results are ``outputs``."""
        results = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        names = [self.name(one) for one in inputs]
        self.ops.append(
            {"op": op, "in": names, "out": [self._new(one) for one in results], **attributes}
        )

    def alias(self, value: Tensor, other: Tensor) -> None:
        """Let ``value`` be what ``other`` is."""
        self._names[id(value)] = _Named(self.name(other), value, value._version)

    def name(self, value: Tensor) -> str:
        """Return the name of a value; what does not depend on the example becomes a constant.

        Raises:
            UserError: It was overwritten by way of another tensor that shares its memory.
        """
        if not self.is_recorded(value):
            return self.constant(value)
        if not self._is_unchanged(value):
            raise Unsupported("the model overwrites a value that it uses again")
        return self._names[id(value)].name

    def constant(self, value: Tensor) -> str:
        """Return the name of a constant, the same for the same tensor.

        Raises:
            UserError: It depends on the example, where only a constant can stand.
        """
        if self.is_recorded(value):
            raise Unsupported("a weight of the model depends on the data")
        if self._is_overwritten(value):
            raise Unsupported("the model overwrites a value that it uses again")
        key = id(value), value._version
        if key not in self._known:
            name = f"c{len(self._known)}"
            self._known[key] = _Named(name, value, value._version)
            self.constants[name] = as_array(value)
        return self._known[key].name

    def _new(self, value: Tensor) -> str:
        self._count += 1
        self._names[id(value)] = _Named(f"v{self._count}", value, value._version)
        return self._names[id(value)].name


def record(model: nn.Module, example: tuple[Any, ...]) -> Program:
    """Return what ``model`` computes for arguments of the shapes of ``example``, as a program.

    Raises:
        UserError: It does what no program can, such as loops that end by what they see; the
            message says what.
    """
    called_with = arguments_on("cpu", example)
    arguments = list(_tensors(called_with))
    recorder = Recorder(arguments)
    with torch.no_grad():
        with recorder:
            result = model(*called_with)
        outputs = list(_tensors(result))
        names = [recorder.name(one) for one in outputs]
    return Program(
        recorder.inputs,
        names,
        recorder.ops,
        recorder.constants,
        [as_array(one) for one in arguments],
        [as_array(one) for one in outputs],
    )


def arguments_on(device: torch.device | str, example: tuple[Any, ...] | Tensor) -> tuple[Any, ...]:
    """Return copies on a device of a call's arguments, tensors or tuples of them.

    Raises:
        UserError: It is a tensor, of which a call would take every row for an argument.
    """
    if isinstance(example, Tensor):
        raise UserError("an example is a tuple of a call's arguments: (x,) instead of x")
    copied: tuple[Any, ...] = pytree.tree_map_only(
        Tensor, lambda one: one.detach().to(device, copy=True), example
    )
    return copied


def as_array(value: Tensor) -> Array:
    """Return a copy as numpy holds it.

    Raises:
        UserError: numpy has no such numbers.
    """
    try:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            return np.ascontiguousarray(value.detach().cpu().numpy()).reshape(value.shape).copy()
    except TypeError as error:
        raise Unsupported(f"a value of type {value.dtype}; use float32") from error


def _name_of(func: Any) -> str:
    name: str = getattr(func, "__name__", str(func))
    # The getter of a property, such as Tensor.shape, is called by the property's name.
    return str(func.__self__.__name__) if name == "__get__" else name


def _overwrites(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a function may write into its arguments: add_, __iadd__, add(..., out=)."""
    special = name.endswith("__") and not name.startswith("__i")
    return "out" in kwargs or (name.endswith("_") and not special)


def _tensors(values: Any) -> Iterable[Tensor]:
    return (one for one in pytree.tree_leaves(values) if isinstance(one, Tensor))
