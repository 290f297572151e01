"""Devices at the end of a pipe: a real ssh server, and agents killed, hung, slow and lying."""

from __future__ import annotations

import fcntl
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from gpsearch.profilers.remote import (  # type: ignore[import-not-found]
    DeviceBusy,
    DeviceCrashed,
    DeviceLied,
    DeviceTimeout,
    Patience,
    RemoteProfiler,
    SshProfiler,
)
from torch import nn

from gpsearch import HLSTM, UserError, find_device, measure
from gpsearch.cli import main
from gpsearch.exporting import AGENT
from gpsearch.profiling import Host
from tests.sshd import SSHD, Server, sshd

EXAMPLE = (torch.ones(4, 1, 3),)
MODEL = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
HASTY = Patience(start_s=60.0, answer_s=2.0, lock_s=0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if SSHD is None:
        pytest.skip("no sshd here: install openssh-server")
    with sshd(tmp_path_factory.mktemp("device")) as running:
        yield running


def agents(folder: Path) -> list[int]:
    """Return the processes that work in this folder as agents."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if b"gpsearch-" in words and f"TMPDIR={folder}\0".encode() in environment + b"\0":
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


# A real server


def test_a_model_is_measured_over_ssh(server: Server, tmp_path: Path) -> None:
    layer = HLSTM(3, 8, gate_hidden=(6,), bidirectional=True)
    with closing(find_device(f"ssh:{server.host()}")) as device:
        facts = device.probe()
        assert facts.name == f"ssh:{platform.node()}"
        assert facts.fingerprint["runtime"] == "numpy"
        assert "no energy counter" in facts.unavailable["energy_j"]
        host = Host(locks=tmp_path)
        reading = measure(
            device, nn.Linear(3, 400), EXAMPLE, reference=layer, max_seconds=0.2, host=host
        )
    assert reading["latency_s"].method == "perf_counter on the device"
    assert 0 < reading["latency_ratio"].number < 1


def test_an_agent_killed_in_the_middle_of_a_measurement_is_started_again(server: Server) -> None:
    layer = HLSTM(3, 8, gate_hidden=(6,))
    with closing(SshProfiler(server.host())) as device:
        handle = device.load(layer, (torch.ones(300, 1, 3),))
        first = agents(server.folder)
        assert len(first) == 1
        threading.Timer(0.1, os.kill, (first[0], signal.SIGKILL)).start()
        seconds = device.run([handle], [0] * 200)  # ten times as long as the agent has
        assert len(seconds) == 200
        assert agents(server.folder)[0] != first[0]


def test_an_agent_that_is_killed_every_time_is_one_clear_line(server: Server) -> None:
    with closing(SshProfiler(server.host())) as device:
        handle = device.load(HLSTM(3, 8), (torch.ones(200, 1, 3),))
        over = threading.Event()

        def kill_all() -> None:
            while not over.wait(0.02):
                for pid in agents(server.folder):
                    os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill_all)
        killer.start()
        try:
            with pytest.raises(DeviceCrashed, match=r"hung up.*a second time, after a restart"):
                device.run([handle], [0] * 5000)
        finally:
            over.set()
            killer.join()


def test_a_stopped_agent_is_given_up_and_the_next_one_measures(server: Server) -> None:
    with closing(SshProfiler(server.host(), HASTY)) as device:
        handle = device.load(MODEL, EXAMPLE)
        (first,) = agents(server.folder)
        os.kill(first, signal.SIGSTOP)
        try:
            assert len(device.run([handle], [0, 0])) == 2
        finally:
            os.kill(first, signal.SIGKILL)


def test_a_device_on_which_others_measure_is_busy(server: Server) -> None:
    lock = server.folder / "gpsearch-here-door.lock"
    lock.touch()
    with closing(SshProfiler(server.host(), HASTY)) as device, lock.open() as other:
        handle = device.load(MODEL, EXAMPLE)
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DeviceBusy, match=r"busy: others measure or train there, after 0.2 s"):
            device.run([handle], [0])
        fcntl.flock(other, fcntl.LOCK_UN)
        assert device.run([handle], [0])[0] > 0


def test_nobody_at_the_other_end_is_one_clear_line() -> None:
    with (
        closing(SshProfiler("-p 9 127.0.0.1")) as device,
        pytest.raises(DeviceCrashed, match=r"hung up: .*port 9: Connection refused"),
    ):
        device.probe()


def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["run", "--device", "remote:false", "--budget", "1", "--out", str(tmp_path / "r")]
    monkeypatch.setattr(sys, "argv", ["gpsearch", *asked])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpsearch: device 'remote:false' hung up")


# Devices that lie, by an agent of the test's own


def shell(folder: Path, edit: str = "") -> str:
    """Return a command that opens a shell whose python3 runs the agent after an ``edit`` of it."""
    (folder / "bin").mkdir(exist_ok=True)
    python = folder / "bin" / "python3"
    python.write_text(
        f"#!{sys.executable}\n"
        "import re, sys\n"
        "boot = sys.argv[2]\n"
        'size = re.search(r"read\\((\\d+)\\)", boot)[1]\n'
        'print("gpsearch-ready", flush=True)\n'
        "source = sys.stdin.buffer.read(int(size)).decode()\n"
        f"{edit}\n"
        'exec(compile(source, "agent", "exec"))\n'
    )
    python.chmod(0o755)
    return f"env PATH={folder / 'bin'}:{os.environ['PATH']} TMPDIR={folder} sh"


def answering(folder: Path, seconds: str) -> RemoteProfiler:
    """Return a device that answers to every run by these seconds."""
    found = "[seconds_of(calls[index]) for index in schedule]"
    assert found in AGENT.read_text(encoding="utf-8")
    return RemoteProfiler(
        shell(folder, f"source = source.replace({found!r}, {seconds!r})"), "liar", HASTY
    )


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ("[0.001]", "did not answer 2 calls by 2 times"),
        ("[-0.001, 0.001]", "says that a call took -0.001 s"),
        ("[float('nan'), 0.001]", "says that a call took nan s"),
        ("[0, 0]", "says that a call took 0 s"),
        ("['1', '1']", "says that a call took 1 s"),
        ("[1000.0, 1000.0]", r"claims 2e\+03 s of calls within"),
        ("None", "did not answer 2 calls"),
    ],
)
def test_a_device_that_lies_is_not_believed(tmp_path: Path, seconds: str, said: str) -> None:
    with closing(answering(tmp_path, seconds)) as device:
        handle = device.load(MODEL, EXAMPLE)
        with pytest.raises(DeviceLied, match=said):
            device.run([handle], [0, 0])


def test_a_device_that_computes_something_else_is_found_out(tmp_path: Path) -> None:
    edit = "source = source.replace('\"tanh\": np.tanh', '\"tanh\": np.sin')"
    with (
        closing(RemoteProfiler(shell(tmp_path, edit), "liar")) as device,
        pytest.raises(UserError, match="'liar' runs this model wrong: its outputs differ"),
    ):
        device.load(MODEL, EXAMPLE)


def test_a_slow_device_has_its_time_by_what_its_calls_took(tmp_path: Path) -> None:
    slow = "[time.sleep(0.3) or 0.3 for index in schedule]"
    with closing(answering(tmp_path, slow)) as device:
        handle = device.load(MODEL, EXAMPLE)
        for count in (1, 9):  # 2.7 s is more than it has at first
            assert device.run([handle], [0] * count) == [0.3] * count


def test_a_hung_device_is_a_timeout_and_its_agent_ends_itself(tmp_path: Path) -> None:
    with closing(answering(tmp_path, "time.sleep(600)")) as device:
        handle = device.load(MODEL, EXAMPLE)
        with pytest.raises(DeviceTimeout, match=r"did not answer in time .a second time"):
            device.run([handle], [0])
    give_up = time.monotonic() + 20
    while agents(tmp_path) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert agents(tmp_path) == []


def test_noise_before_the_agent_is_skipped_and_noise_after_it_is_a_crash(tmp_path: Path) -> None:
    quiet = shell(tmp_path)
    motd = f"sh -c 'echo Welcome; echo; exec {quiet}'"
    with closing(RemoteProfiler(motd, "noisy")) as device:
        assert device.probe().fingerprint["runtime"] == "numpy"
    noise = 'source = source.replace("    for line in source:", "    for line in source:\\n'
    noise += "        sink.write('kernel: usb 1-1 reset' + chr(10))\")"
    with (
        closing(RemoteProfiler(shell(tmp_path, noise), "noisy")) as device,
        pytest.raises(DeviceCrashed, match="wrote 'kernel: usb 1-1 reset', which is no answ"),
    ):
        device.load(MODEL, EXAMPLE)


def test_a_device_without_numpy_says_so(tmp_path: Path) -> None:
    edit = "source = 'import absent_numpy'"
    with (
        closing(RemoteProfiler(shell(tmp_path, edit), "bare")) as device,
        pytest.raises(DeviceCrashed, match="ModuleNotFoundError: No module named"),
    ):
        device.probe()


def test_weights_travel_once(tmp_path: Path) -> None:
    sent: list[int] = []

    class Counting(RemoteProfiler):  # type: ignore[misc]
        def _put(self, pipe: object, blob: bytes) -> None:
            sent.append(len(blob))
            super()._put(pipe, blob)

    big = nn.Linear(300, 300)  # more than one line
    for _ in range(2):
        with closing(Counting(shell(tmp_path), "counted")) as device:
            device.load(big, (torch.ones(1, 300),))
    assert len(sent) == 2  # the weights, and the example
    assert sent[0] > 4 * 300 * 300


def test_many_models_do_not_fill_the_device(tmp_path: Path) -> None:
    with closing(RemoteProfiler(shell(tmp_path), "small")) as device:
        handles = [device.load(nn.Linear(3, n), EXAMPLE) for n in range(1, 8)]
        assert len(device._loaded) == 4
        assert len(device.run(handles[:2], [1, 0, 1])) == 3  # loaded again


def test_a_run_keeps_what_it_needs_be_it_the_oldest_or_more_than_the_limit(tmp_path: Path) -> None:
    with closing(RemoteProfiler(shell(tmp_path), "small")) as device:
        handles = [device.load(nn.Linear(3, n), EXAMPLE) for n in range(1, 6)]
        agent = device._pipe
        first, oldest, second, *others = handles  # the first had to make room
        assert len(device.run([oldest, first], [0, 1])) == 2
        assert list(device._loaded) == [one.name for one in (oldest, *others, first)]
        assert len(device.run([*others, second, first, oldest], [0, 1, 2, 3, 4])) == 5
        device.load(nn.Linear(3, 6), EXAMPLE)
        assert len(device._loaded) == 4
        assert device._pipe is agent  # which was not lost on the way


def test_a_model_may_lack_weights(tmp_path: Path) -> None:
    with closing(RemoteProfiler(shell(tmp_path), "small")) as device:
        assert len(device.run([device.load(nn.ReLU(), EXAMPLE)], [0, 0])) == 2


def test_a_device_that_keeps_nothing_is_found_out(tmp_path: Path) -> None:
    found = "part.replace(self._path(blob))"
    assert found in AGENT.read_text(encoding="utf-8")
    edit = f"source = source.replace({found!r}, {'return {}'!r})"
    with (
        closing(RemoteProfiler(shell(tmp_path, edit), "full")) as device,
        pytest.raises(DeviceCrashed, match="'full' does not keep what is sent: is its disk full"),
    ):
        device.load(nn.Linear(3, 2), EXAMPLE)


def test_devices_without_a_place_say_what_to_give() -> None:
    for name, form in (("ssh", "ssh:HOST"), ("remote", "remote:COMMAND")):
        assert form in find_device(name).probe().unavailable["latency_s"]


def test_a_command_that_is_none_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="'no-such-command' does not start here"):
        find_device("remote:no-such-command").probe()
