"""What the benchmarks do beside timing: their ways agree, and their tables are true."""

from __future__ import annotations

import csv
import io
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import accuracy, decode, masks, others, stability, train, trial
from benchmarks.__main__ import COMMANDS, main
from benchmarks.interleaved import Ratio, Timings, interleave
from benchmarks.layers import thinned
from benchmarks.machine import Neighbours, Product, Reading, description, reader
from benchmarks.report import Column, append_row, csv_text, number, ratio_text, save, table
from gpsearch import HLSTM, UserError
from gpsearch.candidate import Candidate
from gpsearch.kernels.native import available, native

TINY = train.Shape(batch=5, steps=4, inputs=24, hidden=32, width=16)
TINY_DECODE = decode.Sizes(32, 48, 6, (0.9,), ("element", "16x1"), ((16, 16),))
needs_kernels = pytest.mark.skipif(native() is None, reason="the kernels were not built")


class Clock:
    """It is always as late as the calls so far have made it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds

        return call


# Interleaving


def test_calls_take_turns_and_each_begins_a_round():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}

    timings = interleave(calls, 3, warm_up=1)

    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == dict.fromkeys(
        "abc", 3
    )


def test_times_are_read_from_the_clock():
    clock = Clock()

    timings = interleave({"slow": clock.takes(3.0), "fast": clock.takes(1.5)}, 6, clock)

    assert timings.median_s("slow") == 3.0
    assert timings.ratio("slow", "fast") == Ratio(2.0, 2.0, 2.0)


def test_a_ratio_is_the_median_of_the_rounds_ratios_not_the_ratio_of_medians():
    timings = Timings({"a": [1, 2, 30], "b": [1, 4, 10]})

    assert timings.ratio("a", "b") == Ratio(1.0, None, None)  # three are too few for an interval


# Tables


def test_a_table_has_a_line_for_each_group_and_a_dash_for_what_is_missing():
    rows: list[dict[str, Any]] = [
        {"size": "small", "way": "C", "ms": 1.26, "ratio": Ratio(0.5, 0.4, 0.61)},
        {"size": "large", "way": "loop", "ms": None, "ratio": Ratio(2.0, None, None)},
    ]
    columns = (Column("way", "way"), Column("ms", "ms", number(1)),
               Column("ratio", "to it", ratio_text))  # fmt: skip

    assert table(rows, columns, "size").splitlines() == [
        "way    ms              to it",
        "",
        "small",
        "C     1.3  0.50 [0.40, 0.61]",
        "",
        "large",
        "loop    -               2.00",
    ]


def test_a_ratio_takes_three_columns_of_the_csv():
    text = csv_text([{"way": "C", "r": Ratio(0.5, 0.4, None), "n": None}, {"way": "D", "x": 1.5}])

    assert list(csv.DictReader(io.StringIO(text))) == [
        {"way": "C", "r": "0.5", "r_lo": "0.4", "r_hi": "", "n": "", "x": ""},
        {"way": "D", "r": "", "r_lo": "", "r_hi": "", "n": "", "x": "1.5"},
    ]


# The machine


def test_the_machine_is_described():
    facts = description()

    assert set(facts) == {"processor", "cores", "caches", "kernels in C", "torch"}
    assert all(facts.values())
    assert "load average" in str(Neighbours())


@pytest.mark.skipif(reader() is None, reason="no C compiler")
@pytest.mark.parametrize("working_set", [1000, 4096, 100_000])
def test_a_reading_covers_its_working_set(working_set):
    reading = Reading(working_set)

    assert reading.bytes % 32 == 0
    assert 0.9 * Reading.AT_ONCE < reading.bytes < 1.1 * Reading.AT_ONCE
    reading()


# Training


@needs_kernels
def test_all_ways_to_train_agree_and_have_their_rows():
    steps = train.steps_of(TINY)
    found = train.differences(TINY, steps)
    timings = Timings({name: [1.0] * 6 for name in [*steps, "product"]})

    rows = {row["way"]: row for row in train.rows_of(TINY, timings)}

    by_tiles = {train.NO_TILES, train.FEWER_BITS} if "amx" in available() else set()
    assert (
        set(found) == {"plain torch", "fused torch", "C", "C, 90% zeros", "C, 95% zeros"} | by_tiles
    )
    assert max(found.values()) <= train.CLOSE
    assert rows["C"]["per_flop"].value == pytest.approx(1 / TINY.flop_ratio)
    assert rows["C"]["share_of_peak"] == pytest.approx(
        TINY.lstm_flops * TINY.flop_ratio / Product.FLOPS
    )
    assert rows["C, 90% zeros"]["dense_c_over_it"] == Ratio(1.0, 1.0, 1.0)
    assert rows["C, 90% zeros"]["per_flop"] is None


def test_a_way_that_computes_something_else_is_caught():
    steps = train.steps_of(TINY)
    fused = steps["fused torch"]
    right = fused.forward
    fused.forward = lambda x: right(x) * 1.001

    assert train.differences(TINY, steps)["fused torch"] > train.CLOSE


@pytest.mark.parametrize("shape", [*train.SHAPES, *train.QUICK], ids=str)
def test_flops_of_both_layers_are_those_of_their_weights(shape):
    layers = (
        HLSTM(shape.inputs, shape.hidden, gate_hidden=(shape.width,), device="meta"),
        nn.LSTM(shape.inputs, shape.hidden, device="meta"),
    )

    ours, theirs = (sum(p.numel() for p in one.parameters() if p.dim() == 2) for one in layers)

    assert shape.flop_ratio == pytest.approx(ours / theirs)
    assert shape.lstm_flops == 6 * shape.batch * shape.steps * theirs


@pytest.mark.parametrize("structure", ["element", "16x1", "4x4"])
def test_weights_are_put_to_sleep_at_random_in_blocks(structure):
    layer = HLSTM(64, 64, gate_hidden=(32,))

    masks = thinned(layer, 0.75, structure)

    for name, mask in masks.items():
        assert mask.float().mean() == pytest.approx(0.25, abs=0.01)
        assert torch.equal(layer.get_parameter(name) != 0, mask)
    if structure == "16x1":
        panels = masks["weight_gate_ih_l0"].view(-1, 16, 64)
        assert torch.equal(panels.all(1), panels.any(1))


# Decoding


@pytest.mark.parametrize("mode", [decode.WHOLE, decode.STEPS])
def test_all_ways_to_decode_agree_and_have_their_rows(mode):
    torch.manual_seed(0)
    x = torch.randn(TINY_DECODE.steps, 1, TINY_DECODE.hidden)
    ways = [*decode.lstm_ways(TINY_DECODE, x, mode), *decode.hlstm_ways(TINY_DECODE, x, mode)]

    with torch.inference_mode():
        errors = [decode.error(way) for way in ways]

    timings = Timings({way.name: [1.0] * 6 for way in ways})
    rows = decode.rows_of(mode, ways, errors, timings, TINY_DECODE.steps)
    assert {decode.LSTM, decode.INT8, "H-LSTM torch"} <= {row["way"] for row in rows}
    assert rows[0]["us_per_step"] == pytest.approx(1e6 / TINY_DECODE.steps)
    assert all(row["lstm_over_it"].value == 1 for row in rows)


def test_a_way_with_other_outputs_is_caught():
    way = decode.Way("wrong", lambda: torch.ones(3, 1, 2), lambda: torch.zeros(3, 1, 2) + 0.5, 8)

    with pytest.raises(ValueError, match="wrong: its outputs differ by 1"):
        decode.error(way)


def test_the_bytes_of_a_step_leave_out_the_input_of_a_whole_sequence():
    layer = HLSTM(8, 16, gate_hidden=(4,))

    state, first, last = 4 * 4 * 16, 4 * 4 * 8, 4 * 16 * 4
    assert decode._step_bytes(layer, decode.STEPS) == 4 * (state + first + last)
    assert decode._step_bytes(layer, decode.WHOLE) == 4 * (state + last)


@pytest.mark.skipif(not others.has_onnx(), reason=others.MISSING)
def test_the_onnx_lstm_goes_on_from_its_state():
    torch.manual_seed(0)
    lstm, x = nn.LSTM(8, 12).eval(), torch.randn(5, 1, 8)
    onnx = others.OnnxLSTM(lstm)

    first, state = onnx(x[:2])
    last, _ = onnx(x[2:], state)

    with torch.no_grad():
        expected = lstm(x)[0].numpy()
    found = np.concatenate([first, last]).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, atol=1e-6)


# The trial


def one_trial(wall_s: float, **parts: float) -> trial.Trial:
    return {"wall_s": wall_s, "cpu_s": wall_s, "parts": {"wall_s": parts, "cpu_s": parts},
            "metrics": {"wer": 0.5}}  # fmt: skip


def test_parts_and_what_is_left_make_up_the_whole_trial():
    trials = {trial.OURS: [one_trial(10.0, forward=5.0, measuring=3.5, checkpoint=0.5)]}

    rows = {row["part"]: row for row in trial.rows_of(trials)}

    assert list(rows) == ["forward", "measuring", "checkpoint", "other", "whole trial"]
    assert rows["other"]["wall_s"] == pytest.approx(1.0)
    assert rows["forward"]["share"] == 0.5
    assert trial.overhead(list(rows.values()), trial.OURS) == pytest.approx(1.5 / 6.5)


def test_another_revision_is_told_only_what_is_not_at_its_default():
    chosen = trial.candidate(3)

    text = trial.shortest_toml(chosen)

    assert Candidate.from_dict(tomllib.loads(text)) == chosen
    assert "epochs = 3" in text
    assert "optimizer" not in text
    assert "deployment" not in text  # nor a table that the other may lack


def test_of_few_pairs_the_lowest_and_highest_ratio_are_told():
    trials = {"old": [one_trial(w) for w in (10, 12, 9)], trial.OURS: [one_trial(5)] * 3}

    assert trial.speed_up(trials, "old", "wall_s") == Ratio(2.0, 1.8, 2.4)


def test_a_revision_that_git_does_not_know_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="--against no-such-thing: git cannot give it out"):
        trial.install("no-such-thing", tmp_path)
    assert main(["trial", "--quick", "--against", "no-such-thing"]) == 2
    assert "no-such-thing" in capsys.readouterr().err


def test_the_parts_of_a_real_trial(tmp_path):
    quick = trial.candidate(2)
    file = tmp_path / "candidate.toml"
    file.write_text(
        Candidate.from_dict(
            quick.to_dict() | {"architecture": {"layers": 1, "hidden_size": 8, "gate_width": 4}}
        ).to_toml()
    )

    found = trial.run(file, None, (64, 0.05))

    parts = found["parts"]["wall_s"]
    assert {*trial.TRAINING, "batching", "evaluation", "checkpoint", "measuring"} <= set(parts)
    assert 0 < sum(parts.values()) <= found["wall_s"]
    assert found["metrics"]["wer"] > 0


# Stability

STABLE = [
    {"what": what, "competitors": str(count), "ratio": str(ratio), "latency_ms": "2.0"}
    for what, ratios in {"pair": (1.30, 1.34), "same": (0.99, 1.03)}.items()
    for count, ratio in enumerate(ratios)
]


def test_stability_is_told_by_its_readings():
    told = stability.table(STABLE)

    assert "pair   all         2  1.3200 (1.3000 to 1.3400)        2.14%" in told
    assert told.endswith("same: 1 of 2 within 1 +- 2%")


def test_readings_are_drawn_and_described_without_measuring(tmp_path, capsys):
    for row in STABLE:
        append_row(tmp_path / "stability.csv", row)

    main(["stability", "--table", "--out", str(tmp_path)])

    told = (tmp_path / "stability.txt").read_text()
    assert "CV of ratio" in told
    assert "processor:" not in told  # on which machine is not known
    assert (tmp_path / "stability.png").stat().st_size > 1000


def test_a_table_names_the_machine_of_its_readings_and_no_other(tmp_path, capsys):
    for row in STABLE:
        append_row(tmp_path / "stability.csv", row)
    theirs = "Stability\n\nwanted:        calm\nprocessor:     an abacus\ntorch:         0.1: old"
    (tmp_path / "stability.txt").write_text(theirs)

    main(["stability", "--table", "--out", str(tmp_path)])

    told = (tmp_path / "stability.txt").read_text()
    assert "processor:     an abacus\ntorch:         0.1: old\n\nwhat" in told
    assert "cores:" not in told


# Accuracy and masks


def test_runs_of_other_epochs_are_in_no_table(tmp_path):
    for epochs, seed, wer in ((40, 0, 0.1), (40, 1, 0.2), (10, 0, 0.9), (10, 0, 0.05)):
        append_row(
            tmp_path / "an4.csv",
            {"arm": "lstm-dense", "seed": seed, "dropout": 0.1, "epochs": epochs, "weights": 9,
             "nonzeros": 9, "cpu_minutes": 1, "dev_wer": wer, "test_wer": wer},
        )  # fmt: skip

    told = accuracy.table(tmp_path / "an4.csv", 40).splitlines()[2:]

    assert told == ["| lstm-dense | 9 | 9 | 0.1 | 2 | 1.0 (1.0-1.0) | 15.0 (10.0-20.0) "
                    "| 15.0 (10.0-20.0) |"]  # fmt: skip


def test_ratios_of_masks_are_told_with_an_interval_that_knows_their_order():
    drifting = [1 + i / 1000 for i in range(100)]
    mixed = [drifting[37 * i % 100] for i in range(100)]

    assert masks.summary(mixed) == "1.0495 [1.0390, 1.0600], middle half 1.024 to 1.075"
    assert masks.summary(drifting) == "1.0495 [1.0000, 1.0990], middle half 1.024 to 1.075"
    assert "too few for an interval" in masks.summary([1.0, 1.1])


# The door


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["no-such"], 2), ([], 2)])
def test_the_door_lists_its_benchmarks(arguments, code, capsys):
    assert main(arguments) == code
    listed = capsys.readouterr().out
    assert all(name in listed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_says_how_to_run_it(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert "usage: python -m benchmarks" in capsys.readouterr().out


def test_table_rows_and_picture_are_left_in_the_folder(tmp_path: Path, capsys):
    steps = train.steps_of(TINY)
    timings = Timings({name: [1.0, 1.5, 2.0] for name in [*steps, "product"]})
    rows = train.rows_of(TINY, timings)

    save(tmp_path, "train", "the table", rows, lambda figure: train.draw(rows, figure))

    assert (tmp_path / "train.txt").read_text() == "the table\n"
    assert len((tmp_path / "train.csv").read_text().splitlines()) == 1 + len(rows)
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")
    assert "the table" in capsys.readouterr().out
