"""The commands ``gpsearch plugin``: a new package, and whether one keeps the contract."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Devices and tasks of your own: a package to begin with, and its checks.",
)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="What the device or the task is called.")],
    task: Annotated[bool, typer.Option("--task", help="A task; a device if not given.")] = False,
    out: Annotated[Path | None, typer.Option(help="Its folder; ./NAME if not given.")] = None,
) -> None:
    """Write a package with a working device (or task) to change."""
    from gpsearch.testing import template

    folder = out or Path(name)
    for path in template.write("task" if task else "profiler", name, folder):
        typer.echo(path)
    use = f"gpsearch run --task {name}" if task else f"gpsearch plugin check {name}"
    typer.echo(f"next: pip install {shlex.quote(str(folder.resolve()))} && {use}")


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A device's name, or module:Class.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Hold a device's profiler to its contract; exit 1 where it breaks it."""
    from gpsearch.testing.report import examine_named

    report = examine_named(name)
    text = json.dumps(report.to_dict(), indent=2) + "\n" if as_json else report.text()
    typer.echo(text, nl=False)
    if not report.passed:
        raise typer.Exit(1)
