"""The device demo, for gpsearch."""

import copy
import platform
import resource
import time

import torch

from gpsearch.profiling import DeviceFacts, arrays_of

THREAD = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)  # macOS has no other


class DemoProfiler:
    """Runs models in torch, on one thread of the processor."""

    api_version = "1"

    def probe(self):
        """Say what the device is, what its speed depends on, and what it cannot do."""
        return DeviceFacts(
            name="demo",
            fingerprint={"processor": platform.machine(), "torch": torch.__version__},
            unavailable={"energy_j": "this device has no energy counter"},
        )

    def load(self, model, example):
        """Return a copy of the model, ready to run; the model itself stays as it is."""
        return copy.deepcopy(model).eval(), tuple(one.clone() for one in example)

    def run(self, handles, schedule):
        """Return the seconds of each call, until its output is there."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                return [self.seconds(*handles[index]) for index in schedule]
        finally:
            torch.set_num_threads(threads)  # the next training's

    def seconds(self, model, example):
        """Time one call; again, if another process took the processor from it."""
        for _ in range(8):
            interruptions = resource.getrusage(THREAD).ru_nivcsw
            start = time.perf_counter()
            model(*example)  # a device that works on its own must be waited for here
            seconds = time.perf_counter() - start
            if resource.getrusage(THREAD).ru_nivcsw == interruptions:
                break
        return seconds

    def outputs(self, handle):
        """Return what one call computes, so that it can be compared with torch."""
        model, example = handle
        with torch.inference_mode():
            return arrays_of(model(*example))

    def close(self):
        """Let go of the device; nothing is held here."""
