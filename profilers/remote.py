"""A device at the end of a pipe: ssh, adb, a serial line, anything that leads to a shell there.

The agent goes over the pipe at the start; the device needs a POSIX shell and a python3 with numpy.
It times whole schedules by its own clock. Weights follow by checksum, where it lacks them.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import json
import math
import os
import queue
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from gpsearch.errors import Unsupported, UserError
from gpsearch.profiling import (
    AGENT,
    API_VERSION,
    DeviceFacts,
    Program,
    checksum,
    exported,
    packed,
)

_READY = "gpsearch-ready"
_PIECE = 192 << 10
"""Bytes of weights in one line: each has its own deadline."""
_MOST_LOADED = 4
"""Programs in the agent at a time; more only where one run takes more."""
_SSH = "ssh -T -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15"


class DeviceError(ConnectionError):
    """The device, not the model, is at fault: a search stops here, and can go on later."""


class DeviceBusy(DeviceError):
    """Others measure there all the time."""


class DeviceTimeout(DeviceError):
    """No answer came in time."""


class DeviceCrashed(DeviceError):
    """The agent, or the pipe to it, broke."""


class DeviceLied(DeviceError):
    """What it answered cannot be true."""


@dataclass(frozen=True)
class Patience:
    """How long the device may take, in seconds."""

    start_s: float = 60.0
    """Until the agent says what the device is."""
    answer_s: float = 60.0
    """Until any other answer, on top of ten times what the calls took before."""
    lock_s: float = 300.0
    """Until others who measure there make room."""


@dataclass(frozen=True)
class Handle:
    """A model's program under the name that the agent knows it by."""

    name: str
    program: Program


class RemoteProfiler:
    """Runs models in numpy on a device that a command leads to.

    Args:
        command: What opens a POSIX shell on the device, such as ``adb shell``.
        name: What the device is called; after its command if empty.
        patience: How long it may take.
    """

    api_version = API_VERSION
    kind, form = "remote", "remote:COMMAND, a command that opens a shell there"

    def __init__(self, command: str = "", name: str = "", patience: Patience | None = None) -> None:
        self.command, self.name = command, name or f"remote:{command}"
        self.patience = patience or Patience()
        self._pipe: Pipe | None = None
        self._loaded: dict[str, Handle] = {}
        self._call_s: dict[str, float] = {}

    @classmethod
    def with_argument(cls, argument: str) -> RemoteProfiler:
        """Return the profiler of ``remote:COMMAND``."""
        return cls(argument)

    def probe(self) -> DeviceFacts:
        """Start the agent and say what it found."""
        if not self.command:
            nowhere = f"say where it is: --device {self.form}"
            lacking = dict.fromkeys(("latency_s", "energy_j", "peak_memory_bytes"), nowhere)
            return DeviceFacts(self.kind, {}, unavailable=lacking)
        found = self._persist(lambda pipe: pipe.facts)
        no_counter = "the agent at the end of a pipe reads no energy counter"
        return DeviceFacts(
            name=f"{self.kind}:{found['host']}",
            fingerprint={"runtime": "numpy", **{k: str(v) for k, v in found.items()}},
            unavailable={
                "energy_j": no_counter,
                "peak_memory_bytes": "numpy does not tell the peak of one call",
            },
            latency_method="perf_counter on the device",
            machine=f"{self.kind}:{found['host']}",
        )

    def load(self, model: nn.Module, example: tuple[Any, ...]) -> Handle:
        """Export the model, send what the device lacks, and see that its outputs are equal there.

        Raises:
            Unsupported: The model cannot run there.
        """
        program = exported(model, example)
        whole = json.dumps(program.text).encode() + program.weights + packed(program.example)[1]
        handle = Handle(checksum(whole), program)
        self._persist(lambda pipe: self._send(pipe, handle, [handle]))
        return handle

    def run(self, handles: Sequence[Handle], schedule: Sequence[int]) -> list[float]:
        """Time the calls there, in one go."""
        seconds: list[float] = self._persist(lambda pipe: self._run(pipe, handles, schedule))
        return seconds

    def close(self) -> None:
        """Hang up."""
        if self._pipe:
            self._pipe.close()
        self._pipe = None
        self._loaded.clear()

    def _persist(self, do: Callable[[Pipe], Any]) -> Any:
        """Do something on the device; where it breaks or hangs, once more from the start."""
        try:
            return do(self._open())
        except (DeviceTimeout, DeviceCrashed):
            self.close()
        try:
            return do(self._open())
        except (DeviceTimeout, DeviceCrashed) as error:
            self.close()
            raise type(error)(f"{error} (a second time, after a restart)") from None

    def _open(self) -> Pipe:
        self._pipe = self._pipe or Pipe(self.name, self.command, self.patience.start_s)
        return self._pipe

    def _send(self, pipe: Pipe, handle: Handle, needed: Sequence[Handle]) -> None:
        """Load a program into the agent, unless it is there."""
        if handle.name in self._loaded:
            return
        self._make_room(pipe, {one.name for one in needed})
        program, (layout, example) = handle.program, packed(handle.program.example)
        weights = program.weights
        request = {
            "name": handle.name,
            "program": program.text,
            "weights": checksum(weights),
            "layout": layout,
            "example": checksum(example),
        }
        answer = pipe.ask(self.patience.answer_s, "load", **request)
        for blob in (weights, example):
            if checksum(blob) in answer.get("missing", ()):
                self._put(pipe, blob)
        if "missing" in answer:
            answer = pipe.ask(self.patience.answer_s, "load", **request)
        if "missing" in answer:
            raise DeviceCrashed(
                f"device {self.name!r} does not keep what is sent: is its disk full?"
            )
        if difference := program.check(_outputs(self.name, answer)):
            raise Unsupported(f"device {self.name!r} runs this model wrong: {difference}")
        self._loaded[handle.name] = handle

    def _make_room(self, pipe: Pipe, needed: set[str]) -> None:
        """Unload the oldest programs above the limit, but none that is needed together."""
        spare = [name for name in self._loaded if name not in needed]
        for name in spare[: max(0, len(self._loaded) + 1 - _MOST_LOADED)]:
            pipe.ask(self.patience.answer_s, "unload", name=name)
            del self._loaded[name]

    def _put(self, pipe: Pipe, blob: bytes) -> None:
        name, size = checksum(blob), len(blob)
        for start in range(0, max(1, size), _PIECE):  # of nothing, too, there is a file
            end = start + _PIECE
            data = base64.b64encode(blob[start:end]).decode()
            ends = {"first": start == 0, "last": end >= size}
            pipe.ask(self.patience.answer_s, "put", blob=name, data=data, **ends)

    def _run(self, pipe: Pipe, handles: Sequence[Handle], schedule: Sequence[int]) -> list[float]:
        for handle in handles:
            self._send(pipe, handle, handles)
        names = [handle.name for handle in handles]
        usual_s = sum(self._call_s.get(names[index], 0.0) for index in schedule)
        deadline_s = self.patience.answer_s + self.patience.lock_s + 10 * usual_s
        lock_s, start_s = self.patience.lock_s, time.monotonic()
        asked = {"programs": names, "schedule": list(schedule), "wait_s": lock_s}
        answer = pipe.ask(deadline_s, "run", **asked)
        seconds = self._believed(answer.get("seconds"), len(schedule), time.monotonic() - start_s)
        self._call_s.update((names[i], s) for i, s in zip(schedule, seconds, strict=True))
        return seconds

    def _believed(self, seconds: Any, count: int, elapsed_s: float) -> list[float]:
        """Return times, if they can be."""
        if not isinstance(seconds, list) or len(seconds) != count:
            raise DeviceLied(f"device {self.name!r} did not answer {count} calls by {count} times")
        for one in seconds:
            if not isinstance(one, int | float) or not 0 < one < math.inf:
                raise DeviceLied(f"device {self.name!r} says that a call took {one} s")
        if sum(seconds) > elapsed_s:
            took = f"{sum(seconds):.3g} s of calls within {elapsed_s:.3g} s"
            raise DeviceLied(f"device {self.name!r} claims {took}: its clock is wrong")
        return [float(one) for one in seconds]


class SshProfiler(RemoteProfiler):
    """Runs models in numpy on a machine that ssh leads to.

    Args:
        host: What ssh is given: a host, or options and a host; settings of the shell there, such as
            ``PATH=/opt/env/bin:$PATH``, may follow.
        patience: How long it may take.
    """

    kind, form = "ssh", "ssh:HOST"

    def __init__(self, host: str = "", patience: Patience | None = None) -> None:
        super().__init__(f"{_SSH} {host} sh" if host else "", f"ssh:{host}", patience)


class Pipe:
    """One conversation with an agent, from its start to its end.

    Args:
        device: Its name, for messages.
        command: What opens a shell there.
        start_s: Deadline of the start.

    Raises:
        DeviceCrashed: It does not start.
        DeviceTimeout: It does not start in time.
    """

    def __init__(self, device: str, command: str, start_s: float) -> None:
        self.device, self._number = device, 0
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._outgoing: queue.Queue[bytes | None] = queue.Queue()
        self._errors: collections.deque[str] = collections.deque(maxlen=3)
        self._process = _started(device, command)
        # Threads, since a pipe to a hung device blocks whoever writes, too.
        work = self._read, self._read_errors, self._write
        self._threads = [threading.Thread(target=one, daemon=True) for one in work]
        for thread in self._threads:
            thread.start()
        try:
            self.facts = self._begin(time.monotonic() + start_s)
        except BaseException:
            self.close()
            raise

    def _begin(self, deadline: float) -> dict[str, Any]:
        """Send the agent and return what it says of the device."""
        source = AGENT.read_bytes()
        first, second = _READY.split("-")
        boot = (
            f'import sys; print("{first}-" + "{second}", flush=True); '
            f'exec(compile(sys.stdin.buffer.read({len(source)}), "agent", "exec"))'
        )
        # Where the pipe is a terminal it must neither echo nor wait for whole lines.
        self._outgoing.put(f"stty raw -echo 2>/dev/null; exec python3 -c '{boot}'\n".encode())
        while self._line(deadline).strip() != _READY.encode():
            pass  # what a shell says at its start
        self._outgoing.put(source)
        return self._answer(deadline)

    def ask(self, deadline_s: float, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            DeviceError: It is busy, does not answer in time, or breaks.
            UserError: The device cannot do it.
        """
        self._number += 1
        # The agent ends itself a little later than we give up: a hung one must not keep the lock.
        whole = {"id": self._number, "do": do, "deadline_s": deadline_s + 2, **request}
        self._outgoing.put(json.dumps(whole).encode() + b"\n")
        answer = self._answer(time.monotonic() + deadline_s)
        kind, reason = answer.get("error"), answer.get("reason")
        if kind == "unsupported":
            raise Unsupported(f"device {self.device!r} cannot run this model: {reason}")
        if kind:
            fault = DeviceBusy if kind == "busy" else DeviceCrashed
            raise fault(f"device {self.device!r}: {kind}: {reason}")
        return answer

    def close(self) -> None:
        """End the conversation, and the process that carries it."""
        self._outgoing.put(None)
        with contextlib.suppress(OSError):  # it may be gone
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for thread in self._threads:
            thread.join(timeout=1)

    def _answer(self, deadline: float) -> dict[str, Any]:
        line = self._line(deadline)
        try:
            answer = json.loads(line)
            if answer.pop("id") == self._number:
                return dict(answer)
        except (ValueError, AttributeError, KeyError, TypeError):
            pass
        shown = line[:60].decode(errors="replace").strip()
        raise DeviceCrashed(f"device {self.device!r} wrote {shown!r}, which is no answer")

    def _line(self, deadline: float) -> bytes:
        try:
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise DeviceTimeout(f"device {self.device!r} did not answer in time") from None
        if line is None:
            self._threads[1].join(timeout=1)  # its last words may still be on their way
            said = "; ".join(self._errors) or "without a word; was its process killed?"
            raise DeviceCrashed(f"device {self.device!r} hung up: {said}")
        return line

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr
        with self._process.stderr as lines:
            for line in lines:
                if text := line.decode(errors="replace").strip():
                    self._errors.append(text)

    def _write(self) -> None:
        assert self._process.stdin
        with contextlib.suppress(OSError), self._process.stdin as sink:  # the reader finds out
            while (data := self._outgoing.get()) is not None:
                sink.write(data)
                sink.flush()


def _started(device: str, command: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    try:
        # A session of its own: the user's interrupt must not end the agent before we do.
        return subprocess.Popen(
            shlex.split(command), stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"device {device!r}: {command!r} does not start here: {error}") from error


def _outputs(device: str, answer: dict[str, Any]) -> list[Any]:
    """Return the arrays of an answer to "load"."""
    try:
        return [
            np.frombuffer(base64.b64decode(one["data"]), one["dtype"]).reshape(one["shape"])
            for one in answer["outputs"]
        ]
    except (KeyError, ValueError, TypeError) as error:
        raise DeviceLied(f"device {device!r} sent outputs that are none ({error})") from error
