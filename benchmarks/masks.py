"""What the masks cost: a training step with and without, in turn, on the default speech model.

    python -m benchmarks masks [--pairs 200] [--threads 1]

Prints the median of the pairs' ratios of processor time, its 95 % interval, and the middle half of
the ratios; first for two models without masks, to show the noise. Half of the weights are awake:
with fewer, layers compute with these only, and masks save time. The batch is made up, in the shape
of eight utterances of AN4: the time does not look at it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from gpsearch.candidate import Architecture
from gpsearch.growprune import GrowPrune
from gpsearch.kernels.memory import keep_freed_memory
from gpsearch.profiling.intervals import quantile, quantile_interval
from gpsearch.schedule import SET
from gpsearch.tasks.speech import SpeechModel

SHAPE = Architecture(layers=2, hidden_size=128, gate_width=32, gate_direct=True)
FRAMES, BATCH_SIZE = 300, 8  # 3 s of speech, the mean of AN4


def stepper(masked: bool) -> Callable[[], float]:
    """Return a function that takes one training step and returns its seconds."""
    torch.manual_seed(0)
    model = SpeechModel(SHAPE, characters=29)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    if masked:
        GrowPrune(
            model,
            optimizer,
            SET(final_density=0.5),
            10,
            prunable=lambda name: name.startswith("layers"),
        )
    features = torch.randn(BATCH_SIZE, FRAMES, 64)
    lengths = torch.full((BATCH_SIZE,), FRAMES)

    def step() -> float:
        started = time.process_time()
        optimizer.zero_grad()
        model(features, lengths)[0].square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        return time.process_time() - started

    return step


def ratios(first: Callable[[], float], second: Callable[[], float], pairs: int) -> list[float]:
    """Return the second's seconds over the first's, of pairs that take turns at beginning."""
    for warm_up in (first, second) * 3:
        warm_up()
    found = []
    for pair in range(pairs):
        if pair % 2:
            with_masks, without = second(), first()
        else:
            without, with_masks = first(), second()
        found.append(with_masks / without)
    return found


def summary(found: list[float]) -> str:
    """Return what ratios come to, which are given in the order of time."""
    interval = quantile_interval(found)
    bounds = f"[{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "(too few for an interval)"
    quarters = [quantile(found, q) for q in (0.25, 0.75)]
    middle_half = f"middle half {quarters[0]:.3f} to {quarters[1]:.3f}"
    return f"{quantile(found):.4f} {bounds}, {middle_half}"


def main(arguments: list[str]) -> None:
    """Measure and print: two models without masks, then one with and one without."""
    parser = argparse.ArgumentParser("python -m benchmarks masks", description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    flags = parser.parse_args(arguments)
    torch.set_num_threads(flags.threads)
    keep_freed_memory()
    plain = stepper(masked=False)
    for masked in (False, True):
        found = ratios(plain, stepper(masked), flags.pairs)
        print(f"{'masks' if masked else 'no masks'}: {summary(found)}")
