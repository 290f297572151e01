"""What the README says works: its code runs, its commands are taken, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from gpsearch import find_device, measure
from gpsearch.cli import app
from gpsearch.profiling import DeviceProfiler, Host

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def ran(code: str) -> dict[str, Any]:
    """Run a block and return its names."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


DEVICE, LAYER, LOOP, STREAM = blocks("python")
COMMANDS = [
    line.split("#")[0] for line in "".join(blocks("bash")).splitlines() if line.startswith("gps")
]


def test_the_device_of_the_readme_measures(tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text(DEVICE, encoding="utf-8")
    device = find_device(f"{tmp_path / 'half.py'}:HalfProfiler")
    assert isinstance(device, DeviceProfiler)
    host = Host(locks=tmp_path, recovery_s=0.0)
    reading = measure(
        device, torch.nn.Linear(8, 8), (torch.ones(1, 8),), max_seconds=0.5, host=host
    )
    latency_s = reading["latency_s"].value
    assert latency_s
    assert latency_s > 0


def test_the_layer_of_the_readme_is_an_lstm() -> None:
    assert ran(LAYER)["y"].shape == (50, 8, 128)


def test_the_stream_of_the_readme_flows() -> None:
    assert ran(STREAM)["h"].shape == (1, 128)


def test_the_loop_of_the_readme_learns_and_prunes(capsys: pytest.CaptureFixture[str]) -> None:
    names = ran(LOOP)
    right = names["small"](names["x"]).argmax(1) == names["y"]
    assert right.float().mean() > 0.9
    assert names["masks"].density == pytest.approx(0.1, abs=0.01)
    assert "10% of the weights" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_readme_are_taken(command: str) -> None:
    group: Any = typer.main.get_command(app)
    _, name, *arguments = shlex.split(command)
    context = group.commands[name].make_context(name, arguments)
    assert context.args == []  # nothing that the command did not understand


def test_the_links_of_the_readme_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
