"""Inference with one sequence: all of it in one call, and one call for every step.

    python -m benchmarks decode [--quick] [--wall] [--rounds 25]

One layer, one thread. Where an LSTM stands beside an H-LSTM, both have the same input and state.
Equal outputs are checked before anything is timed; those of 8 bits differ, by as much as the table
says. The share of the bandwidth is that of a perfect reader: the weights of one step, as they are
stored, read at the speed at which this core reads so many bytes over and over. In a whole sequence
only the weights on the state have to be read at every step; those on the input are counted where a
way reads them nevertheless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import options, others
from benchmarks.interleaved import Clock, Timings, interleave
from benchmarks.layers import NaiveHLSTM, forward_by, thinned
from benchmarks.machine import Neighbours, Reading, reader
from benchmarks.report import BAR, PALE, Column, Row, bars, head, number, ratio_text, save, table
from gpsearch.cell import HLSTM, HLSTMCell
from gpsearch.compact import compact
from gpsearch.formats import one_thread
from gpsearch.kernels.decode import Packed
from gpsearch.kernels.native import native
from gpsearch.kernels.plain import plain
from gpsearch.stream import Stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHOLE, STEPS = "whole sequence", "one call per step"
LSTM, CELL, INT8 = "nn.LSTM", "nn.LSTMCell", "torch int8 LSTM"
ONNX, ONNX8 = "ONNX Runtime LSTM", "ONNX Runtime int8 LSTM"
CLOSE = 1e-5
INT8_CLOSE = 0.1
"""Largest error of 8 bits before something else is wrong."""


class Sizes(NamedTuple):
    """What is decoded."""

    hidden: int = 512
    """Of input and state."""
    width: int = 256
    """Hidden units of a gate."""
    steps: int = 200
    zeros: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
    structures: tuple[str, ...] = ("element", "16x1", "8x1", "4x4")
    narrow: tuple[tuple[int, int], ...] = ((512, 64), (512, 32), (256, 64), (256, 32))
    """State and gate width of dense H-LSTMs with fewer weights, on the same input."""


QUICK = Sizes(steps=50, zeros=(0.9, 0.95), structures=("element", "16x1"), narrow=((512, 32),))


class Way(NamedTuple):
    """One way to run a layer."""

    name: str
    run: Callable[[], Any]
    """Returns all outputs, [T, 1, H]; on the first call already."""
    truth: Callable[[], Tensor]
    """Returns what it should."""
    step_bytes: int
    """Of the weights that it cannot but read at every step."""
    formats: str = ""
    tolerance: float = CLOSE


def lstm_ways(sizes: Sizes, x: Tensor, mode: str) -> Iterator[Way]:
    """Yield LSTMs: torch's, and where they are installed ONNX Runtime's."""
    lstm = nn.LSTM(sizes.hidden, sizes.hidden).eval()
    nbytes = lstm.get_parameter("weight_hh_l0").nbytes * (1 + (mode == STEPS))
    truth = lambda: lstm(x)[0]  # noqa: E731
    yield Way(LSTM, _calls(lstm, x, mode), truth, nbytes)
    if mode == STEPS:
        cell = nn.LSTMCell(sizes.hidden, sizes.hidden).eval()
        cell.load_state_dict(_as_cell(lstm))
        yield Way(CELL, _cell_calls(cell, x), truth, nbytes)
    own = HLSTM.from_lstm(lstm)
    yield from _deployed_ways(own, x, mode, "LSTM C")
    yield from _deployed_ways(own, x, mode, "LSTM C", "int8")
    yield Way(INT8, _calls(others.int8(lstm), x, mode), truth, nbytes // 4, "", INT8_CLOSE)
    if others.has_onnx():
        onnx, onnx8 = others.OnnxLSTM(lstm), others.OnnxLSTM(lstm, int8=True)
        yield Way(ONNX, _calls(onnx, x, mode), truth, nbytes)
        yield Way(ONNX8, _calls(onnx8, x, mode), truth, nbytes // 4, "", INT8_CLOSE)


def hlstm_ways(sizes: Sizes, x: Tensor, mode: str) -> Iterator[Way]:
    """Yield H-LSTMs: dense, with zeros, narrow; some of them with weights of 8 or 16 bits, too."""
    layer = HLSTM(sizes.hidden, sizes.hidden, gate_hidden=(sizes.width,)).eval()
    yield from _dense_ways(layer, x, mode, "H-LSTM")
    for weights in ("bfloat16", "int8"):
        yield from _deployed_ways(layer, x, mode, "H-LSTM C", weights)
    for structure in sizes.structures:
        for zeros in sizes.zeros:
            name = f"C, {zeros:.0%} zeros" + f" {structure}" * (structure != "element")
            thin = _with_zeros(layer, zeros, structure)
            yield from _deployed_ways(thin, x, mode, name)
            if mode == STEPS and structure == "element":
                yield from _stream_ways(thin, x, f"{name}, Stream")
            if structure == "element":
                yield from _deployed_ways(thin, x, mode, name, "int8")
    for hidden, width in sizes.narrow:
        narrow = HLSTM(sizes.hidden, hidden, gate_hidden=(width,)).eval()
        yield from _dense_ways(narrow, x, mode, f"narrow {hidden}/{width}")


def _dense_ways(layer: HLSTM, x: Tensor, mode: str, name: str) -> Iterator[Way]:
    written_out = forward_by(plain, layer)
    truth = lambda: written_out(x)  # noqa: E731
    if mode == WHOLE:
        naive = NaiveHLSTM(layer).eval()
        yield Way(f"{name} naive loop", lambda: naive(x), truth, _step_bytes(layer, STEPS))
        yield Way(f"{name} torch", truth, truth, _step_bytes(layer, WHOLE))
    else:
        yield Way(f"{name} torch", _cell_calls(_cell(layer), x), truth, _step_bytes(layer, STEPS))
    yield from _deployed_ways(layer, x, mode, f"{name} C")


def _deployed_ways(
    layer: HLSTM, x: Tensor, mode: str, name: str, weights: str = "float32"
) -> Iterator[Way]:
    """Yield what `compact` makes of a layer, where it chooses kernels in C."""
    small: Any = compact(layer if mode == WHOLE else _cell(layer), weights=weights)
    if small.formats:
        run = _calls if mode == WHOLE else lambda module, x, _: _cell_calls(module, x)
        formats = "/".join(dict.fromkeys(small.formats.values()))
        truth = forward_by(plain, layer) if layer.gate_hidden else lambda x: layer(x)[0]
        close = CLOSE if weights == "float32" else INT8_CLOSE
        name += f", {weights}" * (weights != "float32")
        nbytes = _step_bytes(small, mode)
        yield Way(name, run(small, x, mode), lambda: truth(x), nbytes, formats, close)


def _stream_ways(layer: HLSTM, x: Tensor, name: str) -> Iterator[Way]:
    """Yield the `gpsearch.Stream` of what `compact` makes of a layer, if that is in C."""
    small: Any = compact(_cell(layer))
    truth = forward_by(plain, layer)
    inputs = x.unbind()

    def run() -> list[Tensor]:
        stream = Stream(small)
        return [stream(step) for step in inputs]

    if small.formats:
        formats = "/".join(dict.fromkeys(small.formats.values()))
        yield Way(name, run, lambda: truth(x), _step_bytes(small, STEPS), formats)


def _with_zeros(layer: HLSTM, zeros: float, structure: str) -> HLSTM:
    copy = HLSTM(layer.input_size, layer.hidden_size, gate_hidden=layer.gate_hidden).eval()
    copy.load_state_dict(layer.state_dict())
    thinned(copy, zeros, structure)
    return copy


def _cell(layer: HLSTM) -> HLSTMCell:
    cell = HLSTMCell(layer.input_size, layer.hidden_size, gate_hidden=layer.gate_hidden).eval()
    cell.load_state_dict(_as_cell(layer))
    return cell


def _as_cell(layer: nn.Module) -> dict[str, Tensor]:
    return {name.removesuffix("_l0"): value for name, value in layer.state_dict().items()}


def _calls(module: Any, x: Tensor, mode: str) -> Callable[[], Any]:
    """Return what runs a module like `torch.nn.LSTM` over all steps, in one call or in many."""
    if mode == WHOLE:
        return lambda: module(x)[0]
    inputs = x.unsqueeze(1).unbind()

    def run() -> list[Any]:
        outputs, state = [], None
        for step in inputs:
            output, state = module(step, state)
            outputs.append(output)
        return outputs

    return run


def _cell_calls(cell: Any, x: Tensor) -> Callable[[], Any]:
    """Return what runs a module like `torch.nn.LSTMCell` over all steps."""
    inputs = x.unbind()

    def run() -> list[Tensor]:
        outputs, state = [], None
        for step in inputs:
            state = cell(step, state)
            outputs.append(state[0])
        return outputs

    return run


def _step_bytes(module: HLSTM | HLSTMCell, mode: str) -> int:
    """Return the bytes of the weights, packed as they are, that every step has to read."""
    total = 0
    for name, weight in module.named_parameters():
        if weight.dim() == 2 and (mode == STEPS or "_ih" not in name):
            total += _packed_bytes(weight, module.formats.get(name))
    return total


def _packed_bytes(weight: Tensor, format: str | None) -> int:
    kernels = native()
    if format is None or kernels is None:
        return weight.nbytes
    return sum(Packed.bytes_of(kernels, gate.detach(), format) for gate in weight.chunk(4))


def error(way: Way) -> float:
    """Return the largest difference of a way's outputs from those it should have.

    Raises:
        ValueError: It is too large.
    """
    truth = way.truth().flatten().numpy()
    found = way.run()
    outputs = found if not isinstance(found, list) else np.stack([np.asarray(o) for o in found])
    worst = float(np.abs(np.asarray(outputs).reshape(-1) - truth).max() / np.abs(truth).max())
    if not worst <= way.tolerance:
        raise ValueError(f"{way.name}: its outputs differ by {worst:.1e} of the largest")
    return worst


def rows_of(mode: str, ways: Sequence[Way], errors: Sequence[float], timings: Timings,
            steps: int) -> list[Row]:  # fmt: skip
    """Return the table's rows for one mode."""
    return [_row(mode, way, wrong, timings, steps) for way, wrong in zip(ways, errors, strict=True)]


def _row(mode: str, way: Way, wrong: float, timings: Timings, steps: int) -> Row:
    return {
        "mode": mode,
        "way": way.name,
        "formats": way.formats or None,
        "us_per_step": timings.median_s(way.name) / steps * 1e6,
        "lstm_over_it": timings.ratio(LSTM, way.name),
        "int8_over_it": timings.ratio(INT8, way.name),
        "cell_over_it": timings.ratio(CELL, way.name) if mode == STEPS else None,
        "step_kb": way.step_bytes / 1024,
        "share_of_bandwidth": _share(way, timings, steps),
        "error": wrong,
    }


def _share(way: Way, timings: Timings, steps: int) -> float | None:
    """Return how long a perfect reader takes over how long the way takes."""
    if _reading(way) not in timings.seconds:
        return None
    passes = steps * way.step_bytes / Reading(way.step_bytes).bytes
    return timings.ratio(_reading(way), way.name).value * passes


def _reading(way: Way) -> str:
    return f"reading {way.step_bytes} bytes"


COLUMNS = (
    Column("way", "way"),
    Column("us_per_step", "us/step", number(1)),
    Column("lstm_over_it", "nn.LSTM / it", ratio_text),
    Column("int8_over_it", "torch int8 / it", ratio_text),
    Column("cell_over_it", "LSTMCell / it", ratio_text),
    Column("step_kb", "KB/step", number(0)),
    Column("share_of_bandwidth", "of bandwidth", number(0, 100, " %")),
    Column("error", "error", "{:.0e}".format),
    Column("formats", "packed as"),
)


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """Draw both modes side by side: how many times faster than nn.LSTM."""
    figure.set_size_inches(12, 0.9 + 0.19 * len(rows) / 2)
    for axes, mode in zip(figure.subplots(1, 2), (WHOLE, STEPS), strict=True):
        own = [row for row in rows if row["mode"] == mode]
        colours = [BAR if " C" in f" {row['way']}" else PALE for row in own]
        bars(axes, [row["way"] for row in own], [row["lstm_over_it"] for row in own], colours)
        axes.set_xscale("log")
        axes.axvline(1, color=PALE, linewidth=0.8)
        axes.set_title(f"{mode}: times as fast as nn.LSTM, the same way", fontsize=9)


def measure(sizes: Sizes, rounds: int, clock: Clock) -> list[Row]:
    """Check and time both modes; return the rows.

    Raises:
        ValueError: A way's outputs are not those they should be.
    """
    rows: list[Row] = []
    for mode in (WHOLE, STEPS):
        torch.manual_seed(0)
        x = torch.randn(sizes.steps, 1, sizes.hidden)
        ways = [*lstm_ways(sizes, x, mode), *hlstm_ways(sizes, x, mode)]
        calls: dict[str, Callable[[], Any]] = {way.name: way.run for way in ways}
        if reader() is not None:
            calls |= {_reading(way): Reading(way.step_bytes) for way in ways}
        with torch.inference_mode():
            errors = [error(way) for way in ways]
            timings = interleave(calls, rounds, clock)
        rows += rows_of(mode, ways, errors, timings, sizes.steps)
        print(f"{mode}: done", flush=True)
    return rows


def main(arguments: list[str]) -> None:
    """Measure, print, and leave table, rows and picture in a folder."""
    flags = options.parse("decode", __doc__, arguments, rounds=25)
    sizes = QUICK if flags.quick else Sizes()
    with one_thread():
        neighbours = Neighbours()
        rows = measure(sizes, flags.rounds, flags.clock)
        notes = {
            "sizes": f"input and state {sizes.hidden}, gates {sizes.width}, {sizes.steps} steps",
            "how": f"{flags.rounds} rounds in turn, 1 thread, {flags.clock_name}; median [95 %]",
            "others": str(neighbours),
        }
        if not others.has_onnx():
            notes["left out"] = others.MISSING
        text = head("A layer at batch 1: microseconds for every step", notes)
    text += "\n\n" + table(rows, COLUMNS, "mode")
    save(flags.out, "decode", text, rows, lambda figure: draw(rows, figure))
