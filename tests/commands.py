"""The command line within this process, for tests that need no process of its own."""

from __future__ import annotations

import contextlib
import io
from functools import partial

import pytest

from gpsearch.cli import app, main


def call(*words: object) -> tuple[int, str, str]:
    """Run a command as the shell would: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main(partial(app, [str(word) for word in words]))
    assert isinstance(end.value.code, int)
    return end.value.code, out.getvalue(), err.getvalue()
