"""torch.export's format `.pt2` on the processor this runs on, in a single thread.

The time loop of an H-LSTM is unrolled in it: exporting takes a minute for a few hundred steps.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from functools import partial
from typing import Any

import torch
from torch import nn

from gpsearch.errors import Unsupported
from gpsearch.profiling import API_VERSION, DeviceFacts, arguments_on, copied, machine, seconds_of

Handle = Callable[[], Any]
"""One call."""


class Pt2Profiler:
    """Runs models as torch.export wrote them and torch.export read them back."""

    api_version = API_VERSION

    def probe(self) -> DeviceFacts:
        """Name the processor and the runtime."""
        return DeviceFacts(
            name="pt2-cpu",
            fingerprint={
                **machine(),
                "threads": "1",
                "instructions": torch.backends.cpu.get_cpu_capability(),
                "runtime": f"torch.export {torch.__version__}",
            },
            unavailable={
                "energy_j": "this profiler reads no counter; `--device cpu` may",
                "peak_memory_bytes": "this profiler does not tell it; `--device cpu` does",
            },
        )

    def load(self, model: nn.Module, example: tuple[Any, ...]) -> Handle:
        """Export the model, read it back, and see that its outputs are equal.

        Raises:
            Unsupported: torch.export cannot export it.
        """
        model, arguments = copied(model).cpu().eval(), arguments_on("cpu", example)
        loaded = _through_pt2(model, arguments)
        with torch.inference_mode():
            found, wanted = loaded(*arguments), model(*arguments)
        try:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
        except AssertionError as error:
            raise Unsupported(
                f"torch.export makes another model of this one: {str(error).splitlines()[0]}"
            ) from error
        return partial(loaded, *arguments)

    def run(self, handles: Sequence[Handle], schedule: Sequence[int]) -> list[float]:
        """Time one call after the other."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                return [seconds_of(handles[index]) for index in schedule]
        finally:
            torch.set_num_threads(before)

    def close(self) -> None:
        """Nothing is held."""


def _through_pt2(model: nn.Module, arguments: tuple[Any, ...]) -> nn.Module:
    file = io.BytesIO()
    try:
        # Of its own internals torch warns, and what it cannot export it prints whole.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.export.save(torch.export.export(model, arguments), file)
            file.seek(0)
            return torch.export.load(file).module()
    except Exception as error:  # of many kinds, by what the model does
        reason = " ".join(str(error).split())[:300]
        raise Unsupported(f"torch.export cannot export this model: {reason}") from error
