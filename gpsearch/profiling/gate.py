"""The A/A gate: a device on which a model is not as fast as itself cannot rank models."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gpsearch.exporting import arguments_on
from gpsearch.profiling import latency
from gpsearch.profiling.device import DeviceProfiler
from gpsearch.profiling.host import Host
from gpsearch.profiling.intervals import quantile, quantile_interval
from gpsearch.profiling.measuring import Reading, measure, usable
from gpsearch.profiling.strangers import load

AA_GATE = 0.02
"""How far from 1 the ratio of a model to itself may lie."""
GATE_S = 1.0
"""Limit of each attempt, in time on the device; most take half of it."""
ATTEMPTS = 3
"""A passing disturbance, or an unlucky place in memory, is gone at the next one; a biased device is
not mended by it."""

_found: dict[tuple[str, ...], list[str]] = {}
"""What the gate found in this process, by device."""


@torch.inference_mode(False)  # as for `measure`
def aa_gate(
    device: DeviceProfiler,
    model: nn.Module,
    example: tuple[Any, ...],
    *,
    host: Host | None = None,
) -> list[str]:
    """Run a model against itself on a device, once for each kind of device in a process.

    Args:
        device: A profiler; what counts is which device it is of.
        model: What is loaded twice, if no device of this kind has been here yet.
        example: The arguments of one inference.
        host: The machine that measures; the present one if None.

    Returns:
        What casts doubt on every latency of the device, in one line; nothing if there is none.

    Raises:
        UserError: The device cannot run models, or its profiler breaks the contract.
        OSError, RuntimeError: The device or its profiler failed, in whatever way.
    """
    facts, host = usable(device), host or Host()
    kind = type(device)  # by name: a plain file's class is another one whenever it is loaded
    key = (kind.__module__, kind.__qualname__, facts.name, str(sorted(facts.fingerprint.items())))
    if key not in _found:
        with host.alone_on(facts.machine):
            _found[key] = _doubts(device, model, arguments_on("cpu", example), host)
    return _found[key]


def _doubts(
    device: DeviceProfiler, model: nn.Module, example: tuple[Any, ...], host: Host
) -> list[str]:
    """Return what is wrong with equal models, if every attempt says so.

    A noisy machine has a wide interval, or a strange one once; neither shows that it is biased.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            host.sleep(host.recovery_s)
        handles = [load(device, model, example) for _ in range(2)]
        ratios = latency.time_calls(device, handles, AA_GATE, GATE_S).ratios
        low, high = quantile_interval(ratios) or (0.0, math.inf)
        if low <= 1 + AA_GATE and high >= 1 - AA_GATE:
            return []
    return [
        f"a model against itself: {quantile(ratios):.3f}, so latencies are rough "
        "(`gpsearch plugin check` says more)"
    ]


def check(
    device: DeviceProfiler,
    model: nn.Module,
    example: tuple[Any, ...],
    *,
    host: Host | None = None,
) -> Reading:
    """Measure a model against itself as long as any other, for who wants to know all of it."""
    reading = measure(device, model, example, reference=model, reference_name="itself", host=host)
    ratio = reading["latency_ratio"].number
    if abs(ratio - 1) <= AA_GATE:
        return reading
    failed = f"a model measured against itself came out at {ratio:.3f} instead of 1 ± {AA_GATE}"
    return replace(reading, stable=False, flags=[*reading.flags, failed])
