"""One thread for every test process: many tiny products only wait for one another in more.

And locks of its own, so that it waits for no study at work on this machine.
"""

import atexit
import os
import shutil
import tempfile

# For the processes that tests start, too.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GPSEARCH_LOCKS"] = tempfile.mkdtemp(prefix="gpsearch-locks-")

import jaxtyping
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("any machine", deadline=None)  # a busy one takes its time
settings.load_profile("any machine")
atexit.register(shutil.rmtree, os.environ["GPSEARCH_LOCKS"], ignore_errors=True)

LONGEST = (
    "search", "cli", "plugin_install", "remeasured", "packaging", "profilers_cpu", "train",
    "decode", "translation", "cell", "reproduce", "benchmarks", "compact", "kernels", "testing",
)  # fmt: skip
"""The test files that take longest, from the longest on."""


@pytest.fixture
def untyped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test give what the annotations forbid, as a user may: nothing checks them there."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, so that all processes end together."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))
