"""The kit finds every fault that is planted in the profiler of its own template."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch

from gpsearch.candidate import Architecture
from gpsearch.errors import UserError
from gpsearch.profiling import DeviceFacts, DeviceProfiler, Host, find
from gpsearch.testing import examine, template
from gpsearch.testing.bench import Bench, Workload
from gpsearch.testing.checks import CHECKS, DEMANDED, Check, CheckFailed, TimedOut
from gpsearch.testing.report import examine_named
from tests.fakes import FakeDevice, FakeModel
from tests.toy import ToyDevice

ROOT = Path(__file__).parents[1]
TASK = ROOT / "gpsearch/testing/templates/task/gpsearch_demo.py"
SLOW = {"import_has_no_side_effects", "a_model_is_as_fast_as_itself", "readings_survive_json"}
"""Seen through the tests of an installed package and of our own profilers."""
QUICK = {name: one for name, one in CHECKS.items() if name not in SLOW}

ABSENT = '{"energy_j": "this device has no energy counter"}'
METER = """    def read_energy(self):
        return time.perf_counter(), {joules}

    def close"""


def planted(folder: Path, swaps: dict[str, str]) -> DeviceProfiler:
    """Return the template's profiler with parts of its source replaced."""
    template.write("profiler", "demo", folder / "demo")
    path = folder / "demo" / "gpsearch_demo.py"
    source = path.read_text()
    for sound, faulty in swaps.items():
        assert sound in source
        source = source.replace(sound, faulty)
    path.write_text(source)
    return find(f"{path}:DemoProfiler")


def metered(joules: str) -> dict[str, str]:
    return {ABSENT: "{}", "    def close": METER.format(joules=joules)}


@pytest.mark.parametrize(
    ("swaps", "check", "why"),
    [
        # times
        ({"return seconds": "return 0.0"}, "every_call_has_its_time", "gave 0.0 for the seconds"),
        ({"return seconds": "return 1e3 * seconds"}, "seconds_fit_into_the_clock", "not milli"),
        ({"in schedule]": "in schedule[1:]]"}, "every_call_has_its_time", "0 times for 1 calls"),
        ({"in schedule]": "in sorted(schedule)]"}, "the_schedule_is_kept", "of 12 times are not"),
        ({"return seconds": "return 1e-5"}, "ten_times_the_steps_take_ten_times_as_long", "1, 1"),
        (
            {
                "import torch\n": "import torch\nimport concurrent.futures\n",
                "THREAD =": "DEVICE = concurrent.futures.ThreadPoolExecutor(1)\nTHREAD =",
                "model(*example)  #": "DEVICE.submit(model, *example)  #",
            },
            "run_waits_for_the_device",
            "must wait until the output is there",
        ),
        # models
        ({"copy.deepcopy(model).eval()": "model.eval()"}, "load_leaves_the_model_alone", "mode"),
        ({"copy.deepcopy(model)": "model"}, "a_handle_is_a_copy", "off those of torch"),
        ({"(model(*example))": "(model(*example) * 2)"}, "outputs_equal_the_reference", "1 off"),
        (
            {"            model(*example)  #": "            self.try_(model, example)  #",
             "    def close": "    def try_(self, model, example):\n        try:\n            "
             "model(*example)\n        except Exception:\n            pass\n\n    def close"},
            "errors_are_told_and_recovered_from",
            "whose forward raises was given the time",
        ),
        # facts
        ({"return Dev": "raise OSError('no bus')\n        return Dev"}, "probe_is_cheap", "no bus"),
        ({"torch.__version__": "str(time.time())"}, "probe_repeats_itself", "fingerprint"),
        ({"torch.__version__": "1, 2: 3"}, "facts_survive_json", "use str"),
        ({'{"energy_j":': '{"energy":'}, "what_is_unavailable_has_a_reason", "'energy'; there are"),
        ({ABSENT: '{"energy_j": ""}'}, "what_is_unavailable_has_a_reason", "without a reason"),
        ({'nothing is held here."""': '"""\n        del self.api'}, "closes_twice", "Attribute"),
        # joules
        (metered("float('nan')"), "the_counter_never_falls", "nan"),
        (metered("-time.perf_counter()"), "the_counter_never_falls", "cumulative J"),
        (metered("1e9 - time.perf_counter()"), "the_counter_never_falls", "fell from"),
        (metered("2e7 * time.perf_counter()"), "joules_grow_with_the_work", "mJ, uJ or Wh"),
        (metered("time.no_such_clock()"), "known_joules_are_read", "no_such_clock"),
        (metered("open('/no/energy_uj').read()"), "known_joules_are_read", "'/no/energy_uj'"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found_and_named(
    tmp_path: Path, swaps: dict[str, str], check: str, why: str
) -> None:
    bench = Bench(planted(tmp_path, swaps))
    with pytest.raises(CheckFailed, match=re.escape(why)):
        CHECKS[check].run(bench)


def test_the_template_is_sound_and_a_report_says_so(tmp_path: Path) -> None:
    profiler = planted(tmp_path, {})
    report = examine(lambda: profiler, "demo", checks=QUICK)
    assert [one for one in report.outcomes if one.state == "failed"] == []
    assert Counter(one.state for one in report.outcomes) == {"passed": 17, "skipped": 11}
    assert "skip  1 checks: no peak_memory_bytes: the profiler of 'demo' does" in report.text()
    assert json.loads(json.dumps(report.to_dict()))["ran"] == 17


def test_a_profiler_in_a_plain_file_is_imported_from_there(tmp_path: Path) -> None:
    check = CHECKS["import_has_no_side_effects"]
    check.run(Bench(planted(tmp_path / "sound", {})))
    loud = planted(tmp_path / "loud", {"import torch\n": "import torch\n\nprint('hello')\n"})
    with pytest.raises(CheckFailed, match="prints while it is imported: 'hello'"):
        check.run(Bench(loud))


def test_a_check_that_a_busy_machine_may_spoil_is_tried_again(tmp_path: Path) -> None:
    slept: list[float] = []
    bench = Bench(planted(tmp_path, {}), Host(sleep=slept.append))
    seen: list[Bench] = []

    def spoilt_once(bench: Bench) -> None:
        seen.append(bench)
        if len(seen) < 2:
            raise CheckFailed("interrupted")

    Check("spoilt_once", "latency_s", spoilt_once, tries=2).run(bench)
    assert (len(seen), len(slept)) == (2, 1)
    seen.clear()
    with pytest.raises(CheckFailed, match="interrupted"):
        Check("spoilt_once", "latency_s", spoilt_once).run(bench)


def reloaded(slowdown: Callable[[int], float], locks: Path) -> Bench:
    device = FakeDevice(slowdown)
    return Bench(device, device.host(locks), workload=lambda **sizes: (FakeModel(0.01), ()))


def test_other_work_while_one_model_ran_is_waited_out(tmp_path: Path) -> None:
    once = reloaded(lambda call: 4.0 if 16 <= call < 32 else 1.0, tmp_path)
    CHECKS["the_second_time_is_like_the_first"].run(once)
    for_good = reloaded(lambda call: 4.0 if call >= 16 else 1.0, tmp_path)
    with pytest.raises(CheckFailed, match="one model, loaded three times, took"):
        CHECKS["the_second_time_is_like_the_first"].run(for_good)


def test_a_check_that_hangs_is_not_tried_again(tmp_path: Path) -> None:
    tries: list[Bench] = []

    def hanging(bench: Bench) -> None:
        tries.append(bench)
        time.sleep(60)

    with pytest.raises(TimedOut, match=r"^no end within 0\.1 s"):
        Check("hanging", "latency_s", hanging, tries=3).run(Bench(planted(tmp_path, {})), 0.1)
    assert len(tries) == 1


def test_a_report_fails_when_fewer_checks_ran_than_are_demanded(tmp_path: Path) -> None:
    profiler = planted(tmp_path, {})
    one = {"probe_is_cheap": CHECKS["probe_is_cheap"]}
    report = examine(lambda: profiler, "demo", checks=one)
    assert (report.ran, report.passed) == (1, False)
    assert report.summary() == "FAILS: 1 checks ran: TOO FEW, API 1 demands 20; 1 passed"


def test_a_device_that_is_not_there_is_not_proven() -> None:
    away = FakeDevice(unavailable={"latency_s": "unplugged"})
    report = examine(lambda: away, "fake", checks=QUICK)
    assert not any(one.state == "failed" for one in report.outcomes)
    assert not report.passed
    assert "TOO FEW" in report.summary()


def test_the_number_of_checks_is_written_down() -> None:
    assert Counter(one.needs for one in CHECKS.values()) == DEMANDED["1"]


def test_a_known_failure_needs_its_reason_and_has_to_fail() -> None:
    known = {"run_waits_for_the_device": "a simulator", "probe_is_cheap": "slow", "nonsense": "?"}
    checks = {name: CHECKS[name] for name in ("run_waits_for_the_device", "probe_is_cheap")}
    report = examine(ToyDevice, "toy", expected_failures=known, checks=checks)
    states = {one.check: (one.state, one.reason) for one in report.outcomes}
    assert states["run_waits_for_the_device"][0] == "expected"
    assert states["run_waits_for_the_device"][1].startswith("a simulator (batches of 64")
    assert states["probe_is_cheap"][1].startswith("passes, though expected to fail: slow")
    assert states["nonsense"] == ("failed", "expected to fail, but there is no such check")


def test_a_check_that_hangs_is_interrupted_and_the_next_one_runs() -> None:
    hanging = Check("sleeps", "", lambda bench: time.sleep(60))
    with pytest.raises(TimedOut, match=r"^no end within 0\.1 s"):
        hanging.run(Bench(ToyDevice()), limit_s=0.1)
    made: list[DeviceProfiler] = []

    def make() -> DeviceProfiler:
        made.append(ToyDevice())
        return made[-1]

    failing = Check("fails", "", lambda bench: 1 / 0)  # type: ignore[arg-type]
    report = examine(make, checks={"fails": failing, "next": CHECKS["probe_is_cheap"]})
    assert [one.state for one in report.outcomes] == ["failed", "passed"]
    assert len(made) == 2  # the second check has a fresh profiler


class Mute(ToyDevice):
    """Never says what it is."""

    def probe(self) -> DeviceFacts:
        time.sleep(60)
        raise AssertionError


@pytest.mark.parametrize(
    ("checks", "said"),
    [
        (
            ["speaks_this_api_version", "probe_is_cheap", "closes_twice"],
            ["", "no end within 0.5 s", "it does not start a second time: TimedOut: no end"],
        ),
        (
            ["every_call_has_its_time", "closes_twice"],
            ["probe() failed: TimedOut: no end", "it does not start a second time: TimedOut"],
        ),
    ],
)
def test_a_probe_that_hangs_ends_the_examination(checks: list[str], said: list[str]) -> None:
    report = examine(Mute, checks={name: CHECKS[name] for name in checks}, limit_s=0.5)
    for one, start in zip(report.outcomes, said, strict=True):
        assert one.reason.startswith(start)
        assert (one.state == "passed") == (not start)
    assert not report.passed


def faked(seconds: float = 0.01, joules: float = 0.5, **sizes: Any) -> Workload:
    """Return a model for a `FakeDevice`, of whatever size."""
    return FakeModel(seconds, joules), ()


@pytest.mark.parametrize("name", ["known_joules_are_read", "a_falling_counter_is_no_value"])
def test_a_counter_that_hangs_is_not_one_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    reads: list[float] = []

    class Hanging(FakeDevice):
        def read_energy(self) -> tuple[float, float]:
            reads.append(self.clock_s)
            time.sleep(60)
            return 0.0, 0.0

    bench = Bench(Hanging(), Host(locks=tmp_path), faked)
    with pytest.raises(TimedOut, match="no end within"):
        CHECKS[name].run(bench, 2.0)
    assert len(reads) == 1


@pytest.mark.parametrize(("tick_s", "most_s"), [(0.001, 1.5), (0.1, 2.5), (1.0, 16.0), (1.9, 30.0)])
def test_a_counter_may_be_as_slow_as_the_engine_lets_it(
    tmp_path: Path, tick_s: float, most_s: float
) -> None:
    device = FakeDevice(tick_s=tick_s)
    CHECKS["joules_grow_with_the_work"].run(Bench(device, device.host(tmp_path), faked))
    assert device.clock_s < most_s


@pytest.mark.parametrize("tick_s", [0.0, 3.0])
def test_a_counter_that_stands_still_is_found(tmp_path: Path, tick_s: float) -> None:
    device = FakeDevice(tick_s=tick_s)
    with pytest.raises(CheckFailed, match="the counter stood still for 2 s"):
        CHECKS["joules_grow_with_the_work"].run(Bench(device, device.host(tmp_path), faked))


def test_a_name_that_is_none_is_a_mistake() -> None:
    with pytest.raises(UserError, match="no device called 'abacus'"):
        examine_named("abacus")


@pytest.mark.parametrize("kind", ["profiler", "task"])
def test_a_package_bears_the_name_it_is_given(tmp_path: Path, kind: str) -> None:
    written = template.write(kind, "my_board", tmp_path / "p")
    names = {path.relative_to(tmp_path / "p").as_posix() for path in written}
    assert names >= {"pyproject.toml", "README.md", "gpsearch_my_board.py"}
    assert names >= {"tests/test_gpsearch_my_board.py"}
    text = "".join(path.read_text() for path in written)
    assert "demo" not in text.lower()
    assert 'name = "gpsearch-my-board"' in text
    assert f"class MyBoard{kind.capitalize()}" in text


@pytest.mark.parametrize("name", ["3board", "my-board", "Board", "class", ""])
def test_a_name_that_python_cannot_bear_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is no name for a profiler"):
        template.write("profiler", name, tmp_path / "p")


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        template.write("profiler", "board", tmp_path)


def test_the_task_that_is_written_is_the_one_that_is_explained() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    example = TASK.read_text("utf-8")
    assert f"```python\n{example}```" in guide
    assert len(example.splitlines()) <= 70


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 1}, {"hidden_size": 4}, {"gate_depth": 0}, {"gate_width": 4},
        {"activation": "tanh"}, {"gate_direct": True}, {"gate_norm": True}, {"gate_dropout": 0.5},
        {"bidirectional": False}, {"merge": "sum"}, {"norm": "batch"}, {"norm": "none"},
        {"dropout": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_the_task_that_is_written_builds_what_it_is_asked_for(change: dict[str, Any]) -> None:
    task = run_path(str(TASK))["DemoTask"]()
    said = []
    for asked in ({}, change):
        torch.manual_seed(0)
        shape = Architecture(**{"hidden_size": 8, "gate_width": 8, **asked})
        said.append(task.build(shape)(task.x[:3]))
        assert said[-1].shape == (3,)
    assert not torch.equal(*said)


class OpensOnce(ToyDevice):
    """A port that one alone can hold."""

    held = opened = 0

    def __init__(self) -> None:
        if OpensOnce.held:
            raise OSError("the port is busy")
        OpensOnce.held = 1
        OpensOnce.opened += 1

    def close(self) -> None:
        OpensOnce.held = 0


def test_a_device_that_opens_once_can_be_examined() -> None:
    report = examine_named("tests.test_testing:OpensOnce")
    assert [one.check for one in report.outcomes] == [*CHECKS]  # and none says `starts_again`
    assert OpensOnce.opened > 2
    assert OpensOnce.held == 0


class OpensLate(ToyDevice):
    """Cannot be closed before it was used, nor timed, which spares most checks."""

    def probe(self) -> DeviceFacts:
        return replace(super().probe(), unavailable={"latency_s": "unplugged"})

    def close(self) -> None:
        raise AttributeError("port")


def test_a_device_that_cannot_be_closed_is_examined() -> None:
    report = examine_named("tests.test_testing:OpensLate")
    failed = {one.check: one.reason for one in report.outcomes if one.state == "failed"}
    assert failed["closes_twice"] == "the profiler raised AttributeError: port"


class NeverThere(ToyDevice):
    """Waits for a board that does not answer."""

    def __init__(self) -> None:
        time.sleep(60)


def test_a_device_that_cannot_be_made_in_time_is_told() -> None:
    report = examine_named("tests.test_testing:NeverThere", limit_s=0.2)
    assert [(one.check, one.state) for one in report.outcomes] == [("can_be_made", "failed")]
    assert report.outcomes[0].reason == "no end within 0.2 s"
    assert not report.passed


def test_a_device_that_does_not_open_again_keeps_its_outcomes() -> None:
    made: list[DeviceProfiler] = []

    def make() -> DeviceProfiler:
        if made:
            raise OSError("broken\nnow")
        made.append(ToyDevice())
        return made[0]

    failing = Check("fails", "", lambda bench: 1 / 0)  # type: ignore[arg-type]
    report = examine(make, checks={"fails": failing, "next": CHECKS["probe_is_cheap"]})
    assert [one.state for one in report.outcomes] == ["failed", "failed"]
    assert report.outcomes[-1].reason == "it does not start a second time: OSError: broken now"
