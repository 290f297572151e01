"""Speech networks as they are deployed: word errors and latency, 8-bit LSTMs among them.

    python -m benchmarks deployed results/reproduce-speech-small

The networks are those that `gpsearch reproduce speech` left: every row and seed, made compact once
more for this processor, as it is and with weights of 8 bits. The dense LSTM stands there as torch
runs it, too (the reference of all ratios), and with torch's own 8 bits. Latency is that of one
development utterance, measured by `gpsearch.measure`; errors are those of the development split,
utterance by utterance as a user has them.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks import others
from benchmarks.interleaved import Ratio
from benchmarks.report import BAR, Column, Row, head, number, save, table
from gpsearch import compact, find_device, measure, tasks
from gpsearch.cell import HLSTM
from gpsearch.deploy import load_model
from gpsearch.report.picture import plain_log
from gpsearch.reproduce import Reproduction
from gpsearch.tasks.speech import SpeechTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE = "dense_lstm"
IN_TORCH, IN_8_BITS = "dense_lstm, torch", "dense_lstm, torch int8"


class Lengthless(nn.Module):
    """A `torch.nn.LSTM` in the place of an `HLSTM`, for one sequence at a time."""

    def __init__(self, lstm: nn.Module) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor, *, lengths: Tensor | None = None) -> Any:
        """Run the LSTM; ``lengths`` would be those of the whole sequences."""
        return self.lstm(x)


def in_torch(model: nn.Module) -> nn.Module:
    """Return a copy whose recurrent layers are torch's to run."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, HLSTM):
            module.formats = {}
    return plain


def in_8_bits(model: nn.Module) -> nn.Module:
    """Return a copy whose LSTMs have weights of 8 bits."""
    plain = in_torch(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, HLSTM):
            plain.set_submodule(name, Lengthless(others.int8(_as_lstm(module))))
    return plain


def _as_lstm(layer: HLSTM) -> nn.LSTM:
    options = {"batch_first": layer.batch_first, "bidirectional": layer.bidirectional}
    lstm = nn.LSTM(layer.input_size, layer.hidden_size, layer.num_layers, layer.bias, **options)
    lstm.load_state_dict(layer.state_dict())
    return lstm.eval()


def variants(name: str, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the ways to deploy one row's network."""
    yield name, compact(model)
    yield f"{name}, int8", compact(model, weights="int8")
    if name == REFERENCE:
        yield IN_TORCH, in_torch(model)
        yield IN_8_BITS, in_8_bits(model)


@torch.inference_mode()
def dev_wer(task: SpeechTask, model: nn.Module) -> float:
    """Return the word error rate on the development split, one utterance at a time."""
    import jiwer

    from gpsearch.tasks.ctc import greedy

    truth, heard = [], []
    for utterance in task.corpus.split("dev"):
        scores, _ = model(utterance.features[None])
        heard += greedy(scores, torch.tensor([scores.shape[1]]), task.alphabet)
        truth.append(utterance.text)
    return float(jiwer.wer(truth, heard))


def rows(found: Reproduction, task: SpeechTask, max_seconds: float) -> list[Row]:
    """Measure every network that is there, seed by seed."""
    measured: list[Row] = []
    with closing(find_device("cpu")) as device:
        for done in found.rows():
            folder = found.folder / "rows" / done["row"] / str(done["seed"])
            reference = in_torch(load_model(_path(found, REFERENCE, done["seed"])))
            for name, model in variants(done["row"], load_model(folder / "model.pt")):
                reading = measure(
                    device, model, task.example(), reference=reference, max_seconds=max_seconds
                )
                ratio = reading["latency_ratio"]
                measured.append(
                    {
                        "way": name,
                        "seed": done["seed"],
                        "dev_wer": dev_wer(task, model),
                        "nonzeros": done["params_nonzero"],
                        "latency_ms": reading["latency_s"].number * 1e3,
                        "ratio": Ratio(ratio.number, *(ratio.ci95 or (None, None))),
                        "flags": "; ".join(reading.flags),
                    }
                )
                print(f"{name} {done['seed']}: {ratio.number:.3f}", flush=True)
    return measured


def _path(found: Reproduction, name: str, seed: int) -> Path:
    return found.folder / "rows" / name / str(seed) / "model.pt"


def summary(measured: Sequence[Row]) -> list[Row]:
    """Return a row a way: means, and the lowest and highest of the seeds."""
    found: list[Row] = []
    for way in dict.fromkeys(row["way"] for row in measured):
        own = [row for row in measured if row["way"] == way]
        ratios = [row["ratio"].value for row in own]
        errors = [100 * row["dev_wer"] for row in own]
        found.append(
            {
                "way": way,
                "seeds": len(own),
                "nonzeros": own[0]["nonzeros"],
                "dev_wer": f"{mean(errors):.1f} ({min(errors):.1f}-{max(errors):.1f})",
                "latency_ms": mean(row["latency_ms"] for row in own),
                "ratio": f"{mean(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})",
            }
        )
    return found


def _draw(figure: Figure, measured: Sequence[Row]) -> None:
    figure.set_size_inches(8.6, 4.6)
    axes = figure.add_subplot()
    networks = list(dict.fromkeys(row["way"].partition(",")[0] for row in measured))
    for way in dict.fromkeys(row["way"] for row in measured):
        own = [row for row in measured if row["way"] == way]
        xs, ys = [r["ratio"].value for r in own], [100 * r["dev_wer"] for r in own]
        network, _, variant = way.partition(", ")
        colour = f"C{networks.index(network)}"
        filled = "none" if "int8" in variant else colour
        marker = "s" if "torch" in variant else "o"
        axes.plot(xs, ys, marker, ms=7, lw=0, label=way, color=colour, markerfacecolor=filled)
    plain_log(axes)
    axes.set_xlabel("latency / dense LSTM's in torch")
    axes.set_ylabel("WER on the development split (%)")
    axes.grid(color="#e6e9ec", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=BAR, labelcolor="black")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def main(arguments: list[str]) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks deployed")
    parser.add_argument("folder", type=Path, help="what `gpsearch reproduce speech` left")
    parser.add_argument("--seconds", type=float, default=6.0, help="for one latency, at most (6)")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = Reproduction(flags.folder)
    task = tasks.find("speech", found.comparison.data_path)
    assert isinstance(task, SpeechTask)
    if not _path(found, REFERENCE, 0).exists():
        parser.error(f"{_path(found, REFERENCE, 0)} is missing; run gpsearch reproduce speech")
    measured = rows(found, task, flags.seconds)
    columns = [
        Column("way", "network"),
        Column("seeds", "seeds"),
        Column("nonzeros", "non-zeros", "{:,}".format),
        Column("dev_wer", "dev WER %"),
        Column("latency_ms", "ms", number(2)),
        Column("ratio", "latency ratio"),
    ]
    notes = {"trained by": "gpsearch reproduce speech", "latency": "one development utterance"}
    text = f"{head('Speech networks, deployed', notes)}\n\n{table(summary(measured), columns)}"
    save(flags.out, "deployed", text, measured, lambda figure: _draw(figure, measured))
