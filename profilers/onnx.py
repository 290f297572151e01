"""ONNX Runtime on the processor this runs on, in a single thread.

Needs `pip install onnx onnxruntime`. The graph is gpsearch's own (`gpsearch.profiling.to_onnx`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from gpsearch.errors import Unsupported, UserError
from gpsearch.profiling import API_VERSION, DeviceFacts, exported, machine, seconds_of, to_onnx

Handle = Callable[[], Any]
"""One call."""


class OnnxProfiler:
    """Runs models in ONNX Runtime.

    Args:
        threads: Threads within an operation.
    """

    api_version = API_VERSION

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads

    def probe(self) -> DeviceFacts:
        """Name the processor and the runtime."""
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            why_not = f"{error.name} is missing: pip install onnx onnxruntime"
            return DeviceFacts("onnx-cpu", {}, unavailable={"latency_s": why_not})
        return DeviceFacts(
            name="onnx-cpu",
            fingerprint={
                **machine(),
                "threads": str(self.threads),
                "runtime": f"onnxruntime {onnxruntime.__version__}",
                "onnx": onnx.__version__,
            },
            unavailable={
                "energy_j": "this profiler reads no counter; `--device cpu` may",
                "peak_memory_bytes": "ONNX Runtime does not tell the peak of one call",
            },
        )

    def load(self, model: nn.Module, example: tuple[Any, ...]) -> Handle:
        """Export the model and see that its outputs are equal in ONNX Runtime.

        Raises:
            Unsupported: It cannot be exported, or it cannot run there.
        """
        import onnxruntime

        program = exported(model, example)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(
                to_onnx(program).SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            inputs = dict(zip(program.inputs, program.example, strict=True))
            found = session.run(None, inputs)
        except UserError:
            raise
        except Exception as error:  # of onnxruntime's own kinds, without a common base
            reason = " ".join(str(error).split())
            raise Unsupported(f"ONNX Runtime refuses this model: {reason}") from error
        if difference := program.check(found):
            raise Unsupported(f"ONNX Runtime runs this model wrong: {difference}")
        return partial(session.run, None, inputs)

    def run(self, handles: Sequence[Handle], schedule: Sequence[int]) -> list[float]:
        """Time one call after the other."""
        return [seconds_of(handles[index]) for index in schedule]

    def close(self) -> None:
        """Nothing is held."""
