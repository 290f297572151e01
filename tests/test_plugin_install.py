"""A profiler in a package of its own, installed by pip, is found by its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
        return DeviceFacts("toy", {"processor": "wood"})

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

reading = measure(find("toy"), nn.Identity(), ())
print(json.dumps({
    "installed": installed(),
    "latency_s": reading["latency_s"].value,
    "device": reading.device,
    "torn": str(devices()["torn"]),
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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages that holds gpsearch-toy, beside those of this environment."""
    pytest.importorskip("pip")
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "gpsearch_toy.py").write_text(MODULE)
    quiet = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir")
    run("-m", "pip", "install", *quiet, "--target", str(site), str(source))
    return site


def test_a_profiler_installed_by_pip_is_listed_and_used(site: Path, tmp_path: Path) -> None:
    used = json.loads(run("-c", USE, PYTHONPATH=str(site), TMPDIR=str(tmp_path)))
    assert used["installed"]["toy"] == "gpsearch-toy 1.2"
    assert used["installed"].keys() >= {"cpu", "gpu"}
    assert used["device"] == "toy"
    assert used["latency_s"] == 0.001
    # Its broken sibling troubles only those who ask for it, and names its package.
    assert used["torn"].startswith("device 'torn' of package gpsearch-toy 1.2 cannot be imported")


def test_a_search_runs_on_an_installed_profiler(site: Path, tmp_path: Path) -> None:
    there = {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "TMPDIR": str(tmp_path)}
    assert "toy  (gpsearch-toy 1.2)" in run("-m", "gpsearch", "devices", **there)

    folder = tmp_path / "r"
    task, space = "tests.toy:ToyTask", str(ROOT / "tests" / "toy.toml")
    run("-m", "gpsearch", "run", "--device", "toy", "--task", task, "--space", space,
        "--budget", "1", "--out", str(folder), **there)  # fmt: skip
    assert json.loads((folder / "device.json").read_text())["name"] == "toy"
    assert "0.001" in (folder / "trials.csv").read_text()
