"""A profiler in a package of its own, installed by pip, is found by its name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpsearch.testing import template
from tests.commands import call

ROOT = Path(__file__).parents[1]
PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "gpsearch-toy"
version = "1.2"

[project.entry-points."gpsearch.profilers"]
toy = "gpsearch_toy:ToyProfiler"
torn = "gpsearch_toy:Absent"

[tool.setuptools]
py-modules = ["gpsearch_toy"]
"""

MODULE = '''
from gpsearch.profiling import API_VERSION, DeviceFacts

class ToyProfiler:
    """Every call takes a millisecond."""

    api_version = API_VERSION

    def probe(self):
        return DeviceFacts("toy", {"processor": "wood"}, machine="toy")

    def load(self, model, example):
        return model

    def run(self, handles, schedule):
        return [0.001 for _ in schedule]

    def close(self):
        pass
'''

USE = """
import json
from torch import nn
from gpsearch.profiling import devices, find, installed, measure
from gpsearch.progress import devices_text

reading = measure(find("toy"), nn.Identity(), ())
print(json.dumps({
    "installed": installed(),
    "latency_s": reading["latency_s"].value,
    "device": reading.device,
    "torn": str(devices()["torn"]),
    "list": devices_text(),
}))
"""


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def installed(*sources: Path, into: Path) -> Path:
    """Install packages into a folder, beside those of this environment."""
    pytest.importorskip("pip")
    quiet = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir")
    run("-m", "pip", "install", *quiet, "--target", str(into), *map(str, sources))
    return into


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages that holds gpsearch-toy."""
    source = tmp_path_factory.mktemp("source")
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "gpsearch_toy.py").write_text(MODULE)
    return installed(source, into=tmp_path_factory.mktemp("site"))


def test_a_profiler_installed_by_pip_is_listed_and_used(site: Path, tmp_path: Path) -> None:
    used = json.loads(run("-c", USE, PYTHONPATH=str(site), TMPDIR=str(tmp_path)))
    assert used["installed"]["toy"] == "gpsearch-toy 1.2"
    assert used["installed"].keys() >= {"cpu", "gpu"}
    assert used["device"] == "toy"
    assert used["latency_s"] == 0.001
    assert "toy  (gpsearch-toy 1.2)" in used["list"]
    # Its broken sibling troubles only those who ask for it, and names its package.
    assert used["torn"].startswith("device 'torn' of package gpsearch-toy 1.2 cannot be imported")


BROKEN = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "gpsearch-broken"
version = "0.1"

[project.entry-points."gpsearch.profilers"]
needy = "broken_needy:Absent"
garbled = "broken_garbled:Absent"
leaving = "broken_leaving:Absent"
unmade = "broken:Unmade"
silent = "broken:Silent"
hanging = "broken:Hanging"
vague = "broken:Vague"
newer = "broken:Newer"

[project.entry-points."gpsearch.tasks"]
leaving = "broken_leaving:Absent"

[tool.setuptools]
py-modules = ["broken", "broken_needy", "broken_garbled", "broken_leaving"]
"""

BROKEN_MODULES = {
    "broken_needy": "import a_module_that_nobody_has",
    "broken_garbled": "def torn(:",
    "broken_leaving": "import sys; sys.exit('this package wants Windows')",
    "broken": """
import time

class Unmade:
    api_version = "1"
    def probe(self): pass
    def load(self, model, example): pass
    def run(self, handles, schedule): pass
    def close(self): pass
    def __init__(self): raise OSError("no such bus")

class Silent(Unmade):
    def __init__(self): pass
    def probe(self): raise KeyError("serial number")

class Hanging(Silent):
    def probe(self): time.sleep(3600)

class Vague(Silent):
    def probe(self): return {"name": "vague"}

class Newer(Silent):
    api_version = "2"
""",
}

USE_BESIDE_BROKEN = """
import json
from torch import nn
from gpsearch import tasks
from gpsearch.profiling import devices, find, measure

said = {name: str(facts) for name, facts in devices(patience_s=1.0).items()}
reading = measure(find("toy"), nn.Identity(), ())
print(json.dumps({**said, "latency_s": reading["latency_s"].value, "tasks": tasks.installed()}))
"""

SAID = {
    "needy": "cannot be imported: ModuleNotFoundError: No module named 'a_module_that_nobody_has'",
    "garbled": "cannot be imported: SyntaxError",
    "leaving": "cannot be imported: SystemExit: this package wants Windows",
    "unmade": "does not start: OSError: no such bus",
    "silent": "does not say what it is: KeyError: 'serial number'",
    "hanging": "does not say what it is: TimeoutError: no answer within 1 s",
    "vague": "does not say what it is: its probe() returned dict, not DeviceFacts",
    "newer": "speaks API version '2', this gpsearch '1'; update or reinstall that package",
}


def test_broken_packages_are_named_and_break_nothing_else(site: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "pyproject.toml").write_text(BROKEN)
    for name, text in BROKEN_MODULES.items():
        (tmp_path / "source" / f"{name}.py").write_text(text)
    broken = installed(tmp_path / "source", into=tmp_path / "broken")
    there = {"PYTHONPATH": f"{site}{os.pathsep}{broken}", "TMPDIR": str(tmp_path)}
    said = json.loads(run("-c", USE_BESIDE_BROKEN, **there))
    for name, line in SAID.items():
        assert line in said[name]
        assert "\n" not in said[name]
    assert said["latency_s"] == 0.001
    assert said["cpu"].startswith("DeviceFacts(name='cpu'")
    assert "this package wants Windows" in said["tasks"]["leaving"]


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages with what `gpsearch plugin new` writes, and their tests."""
    folder = tmp_path_factory.mktemp("new")
    for kind, name in (("profiler", "demo"), ("task", "adding")):
        template.write(kind, name, folder / name)
    return installed(folder / "demo", folder / "adding", into=folder / "site").parent


def test_a_new_package_passes_the_kit_as_it_is_and_not_when_it_is_spoilt(
    new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"PYTHONPATH": str(new / "site"), "TMPDIR": str(tmp_path)}
    report = json.loads(run("-m", "gpsearch", "plugin", "check", "demo", "--json", **there))
    assert report["passed"]
    assert report["ran"] == report["demanded"] == 20

    spoilt = tmp_path / "gpsearch_demo.py"
    sound = (new / "site" / "gpsearch_demo.py").read_text()
    spoilt.write_text(sound.replace('api_version = "1"', 'api_version = "2"'))
    monkeypatch.syspath_prepend(new / "site")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = call("plugin", "check", "demo")
    monkeypatch.delitem(sys.modules, "gpsearch_demo")
    assert code == 1
    assert "FAIL  can_be_made: device 'demo' of package gpsearch-demo 0.1.0" in out
    assert "speaks API version '2'" in out


def test_a_new_package_passes_its_own_tests(new: Path, tmp_path: Path) -> None:
    there = {"PYTHONPATH": str(new / "site"), "TMPDIR": str(tmp_path)}
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(new / "adding"), **there)
    assert re.search(r"^[1-9]\d* passed", out, re.MULTILINE)


def test_a_search_runs_on_an_installed_task_and_an_installed_profiler(
    site: Path, new: Path, tmp_path: Path
) -> None:
    there = {"PYTHONPATH": f"{site}{os.pathsep}{new / 'site'}", "TMPDIR": str(tmp_path)}
    run("-m", "gpsearch", "run", "--task", "adding", "--device", "toy",
        "--space", str(ROOT / "tests" / "toy.toml"), "--budget", "1", "--epochs", "1",
        "--out", str(tmp_path / "r"), **there)  # fmt: skip
    assert json.loads((tmp_path / "r" / "device.json").read_text())["name"] == "toy"
    trials = (tmp_path / "r" / "trials.csv").read_text()
    assert "missed" in trials
    assert "0.001" in trials
