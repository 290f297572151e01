"""`measure`: one model on one device, by one protocol, as one `Reading`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from gpsearch.errors import UserError
from gpsearch.profiling import latency
from gpsearch.profiling.device import DeviceFacts, DeviceProfiler, EnergyMeter, MemoryMeter
from gpsearch.profiling.energy import Work, measure_energy
from gpsearch.profiling.host import Host
from gpsearch.profiling.intervals import quantile
from gpsearch.profiling.quantity import Quantity

PROTOCOL = "aba-2"
"""The protocol is part of the number: readings of different protocols are not compared."""
STALLED = 0.5
"""Share of a reading in which tasks waited for a processor, above which it is flagged."""
AA_GATE = 0.02
"""How far from 1 the ratio of a model to itself may lie."""


@dataclass(frozen=True)
class Reading:
    """What was measured of one model on one device; reading.json holds it beside the metrics."""

    quantities: Mapping[str, Quantity]
    """latency_s, latency_p90_s, latency_ratio, energy_j, peak_memory_bytes; where there are
    a reference and a counter, latency_reference_s and power_idle_w as well."""
    stable: bool
    """Whether the latency can be trusted; if not, ``flags`` says why."""
    flags: list[str] = field(default_factory=list)
    device: str = ""
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    reference: str | None = None
    """The model that latency_ratio is to; 1 is as fast as it, 0.5 twice as fast."""
    protocol: str = PROTOCOL

    def __getitem__(self, name: str) -> Quantity:
        return self.quantities[name]

    def to_dict(self) -> dict[str, Any]:
        """Return the reading as JSON takes it."""
        named = {name: quantity.to_dict() for name, quantity in self.quantities.items()}
        return {**vars(self), "quantities": named, "fingerprint": dict(self.fingerprint)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Reading:
        """Return the reading that `to_dict` wrote."""
        named = {name: Quantity.from_dict(one) for name, one in fields["quantities"].items()}
        return cls(**{**fields, "quantities": named})


def measure(
    device: DeviceProfiler,
    model: nn.Module,
    example: tuple[Tensor, ...],
    *,
    reference: nn.Module | None = None,
    reference_name: str = "reference",
    energy: bool = False,
    precision: float = 0.01,
    max_seconds: float = 20.0,
    seed: int = 0,
    host: Host | None = None,
) -> Reading:
    """Measure ``model`` on ``device``, alone there, and a second time where the first is unstable.

    Args:
        device: A profiler, as `gpsearch.profiling.find` returns.
        model: What is measured; it stays as it is.
        example: The arguments of one inference.
        reference: Interleaved call by call; without it there is no latency_ratio.
        reference_name: What the results call it.
        energy: Also measure joules per inference, where the device has a counter.
        precision: Wanted half-width of the ratio's 95 % interval (the latency's, without a
            reference), as a fraction.
        max_seconds: Limit of each attempt at the latency, in time on the device.
        seed: Of the energy windows' random delays.
        host: The machine that measures; the present one if None.

    Raises:
        UserError: The device cannot run models, or its profiler breaks the contract.
    """
    facts, host = _usable(device), host or Host()
    with host.alone_on(facts.name):
        models = [model] if reference is None else [model, reference]
        handles = [device.load(one, example) for one in models]
        timing, flags = _timing(device, handles, precision, max_seconds, host)
        quantities = latency.quantities(timing, facts)
        joules, doubts = _no_energy("not asked for"), list[str]()
        if energy:
            call_s = quantile(timing.candidate)
            joules, doubts = _energy(device, handles[0], call_s, facts, host, seed)
        memory = _peak_memory(device, handles[0], facts)
    return Reading(
        quantities | joules | {"peak_memory_bytes": memory},
        stable=not timing.faults(),
        flags=flags + doubts,
        device=facts.name,
        fingerprint=facts.fingerprint,
        reference=None if reference is None else reference_name,
    )


def check(
    device: DeviceProfiler,
    model: nn.Module,
    example: tuple[Tensor, ...],
    *,
    host: Host | None = None,
) -> Reading:
    """Measure a model against itself: a device whose ratio is not 1 ± 2 % cannot rank models."""
    reading = measure(device, model, example, reference=model, reference_name="itself", host=host)
    ratio = reading["latency_ratio"].value
    if ratio is not None and abs(ratio - 1) <= AA_GATE:
        return reading
    failed = f"a model measured against itself came out at {ratio:.3f} instead of 1 ± {AA_GATE}"
    return replace(reading, stable=False, flags=[*reading.flags, failed])


def _usable(device: DeviceProfiler) -> DeviceFacts:
    facts = device.probe()
    if "latency_s" in facts.unavailable:
        raise UserError(f"device {facts.name!r} cannot measure: {facts.unavailable['latency_s']}")
    return facts


def _timing(
    device: DeviceProfiler, handles: list[Any], precision: float, max_seconds: float, host: Host
) -> tuple[latency.Timing, list[str]]:
    """Return the sharper of at most two attempts, and all that casts doubt on it."""
    start_s, stalled_s = host.clock(), host.stalled_s()
    timing = latency.time_calls(device, handles, precision, max_seconds)
    flags = []
    # A reading that ran out of time would only do so again.
    if timing.faults() and len(timing.candidate) >= latency.ENOUGH:
        flags = ["measured twice, since the first reading was unstable"]
        again = latency.time_calls(device, handles, precision, max_seconds)
        timing = min(timing, again, key=lambda one: (len(one.faults()), one.half_width))
    flags += timing.faults()
    stalled = _share_stalled(stalled_s, host.stalled_s(), host.clock() - start_s)
    if stalled > STALLED:
        flags.append(f"tasks waited for a processor {stalled:.0%} of the time: a busy machine")
    return timing, flags


def _share_stalled(before_s: float | None, after_s: float | None, elapsed_s: float) -> float:
    if before_s is None or after_s is None or elapsed_s <= 0:
        return 0.0
    return (after_s - before_s) / elapsed_s


def _energy(
    device: DeviceProfiler,
    handle: Any,
    call_s: float,
    facts: DeviceFacts,
    host: Host,
    seed: int,
) -> tuple[dict[str, Quantity], list[str]]:
    why_not = facts.unavailable.get("energy_j")
    if why_not is None and isinstance(device, EnergyMeter):
        inference = Work(lambda n: latency.timed(device, [handle], [0] * n), call_s)
        return measure_energy(device.read_energy, inference, facts, host.sleep, seed)
    reason = why_not or f"the profiler of {facts.name!r} reads no energy counter"
    return _no_energy(reason), []


def _no_energy(reason: str) -> dict[str, Quantity]:
    return {"energy_j": Quantity.unavailable("J", reason)}


def _peak_memory(device: DeviceProfiler, handle: Any, facts: DeviceFacts) -> Quantity:
    why_not = facts.unavailable.get("peak_memory_bytes")
    if why_not is None and isinstance(device, MemoryMeter):
        method = f"{type(device).__name__}.peak_memory"
        peak = device.peak_memory(handle)
        return Quantity(peak, "B", "measured", None, 1, method, "device")
    reason = why_not or f"the profiler of {facts.name!r} does not tell it"
    return Quantity.unavailable("B", reason)
