"""Calling strangers' code: whatever a profiler raises is told in one line that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

from torch import nn

from gpsearch.errors import UserError, line_of
from gpsearch.profiling.device import DeviceProfiler

P = ParamSpec("P")
T = TypeVar("T")


def told(device: object, ask: Callable[P, T]) -> Callable[P, T]:
    """Return what asks a profiler, such as its method, without a traceback where that fails.

    Errors that say what failed pass as they are: UserError (so Unsupported too), OSError and
    RuntimeError. Any other becomes a RuntimeError.
    """

    def asked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return ask(*args, **kwargs)
        except (UserError, OSError, RuntimeError):
            raise
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"profiler {type(device).__name__}: {line_of(error)}") from error

    return asked


def load(device: DeviceProfiler, model: nn.Module, example: tuple[Any, ...]) -> Any:
    """Return a profiler's handle to a model.

    Raises:
        UserError: The device cannot run it; as `Unsupported`, the model is at fault.
        OSError, RuntimeError: It failed, in whatever way.
    """
    return told(device, device.load)(model, example)


@contextmanager
def closing(device: DeviceProfiler) -> Iterator[DeviceProfiler]:
    """Close a profiler in the end, as `contextlib.closing`; a failure of that hides no other.

    Raises:
        OSError, RuntimeError: It cannot be closed.
    """
    try:
        yield device
    except BaseException:
        with suppress(Exception, SystemExit):
            device.close()
        raise
    told(device, device.close)()
