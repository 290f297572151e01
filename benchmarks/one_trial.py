"""One whole speech trial, with the time of each of its parts; `benchmarks.trial` runs it.

    python benchmarks/one_trial.py CANDIDATE.toml EVERY SECONDS      # prints one line of JSON

EVERY takes one utterance of so many, SECONDS limit the latency's measurement. It tells the story of
`gpsearch.search.Search.try_candidate`, outside a study. It imports nothing of its own folder, so
that it can run on another revision of gpsearch; what that one lacks is counted as "other".
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gpsearch import compact, deploy, profiling, train
from gpsearch.candidate import Candidate
from gpsearch.growprune import GrowPrune
from gpsearch.kernels.memory import keep_freed_memory
from gpsearch.space import Space
from gpsearch.tasks.speech import SpeechTask
from gpsearch.train import grow_and_prune

WATCHED = (
    (GrowPrune, "update", "growing and pruning"),
    (SpeechTask, "_batch", "batching"),
    (SpeechTask, "loss", "forward"),
    (torch.Tensor, "backward", "backward"),
    (nn.utils, "clip_grad_norm_", "clipping"),
    (SpeechTask, "evaluate", "evaluation"),
    (train._Run, "_remember_best", "keeping the best"),
    (train._Run, "save", "checkpoint"),
)
OPTIMIZER = "optimizer and masks"
ONCE = "once a study"
"""Loading the data, and what the first trial imports."""


class Parts:
    """Stop-watches, one a part; what happens inside a part belongs to it alone."""

    def __init__(self) -> None:
        self.wall_s: dict[str, float] = defaultdict(float)
        self.cpu_s: dict[str, float] = defaultdict(float)
        self._running: tuple[str, float, float] | None = None

    def begin(self, part: str) -> bool:
        """Start a part, unless another one runs; say which it was."""
        if self._running is not None:
            return False
        self._running = part, time.perf_counter(), time.process_time()
        return True

    def end(self) -> None:
        """Stop the part that runs."""
        assert self._running is not None
        part, wall, cpu = self._running
        self.wall_s[part] += time.perf_counter() - wall
        self.cpu_s[part] += time.process_time() - cpu
        self._running = None

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Time what stands in the block."""
        ours = self.begin(part)
        try:
            yield
        finally:
            if ours:
                self.end()

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Time every call of a function from now on."""
        function = getattr(owner, name, None)
        if function is None:
            return

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.during(part):
                return function(*args, **kwargs)

        setattr(owner, name, timed)

    def watch_optimizers(self) -> None:
        """Time every optimizer's step, with what hangs on it: the masks."""
        mine: list[bool] = []
        register_optimizer_step_pre_hook(lambda *_: mine.append(self.begin(OPTIMIZER)))
        register_optimizer_step_post_hook(lambda *_: self.end() if mine.pop() else None)


def run(candidate: Candidate, every: int, seconds: float, folder: Path, parts: Parts) -> Any:
    """Train, compact and measure one candidate, as a search does; return its dev metrics."""
    with parts.during(ONCE):
        import_module("torch._dynamo")  # as the first optimizer of a process does
        task, space, device = _task(every), Space.read("hlstm"), profiling.find("cpu")
        reference = deploy.reference_model(space, task)
    torch.manual_seed(0)
    model = task.build(candidate.architecture)
    trained = grow_and_prune(model, task, candidate.schedule, candidate.training, folder=folder)
    with parts.during("compacting"):
        deployed = compact(trained)
        deploy.save_model(deployed, folder / "model.pt")
    with parts.during("measuring"):
        deploy.read_costs(device, deployed, task, reference=reference, max_seconds=seconds)
    return task.evaluate(deployed)


def _task(every: int) -> SpeechTask:
    task = SpeechTask()
    task.corpus = replace(task.corpus, utterances=task.corpus.utterances[::every])
    return task


def main(path: Path, every: int = 1, seconds: float = 20.0) -> dict[str, Any]:
    """Run the trial of a candidate's file; return its times and its dev metrics."""
    torch.set_num_threads(1)
    keep_freed_memory()
    parts = Parts()
    for owner, name, part in WATCHED:
        parts.watch(owner, name, part)
    parts.watch_optimizers()
    started, began = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        metrics = run(Candidate.read(path), every, seconds, Path(folder), parts)
    total = {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - began}
    return {**total, "parts": {"wall_s": parts.wall_s, "cpu_s": parts.cpu_s}, "metrics": metrics}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))))
