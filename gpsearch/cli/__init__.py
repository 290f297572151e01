"""The command line: every command is a few lines over the library.

app         the program, and what commands share
studies     run, resume, front, remeasure, compare
models      train, reproduce, profile, show
machine     devices, tasks, spaces, doctor
plugin      plugin new, plugin check
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from gpsearch.cli import machine, models, plugin, studies
from gpsearch.cli.app import app
from gpsearch.errors import UserError

__all__ = ["app", "machine", "main", "models", "plugin", "studies"]

app.add_typer(plugin.app, name="plugin")


def main(run_app: Callable[..., Any] = app) -> None:
    """Run the command line; exit 0 done, 1 failed, 2 bad input, 130 interrupted."""
    try:
        code = run_app(standalone_mode=False)
    except typer.TyperException as error:  # a flag or command that typer does not know
        if type(error).__name__ == "NoArgsIsHelpError":  # which typer does not give out
            typer.echo(error.format_message())
            sys.exit(2)
        _stop(2, error.format_message())
    except typer.Abort:
        sys.exit(130)
    except UserError as error:
        _stop(2, str(error))
    except (OSError, RuntimeError) as error:
        _stop(1, str(error))
    sys.exit(code if isinstance(code, int) else 0)


def _stop(code: int, message: str) -> None:
    typer.echo(f"gpsearch: {message}", err=True)
    sys.exit(code)
