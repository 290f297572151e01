"""Commands on what there is: devices, tasks, spaces, and what works on this machine."""

from __future__ import annotations

import typer

from gpsearch.cli.app import app


@app.command()
def devices() -> None:
    """List the installed devices, what each can measure, and why not."""
    from gpsearch.progress import devices_text

    typer.echo(devices_text(), nl=False)


@app.command()
def tasks() -> None:
    """List the installed tasks."""
    from gpsearch import tasks as installed

    for name, what in installed.installed().items():
        typer.echo(f"{name:12} {what}")


@app.command()
def spaces() -> None:
    """List the built-in search spaces."""
    from gpsearch.space import built_in

    for name, what in built_in().items():
        typer.echo(f"{name:12} {what}")


@app.command()
def doctor() -> None:
    """Say what works on this machine, what doesn't, and the remedy."""
    from gpsearch.progress import diagnosis

    typer.echo(diagnosis(), nl=False)
