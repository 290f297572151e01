from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gpsearch.errors import Unsupported, UserError
from gpsearch.profiling import (
    DeviceFacts,
    DeviceProfiler,
    Host,
    Quantity,
    Reading,
    aa_gate,
    check,
    closing,
    devices,
    facts_of,
    find,
    from_anywhere,
    installed,
    measure,
)
from gpsearch.profiling.intervals import mean_of_five, quantile, quantile_interval
from tests.fakes import FakeDevice, FakeModel

POSITIVE = st.floats(1e-9, 1e9)

# ---- quantities


@settings(max_examples=50)
@given(value=POSITIVE, width=st.floats(0, 1), n=st.integers(1, 1000))
def test_a_quantity_survives_json(value: float, width: float, n: int) -> None:
    interval = (value * (1 - width), value * (1 + width))
    quantity = Quantity(value, "s", "measured", interval, n, "script", "device")
    assert Quantity.from_dict(json.loads(json.dumps(quantity.to_dict()))) == quantity


def test_an_unavailable_quantity_has_a_reason_and_no_value() -> None:
    quantity = Quantity.unavailable("J", "no counter")
    assert (quantity.value, quantity.kind, quantity.reason) == (None, "unavailable", "no counter")
    assert not quantity.available
    assert Quantity.from_dict(json.loads(json.dumps(quantity.to_dict()))) == quantity
    with pytest.raises(ValueError, match="unavailable: no counter"):
        _ = quantity.number


@pytest.mark.parametrize(
    "contradiction",
    [
        lambda: Quantity(math.nan, "s", "analytic"),
        lambda: Quantity(math.inf, "s", "analytic"),
        lambda: Quantity(-1.0, "s", "analytic"),
        lambda: Quantity(1.0, "", "analytic"),
        lambda: Quantity(None, "s", "measured", n=64),
        lambda: Quantity(1.0, "J", "unavailable", reason="no counter"),
        lambda: Quantity(None, "J", "unavailable"),
        lambda: Quantity(1.0, "J", "estimated"),
        lambda: Quantity(0.0, "J", "measured", n=1),
        lambda: Quantity(1.0, "s", "measured"),
        lambda: Quantity(1.0, "s", "measured", (2.0, 3.0), 64),
        lambda: Quantity(None, "s", "unavailable", (2.0, 3.0), reason="no counter"),
    ],
)
def test_a_quantity_never_contradicts_itself(contradiction: Callable[[], Quantity]) -> None:
    with pytest.raises(ValueError, match="not a quantity"):
        contradiction()


def test_nothing_at_all_is_a_count() -> None:
    assert Quantity(0, "1", "analytic").value == 0


# ---- intervals


def test_the_median_of_six_lies_between_its_extremes_with_97_percent() -> None:
    # P(all six on one side) = 2 / 2**6 = 3 %; of five it would be 6 %.
    assert quantile_interval([3.0, 1.0, 4.0, 2.0, 6.0, 5.0]) == (1.0, 6.0)
    assert quantile_interval([3.0, 1.0, 4.0, 2.0, 5.0]) is None


@settings(max_examples=50)
@given(samples=st.lists(POSITIVE, min_size=36, max_size=300), q=st.sampled_from([0.5, 0.9]))
def test_an_interval_holds_the_quantile(samples: list[float], q: float) -> None:
    interval = quantile_interval(samples, q)
    if interval is None:
        assert q > 0.5, "too few samples are below it only where they correlate"
        return
    assert interval[0] <= quantile(samples, q) <= interval[1]


@pytest.mark.parametrize(("q", "true"), [(0.5, math.log(2)), (0.9, math.log(10))])
@pytest.mark.parametrize("n", [128, 500])
def test_intervals_cover_the_truth_95_times_in_100(n: int, q: float, true: float) -> None:
    rng = np.random.default_rng(0)
    intervals = [quantile_interval(list(rng.exponential(size=n)), q) for _ in range(1000)]
    covered = [low <= true <= high for low, high in filter(None, intervals)]
    assert len(covered) > 970
    assert 0.94 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize(("n", "correlation"), [(128, 0.6), (128, 0.9), (512, 0.9), (512, 0.95)])
def test_intervals_cover_the_truth_where_one_call_is_like_the_last(
    n: int, correlation: float
) -> None:
    # 128 calls are the fewest of a reading that has the time.
    noise = np.random.default_rng(0).normal(size=(n, 400))
    for before, now in pairwise(noise):
        now *= math.sqrt(1 - correlation**2)
        now += correlation * before
    intervals = [quantile_interval(list(run)) for run in np.exp(noise.T)]
    assert np.mean([low <= 1 <= high for low, high in filter(None, intervals)]) >= 0.9


def test_the_mean_of_five_by_students_t() -> None:
    mean, (low, high) = mean_of_five([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, low, high) == pytest.approx((3, 3 - 1.963, 3 + 1.963), abs=1e-3)


# ---- latency


def read(device: FakeDevice, tmp_path: Path, *, seconds: float = 0.002, **options: Any) -> Reading:
    """Measure a model of 2 ms against one of 1 ms."""
    options = {"reference": FakeModel(0.001), "host": device.host(tmp_path), **options}
    return measure(device, FakeModel(seconds, joules=0.5), (), **options)


def test_known_latencies_are_read_exactly(tmp_path: Path) -> None:
    reading = read(FakeDevice(), tmp_path, reference_name="lstm")
    assert reading["latency_s"].value == 0.002
    assert reading["latency_s"].ci95 == (0.002, 0.002)
    assert reading["latency_p90_s"].value == 0.002
    assert reading["latency_ratio"].value == pytest.approx(2)
    assert reading["latency_reference_s"].value == 0.001
    assert reading["latency_s"].n >= 64
    assert (reading.stable, reading.flags, reading.reference) == (True, [], "lstm")
    assert (reading.device, reading.protocol) == ("fake", "abab-1")


def test_a_reading_survives_json(tmp_path: Path) -> None:
    reading = read(FakeDevice(), tmp_path, energy=True)
    assert Reading.from_dict(json.loads(json.dumps(reading.to_dict()))) == reading


def test_a_reading_says_when_how_long_and_of_what_it_is(tmp_path: Path) -> None:
    device = FakeDevice()
    model = FakeModel(0.002)
    model.weight = nn.Parameter(torch.zeros(1, dtype=torch.float16))
    example = (torch.zeros(1, 7, 3), torch.tensor(5))
    reading = measure(device, model, example, host=device.host(tmp_path))
    began = datetime.fromisoformat(reading.started_at)
    assert began.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - began) < timedelta(minutes=5)
    assert reading.wall_s == device.clock_s > 0
    assert reading.workload == {"example": ["float32[1, 7, 3]", "5"], "dtype": "float16"}
    assert Reading.from_dict(json.loads(json.dumps(reading.to_dict()))) == reading


@pytest.mark.parametrize(
    ("fingerprint", "told"),
    [
        ({"threads": "2", "torch": "2.13.0"}, {"threads": 2, "runtime": "torch 2.13.0"}),
        ({"runtime": "numpy", "torch": "2.13.0"}, {"runtime": "numpy"}),
    ],
)
def test_threads_and_runtime_are_those_of_the_device(
    tmp_path: Path, fingerprint: dict[str, str], told: dict[str, Any]
) -> None:
    class Telling(FakeDevice):
        def probe(self) -> DeviceFacts:
            return replace(super().probe(), fingerprint=fingerprint)

    assert read(Telling(), tmp_path).workload == told


def test_a_reading_from_before_these_were_kept_is_read(tmp_path: Path) -> None:
    old = read(FakeDevice(), tmp_path).to_dict()
    for name in ("started_at", "wall_s", "workload"):
        del old[name]
    reading = Reading.from_dict(old)
    assert (reading.started_at, reading.wall_s, reading.workload) == ("", None, {})


def test_without_a_reference_there_is_no_ratio(tmp_path: Path) -> None:
    reading = read(FakeDevice(), tmp_path, reference=None)
    assert reading["latency_s"].value == 0.002
    assert reading["latency_ratio"].reason == "measured without a reference model"
    assert reading.reference is None


def test_a_slow_swing_of_the_machine_moves_the_median_but_not_the_ratio(tmp_path: Path) -> None:
    swinging = FakeDevice(slowdown=lambda call: 1.5 + 0.5 * math.sin(call / 200))
    reading = read(swinging, tmp_path)
    assert reading["latency_ratio"].value == pytest.approx(2, rel=0.005)
    assert reading["latency_s"].number > 0.0021


def test_noise_makes_a_reading_longer_until_it_is_sharp(tmp_path: Path) -> None:
    rng = Random(0)
    noisy = FakeDevice(slowdown=lambda call: rng.uniform(0.9, 1.1))
    reading = read(noisy, tmp_path, precision=0.01)
    ratio = reading["latency_ratio"]
    assert ratio.n > 128
    assert ratio.ci95 is not None
    low, high = ratio.ci95
    assert high - low <= 0.02 * ratio.number
    assert low <= 2 <= high


def test_a_cold_start_is_not_in_the_reading(tmp_path: Path) -> None:
    cold = FakeDevice(slowdown=lambda call: 1 + 20 * math.exp(-call / 20))
    assert read(cold, tmp_path)["latency_s"].value == pytest.approx(0.002, rel=0.01)


def test_a_model_too_slow_for_64_calls_is_flagged_and_not_measured_twice(tmp_path: Path) -> None:
    device = FakeDevice()
    reading = read(device, tmp_path, seconds=0.5, reference=FakeModel(0.5), max_seconds=20.0)
    assert reading["latency_ratio"].n == 8
    assert reading.flags == ["only 8 of 64 turns fitted into 20 s"]
    assert not reading.stable
    assert device.clock_s < 30


def test_even_the_slowest_model_gets_an_interval(tmp_path: Path) -> None:
    reading = read(FakeDevice(), tmp_path, seconds=60.0, max_seconds=20.0)
    assert reading["latency_s"].ci95 == (60, 60)


def test_a_drifting_device_is_flagged_after_a_second_attempt(tmp_path: Path) -> None:
    throttling = FakeDevice(slowdown=lambda call: 1 + call / 1000)
    reading = read(throttling, tmp_path)
    assert not reading.stable
    assert reading.flags[0] == "measured twice, since the first reading was doubtful"
    assert "speed drifted by +" in reading.flags[1]


def test_a_passing_disturbance_costs_a_second_attempt_only(tmp_path: Path) -> None:
    disturbed = FakeDevice(slowdown=lambda call: 2.0 if 520 < call < 720 else 1.0)
    reading = read(disturbed, tmp_path)
    assert reading.stable
    assert reading.flags == ["measured twice, since the first reading was doubtful"]
    assert reading["latency_s"].value == pytest.approx(0.002)


class Forgetful(FakeDevice):
    def run(self, handles: Any, schedule: Any) -> list[float]:
        return [0.0 for _ in schedule]


def test_a_profiler_that_returns_no_times_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"profiler Forgetful: run\(\) must return one positive"):
        read(Forgetful(), tmp_path)


def test_a_device_that_is_not_there_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="device 'fake' cannot measure: unplugged"):
        read(FakeDevice(unavailable={"latency_s": "unplugged"}), tmp_path)


def test_a_device_passes_the_aa_gate_when_a_model_is_as_fast_as_itself(tmp_path: Path) -> None:
    fair = FakeDevice()
    assert check(fair, FakeModel(0.001), (), host=fair.host(tmp_path)).stable

    class Biased(FakeDevice):
        """The candidate's calls are 5 % slower."""

        def run(self, handles: Sequence[FakeModel], schedule: Sequence[int]) -> list[float]:
            seconds = super().run(handles, schedule)
            return [s if index else 1.05 * s for s, index in zip(seconds, schedule, strict=True)]

    biased = Biased()
    reading = check(biased, FakeModel(0.001), (), host=biased.host(tmp_path))
    assert not reading.stable
    assert "a model measured against itself came out at 1.050" in reading.flags[-1]


class Gated(FakeDevice):
    """The first handle's calls take ``bias`` times as long, for as long as ``until`` calls."""

    def __init__(self, place: Path, bias: float = 1.0, until: float = math.inf) -> None:
        super().__init__()
        self.place, self.bias, self.until = str(place), bias, until

    def probe(self) -> DeviceFacts:
        return replace(super().probe(), fingerprint={"place": self.place})

    def run(self, handles: Sequence[FakeModel], schedule: Sequence[int]) -> list[float]:
        bias = self.bias if self.calls < self.until else 1.0
        seconds = super().run(handles, schedule)
        return [s if index else bias * s for s, index in zip(seconds, schedule, strict=True)]


def gate(device: FakeDevice, tmp_path: Path) -> list[str]:
    return aa_gate(device, FakeModel(0.002), (), host=device.host(tmp_path))


def test_a_biased_device_fails_the_aa_gate_once_for_all(tmp_path: Path) -> None:
    biased = Gated(tmp_path, 1.3)
    (doubt,) = gate(biased, tmp_path)
    assert doubt.startswith("a model against itself: 1.300, so latencies are rough")
    assert biased.clock_s < 12  # three attempts of about a second, and pauses

    again, another = Gated(tmp_path, 1.3), Gated(tmp_path / "another", 1.0)
    assert gate(again, tmp_path) == [doubt]
    assert again.calls == 0
    assert gate(another, tmp_path) == []


def test_a_passing_disturbance_and_noise_pass_the_aa_gate(tmp_path: Path) -> None:
    passing = Gated(tmp_path, 1.3, until=400)
    assert gate(passing, tmp_path) == []
    assert passing.clock_s > passing.host(tmp_path).recovery_s, "at the second attempt"
    rng = Random(0)
    noisy = Gated(tmp_path / "noisy")
    noisy.slowdown = lambda call: rng.choice([1.0, 1.0, 3.0])
    assert gate(noisy, tmp_path) == []


# ---- memory


def test_what_a_profiler_cannot_tell_is_unavailable(tmp_path: Path) -> None:
    memory = read(FakeDevice(), tmp_path)["peak_memory_bytes"]
    assert memory.reason == "the profiler of 'fake' does not tell it"


def test_peak_memory_is_the_profilers(tmp_path: Path) -> None:
    class Remembering(FakeDevice):
        def peak_memory(self, handle: object) -> int:
            return 4096

    assert read(Remembering(), tmp_path)["peak_memory_bytes"].value == 4096


# ---- finding a profiler

PROFILER = """
from gpsearch.profiling import API_VERSION, DeviceFacts

class Toy:
    api_version = API_VERSION

    def probe(self):
        return DeviceFacts("toy", {"processor": "wood"}, machine="toy")

    def load(self, model, example):
        return model

    def run(self, handles, schedule):
        return [0.001 for _ in schedule]

    def close(self):
        pass

class Many(Toy):
    def __init__(self, place="first"):
        self.place = place

    @classmethod
    def with_argument(cls, argument):
        return cls(argument)

class Old(Toy):
    api_version = "0"

class Half:
    api_version = API_VERSION

    def probe(self):
        return DeviceFacts("half", {})

class Broken(Toy):
    def __init__(self):
        raise OSError("no such\\ndevice")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder that holds a plain file with profilers."""
    (tmp_path / "toy_device.py").write_text(PROFILER)
    (tmp_path / "needy_device.py").write_text("import a_module_that_nobody_has")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["toy_device:Toy", "toy_device.py:Toy", "./toy_device.py:Toy"])
def test_a_profiler_in_a_plain_file_is_used_like_any_other(folder: Path, name: str) -> None:
    toy = find(name)
    assert isinstance(toy, DeviceProfiler)
    reading = measure(toy, FakeModel(1), (), host=Host(locks=folder))
    assert reading["latency_s"].value == 0.001
    assert reading["energy_j"].reason == "not asked for"


@pytest.mark.parametrize("module", ["toy_device", "toy_device.py", "./toy_device.py"])
@pytest.mark.parametrize(
    ("argument", "place"), [("", "first"), (":second", "second"), (":me@host:22", "me@host:22")]
)
def test_an_argument_may_follow_a_name(
    folder: Path, module: str, argument: str, place: str
) -> None:
    assert vars(find(f"{module}:Many{argument}"))["place"] == place


def test_a_profiler_without_a_counter_says_so(folder: Path) -> None:
    reading = measure(
        find("toy_device:Toy"), FakeModel(1), (), energy=True, host=Host(locks=folder)
    )
    assert reading["energy_j"].reason == "the profiler of 'toy' reads no energy counter"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("tpu", r"no device called 'tpu'; installed: cpu, gpu.*module:Class"),
        ("absent.py:Toy", r"there is no file absent\.py"),
        ("absent_module:Toy", r"of absent_module cannot be imported: ModuleNotFoundError"),
        (
            "needy_device:Toy",
            r"cannot be imported: .*'a_module_that_nobody_has'; correct that file",
        ),
        ("toy_device:Nobody", r"toy_device defines no 'Nobody'"),
        ("toy_device:Toy:2", r"'toy_device:Toy' takes no argument '2'; write --device toy_device:"),
        ("cpu:2", r"device 'cpu' takes no argument '2'; write --device cpu"),
        ("toy_device:Old", r"speaks API version '0', this gpsearch '1'"),
        ("toy_device:Half", r"of toy_device lacks load, run, close\(\)"),
        ("toy_device:Broken", r"does not start: OSError: no such device"),
    ],
)
def test_a_mistaken_device_is_answered_by_one_line(folder: Path, name: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as raised:
        find(name)
    assert "\n" not in str(raised.value)


def test_the_built_in_devices_come_by_the_same_door() -> None:
    assert {"cpu", "gpu"} <= installed().keys()
    assert installed()["cpu"].startswith("gpsearch ")
    facts = devices()["cpu"]
    assert isinstance(facts, DeviceFacts)
    assert facts.name == "cpu"


# ---- strangers' answers


class Odd(FakeDevice):
    """Answers as the test says."""

    answers: dict[str, Any] = {}  # noqa: RUF012 - read only

    def peak_memory(self, handle: object) -> Any:
        answer = self.answers["peak_memory"]
        return answer() if callable(answer) else answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(0, "a sensor that reads 0"), (lambda: 1 / 0.0, "ZeroDivisionError"), (None, "TypeError")],
)
def test_memory_that_cannot_be_told_ends_no_measurement(
    tmp_path: Path, answer: Any, reason: str
) -> None:
    odd = Odd()
    odd.answers = {"peak_memory": answer}
    memory = read(odd, tmp_path)["peak_memory_bytes"]
    assert memory.value is None
    assert re.search(f"Odd.peak_memory: .*{reason}", str(memory.reason))


def test_seconds_of_numpy_survive_json(tmp_path: Path) -> None:
    class Numpy(FakeDevice):
        def run(self, handles: Any, schedule: Any) -> Any:
            return np.array(super().run(handles, schedule), np.float32)

    assert json.dumps(read(Numpy(), tmp_path).to_dict())


def test_a_run_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    class Failing(FakeDevice):
        def run(self, handles: Any, schedule: Any) -> Any:
            raise KeyError("no such\nbus")

    with pytest.raises(RuntimeError, match=r"profiler Failing: KeyError: .*no such.*bus") as raised:
        read(Failing(), tmp_path)
    assert "\n" not in str(raised.value)


def raising(error: BaseException) -> Callable[..., Any]:
    def method(*arguments: object) -> Any:
        raise error

    return method


@pytest.mark.parametrize("method", ["load", "run", "disturbances", "close"])
@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (KeyError("bus"), RuntimeError, "profiler FakeDevice: KeyError: 'bus'"),
        (SystemExit(0), RuntimeError, "profiler FakeDevice: SystemExit: 0"),
        (Unsupported("too large"), Unsupported, "unsupported: too large"),
        (OSError("unplugged"), OSError, "unplugged"),
        (RuntimeError("out of memory"), RuntimeError, "out of memory"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_what_a_profiler_raises_is_told_in_one_line(
    tmp_path: Path, method: str, error: BaseException, kind: type[BaseException], line: str
) -> None:
    device = FakeDevice()
    setattr(device, method, raising(error))
    with pytest.raises(kind) as raised, closing(device):
        read(device, tmp_path)
    assert (raised.type, str(raised.value)) == (kind, line)


def test_a_counter_s_failure_costs_the_energy_alone(tmp_path: Path) -> None:
    class Failing(FakeDevice):
        def read_energy(self) -> tuple[float, float]:
            raise AttributeError("no such clock")

    reading = read(Failing(), tmp_path, energy=True)
    assert reading["energy_j"].reason == "counter: profiler Failing: AttributeError: no such clock"
    assert reading["latency_s"].value == 0.002


def test_a_profiler_that_cannot_be_closed_hides_no_other_failure() -> None:
    device = FakeDevice()
    device.close = raising(KeyError("no bus"))  # type: ignore[method-assign]
    with pytest.raises(UserError, match="the first"), closing(device):
        raise UserError("the first")


def test_a_disturbed_reading_is_flagged_and_stable(tmp_path: Path) -> None:
    class Shared(FakeDevice):
        def disturbances(self) -> Sequence[str]:
            return ["somebody else computes there"]

    reading = read(Shared(), tmp_path)
    assert reading.stable
    assert "somebody else computes there" in reading.flags


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("facts", "fault"),
    [
        (lambda: None, r"probe\(\) returned NoneType, not DeviceFacts"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: DeviceFacts("odd", {"cores": {1, 2}}), "set is not JSON serializable"),  # type: ignore[dict-item]
    ],
)
def test_a_device_that_does_not_say_what_it_is_is_refused(facts: Any, fault: str) -> None:
    class Vague(FakeDevice):
        def probe(self) -> Any:
            return facts()

    with pytest.raises(UserError, match=f"device Vague does not say what it is: .*{fault}"):
        facts_of(Vague())


def test_what_a_profiler_has_no_methods_for_is_unavailable_too() -> None:
    facts = facts_of(FakeDevice(unavailable={"outputs": ""}))
    assert facts.unavailable == {
        "peak_memory_bytes": "the profiler of 'fake' does not tell it",
        "outputs": "its profiler does not say why",
    }


def test_a_file_s_profiler_has_a_name_that_holds_everywhere(folder: Path) -> None:
    assert from_anywhere("toy_device.py:Many:second") == f"{folder}/toy_device.py:Many:second"
    for name in ("cpu", "gpu:1", "toy_device:Toy", "ssh:me@host"):
        assert from_anywhere(name) == name


def test_in_inference_mode_the_same_is_measured(tmp_path: Path) -> None:
    class Watching(FakeDevice):
        def load(self, model: nn.Module, example: tuple[Any, ...]) -> nn.Module:
            assert not torch.ones(1).is_inference()  # a copy with such weights would be slow
            return model

    with torch.inference_mode():
        assert read(Watching(), tmp_path)["latency_s"].value == 0.002
