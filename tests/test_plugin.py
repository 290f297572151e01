"""The commands `gpsearch plugin`; with installed packages, they are in test_plugin_install."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gpsearch.cli import app
from gpsearch.errors import UserError
from gpsearch.profiling import find
from gpsearch.testing import template
from gpsearch.testing.bench import Bench
from gpsearch.testing.checks import CHECKS


def test_new_writes_a_package_and_says_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, next_step in (
        (["board"], "plugin check board"),
        (["chess", "--task"], "run --task"),
    ):
        result = CliRunner().invoke(app, ["plugin", "new", *words])
        assert result.exit_code == 0, result.output
        assert f"{words[0]}/gpsearch_{words[0]}.py" in result.output
        assert next_step in result.output.splitlines()[-1]
    again = CliRunner().invoke(app, ["plugin", "new", "board"])
    assert isinstance(again.exception, UserError)


def test_a_name_may_hold_the_template_s_own(tmp_path: Path) -> None:
    template.write("profiler", "my_demo", tmp_path / "d")
    assert 'name = "gpsearch-my-demo"' in (tmp_path / "d" / "pyproject.toml").read_text()
    assert (tmp_path / "d" / "gpsearch_my_demo.py").exists()


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [("profiler", "cpu", "a device is called 'cpu' already"),
     ("task", "speech", "a task is called 'speech' already")],
)  # fmt: skip
def test_a_name_is_given_once(tmp_path: Path, kind: str, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        template.write(kind, name, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_device_in_a_file_may_import_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template.write("profiler", "demo", tmp_path / "demo")
    path = tmp_path / "demo" / "gpsearch_demo.py"
    path.write_text(f"import demo_wiring\n{path.read_text()}")
    path.with_name("demo_wiring.py").write_text("PINS = 3\n")
    monkeypatch.chdir(tmp_path)
    before = [*sys.path]
    device = find("demo/gpsearch_demo.py:DemoProfiler")
    assert sys.path == before
    assert sys.modules[type(device).__module__].demo_wiring.PINS == 3
    CHECKS["import_has_no_side_effects"].run(Bench(device))  # in a process of its own


def test_check_fails_on_a_profiler_that_breaks_the_contract_and_says_why() -> None:
    """The device of the toys makes its times up."""
    result = CliRunner().invoke(app, ["plugin", "check", "tests.toy:ToyDevice", "--json"])
    assert result.exit_code == 1
    report = json.loads(result.output)
    failed = {one["check"] for one in report["outcomes"] if one["state"] == "failed"}
    assert failed >= {"run_waits_for_the_device", "ten_times_the_steps_take_ten_times_as_long"}
    assert report["passed"] is False
    assert report["summary"].startswith("FAILS: ")
