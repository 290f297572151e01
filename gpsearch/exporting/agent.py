"""What runs on a device: an exported program in numpy, timed there, asked by lines of JSON.

This one file needs Python 3.8 and numpy and nothing of gpsearch: its text goes over the pipe that
leads to the device. A request is a line, and so is its answer; nothing else is written to it.

    {"id": 3, "do": "run", "deadline_s": 60, "programs": ["a", "b"], "schedule": [1, 0, 1, 0]}
    {"id": 3, "seconds": [0.011, 0.012, 0.011, 0.012]}

What goes wrong is answered by {"error": "busy" | "unsupported" | "failed", "reason": ...}.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import platform
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    for _pool in ("OMP", "OPENBLAS", "MKL", "BLIS", "VECLIB_MAXIMUM"):
        os.environ[_pool + "_NUM_THREADS"] = "1"  # they are read when numpy is imported

import numpy as np

Array = Any
"""A numpy array; old versions of numpy cannot say of what."""
Json = Any

KEPT_BYTES = 256 << 20
"""Of weights that stay on the device for their next measurement."""
ATTEMPTS = 8
"""A call is timed again, so often, where another process took the processor during it."""
LONG_S = 0.02
"""A call this long is interrupted every time on a busy machine: timing it again does not help."""


class Unsupported(Exception):
    """This device cannot run the program."""


class Busy(Exception):
    """Somebody else measures on this device."""


# A program: arrays in, arrays out


class Program:
    """A list of operations on named arrays, as `gpsearch.exporting.Program` writes it.

    Args:
        facts: What came as JSON.
        blob: All constants, one after the other.
    """

    def __init__(self, facts: Json, blob: bytes) -> None:
        self.inputs, self.outputs = facts["inputs"], facts["outputs"]
        self.constants = dict(zip(facts["constants"], arrays(facts["constants"].values(), blob)))
        last = {name: i for i, op in enumerate(facts["ops"]) for name in op["in"]}
        kept = {*self.outputs, *self.constants}
        self.steps = []
        for i, op in enumerate(facts["ops"]):
            dead = [name for name in set(op["in"]) if last[name] == i and name not in kept]
            self.steps.append((self._function(op), op["in"], op["out"], dead))

    def run(self, *inputs: Array) -> list[Array]:
        """Return the outputs."""
        values = dict(self.constants)
        values.update(zip(self.inputs, inputs))
        for function, names, results, dead in self.steps:
            found = function(*[values[name] for name in names])
            for name in dead:
                del values[name]
            values.update(zip(results, found if len(results) > 1 else (found,)))
        return [values[name] for name in self.outputs]

    def _function(self, op: Json) -> Callable[..., Any]:
        attributes = {key: op[key] for key in op if key not in ("op", "in", "out")}
        if op["op"] not in OPERATIONS:
            raise Unsupported("the agent knows no operation " + op["op"])
        function = OPERATIONS[op["op"]]
        if "cells" in attributes:
            attributes["cells"] = [Cell(self.constants, **cell) for cell in attributes["cells"]]
        return lambda *values: function(*values, **attributes)


def arrays(layout: Iterable[Json], blob: bytes) -> list[Array]:
    """Cut arrays out of bytes."""
    return [
        np.frombuffer(blob, one["dtype"], int(np.prod(one["shape"])), one["offset"]).reshape(
            one["shape"]
        )
        for one in layout
    ]


class Cell:
    """One direction of a recurrent layer: four gates, each zero or more hidden layers deep."""

    def __init__(
        self,
        constants: dict[str, Array],
        ih: str,
        hh: str,
        bias: str | None,
        dense: Iterable[Json] = (),
        norms: Iterable[Json] = (),
        activation: str = "relu",
    ) -> None:
        def get(name: str | None) -> Array:
            return None if name is None else constants[name]

        self.ih, self.hh = (np.ascontiguousarray(get(name).T) for name in (ih, hh))
        self.bias = get(bias)
        self.dense = [(_last_two_swapped(get(w)), _rows(get(b))) for w, b in dense]
        self.norms = [(_rows(get(w)), _rows(get(b))) for w, b in norms]
        self.activate = OPERATIONS[activation]
        self.first = 4 * self.dense[0][0].shape[1] if dense else 0
        self.half = np.array([0.5, 0.5, 1, 0.5], self.hh.dtype).reshape(4, 1, 1)

    def run(self, xs: Array, h: Array, c: Array) -> tuple[Array, Array]:
        """Return h and c at every step."""
        steps, batch = xs.shape[:2]
        products = xs.reshape(steps * batch, xs.shape[2]) @ self.ih
        if self.bias is not None:
            products += self.bias
        products = products.reshape(steps, batch, self.ih.shape[1])
        hs = np.empty((steps, *h.shape), h.dtype)
        cs = np.empty_like(hs)
        for t in range(steps):
            h, c = self._step(products[t] + h @ self.hh, c)
            hs[t], cs[t] = h, c
        return hs, cs

    def _step(self, z: Array, c: Array) -> tuple[Array, Array]:
        gates = _per_gate(z[:, self.first :]) if z.shape[1] > self.first else 0
        if self.dense:
            gates = self._hidden(_per_gate(z[:, : self.first])) + gates
        # A sigmoid is half a tanh of the half: one call for all four.
        i, f, g, o = np.tanh(gates * self.half)
        c = (0.5 * f + 0.5) * c + (0.5 * i + 0.5) * g
        return (0.5 * o + 0.5) * np.tanh(c), c

    def _hidden(self, a: Array) -> Array:
        for j, (weight, bias) in enumerate(self.dense):
            if self.norms:
                a = layer_norm(a, *self.norms[j], axes=1, eps=1e-5)
            a = self.activate(a) @ weight
            if bias is not None:
                a = a + bias
        return a


def _per_gate(z: Array) -> Array:
    return z.reshape(len(z), 4, z.shape[1] // 4).transpose(1, 0, 2)


def _last_two_swapped(weight: Array) -> Array:
    return np.ascontiguousarray(weight.transpose(0, 2, 1))


def _rows(vector: Array) -> Array:
    return None if vector is None else vector[:, None, :]


def recurrence(*values: Array, cells: list[Cell]) -> tuple[Array, Array]:
    """Run the directions of a layer, each over its own input; h and c ``[dir, time, batch, H]``."""
    xs, (h0, c0) = values[:-2], values[-2:]
    runs = [cell.run(x, h, c) for cell, x, h, c in zip(cells, xs, h0, c0)]
    return np.stack([hs for hs, _ in runs]), np.stack([cs for _, cs in runs])


def lstm(x: Array, h0: Array, c0: Array, cells: list[Cell]) -> tuple[Array, Array, Array]:
    """Run a layer of `torch.nn.LSTM`, time first."""
    runs = [cell.run(x[:: 1 - 2 * d], h0[d], c0[d]) for d, cell in enumerate(cells)]
    joined = np.concatenate([hs[:: 1 - 2 * d] for d, (hs, _) in enumerate(runs)], 2)
    return joined, np.stack([hs[-1] for hs, _ in runs]), np.stack([cs[-1] for _, cs in runs])


def layer_norm(
    x: Array, weight: Array = None, bias: Array = None, axes: int = 1, eps: float = 1e-5
) -> Array:
    """Normalise over the last ``axes`` axes."""
    last = tuple(range(-axes, 0))
    centred = x - x.mean(last, keepdims=True)
    y = centred / np.sqrt((centred * centred).mean(last, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def conv(
    x: Array,
    weight: Array,
    bias: Array = None,
    *,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Array:
    """Convolve over any number of axes: patches side by side, then one product a group."""
    around = len(stride)
    x = np.pad(x, [(0, 0), (0, 0)] + [(p, p) for p in padding])
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:])]
    patches = np.lib.stride_tricks.sliding_window_view(x, reach, tuple(range(2, 2 + around)))
    picked = (slice(None),) * 2 + tuple(slice(None, None, s) for s in stride)
    patches = patches[picked + tuple(slice(None, None, d) for d in dilation)]
    # [batch, channels, places, kernel] -> [batch, places, channels * kernel]
    places = patches.shape[2 : 2 + around]
    patches = np.moveaxis(patches, 1, 1 + around).reshape(len(x), int(np.prod(places)), groups, -1)
    kernels = weight.reshape(groups, weight.shape[0] // groups, -1)
    y = np.concatenate([patches[:, :, g] @ kernels[g].T for g in range(groups)], 2)
    y = y if bias is None else y + bias
    return y.transpose(0, 2, 1).reshape((len(x), -1, *places))


def log_softmax(x: Array, axis: int) -> Array:
    """Return the logarithms of the shares along an axis."""
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def gelu(x: Array) -> Array:
    """Return x times the normal distribution's share below x."""
    return 0.5 * x * erfc(x * -0.7071067811865476)


def erfc(x: Array) -> Array:
    """Return the complementary error function, to 1.2e-7 (Numerical Recipes, section 6.2)."""
    t = 1 / (1 + 0.5 * np.abs(x))
    series = 0.17087277
    for factor in (
        -0.82215223, 1.48851587, -1.13520398, 0.27886807,
        -0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223,
    ):  # fmt: skip
        series = series * t + factor
    tail = t * np.exp(series - x * x)
    return np.where(x < 0, 2 - tail, tail)


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), which would overflow if it were written so."""
    return 0.5 * np.tanh(0.5 * x) + 0.5


def linear(x: Array, weight: Array, bias: Array = None) -> Array:
    """Return x @ weight.T + bias."""
    y = x @ weight.T
    return y if bias is None else y + bias


def slices(x: Array, starts: list[int], stops: list[int], steps: list[int]) -> Array:
    """Cut a box out of x."""
    return x[tuple(slice(*one) for one in zip(starts, stops, steps))]


def argmax(x: Array, axis: int, keepdims: bool) -> Array:
    """Return where along an axis x is largest, first."""
    found = x.argmax(axis)
    return np.expand_dims(found, axis) if keepdims else found


OPERATIONS: dict[str, Callable[..., Any]] = {
    "recurrence": recurrence,
    "lstm": lstm,
    "layer_norm": layer_norm,
    "conv": conv,
    "linear": linear,
    "matmul": np.matmul,
    "relu": lambda x: np.maximum(x, x.dtype.type(0)),
    "leaky_relu": lambda x, slope=0.01: np.where(x < 0, x * x.dtype.type(slope), x),
    "gelu": gelu,
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "neg": np.negative,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "eq": np.equal,
    "lt": np.less,
    "gt": np.greater,
    "where": np.where,
    "softmax": lambda x, axis: np.exp(log_softmax(x, axis)),
    "log_softmax": log_softmax,
    "sum": lambda x, axes, keepdims: x.sum(tuple(axes), keepdims=keepdims),
    "mean": lambda x, axes, keepdims: x.mean(tuple(axes), keepdims=keepdims),
    "max": lambda x, axes, keepdims: x.max(tuple(axes), keepdims=keepdims),
    "argmax": argmax,
    "reshape": lambda x, shape: x.reshape(shape),
    "expand": lambda x, shape: np.broadcast_to(x, shape),
    "transpose": lambda x, order: x.transpose(order),
    "slice": slices,
    "concat": lambda *xs, axis: np.concatenate(xs, axis),
    "gather": lambda x, index, axis: np.take(x, index, axis),
    "cast": lambda x, dtype: x.astype(dtype),
}


# Timing


def seconds_of(call: Callable[[], Any]) -> float:
    """Time one call; where another process took the processor during it, time it again."""
    for _ in range(ATTEMPTS):
        preempted = _preemptions()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        if _preemptions() == preempted or seconds > LONG_S:
            break
    return seconds


try:
    import resource

    def _preemptions() -> int:
        who = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
        return resource.getrusage(who).ru_nivcsw

except ImportError:  # no Unix

    def _preemptions() -> int:
        return 0


@contextlib.contextmanager
def alone(wait_s: float, folder: str | None = None) -> Iterator[None]:
    """Keep all others off this device: other agents, and gpsearch itself where it runs there."""
    try:
        import fcntl
    except ImportError:  # no Unix, no lock
        yield
        return
    folder = folder or os.environ.get("GPSEARCH_LOCKS") or tempfile.gettempdir()
    # The locks of gpsearch.profiling.host: others who measure, and then those who train.
    paths = [os.path.join(folder, f"gpsearch-here-{part}.lock") for part in ("door", "room")]
    files = [_open_shared(path) for path in paths]
    try:
        with _alarm(wait_s):  # to ask again and again would be to lose against all who wait
            for file in files:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        for file in files:
            os.close(file)


def _open_shared(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY)  # another user's can only be read
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)


@contextlib.contextmanager
def _alarm(wait_s: float) -> Iterator[None]:
    def give_up(*_: Any) -> None:
        raise Busy(f"others measure or train there, after {wait_s:g} s still; stop them, or wait")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, wait_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Requests and answers


class Agent:
    """What can be asked of a device.

    Args:
        folder: Where weights are kept, by their sha256.
        kept_bytes: How many of them.
    """

    def __init__(self, folder: Path, kept_bytes: int = KEPT_BYTES) -> None:
        self.folder, self.kept_bytes = folder, kept_bytes
        self.wanted: list[str] = []
        self.programs: dict[str, tuple[Program, list[Array]]] = {}

    def put(self, blob: str, data: str, first: bool, last: bool) -> Json:
        """Take a piece of some bytes; behind the last one they must have their checksum."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._path(blob).with_suffix(f".{os.getpid()}.part")
        with part.open("wb" if first else "ab") as file:
            file.write(base64.b64decode(data))
        if last:
            part.replace(self._path(blob))
            self._forget_oldest()
            if self._bytes(blob) is None:
                raise ValueError("the weights were damaged on their way")
        return {}

    def load(self, name: str, program: Json, weights: str, layout: Json, example: str) -> Json:
        """Make a program ready and return its outputs for the example; or say what is missing."""
        self.wanted = [weights, example]
        blobs, values = self._bytes(weights), self._bytes(example)
        if blobs is None or values is None:
            known = {weights: blobs, example: values}
            return {"missing": [name for name in known if known[name] is None]}
        loaded, arguments = Program(program, blobs), arrays(layout, values)
        outputs = [np.ascontiguousarray(one) for one in loaded.run(*arguments)]
        self.programs[name] = loaded, arguments
        shown = [(one.dtype.str, one.shape, _text(one.tobytes())) for one in outputs]
        return {"outputs": [dict(zip(("dtype", "shape", "data"), one)) for one in shown]}

    def unload(self, name: str) -> Json:
        """Forget a program."""
        self.programs.pop(name, None)
        return {}

    def run(self, programs: list[str], schedule: list[int], wait_s: float) -> Json:
        """Time single calls, one after the other, in the order of the schedule."""
        ready = [self.programs[name] for name in programs]
        calls = [partial(program.run, *example) for program, example in ready]
        with alone(wait_s):
            return {"seconds": [seconds_of(calls[index]) for index in schedule]}

    def _bytes(self, blob: str) -> bytes | None:
        """Return the bytes of this checksum; None, and no file, where they are damaged."""
        path = self._path(blob)
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != blob:
            path.unlink()
        return path.read_bytes() if path.exists() else None

    def _path(self, blob: str) -> Path:
        return self.folder / re.sub("[^0-9a-f]", "_", blob)

    def _forget_oldest(self) -> None:
        files = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        needed = [self._path(blob) for blob in self.wanted]  # by what is loaded next
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > self.kept_bytes and path != files[0] and path not in needed:
                path.unlink()


def machine() -> dict[str, str]:
    """Say what this machine is, as far as the speed of numpy depends on it."""
    return {
        "processor": _processor(),
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "host": platform.node(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        found = re.search(r"^(?:model name|Model)\s*: (.*)$", text, re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def answer(agent: Agent, request: Json) -> Json:
    """Do what is asked, and stop altogether where that takes longer than its deadline."""
    watchdog = threading.Timer(request.pop("deadline_s"), os._exit, (3,))
    watchdog.daemon = True
    watchdog.start()
    try:
        return getattr(agent, request.pop("do"))(**request)
    except Busy as error:
        return {"error": "busy", "reason": str(error)}
    except (Unsupported, MemoryError) as error:
        return {"error": "unsupported", "reason": str(error) or "not enough memory"}
    except Exception as error:
        return {"error": "failed", "reason": f"{type(error).__name__}: {error}"}
    finally:
        watchdog.cancel()


def serve(source: Iterable[bytes], sink: Any) -> None:
    """Answer line by line, into a text file, until the pipe is closed."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    agent = Agent(Path(tempfile.gettempdir()) / f"gpsearch-weights-{user}")
    sink.write(json.dumps({"id": 0, **machine()}) + "\n")
    sink.flush()
    for line in source:
        request = json.loads(line)
        number = request.pop("id")
        sink.write(json.dumps({"id": number, **answer(agent, request)}) + "\n")
        sink.flush()


if __name__ == "__main__":
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not stand between the answers
    serve(sys.stdin.buffer, _answers)
