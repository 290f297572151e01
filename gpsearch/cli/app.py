"""The program that commands are added to, and what several of them share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Search H-LSTM architectures and grow-and-prune schedules for a device.",
)

RESULTS = Path("results")
Folder = Annotated[Path, typer.Argument(help="A results folder.")]
Device = Annotated[str, typer.Option(help="A device's name, ssh:HOST, or module:Class.")]
Data = Annotated[Path | None, typer.Option(help="The task's data, if not the package's.")]


def _say_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"gpsearch {metadata.version('gpsearch')}")
        raise typer.Exit
    return wanted


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    """Take what stands before a command."""


@contextmanager
def resumable(how: str) -> Iterator[None]:
    """Let Ctrl-C end in one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; go on with: {how}", err=True)
        raise typer.Exit(130) from None
