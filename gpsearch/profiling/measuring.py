"""`measure`: one model on one device, by one protocol, as one `Reading`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gpsearch.errors import UserError, line_of
from gpsearch.exporting import arguments_on
from gpsearch.profiling import latency
from gpsearch.profiling.device import (
    DeviceFacts,
    DeviceProfiler,
    EnergyMeter,
    MemoryMeter,
    PowerMeter,
    Watched,
    Worker,
    facts_of,
)
from gpsearch.profiling.energy import Work, measure_energy, unavailable
from gpsearch.profiling.host import HERE, Host, Load
from gpsearch.profiling.intervals import quantile
from gpsearch.profiling.quantity import Quantity
from gpsearch.profiling.strangers import load, told

PROTOCOL = "abab-1"
"""The protocol is part of the number: readings of different protocols are not compared."""


@dataclass(frozen=True)
class Reading:
    """What was measured of one model on one device; reading.json holds it beside the metrics."""

    quantities: Mapping[str, Quantity]
    """latency_s, latency_p90_s, latency_ratio, energy_j, peak_memory_bytes; where there is a
    reference, latency_reference_s; where there is a counter, energy_net_j, power_avg_w,
    power_idle_w and energy_period_s."""
    stable: bool
    """Whether the times hold together: the warm-up settled, their interval is as narrow as asked
    for, and the speed neither drifted nor was another than before. What else went on meanwhile does
    not count, since the ratio hardly feels it, and some machines are never left alone."""
    flags: list[str] = field(default_factory=list)
    """All that casts doubt on the reading: why it is not stable; what disturbed it, stable or not,
    as other processes or throttling; what is odd about the energy."""
    device: str = ""
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    reference: str | None = None
    """The model that latency_ratio is to; 1 is as fast as it, 0.5 twice as fast."""
    protocol: str = PROTOCOL
    started_at: str = ""
    """When the measuring began, in UTC, as ISO 8601 has it; empty in readings from before that was
    kept."""
    wall_s: float | None = None
    """How long it took by the clock on the wall, second attempts and energy included."""
    workload: Mapping[str, Any] = field(default_factory=dict)
    """What was run, as far as it is known: example (its arguments' shapes, or values of numbers),
    dtype (of the weights), threads, runtime."""

    def __getitem__(self, name: str) -> Quantity:
        return self.quantities[name]

    def to_dict(self) -> dict[str, Any]:
        """Return the reading as JSON takes it."""
        named = {name: quantity.to_dict() for name, quantity in self.quantities.items()}
        copies = {"fingerprint": dict(self.fingerprint), "workload": dict(self.workload)}
        return {**vars(self), "quantities": named, **copies}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Reading:
        """Return the reading that `to_dict` wrote."""
        named = {name: Quantity.from_dict(one) for name, one in fields["quantities"].items()}
        return cls(**{**fields, "quantities": named})


@torch.inference_mode(False)  # within it no copy's weights could be watched, nor run in C
def measure(
    device: DeviceProfiler,
    model: nn.Module,
    example: tuple[Any, ...],
    *,
    reference: nn.Module | None = None,
    reference_name: str = "reference",
    reference_s: float | None = None,
    energy: bool = False,
    estimate_w: float | None = None,
    precision: float = 0.01,
    max_seconds: float = 20.0,
    seed: int = 0,
    host: Host | None = None,
) -> Reading:
    """Measure ``model`` on ``device``, alone there, and again where the first time is doubtful.

    Args:
        device: A profiler, as `gpsearch.profiling.find` returns.
        model: What is measured; it stays as it is.
        example: The arguments of one inference.
        reference: Interleaved call by call; without it there is no latency_ratio.
        reference_name: What the results call it.
        reference_s: How long it took before, as at other moments of a search. Where it takes
            over 10 % more or less now, this reading's latency does not compare with those.
        energy: Also measure joules per inference, where the device has a counter.
        estimate_w: Estimate them instead, as this power (W) times the latency; such a value is
            of kind "estimated" and shares no front with measured ones.
        precision: Wanted half-width of the ratio's 95 % interval (the latency's, without a
            reference), as a fraction.
        max_seconds: Limit of each attempt at the latency, in time on the device.
        seed: Of the energy windows' random delays.
        host: The machine that measures; the present one if None.

    Raises:
        UserError: The device cannot run models, its profiler breaks the contract, the example is
            a tensor instead of a tuple of them, or others measure there for too long.
        OSError, RuntimeError: The device or its profiler failed, in whatever way.
    """
    facts, host = usable(device), host or Host()
    example = arguments_on("cpu", example)
    with host.alone_on(facts.machine) as flags:
        started_at, began_s = datetime.now(UTC).isoformat(timespec="seconds"), host.clock()
        models = [model] if reference is None else [model, reference]
        handles = [load(device, one, example) for one in models]
        stage = _Stage(device, handles, facts, host, seed)
        timing, of_times = stage.timing(precision, max_seconds, reference_s)
        if estimate_w is not None:
            joules = _estimated(estimate_w, quantile(timing.candidate), facts)
            of_joules = list[str]()
        elif energy:
            joules, of_joules = stage.energy(quantile(timing.candidate))
        else:
            joules, of_joules = unavailable("not asked for"), []
        memory = _peak_memory(device, handles[0], facts)
        wall_s = host.clock() - began_s
    return Reading(
        latency.quantities(timing, facts) | joules | {"peak_memory_bytes": memory},
        stable=not timing.faults(reference_s),
        flags=[*flags, *of_times, *of_joules],
        device=facts.name,
        fingerprint=facts.fingerprint,
        reference=None if reference is None else reference_name,
        started_at=started_at,
        wall_s=wall_s,
        workload=_workload(model, example, facts),
    )


def usable(device: DeviceProfiler) -> DeviceFacts:
    """Ask a device what it is; one that cannot measure latency is refused.

    Raises:
        UserError: It cannot, or does not say what it is.
    """
    facts = facts_of(device)
    if "latency_s" in facts.unavailable:
        raise UserError(f"device {facts.name!r} cannot measure: {facts.unavailable['latency_s']}")
    return facts


@dataclass(frozen=True)
class _Stage:
    """A device with models loaded, and nobody else on it."""

    device: DeviceProfiler
    handles: list[Any]
    facts: DeviceFacts
    host: Host
    seed: int

    def timing(
        self, precision: float, max_seconds: float, reference_s: float | None
    ) -> tuple[latency.Timing, list[str]]:
        """Return the better of at most two attempts, and its flags."""
        first = self._attempt(precision, max_seconds, reference_s)
        timing, flags = first
        # A reading that ran out of time would only do so again.
        if not flags or len(timing.turns) < latency.ENOUGH:
            return first
        self.host.sleep(self.host.recovery_s)
        attempts = first, self._attempt(precision, max_seconds, reference_s)
        timing, flags = min(attempts, key=lambda one: (len(one[1]), one[0].half_width))
        return timing, ["measured twice, since the first reading was doubtful", *flags]

    def energy(self, call_s: float) -> tuple[dict[str, Quantity], list[str]]:
        """Return joules per inference, where there is a counter, and their flags."""
        device, facts, handle = self.device, self.facts, self.handles[0]
        if (why_not := facts.unavailable.get("energy_j")) is not None:
            return unavailable(why_not), []
        assert isinstance(device, EnergyMeter)
        inference = Work(partial(_work, device, handle), call_s)
        before = self.host.load()
        found, flags = measure_energy(
            told(device, device.read_energy),
            inference,
            facts,
            self.host.sleep,
            self.seed,
            self._disturbances,
            told(device, device.read_power) if isinstance(device, PowerMeter) else None,
        )
        return found, flags + [f"over the energy reading, {one}" for one in self._here(before)]

    def _attempt(
        self, precision: float, max_seconds: float, reference_s: float | None
    ) -> tuple[latency.Timing, list[str]]:
        """Return times, and as their flags what is wrong with them and what disturbed them."""
        before = self.host.load()
        timing = latency.time_calls(self.device, self.handles, precision, max_seconds)
        return timing, timing.faults(reference_s) + self._here(before) + self._disturbances()

    def _here(self, before: Load) -> list[str]:
        """Return what was wrong here since; what runs elsewhere does not suffer from that."""
        return self.host.load().since(before) if self.facts.machine == HERE else []

    def _disturbances(self) -> list[str]:
        device = self.device
        if not isinstance(device, Watched):
            return []
        return told(device, lambda: [str(one) for one in device.disturbances()])()


def _workload(
    model: nn.Module, example: tuple[Any, ...], facts: DeviceFacts
) -> dict[str, str | int | list[str]]:
    """Return what is known of what was run; nothing is guessed."""
    given = pytree.tree_leaves(example)
    stored = {
        one.dtype for one in (*model.parameters(), *model.buffers()) if one.is_floating_point()
    }
    said = {name: str(value) for name, value in facts.fingerprint.items()}
    threads, version = said.get("threads", ""), said.get("torch")
    known: dict[str, str | int | list[str]] = {
        "example": [_in_short(one) for one in given],
        "dtype": ", ".join(sorted(str(one).removeprefix("torch.") for one in stored)),
        "threads": int(threads) if threads.isdecimal() else "",
        "runtime": said.get("runtime") or (f"torch {version}" if version else ""),
    }
    return {name: value for name, value in known.items() if value}


def _in_short(argument: object) -> str:
    """Return an argument's type and shape; a number, which may be a count of steps, itself."""
    if isinstance(argument, Tensor) and argument.ndim:
        return f"{str(argument.dtype).removeprefix('torch.')}{list(argument.shape)}"
    if isinstance(argument, Tensor | int | float):
        return str(argument.item() if isinstance(argument, Tensor) else argument)
    return type(argument).__name__


def _work(device: DeviceProfiler, handle: Any, calls: int) -> None:
    """Run a model exactly so many times, without repeats of disturbed calls."""
    if isinstance(device, Worker):
        told(device, device.work)(handle, calls)
    else:
        latency.timed(device, [handle], [0] * calls)


def _estimated(watts: float, call_s: float, facts: DeviceFacts) -> dict[str, Quantity]:
    """Return joules that nobody measured, marked as such."""
    reason = f"not measured: {watts:g} W, as asked for, times the latency"
    joules = Quantity(
        watts * call_s, "J", "estimated", None, 0, "power x time", facts.energy_scope, reason
    )
    return unavailable("estimates have no idle power") | {"energy_j": joules}


def _peak_memory(device: DeviceProfiler, handle: Any, facts: DeviceFacts) -> Quantity:
    """Return what the device tells of a call's memory: no objective, so no fault ends a trial."""
    if (why_not := facts.unavailable.get("peak_memory_bytes")) is not None:
        return Quantity.unavailable("B", why_not)
    assert isinstance(device, MemoryMeter)
    method = f"{type(device).__name__}.peak_memory"
    try:
        return Quantity(int(device.peak_memory(handle)), "B", "measured", None, 1, method, "device")
    except Exception as error:  # whatever a stranger's code raises
        return Quantity.unavailable("B", f"{method}: {line_of(error)}")
