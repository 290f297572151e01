"""Measuring a model on a device, and the one door by which devices come in.

A device profiler supplies primitives only: say what it can, load a model, run it, read a counter.
The engine owns warm-up, order, repeats and statistics, so that every device is measured alike.
Of the engine a profiler imports this package and `gpsearch.errors`, and nothing else.

    quantity    one number, and how it was got
    device      what a profiler is: `DeviceProfiler` and the facts it states
    patience    waiting for strangers' code, and not for ever
    strangers   calling it, and telling its errors in one line
    plugins     from a name to a profiler: `find`, `installed`, `devices`
    intervals   medians, quantiles and their 95 % intervals
    latency     the order of the calls, and when to stop
    energy      windows on a cumulative counter
    rapl        the counters of Intel's and AMD's processors, for profilers to share
    zeus        likewise what Zeus reads of Jetson boards, Apple's chips and AMD's GPUs
    host        the measuring machine: its load, and who may use it when
    measuring   `measure`: one model on one device, as one `Reading`
    gate        `aa_gate` and `check`: whether the device can rank models at all

For devices that do not run torch there are `exported` and `to_onnx` of `gpsearch.exporting`.
"""

from gpsearch.computed import copied
from gpsearch.exporting import (
    AGENT,
    Program,
    arguments_on,
    checksum,
    exported,
    machine,
    packed,
    seconds_of,
    to_onnx,
)
from gpsearch.profiling.device import (
    API_VERSION,
    DeviceFacts,
    DeviceProfiler,
    EnergyMeter,
    MemoryMeter,
    OutputReader,
    PowerMeter,
    Watched,
    Worker,
    arrays_of,
    facts_of,
    kernels_in_use,
    stored_bytes,
)
from gpsearch.profiling.gate import AA_GATE, aa_gate, check
from gpsearch.profiling.host import Host, waiting
from gpsearch.profiling.measuring import Reading, measure
from gpsearch.profiling.plugins import devices, find, from_anywhere, installed
from gpsearch.profiling.quantity import Quantity
from gpsearch.profiling.strangers import closing, load

__all__ = [
    "AA_GATE",
    "AGENT",
    "API_VERSION",
    "DeviceFacts",
    "DeviceProfiler",
    "EnergyMeter",
    "Host",
    "MemoryMeter",
    "OutputReader",
    "PowerMeter",
    "Program",
    "Quantity",
    "Reading",
    "Watched",
    "Worker",
    "aa_gate",
    "arguments_on",
    "arrays_of",
    "check",
    "checksum",
    "closing",
    "copied",
    "devices",
    "exported",
    "facts_of",
    "find",
    "from_anywhere",
    "installed",
    "kernels_in_use",
    "load",
    "machine",
    "measure",
    "packed",
    "seconds_of",
    "stored_bytes",
    "to_onnx",
    "waiting",
]
