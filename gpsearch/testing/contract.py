"""Checks of what a profiler says, and of how it treats what it is given."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpsearch.profiling import DeviceFacts, arrays_of, measure
from gpsearch.profiling.device import API_VERSION, CAPABILITIES, understood
from gpsearch.testing.bench import Bench
from gpsearch.testing.checks import CheckFailed, check

PROBE_S = 2.0
_METHODS = ("probe", "load", "run", "close")

# What an import must leave alone; run in a process of its own.
_IMPORT = """
import importlib, importlib.util, json, os, signal, sys, threading
import torch, gpsearch.profiling

def state():
    return {
        "the current folder": os.getcwd(),
        "the environment's variables": dict(os.environ),
        "signal handlers": [str(signal.getsignal(s)) for s in sorted(signal.valid_signals())],
        "running threads": sorted(thread.name for thread in threading.enumerate()),
        "files in the current folder": sorted(os.listdir()),
        "torch's threads": torch.get_num_threads(),
        "torch's default type": str(torch.get_default_dtype()),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's random numbers": torch.get_rng_state().sum().item(),
        "a CUDA context": torch.cuda.is_initialized(),
    }

name, path = sys.argv[1:]
if path:
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # as `find` has it
before = state()
if path:
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
else:
    importlib.import_module(name)
after = state()
changed = [what for what in before if before[what] != after[what]]
sys.stderr.write("\\n" + json.dumps(changed))
"""


@check()
def speaks_this_api_version(bench: Bench) -> None:
    """The class says for which version it was written, and has that version's methods."""
    spoken = getattr(type(bench.profiler), "api_version", None)
    if not understood(spoken):
        raise CheckFailed(f"its class says api_version = {spoken!r}; this is {API_VERSION!r}")
    missing = [name for name in _METHODS if not callable(getattr(bench.profiler, name, None))]
    if missing:
        raise CheckFailed(f"it lacks {', '.join(missing)}()")


@check()
def import_has_no_side_effects(bench: Bench) -> None:
    """Importing the module changes and prints nothing: `gpsearch devices` imports them all."""
    module = sys.modules[type(bench.profiler).__module__]
    fault = _import_fault(module.__name__, getattr(module, "__file__", None) or "")
    if fault:
        raise CheckFailed(fault)


@lru_cache
def _import_fault(name: str, path: str) -> str | None:
    first = name.partition(".")[0]
    # Not importlib's find_spec, which takes what is loaded, a plain file too, for importable.
    importable = any(finder.find_spec(first, None) for finder in sys.meta_path)
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT, name, "" if importable else path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(one or os.getcwd() for one in sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    told, _, last = done.stderr.rstrip().rpartition("\n")
    if done.returncode:
        return f"its module cannot be imported in a fresh process: {last}"
    if done.stdout or told.strip():
        return f"its module prints while it is imported: {(done.stdout + told).strip()[:80]!r}"
    changed = json.loads(last)
    return f"its module changes {', '.join(changed)} while it is imported" if changed else None


@check()
def probe_is_cheap(bench: Bench) -> None:
    """A probe takes no time to speak of, since `gpsearch devices` asks them all."""
    start_s = time.perf_counter()
    bench.profiler.probe()
    seconds = time.perf_counter() - start_s
    if seconds > PROBE_S:
        raise CheckFailed(f"probe() took {seconds:.1f} s; at most {PROBE_S:g} s are wanted")


@check()
def probe_repeats_itself(bench: Bench) -> None:
    """Two probes say the same: a search tells by it whether it goes on on the same device."""
    first, second = asdict(bench.profiler.probe()), asdict(bench.profiler.probe())
    changed = [name for name, value in first.items() if value != second[name]]
    if changed:
        raise CheckFailed(f"two probes differ in {', '.join(changed)}; what changes is no fact")


@check()
def facts_survive_json(bench: Bench) -> None:
    """The facts are what they seem to be, and come back from device.json as they were."""
    facts = bench.facts
    if not isinstance(facts, DeviceFacts):
        raise CheckFailed(f"probe() returned {type(facts).__name__}, not DeviceFacts")
    if not facts.name or not facts.fingerprint:
        raise CheckFailed("a device has a name, and a fingerprint of what its speed depends on")
    again = DeviceFacts(**json.loads(json.dumps(asdict(facts))))
    if again != facts:
        raise CheckFailed("the facts come back from JSON changed; use str for texts and keys")


@check()
def what_is_unavailable_has_a_reason(bench: Bench) -> None:
    """Every capability that is absent is one that there is, and has its reason."""
    for name, reason in bench.facts.unavailable.items():
        if name not in CAPABILITIES:
            raise CheckFailed(f"unavailable names {name!r}; there are {', '.join(CAPABILITIES)}")
        if not isinstance(reason, str) or not reason.strip():
            raise CheckFailed(f"{name} is unavailable without a reason")


@check("latency_s")
def load_leaves_the_model_alone(bench: Bench) -> None:
    """Loading and running change neither the model nor its example."""
    model, example = bench.workload()
    model.train()
    before = _state(model, example)
    bench.profiler.run([bench.profiler.load(model, example)], [0, 0])
    after = _state(model, example)
    changed = [name for name, value in before.items() if not _same(value, after.get(name))]
    if changed:
        raise CheckFailed(f"load() or run() changed the model's {', '.join(changed)}; copy it")


def _state(model: nn.Module, example: tuple[Any, ...]) -> dict[str, Any]:
    tensors = {**model.state_dict(keep_vars=True)}
    tensors |= {f"example[{i}]": one for i, one in enumerate(example)}
    state: dict[str, Any] = {name: one.detach().clone() for name, one in tensors.items()}
    state |= {f"{name}.requires_grad": one.requires_grad for name, one in tensors.items()}
    return state | {"mode": [module.training for module in model.modules()]}


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return a == b


@check("latency_s")
def every_call_has_its_time(bench: Bench) -> None:
    """A schedule is answered by as many positive seconds."""
    handles = [bench.loaded(), bench.loaded(seed=1)]
    for schedule in ([0], [1], [0, 1, 0], [1, 1, 0, 1, 0, 0, 0]):
        seconds = bench.profiler.run(handles, schedule)
        if len(seconds) != len(schedule):
            raise CheckFailed(f"run() gave {len(seconds)} times for {len(schedule)} calls")
        wrong = [one for one in seconds if not (isinstance(one, float) and 0 < one < math.inf)]
        if wrong:
            raise CheckFailed(f"run() gave {wrong[0]!r} for the seconds of a call; above 0 wanted")


@check("latency_s")
def what_is_unavailable_is_no_zero(bench: Bench) -> None:
    """The engine's reading has no value, and the reason, where the profiler declares none."""
    absent = {"energy_j", "peak_memory_bytes"} & bench.lacking.keys()
    reading = measure(
        bench.profiler, *bench.workload(steps=2), energy="energy_j" in absent, max_seconds=0.1,
        host=bench.host,
    )  # fmt: skip
    for name in absent:
        quantity = reading[name]
        if quantity.value is not None or not quantity.reason:
            raise CheckFailed(f"{name} is unavailable, and was read as {quantity.value!r}")


@check("outputs")
def outputs_equal_the_reference(bench: Bench) -> None:
    """What the device computes is what torch does, within the tolerance of the facts."""
    for seed, steps, hidden in ((0, 7, 16), (1, 30, 48)):
        model, example = bench.workload(steps=steps, hidden=hidden, seed=seed, gates=True)
        handle = bench.profiler.load(model, example)
        bench.profiler.run([handle], [0])
        _compare(bench, bench.profiler.outputs(handle), model, example)  # type: ignore[attr-defined]


@check("outputs")
def a_handle_is_a_copy(bench: Bench) -> None:
    """A loaded model stays what it was, whatever becomes of the original and of other handles."""
    model, example = bench.workload()
    untouched = copy.deepcopy(model)
    handle, other = bench.profiler.load(model, example), bench.loaded(seed=1)
    with torch.no_grad():
        for one in model.parameters():
            one.zero_()
    bench.profiler.run([handle, other], [0, 1])
    _compare(bench, bench.profiler.outputs(handle), untouched, example)  # type: ignore[attr-defined]


def _compare(
    bench: Bench, outputs: tuple[Any, ...], model: nn.Module, example: tuple[Any, ...]
) -> None:
    with torch.inference_mode():
        wanted = arrays_of(model(*example))
    found = [np.asarray(one) for one in outputs]
    if [one.shape for one in found] != [one.shape for one in wanted]:
        shapes = f"{[one.shape for one in found]}; {[one.shape for one in wanted]} are wanted"
        raise CheckFailed(f"outputs() has the shapes {shapes}")
    for a, b in zip(found, wanted, strict=True):
        off = float(np.abs(a - b).max() / np.abs(b).max())
        if not off <= bench.facts.tolerance:
            wish = f"at most {bench.facts.tolerance:g}, the facts' tolerance"
            raise CheckFailed(f"outputs are {off:.2g} off those of torch; {wish}, are wanted")
