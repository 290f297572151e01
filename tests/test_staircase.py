from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gpsearch.candidate import Architecture
from gpsearch.errors import UserError
from gpsearch.profiling import DeviceProfiler
from gpsearch.report import draw_staircase
from gpsearch.settings import Settings
from gpsearch.space import Space
from gpsearch.staircase import (
    EQUAL,
    Staircase,
    Step,
    Sweep,
    right_edges,
    snapped,
    subject,
    take,
)
from gpsearch.study import Study
from tests.commands import call
from tests.toy import StepDevice, ToyDevice, ToyTask

ROOT = Path(__file__).parents[1]
SWEEP = "hidden=16:128:16"
SPACE = """\
[architecture]
hidden_size = { low = 16, high = 128, step = 16, default = 48, snap = "device" } # widths
gate_depth = { choices = [0, 1], default = 1 }
gate_width = 6

[schedule]
name = "dense"

[training]
epochs = 1
batch_size = 16

[baselines.dense_lstm] # 80 stands within the third step
architecture.gate_depth = 0
architecture.hidden_size = 80
"""


def intervals(latency: np.ndarray, half_width: float) -> tuple[np.ndarray, np.ndarray]:
    return latency * (1 - half_width), latency * (1 + half_width)


# What a step is


def test_the_edge_of_a_step_is_its_widest() -> None:
    #          8    16   24   32   40   48
    latency = [1.0, 1.0, 1.0, 1.2, 1.2, 1.5]
    assert right_edges(*intervals(np.array(latency), 0.01)) == [2, 2, 2, 4, 4, 5]


def test_a_wider_layer_that_is_faster_takes_the_narrower_ones() -> None:
    latency = [1.0, 1.3, 1.1, 1.0, 1.6]
    assert right_edges(*intervals(np.array(latency), 0.01)) == [3, 3, 3, 3, 4]


def test_a_slope_of_small_rises_is_no_step() -> None:
    latency = 1.01 ** np.arange(60)
    found = right_edges(*intervals(latency, 0.005))
    # Neighbours can hardly be told apart; the first and the last can, and so no step spans far.
    assert max(edge - place for place, edge in enumerate(found)) <= 2


@st.composite
def staircases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Real steps under noise that the intervals own up to: (low, high, the true right edges)."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    rises = draw(st.lists(st.floats(0.05, 0.5), min_size=len(lengths), max_size=len(lengths)))
    heights = np.cumprod(1 + np.array(rises))
    truth = np.repeat(heights, lengths)
    error = draw(arrays(float, len(truth), elements=st.floats(-0.004, 0.004)))
    low, high = intervals(truth * (1 + error), 0.006)
    ends = np.cumsum(lengths) - 1
    return low, high, np.repeat(ends, lengths).tolist()


@given(staircases())
def test_real_steps_are_found_through_noise(
    stairs: tuple[np.ndarray, np.ndarray, list[int]],
) -> None:
    low, high, edges = stairs
    assert right_edges(low, high) == edges


@given(
    arrays(float, st.shared(st.integers(0, 30), key="n"), elements=st.floats(0.5, 2)),
    arrays(float, st.shared(st.integers(0, 30), key="n"), elements=st.floats(0, 0.1)),
)
def test_a_snapped_width_is_never_narrower_and_shown_to_be_no_slower(
    latency: np.ndarray, half_width: np.ndarray
) -> None:
    low, high = latency * (1 - half_width), latency * (1 + half_width)
    found = right_edges(low, high)
    for place, edge in enumerate(found):
        assert edge >= place
        assert found[edge] == edge, "an edge is its own"
        assert edge == place or high[edge] <= (1 + EQUAL) * low[place]
        assert edge == place or low[edge] <= high[place]


@given(st.integers(1, 40), st.integers(0, 99))
def test_noise_alone_makes_no_steps(n: int, seed: int) -> None:
    latency = 1 + 0.1 * np.random.default_rng(seed).random(n)
    assert right_edges(*intervals(latency, 0.1)) == list(range(n))


# A sweep


def taken(root: Path, device: DeviceProfiler | None = None, sweep: str = SWEEP) -> Staircase:
    device, task = device or StepDevice(), ToyTask()
    base = Architecture(hidden_size=48, gate_width=6)
    about = subject(device.probe(), task, base, Sweep.parse(sweep))
    return take(Staircase.stored(about, root), device, task)


def test_the_steps_of_a_device_are_found_and_stored(tmp_path: Path) -> None:
    stairs = taken(tmp_path)

    assert stairs.edges == [32, 64, 96, 128]
    assert stairs.snapped[80] == 96
    assert [step.latency_s for step in stairs.steps[1:4]] == [0.002, 0.003, 0.003]
    assert Staircase.stored(stairs.subject, tmp_path) == stairs
    with (stairs.folder / "staircase.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["right_edge"] for row in rows][:3] == ["32", "32", "64"]
    draw_staircase(stairs, tmp_path / "s.png")
    assert len((tmp_path / "s.png").read_bytes()) > 20_000


def test_gates_have_a_staircase_too(tmp_path: Path) -> None:
    stairs = taken(tmp_path, ToyDevice(), "gate=4:12:4")

    assert stairs.sweep.key == "gate_width"
    assert stairs.edges == [4, 8, 12], "every parameter costs a microsecond there"


def test_another_sweep_measures_what_is_missing_or_unstable(tmp_path: Path) -> None:
    about = taken(tmp_path, sweep="hidden=16:64:16").subject
    part = Staircase(tmp_path / about.folder_name, about, ())
    part = part.extended(Step(32, 9.0, 8.9, 9.1, 0.5, True, ""))
    part = part.extended(Step(48, 9.0, 1.0, 9.9, 0.5, False, "interval of ±40%"))

    assert part.missing == [16, 64]
    assert sorted(part.left) == [16, 48, 64]
    again = taken(tmp_path, sweep="hidden=16:64:16")
    assert [step.latency_s for step in again.steps] == [0.002, 0.5, 0.003, 0.003]


def test_another_machine_or_shape_has_another_staircase() -> None:
    facts, task, sweep = StepDevice().probe(), ToyTask(), Sweep.parse(SWEEP)
    names = {
        subject(facts, task, Architecture(), sweep).folder_name,
        subject(facts, task, Architecture(gate_width=8), sweep).folder_name,
        subject(ToyDevice().probe(), task, Architecture(), sweep).folder_name,
        subject(facts, task, Architecture(), Sweep.parse("hidden=8:128:8")).folder_name,
    }
    assert len(names) == 4


@pytest.mark.parametrize("text", ["hidden", "hidden=8", "hidden=8:20:8", "hidden=9:8:1", "x=1:2:1"])
def test_a_sweep_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--sweep"):
        Sweep.parse(text)


def test_a_shape_without_the_width_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    facts, task = StepDevice().probe(), ToyTask()
    with pytest.raises(UserError, match="no hidden layers"):
        subject(facts, task, Architecture(gate_depth=0), Sweep.parse("gate=4:8:4"))
    about = subject(facts, task, Architecture(), Sweep.parse(SWEEP))
    (tmp_path / about.folder_name).mkdir()
    (tmp_path / about.folder_name / "staircase.json").write_text("{")
    with pytest.raises(UserError, match="damaged; delete it and sweep again"):
        Staircase.stored(about, tmp_path)


# A space that snaps


def asked(tmp_path: Path, device: str = "tests.toy:StepDevice") -> Settings:
    (tmp_path / "mine.toml").write_text(SPACE)
    return Settings.of({
        "task": "tests.toy:ToyTask", "space": str(tmp_path / "mine.toml"), "device": device,
        "objectives": "error,latency",
    })  # fmt: skip


def test_a_space_that_snaps_wants_the_devices_staircase_first(tmp_path: Path) -> None:
    settings = asked(tmp_path)
    with pytest.raises(UserError, match=r"profile --sweep hidden_size=16:128:16 --space .*first"):
        snapped(Space.read(settings.space), settings, tmp_path)


def test_gates_that_are_not_there_do_not_snap(tmp_path: Path) -> None:
    settings = asked(tmp_path)
    path = Path(settings.space)
    snapping = 'gate_width = { low = 16, high = 64, step = 16, snap = "device" }'
    path.write_text(SPACE.replace("gate_width = 6", snapping).replace("default = 1", "default = 0"))
    with pytest.raises(UserError, match="gate_depth = 0 has none; give gate_depth another default"):
        snapped(Space.read(settings.space), settings, tmp_path)


def test_snapped_widths_cost_as_much_as_narrower_ones_and_are_part_of_the_space(
    tmp_path: Path,
) -> None:
    stairs, settings = taken(tmp_path), asked(tmp_path)
    space = snapped(Space.read(settings.space), settings, tmp_path)

    assert "[snapped]\n# Right edges of the latency steps of steps, tile 32\n" in space.text
    assert "hidden_size = [32, 64, 96, 128]" in space.text
    assert space.text.startswith(SPACE.rstrip())
    # The default 48 and the baseline's 80 get the width that their latency pays for.
    assert space.defaults()["hidden_size"] == 64
    assert space.baselines()["dense_lstm"]["hidden_size"] == 96
    latency = {step.width: step.latency_s for step in stairs.steps}
    assert latency[48] == latency[64]
    assert latency[80] == latency[96]


def test_a_study_keeps_its_widths_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = asked(tmp_path)
    monkeypatch.chdir(tmp_path)
    taken(Path("results/staircases"))
    study = Study.create(tmp_path / "s", settings)
    monkeypatch.chdir("/")  # where there is no staircase, of no device

    again = Study(study.folder).space
    assert again.unsnapped == {}
    assert again.text == (study.folder / "space.toml").read_text()
    assert again.defaults() == study.space.defaults()
    assert again.defaults()["hidden_size"] == 64
    sampler = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = {again.suggest(sampler.ask()).architecture.hidden_size for _ in range(30)}
    assert drawn == {32, 64, 96, 128}


def test_a_sweep_on_the_command_line_survives_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.toml").write_text(SPACE)
    words = [
        "profile", "--sweep", SWEEP, "--space", "mine.toml",
        "--device", f"{ROOT / 'tests' / 'toy.py'}:StepDevice", "--task", "tests.toy:ToyTask",
    ]  # fmt: skip
    command = [sys.executable, "-m", "gpsearch", *words]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=null, stderr=null)
    while not (stored := list(tmp_path.glob("results/staircases/*/staircase.json"))):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = len(json.loads(stored[0].read_text())["steps"])

    monkeypatch.chdir(tmp_path)
    code, out, err = call(*words)
    assert code == 0, err
    assert len(err.splitlines()) == 8 - kept
    assert "right edges of hidden_size: 32, 64, 96, 128" in out
