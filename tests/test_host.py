from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpsearch.errors import UserError
from gpsearch.profiling import Host, measure
from tests.fakes import FakeDevice, FakeModel

ROOT = Path(__file__).parents[1]

# ---- load


def machine(root: Path, *, total_us: int, steal: int, busy: int, throttled: int) -> Host:
    """Write what the kernel shows of a machine's load."""
    (root / "pressure").mkdir(exist_ok=True)
    (root / "cpu0" / "thermal_throttle").mkdir(parents=True, exist_ok=True)
    (root / "pressure" / "cpu").write_text(
        f"some avg10=1.00 avg60=0.1 avg300=0.0 total={total_us}\nfull avg10=0 total=7\n"
    )
    (root / "stat").write_text(f"cpu  {busy} 0 0 0 0 0 0 {steal} {busy} 0\ncpu0 1 2 3\n")
    (root / "cpu0" / "thermal_throttle" / "core_throttle_count").write_text(f"{throttled}\n")
    return Host(clock=lambda: 0.0, proc=root, cpus=root, locks=root)


def test_load_is_read_from_the_kernel(tmp_path: Path) -> None:
    load = machine(tmp_path, total_us=3_395_706, steal=5, busy=95, throttled=2).load()
    assert load.stalled_s == pytest.approx(3.395706)
    assert load.ticks == (5, 100)  # what guests used is in what the machine did, not besides
    assert load.throttled == 2


def test_a_machine_that_tells_nothing_is_not_blamed(tmp_path: Path) -> None:
    load = Host(proc=tmp_path, cpus=tmp_path).load()
    assert (load.stalled_s, load.ticks, load.throttled) == (None, None, None)
    assert load.since(load) == []


@pytest.mark.parametrize(
    ("after", "faults"),
    [
        ({}, []),
        ({"total_us": 4_000_000}, []),
        ({"total_us": 9_000_000}, ["tasks waited for a processor 90% of the time: a busy machine"]),
        ({"steal": 30, "busy": 170}, ["the machine above took 30% of the processors"]),
        ({"throttled": 1}, ["a processor was throttled"]),
    ],
)
def test_what_was_wrong_in_a_while_is_told(
    tmp_path: Path, after: dict[str, int], faults: list[str]
) -> None:
    quiet = {"total_us": 0, "steal": 0, "busy": 100, "throttled": 0}
    before = machine(tmp_path, **quiet).load()
    host = machine(tmp_path, **quiet | after)
    later = Host(clock=lambda: 10.0, proc=host.proc, cpus=host.cpus).load()
    assert later.since(before) == faults


class Stressed(FakeDevice):
    """A device whose machine is busy until a moment."""

    def __init__(self, root: Path, until_s: float) -> None:
        super().__init__()
        self.root, self.until_s = root, until_s
        (root / "pressure").mkdir()

    def host(self, locks: Path) -> Host:
        return Host(self.now, self.sleep, self.root, self.root / "absent", locks)

    def now(self) -> float:
        stalled_us = round(0.9e6 * min(self.clock_s, self.until_s))
        (self.root / "pressure" / "cpu").write_text(f"some avg10=0 total={stalled_us}\n")
        return self.clock_s


def test_a_busy_machine_costs_a_second_attempt_after_a_wait(tmp_path: Path) -> None:
    device = Stressed(tmp_path, until_s=2.0)
    reading = measure(device, FakeModel(0.002), (), host=device.host(tmp_path))
    assert reading.flags == ["measured twice, since the first reading was doubtful"]
    assert device.clock_s > 3


def test_a_machine_that_stays_busy_is_flagged(tmp_path: Path) -> None:
    device = Stressed(tmp_path, until_s=1e9)
    reading = measure(device, FakeModel(0.002), (), host=device.host(tmp_path))
    assert "tasks waited for a processor" in reading.flags[1]


# ---- who may use the machine when

WORKER = """
import importlib.util, sys, time
from pathlib import Path

# The module alone: it needs nothing else, and importing torch takes seconds.
spec = importlib.util.spec_from_file_location("host", "gpsearch/profiling/host.py")
sys.modules["host"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
host, what, log = module.Host(locks=Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3])

def note(text):
    with log.open("a") as file:
        file.write(f"{text}\\n")

if what in ("measures", "measures for ever"):
    with host.alone_on() as doubts:
        note("begin")
        time.sleep(0.4 if what == "measures" else 3600)
        note("end")
else:
    with host.sharing() as pause:
        while not (log.parent / "stop").exists():
            pause()
            note("batch")
            time.sleep(0.02)
"""


def worker(folder: Path, what: str) -> subprocess.Popen[bytes]:
    """Start a process that trains or measures."""
    words = [sys.executable, "-c", WORKER, str(folder), what, str(folder / "log")]
    return subprocess.Popen(words, cwd=ROOT)


def held(folder: Path, lock: str) -> bool:
    """Say whether anybody has a lock."""
    with (folder / f"gpsearch-{lock}.lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_for(path: Path) -> None:
    """Wait until a worker has begun."""
    while not path.exists():
        time.sleep(0.01)


def test_trainings_pause_while_somebody_measures_and_go_on_afterwards(tmp_path: Path) -> None:
    trainings = [worker(tmp_path, "trains") for _ in range(2)]
    wait_for(tmp_path / "log")
    measurements = [worker(tmp_path, "measures") for _ in range(2)]
    for one in measurements:
        assert one.wait(60) == 0
    time.sleep(0.2)
    (tmp_path / "stop").touch()
    for one in trainings:
        assert one.wait(60) == 0

    log = (tmp_path / "log").read_text().split()
    assert log[0] == log[-1] == "batch"
    begins = [i for i, what in enumerate(log) if what == "begin"]
    assert len(begins) == 2
    assert all(log[i + 1] == "end" for i in begins)


def test_a_killed_measurement_lets_trainings_go_on(tmp_path: Path) -> None:
    measuring = worker(tmp_path, "measures for ever")
    wait_for(tmp_path / "log")
    assert held(tmp_path, "here-door")
    measuring.kill()
    measuring.wait()
    assert not held(tmp_path, "here-door")
    with Host(locks=tmp_path).sharing() as pause:
        pause()
        assert held(tmp_path, "here-room")
    assert (tmp_path / "log").read_text().split() == ["begin"]


@pytest.mark.parametrize("what", ["alone_on", "sharing"])
def test_who_waits_for_a_stopped_measurement_says_so_once_and_gives_up(
    tmp_path: Path, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    measuring = worker(tmp_path, "measures for ever")
    wait_for(tmp_path / "log")
    measuring.send_signal(signal.SIGSTOP)
    host = Host(locks=tmp_path, silence_s=0.05, queue_s=0.2)
    who = rf"(process {measuring.pid} \(stopped\)|another process), which measures"
    mend = rf"waited 0\.2 s for {who}; end it, or .*`fg`"
    with pytest.raises(UserError, match=mend), getattr(host, what)():
        raise AssertionError("it came in")
    assert re.fullmatch(rf"gpsearch: waiting for {who}\n", capfd.readouterr().err)
    measuring.kill()
    measuring.wait()
    with getattr(Host(locks=tmp_path), what)():
        assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("state", "who"),
    [("T (stopped)", "process 4711 (stopped)"), ("S (sleeping)", "process 4711"), ("", "another")],
)
def test_who_has_a_lock_is_named_where_the_system_tells(
    tmp_path: Path, state: str, who: str
) -> None:
    lock = tmp_path / "gpsearch-here-door.lock"
    lock.touch()
    device, number = lock.stat().st_dev, lock.stat().st_ino
    place = f"{os.major(device):02x}:{os.minor(device):02x}:{number}"
    (tmp_path / "locks").write_text(
        f"1: FLOCK  ADVISORY  WRITE 17 {place}0 0 EOF\n"
        f"2: FLOCK  ADVISORY  WRITE {4711 if state else '?'} {place} 0 EOF\n"
        f"2: -> FLOCK  ADVISORY  READ 18 {place} 0 EOF\n"
    )
    (tmp_path / "4711").mkdir()
    (tmp_path / "4711" / "status").write_text(f"Name:\tpython\nState:\t{state}\n")
    host = Host(proc=tmp_path, locks=tmp_path, silence_s=0.01, queue_s=0.02)
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=re.escape(f"for {who}")), host.alone_on():
            raise AssertionError("it came in")


def test_who_is_let_in_after_a_wait_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    measuring = worker(tmp_path, "measures")
    wait_for(tmp_path / "log")
    with Host(locks=tmp_path, silence_s=0.01).alone_on() as doubts:
        assert (tmp_path / "log").read_text().split() == ["begin", "end"]
        assert doubts == []
        assert held(tmp_path, "here-door")
    assert not held(tmp_path, "here-door")
    assert measuring.wait(60) == 0
    assert capfd.readouterr().err.count("waiting for") == 1


def test_a_training_that_is_stopped_does_not_stop_a_measurement_for_ever(tmp_path: Path) -> None:
    host = Host(locks=tmp_path, patience_s=0.1)
    with host.sharing(), host.alone_on() as doubts:
        assert doubts == ["a training that is stopped or stuck did not pause"]
    with host.alone_on() as doubts:
        assert doubts == []


def test_machines_do_not_wait_for_one_another(tmp_path: Path) -> None:
    host = Host(locks=tmp_path, patience_s=0.0)
    with (
        host.alone_on("a board") as doubts,
        host.alone_on("another board") as others,
        host.sharing() as pause,
    ):
        pause()
        assert doubts == others == []
        assert all(held(tmp_path, f"{board}-door") for board in ("a_board", "another_board"))
        assert held(tmp_path, "here-room")
        assert not held(tmp_path, "here-door")
