"""One training step of a recurrent layer, in all the ways there are to take it.

    python -m benchmarks train [--quick] [--wall] [--rounds 15]

A step is forward and backward, with the gradient of the input, in one thread. The naive loop and
our kernels have the same weights, and their outputs and gradients are compared before anything is
timed; nn.LSTM has the same input and state, and another number of FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import options
from benchmarks.interleaved import Clock, Ratio, Timings, interleave
from benchmarks.layers import NaiveHLSTM, forward_by, thinned
from benchmarks.machine import Neighbours, Product
from benchmarks.report import PALE, Column, Row, bars, head, number, ratio_text, save, table
from gpsearch.cell import HLSTM
from gpsearch.formats import one_thread
from gpsearch.kernels.compiled import compiled
from gpsearch.kernels.fused import fused
from gpsearch.kernels.memory import keep_freed_memory
from gpsearch.kernels.native import native
from gpsearch.kernels.plain import plain
from gpsearch.profiling.intervals import quantile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LSTM, NAIVE, DENSE = "nn.LSTM", "naive loop", "C"
NO_TILES, FEWER_BITS = "C, no tiles", "C, 17 bits"
"""Where the kernels multiply by tiles: what that is worth, and what torch's "high" precision is."""
ZEROS = (0.9, 0.95)
CLOSE = 1e-3
"""Largest distance of outputs and gradients, relative to their norm. Among millions of ReLUs some
stand within rounding of 0, where one way takes the slope 0 and another 1, which all earlier steps
feel: two ways in torch came out 1.6e-4 apart. The tests of the kernels hold them to 1e-5."""
CLOSE_IN_FEWER_BITS = 1e-2
"""The same where products have 17 bits, and more ReLUs stand within rounding of 0."""


class Shape(NamedTuple):
    """Sizes of one layer and its batch."""

    batch: int
    steps: int
    inputs: int
    hidden: int
    width: int
    """Hidden units of a gate."""

    def __str__(self) -> str:
        return f"B{self.batch} T{self.steps} X{self.inputs} H{self.hidden} m{self.width}"

    @property
    def flop_ratio(self) -> float:
        """FLOPs of the H-LSTM over those of the LSTM."""
        x, h = self.inputs, self.hidden
        return self.width * (x + 2 * h) / (h * (x + h))

    @property
    def lstm_flops(self) -> float:
        """FLOPs of the LSTM's step: one product forward, two backward."""
        rows = self.batch * self.steps
        return 3 * 2 * rows * 4 * self.hidden * (self.inputs + self.hidden)


SHAPES = (
    Shape(8, 75, 256, 128, 32),  # speech: the second half of what is timed in a trial
    Shape(16, 50, 256, 256, 128),
    Shape(32, 100, 256, 256, 256),
    Shape(32, 100, 512, 512, 128),
    Shape(32, 100, 512, 512, 256),
    Shape(32, 100, 512, 512, 512),
    Shape(64, 100, 512, 512, 256),
    Shape(16, 200, 512, 512, 256),
)
QUICK = (SHAPES[0], SHAPES[1], Shape(32, 20, 512, 512, 256))


class Step:
    """A training step of one layer: call it, and look at what it has left.

    Args:
        module: The layer, whose gradients are cleared before.
        x: The input, [T, B, X].
        forward: Returns the output, [T, B, H]; by default the module's own.
    """

    def __init__(
        self, module: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.module, self.x = module, x.clone().requires_grad_()
        self.forward = forward or (lambda x: module(x)[0])
        self.output = self.forward(self.x)
        random = torch.Generator().manual_seed(2)
        self.slope = torch.randn(self.output.shape, generator=random)

    def __call__(self) -> None:
        """Go forward and backward once."""
        self.x.grad = None
        self.module.zero_grad()
        self.output = self.forward(self.x)
        self.output.backward(self.slope)

    def results(self) -> dict[str, Tensor]:
        """Return the output, the input's gradient, and those of the weights that are awake."""
        assert self.x.grad is not None
        grads = {
            name: p.grad * (p.detach() != 0)
            for name, p in self.module.named_parameters()
            if p.grad is not None
        }
        return {"output": self.output.detach(), "input": self.x.grad} | grads


class StepInFewerBits(Step):
    """A training step with products of what torch calls "high" precision."""

    def __call__(self) -> None:
        """Go forward and backward once."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            super().__call__()
        finally:
            torch.set_float32_matmul_precision(before)


def steps_of(shape: Shape) -> dict[str, Step]:
    """Return one step for each way, by name; those in C only where there are kernels."""
    torch.manual_seed(0)
    x = torch.randn(shape.steps, shape.batch, shape.inputs)
    layer = HLSTM(shape.inputs, shape.hidden, gate_hidden=(shape.width,))
    naive = NaiveHLSTM(layer)
    steps = {
        LSTM: Step(nn.LSTM(shape.inputs, shape.hidden), x),
        NAIVE: Step(naive, x, naive),
        "plain torch": Step(layer, x, forward_by(plain, layer)),
        "fused torch": Step(layer, x, forward_by(fused, layer)),
    }
    if kernels := native():
        steps[DENSE] = Step(layer, x)
        if kernels.tiles and (tileless := native("avx512")):
            steps[NO_TILES] = Step(layer, x, forward_by(partial(compiled, tileless), layer))
            steps[FEWER_BITS] = StepInFewerBits(layer, x)
        for zeros in ZEROS:
            steps[_sparse_name(zeros)] = Step(_sparse(layer, zeros), x)
    return steps


def _sparse_name(zeros: float) -> str:
    return f"C, {zeros:.0%} zeros"


def _sparse(layer: HLSTM, zeros: float) -> HLSTM:
    """Return a copy of the layer with few weights awake, which computes with these only."""
    copy = HLSTM(layer.input_size, layer.hidden_size, gate_hidden=layer.gate_hidden)
    copy.load_state_dict(layer.state_dict())
    copy.use_masks(thinned(copy, zeros))
    return copy


def differences(shape: Shape, steps: dict[str, Step]) -> dict[str, float]:
    """Return, for each way, its largest relative distance from the one it should equal.

    That is the naive loop for dense ways, and the written-out loop with the same zeros for sparse
    ones. Gradients of weights are compared where the parameters have the same names.
    """
    found = {}
    for name, step in steps.items():
        if name in (LSTM, NAIVE):
            continue
        truth = steps[NAIVE]
        if isinstance(step.module, HLSTM) and step.module is not steps["plain torch"].module:
            truth = Step(step.module, step.x.detach(), forward_by(plain, step.module))
        truth()
        expected = truth.results()
        step()
        found[name] = max(
            _difference(value, expected[key])
            for key, value in step.results().items()
            if key in expected
        )
    return found


def _difference(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def rows_of(shape: Shape, timings: Timings) -> list[Row]:
    """Return the table's rows for one shape."""
    return [_row(shape, name, timings) for name in timings.seconds if name != "product"]


def _row(shape: Shape, name: str, timings: Timings) -> Row:
    sparse = "zeros" in name
    flops = shape.lstm_flops * (1 if name == LSTM else shape.flop_ratio)
    to_lstm = timings.ratio(name, LSTM)
    peak = timings.ratio("product", name).value * flops / Product.FLOPS
    return {
        "shape": str(shape),
        "way": name,
        "ms": timings.median_s(name) * 1e3,
        "to_lstm": to_lstm,
        "per_flop": None if sparse else _scaled(to_lstm, flops / shape.lstm_flops),
        "naive_over_it": timings.ratio(NAIVE, name),
        "dense_c_over_it": timings.ratio(DENSE, name) if sparse else None,
        "gflop_s": None if sparse else flops / timings.median_s(name) / 1e9,
        "share_of_peak": None if sparse else peak,
    }


def _scaled(ratio: Ratio, by: float) -> Ratio:
    return Ratio(*(None if one is None else one / by for one in ratio))  # type: ignore[arg-type]


COLUMNS = (
    Column("way", "way"),
    Column("ms", "ms", number(1)),
    Column("to_lstm", "time / nn.LSTM", ratio_text),
    Column("per_flop", "per FLOP", ratio_text),
    Column("naive_over_it", "naive / it", ratio_text),
    Column("dense_c_over_it", "dense C / it", ratio_text),
    Column("gflop_s", "GFLOP/s", number(0)),
    Column("share_of_peak", "of peak", number(0, 100, " %")),
)


def draw(rows: list[Row], figure: Figure) -> None:
    """Draw a panel for each shape: the time of every way, nn.LSTM's being 1."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    across = min(4, len(shapes))
    down = -(-len(shapes) // across)
    figure.set_size_inches(3.4 * across, 2.6 * down)
    panels = figure.subplots(down, across, squeeze=False).flat
    for axes, shape in zip(panels, shapes, strict=False):
        own = [row for row in rows if row["shape"] == shape]
        bars(axes, [row["way"] for row in own], [row["to_lstm"] for row in own])
        axes.axvline(1, color=PALE, linewidth=0.8)
        axes.set_title(shape, fontsize=9)
    for axes in list(panels):
        axes.set_axis_off()
    figure.suptitle("Time of one training step, nn.LSTM = 1", fontsize=10)


def measure(shapes: tuple[Shape, ...], rounds: int, clock: Clock) -> tuple[list[Row], list[float]]:
    """Check and time all shapes; return the rows and the largest differences found.

    The second difference is that in fewer bits.

    Raises:
        ValueError: A way's outputs or gradients are not those they should be.
    """
    rows, worst = list[Row](), [0.0, 0.0]
    for shape in shapes:
        steps = steps_of(shape)
        for name, difference in differences(shape, steps).items():
            if not difference <= (CLOSE_IN_FEWER_BITS if name == FEWER_BITS else CLOSE):
                raise ValueError(f"{shape}, {name}: differs by {difference:.1e}")
            worst[name == FEWER_BITS] = max(worst[name == FEWER_BITS], difference)
        timings = interleave({**steps, "product": Product()}, rounds, clock)
        rows += rows_of(shape, timings)
        print(f"{shape}: done", flush=True)
    return rows, worst


def _peak(rows: list[Row]) -> float:
    """Return the peak in GFLOP/s, as the rows were measured against it."""
    return quantile([row["gflop_s"] / row["share_of_peak"] for row in rows if row["gflop_s"]])


def main(arguments: list[str]) -> None:
    """Measure, print, and leave table, rows and picture in a folder."""
    flags = options.parse("train", __doc__, arguments, rounds=15)
    keep_freed_memory()
    with one_thread():
        neighbours = Neighbours()
        rows, worst = measure(QUICK if flags.quick else SHAPES, flags.rounds, flags.clock)
        notes = {
            "how": f"{flags.rounds} rounds in turn, 1 thread, {flags.clock_name}; median [95 %]",
            "checked": f"outputs and gradients equal within {worst[0]:.1e} of the norm"
            + (f", in 17 bits within {worst[1]:.1e}" if worst[1] else ""),
            "product peak": f"{_peak(rows):.0f} GFLOP/s, torch.mm of {Product.SIZE} cubed",
            "others": str(neighbours),
        }
        text = head("One training step: forward, and backward with the input's gradient", notes)
    text += "\n\n" + table(rows, COLUMNS, "shape")
    save(flags.out, "train", text, rows, lambda figure: draw(rows, figure))
