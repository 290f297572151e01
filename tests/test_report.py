from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gpsearch import report
from gpsearch.candidate import Architecture, Candidate
from gpsearch.errors import UserError
from gpsearch.objectives import OBJECTIVES, constraint, estimated, objectives
from gpsearch.report import Results
from gpsearch.report.picture import (
    Point,
    _has_room_above,
    ceiling,
    html_figure,
    is_wide,
    plain_log,
    png_figure,
    points,
    staircase,
)
from gpsearch.report.tables import cost_text
from gpsearch.schedule import GMP, GP
from gpsearch.study import Row

LSTM = Architecture(hidden_size=64, gate_depth=0)
HLSTM = Architecture(hidden_size=48, gate_depth=1, gate_width=32, gate_direct=True)

#  trial    error   latency    MFLOP   weights
#    0       20 %    2.0 ms     40      400 000   dense_lstm, the reference
#    1       30 %    1.5 ms      5       40 000   pruned_lstm
#    2       25 %    1.0 ms      2       20 000   gp: better than trial 1 in everything
#    3       40 %    0.5 ms      1       10 000
#    4       failed
CANDIDATES = {
    0: Candidate(LSTM),
    1: Candidate(LSTM, GMP(final_density=0.1)),
    2: Candidate(HLSTM, GP(final_density=0.1)),
    3: Candidate(HLSTM, GP(final_density=0.05, structure="row_column")),
    4: Candidate(HLSTM),
}


def complete(trial: int, error: float, ms: float, mflop: float, weights: int) -> Row:
    return {
        "trial": trial,
        "baseline": {0: "dense_lstm", 1: "pruned_lstm"}.get(trial, ""),
        "p:hidden_size": 64 if trial < 2 else 48,
        **({"p:gate_width": 32} if trial >= 2 else {}),
        "state": "complete",
        "metric": "wer",
        "error": error,
        "wer": error,
        "cer": error / 2,
        "latency_s": ms / 1e3,
        "latency_lo_s": ms * 0.96e-3,
        "latency_hi_s": ms * 1.04e-3,
        "latency_ratio": ms / 2,
        "latency_p90_s": ms * 1.2e-3,
        "energy_j": None,
        "flops_dense": 40_000_000,
        "flops_effective": int(mflop * 1e6),
        "params": 400_000,
        "params_nonzero": weights,
        "weight_bytes": weights * 6,
        "flags": "",
        "train_s": 61.5,
    }


ROWS: list[Row] = [
    complete(0, 0.20, 2.0, 40, 400_000),
    complete(1, 0.30, 1.5, 5, 40_000),
    complete(2, 0.25, 1.0, 2, 20_000),
    complete(3, 0.40, 0.5, 1, 10_000),
    {"trial": 4, "baseline": "", "state": "failed", "reason": "loss is NaN", "train_s": 3.5},
]
FINALS: dict[int, Row] = {
    2: {
        "latency_s": 1.1e-3,
        "latency_lo_s": 1.05e-3,
        "latency_hi_s": 1.15e-3,
        "latency_ratio": 0.5,
        "test_error": 0.22,
        "flags": "a processor was throttled",
        "flops_dense": 7,
    }
}


def results(
    folder: Path,
    goals: str = "error,latency,flops",
    limits: tuple[str, ...] = (),
    finals: dict[int, Row] | None = None,
) -> Results:
    parsed = tuple(constraint(text) for text in limits)
    return Results(folder, ROWS, CANDIDATES, objectives(goals), parsed, "cpu", finals or {})


# What is on the front


def test_the_front_is_complete_feasible_and_not_dominated(tmp_path: Path) -> None:
    assert results(tmp_path).front == [0, 2, 3]
    assert results(tmp_path, limits=("latency_ms<=1.2",)).front == [2, 3]
    assert results(tmp_path, limits=("latency_ms<=0.1",)).front == []


def test_costs_are_compared_with_the_first_baseline(tmp_path: Path) -> None:
    found = results(tmp_path, "error,latency,energy,flops,params,memory")
    latency, energy, flops, params, memory = found.costs
    assert found.fewer(2, flops) == 20
    assert found.fewer(2, params) == found.fewer(2, memory) == 20
    # The paired ratio, not the ratio of two latencies measured at different times.
    assert found.fewer(2, latency) == 2
    assert found.fewer(2, energy) is None


def test_latencies_measured_again_replace_the_first_ones_of_the_front(tmp_path: Path) -> None:
    found = results(tmp_path, finals=FINALS)
    assert found.row(2)["latency_s"] == 1.1e-3
    assert found.row(2)["test_error"] == 0.22
    assert found.row(2)["flags"] == "a processor was throttled"
    # Counts are exact, and the search's own record stays.
    assert found.row(2)["flops_dense"] == 40_000_000
    assert found.rows[2]["latency_s"] == 1e-3


def test_a_violation_is_the_largest_share_above_a_limit(tmp_path: Path) -> None:
    found = results(tmp_path, limits=("latency_ms<=1.0", "flops<=4e6"))
    assert found.violation(1) == pytest.approx(0.5)
    assert found.violation(2) == 0
    assert found.violation(4) is None


def test_the_metrics_name_is_told_in_the_rows(tmp_path: Path) -> None:
    assert results(tmp_path).metric == "WER"


def rising(folder: Path) -> Results:
    """Return results of a task whose metric is better the higher it is."""
    of_bleu = {"metric": "bleu", "bleu": 0.31, "error": 0.69}
    finals = {0: {"test_bleu": 0.29, "test_error": 0.71}}
    rows = [{**ROWS[0], **of_bleu}]
    return Results(folder, rows, CANDIDATES, objectives("error,latency"), (), "cpu", finals)


def test_a_metric_that_rises_is_shown_as_users_know_it_and_its_fall_is_minimised(
    tmp_path: Path,
) -> None:
    found = rising(tmp_path)
    assert (found.metric, found.error) == ("BLEU", "1 - BLEU")
    assert found.score(found.rows[0]) == 0.31
    assert found.score(found.row(0), "test") == 0.29
    text = report.front_text(found, "table")
    assert "BLEU %" in text
    assert "31.00" in text
    assert "29.00" in text
    assert "69.00" not in text
    assert results(tmp_path).error == "WER"


def test_a_metric_that_is_no_fraction_is_told_as_it_is(tmp_path: Path) -> None:
    given: Row = {"metric": "cider_d", "metric_unit": "", "cider_d": 0.45, "error": 1 / 1.45}
    found = replace(results(tmp_path), rows=[ROWS[0] | given, *ROWS[1:]])

    assert (found.metric, found.unit) == ("CIDER_D", "")
    assert found.error == "error, which falls as CIDER_D rises,"
    assert found.score_text(found.rows[0]) == "0.450"
    assert found.score_text(found.rows[0], "test") == "-"
    assert "CIDER_D %" not in report.front_text(found, "table")
    assert " 0.450 " in report.front_text(found, "table")


# Tables


def test_trials_csv_has_the_columns_users_hold_on_to(tmp_path: Path) -> None:
    columns = list(report.trials(results(tmp_path)).columns)
    assert columns[:18] == [
        "trial", "state", "p:gate_width", "p:hidden_size", "error", "wer", "cer", "latency_s",
        "latency_lo_s", "latency_hi_s", "latency_ratio", "energy_j", "flops_dense",
        "flops_effective", "params", "params_nonzero", "weight_bytes", "on_front",
    ]  # fmt: skip
    assert columns[18:25] == [
        "candidate", "baseline", "feasible", "violation", "reason", "flags", "train_s",
    ]  # fmt: skip


def test_trials_csv_reads_back_and_an_empty_cell_is_unavailable(tmp_path: Path) -> None:
    report.write(results(tmp_path))
    text = (tmp_path / "trials.csv").read_text()
    assert text.splitlines()[1].startswith("0,complete,,64,0.2,0.2,0.1,0.002,")
    table = pd.read_csv(tmp_path / "trials.csv")
    assert table["trial"].tolist() == [0, 1, 2, 3, 4]
    assert table["on_front"].tolist() == [True, False, True, True, False]
    assert table["energy_j"].isna().all()
    assert table["params_nonzero"].tolist()[:4] == [400_000, 40_000, 20_000, 10_000]
    assert ",40000," in text, "a whole number stays whole beside a gap"
    for name in ("error", "latency_s", "flops_effective"):
        assert table[name].tolist()[:4] == [row[name] for row in ROWS[:4]]
    assert table["reason"][4] == "loss is NaN"


def test_pareto_csv_and_json_hold_the_front_with_its_ratios(tmp_path: Path) -> None:
    report.write(results(tmp_path, finals=FINALS))
    rows = json.loads((tmp_path / "pareto.json").read_text())
    assert [row["trial"] for row in rows] == [0, 2, 3]
    assert rows[1]["candidate"] == "H-LSTM 2x48, gates 1x32 direct, gp 10.0%"
    assert rows[1]["flops_effective_fewer"] == 20
    assert rows[1]["energy_j"] is None
    assert rows[1]["energy_j_fewer"] is None
    assert rows[1]["latency_s"] == 1.1e-3
    table = pd.read_csv(tmp_path / "pareto.csv")
    assert table["trial"].tolist() == [0, 2, 3]
    assert table["params_nonzero_fewer"].tolist() == [1, 20, 40]
    assert table["on_front"].all()


def test_what_the_last_reading_could_not_tell_is_the_search_s(tmp_path: Path) -> None:
    rows = [*ROWS[:2], ROWS[2] | {"energy_j": 0.02, "power_avg_w": 20.0}, *ROWS[3:]]
    last = {"latency_s": 1.1e-3, "latency_lo_s": None, "energy_j": None, "power_avg_w": None}
    found = dataclasses.replace(results(tmp_path), rows=rows, finals={2: last})
    assert {name: found.row(2)[name] for name in last} == {
        "latency_s": 1.1e-3, "latency_lo_s": None, "energy_j": 0.02, "power_avg_w": 20.0
    }, "the interval is the last reading's, which had too few calls for one"  # fmt: skip


@pytest.mark.parametrize(
    ("ms", "half_width", "text"),
    [
        (1.234, 0.02, "1.23 ±0.02"),
        (300, 12, "300 ±12"),
        (1234, 200, "1,234 ±200"),
        (999.7, None, "1,000"),
    ],
)
def test_large_costs_have_no_exponent(ms: float, half_width: float | None, text: str) -> None:
    row: Row = {"latency_s": ms / 1e3}
    if half_width:
        row |= {"latency_lo_s": (ms - half_width) / 1e3, "latency_hi_s": (ms + half_width) / 1e3}
    assert cost_text(row, OBJECTIVES["latency"]) == text


def test_the_printed_csv_and_json_are_those_of_the_files(tmp_path: Path) -> None:
    found = results(tmp_path)
    report.write(found)
    for form in ("csv", "json"):
        assert report.front_text(found, form) == (tmp_path / f"pareto.{form}").read_text()


def lines_of(found: Results) -> list[str]:
    """Return the table's lines, runs of blanks as one."""
    text = report.front_text(found, "table")
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_table_shows_front_and_baselines_with_ratios(tmp_path: Path) -> None:
    lines = lines_of(results(tmp_path, finals=FINALS))
    assert "* 0 LSTM 2x64, dense [dense_lstm] 20.00 - 2 ±0.08 1x 40 1x 400 1x" in lines
    assert (
        "* 2 H-LSTM 2x48, gates 1x32 direct, gp 10.0% 25.00 22.00 1.1 ±0.05 2x 2 20x 20 20x"
    ) in lines
    # A baseline off the front stands below it.
    assert lines.index("1 LSTM 2x64, gmp 10.0% [pruned_lstm] 30.00 - 1.5 ±0.06 1.33x 5 8x 40 10x")
    assert "* on the front; x fewer: against trial 0, dense_lstm" in lines
    (note,) = (line for line in lines if line.startswith("latencies are compared with that of its"))
    assert note.endswith("judged by the seconds measured: a member may seem dominated")
    new = dataclasses.replace(
        results(tmp_path), rows=[row | {"latency_slowdown": 1.0} for row in ROWS]
    )
    assert any(line.endswith("at which this takes what it usually took") for line in lines_of(new))
    assert "5 trials: 4 complete, 1 failed; reasons in trials.csv" in lines


def test_no_figure_is_cut_off_however_narrow_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All objectives need more than the 140 columns that a table has at least."""
    monkeypatch.setenv("COLUMNS", "80")
    small = [complete(0, 0.755, 0.0882, 0.0218, 1230), complete(1, 0.765, 0.0887, 0.00181, 223)]
    rows = [row | {"energy_j": 10 * row["latency_s"], "test_error": 0.825} for row in small]
    found = results(tmp_path, "error,latency,energy,flops,params,memory")
    goals = tuple(estimated(goal) for goal in found.goals)
    lines = lines_of(dataclasses.replace(found, rows=rows, goals=goals))
    figures = "0.0887 ±0.004 22.5x 0.887 0.994x 0.00181 12x 0.223 5.52x 1.34 5.52x"
    assert f"* 1 LSTM 2x64, gmp 10.0% 76.50 82.50 {figures}" in lines
    assert "[pruned_lstm]" in lines, "candidates wrap"


def test_the_table_says_what_is_unavailable_and_why(tmp_path: Path) -> None:
    reading = {"quantities": {"energy_j": {"value": None, "reason": "not asked for"}}}
    (tmp_path / "trials/0").mkdir(parents=True)
    (tmp_path / "trials/0/reading.json").write_text(json.dumps(reading))
    assert "energy: unavailable, not asked for" in lines_of(results(tmp_path))
    # What the device says goes before that.
    (tmp_path / "device.json").write_text('{"unavailable": {"energy_j": "no RAPL here"}}')
    assert "energy: unavailable, no RAPL here" in lines_of(results(tmp_path))
    (tmp_path / "trials/0/reading.json").write_text('{"quantities": []}')
    with pytest.raises(UserError, match=r"reading.json: damaged; restore it from a backup"):
        lines_of(results(tmp_path))


def test_the_table_says_whose_latency_the_ratios_are_to(tmp_path: Path) -> None:
    failed = {"trial": 0, "baseline": "dense_lstm", "state": "failed", "reason": "lost"}
    rows = [failed, {**ROWS[1], "baseline": "narrow"}, *ROWS[2:]]
    lines = lines_of(dataclasses.replace(results(tmp_path), rows=rows))
    assert "* on the front; x fewer: against trial 1, narrow" in lines
    assert any("compared with that of dense_lstm's network before" in line for line in lines)


def test_the_table_names_the_nearest_trial_if_none_is_feasible(tmp_path: Path) -> None:
    assert (
        "0 of 4 complete trials meet latency_ms<=0.4; nearest is trial 3 "
        "(H-LSTM 2x48, gates 1x32 direct, gp 5.0% units), 25% above a limit"
    ) in lines_of(results(tmp_path, limits=("latency_ms<=0.4",)))


def test_a_study_without_trials_has_tables_and_no_picture(tmp_path: Path) -> None:
    empty = Results(tmp_path, [], {}, objectives("error,flops"))
    report.write(empty)
    assert (tmp_path / "trials.csv").read_text().startswith("trial,state,error,")
    assert json.loads((tmp_path / "pareto.json").read_text()) == []
    assert "no trial is finished" in lines_of(empty)
    assert not (tmp_path / "pareto.png").exists()


# Pictures


def test_the_staircase_is_the_front_of_one_panel(tmp_path: Path) -> None:
    found = results(tmp_path)
    latency, flops = found.costs
    assert staircase(points(found, flops)) == [(1, 40), (2, 25), (40, 20)]
    assert is_wide(points(found, flops))
    assert not is_wide(points(found, latency))


def test_a_point_has_its_interval_and_its_rank(tmp_path: Path) -> None:
    found = results(tmp_path, limits=("latency_ms<=1.7",))
    reference, pruned, grown, _ = points(found, found.costs[0])
    assert (reference.rank, pruned.rank, grown.rank) == ("infeasible", "dominated", "front")
    assert (pruned.x, pruned.error, pruned.baseline) == (1.5, 30, "pruned_lstm")
    assert pruned.below == pytest.approx(0.06)
    assert (pruned.cell, grown.cell, grown.schedule) == ("LSTM", "H-LSTM", "gp")


def test_of_neighbouring_baselines_the_upper_has_its_name_above() -> None:
    def at(error: float) -> Point:
        return Point(0, 1.0, error, 0.0, 0.0, "dense", "LSTM", "front", "dense_lstm")

    upper, middle, lower = baselines = [at(0.9), at(0.3), at(0.2)]
    assert [_has_room_above(one, baselines) for one in baselines] == [True, True, False]
    assert _has_room_above(upper, [upper])
    assert not _has_room_above(lower, [middle, lower])


def test_hopeless_trials_do_not_flatten_the_picture(tmp_path: Path) -> None:
    found = results(tmp_path)
    assert ceiling(found) is None
    rows = [*ROWS[:4], complete(4, 0.99, 2.5, 50, 500_000)]
    bad = Results(tmp_path, rows, CANDIDATES, found.goals)
    assert ceiling(bad) == pytest.approx(52)


PANELS: list[Any] = [  # of latency and FLOPs: where `ROWS` are, the front's steps, the limit
    ([(2, 20), (1.5, 30), (1, 25), (0.5, 40)], [(0.5, 40), (1, 25)], 1.7),
    ([(40, 20), (5, 30), (2, 25), (1, 40)], [(1, 40), (2, 25)], 20),
]
LIMITS = ("latency_ms<=1.7", "mflops<=20")


def places(lines: Iterable[Any]) -> list[tuple[float, float]]:
    return [(x, y) for line in lines for x, y in line.get_xydata()]


def test_the_picture_shows_points_steps_and_limits(tmp_path: Path) -> None:
    figure: Any = png_figure(results(tmp_path, limits=LIMITS))
    for axes, (trials, steps, limit) in zip(figure.axes, PANELS, strict=True):
        marks = [line for line in axes.lines if line.get_marker() in ("o", "s")]
        assert places(marks) == [*trials, *trials[:2]], "the two baselines have rings"
        assert places(line for line in axes.lines if line.get_drawstyle() == "steps-post") == steps
        (dashed,) = (line for line in axes.lines if line.get_linestyle() == "--")
        assert list(dashed.get_xdata()) == [limit, limit]
    latency, flops = (axes.collections for axes in figure.axes)
    (ends,) = latency[0].get_segments()
    assert ends.ravel().tolist() == pytest.approx([1.92, 20, 2.08, 20])
    assert not flops, "counts have no intervals"


def test_the_page_shows_points_steps_and_limits(tmp_path: Path) -> None:
    page = html_figure(results(tmp_path, limits=LIMITS))
    for axis, (trials, steps, limit) in zip(("x", "x2"), PANELS, strict=True):
        traces = [trace for trace in page.data if trace.xaxis == axis]
        assert {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in traces} == {
            "front": steps, "dense, LSTM": trials[:1], "gmp, LSTM": trials[1:2],
            "gp, H-LSTM": trials[2:], "baseline": trials[:2],
        }  # fmt: skip
        (line,) = (shape for shape in page.layout.shapes if shape.xref == axis)
        assert (line.x0, line.x1) == (limit, limit)


@pytest.mark.parametrize(
    ("goals", "panels"),
    [("error,flops", 1), ("error,latency,flops", 2), ("error,latency,flops,params,memory", 4)],
)
def test_the_pictures_have_a_panel_a_cost(tmp_path: Path, goals: str, panels: int) -> None:
    report.write(results(tmp_path, goals, ("latency_ms<=1.7", "flops<=20e6"), FINALS))
    image = (tmp_path / "pareto.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 20_000
    page = (tmp_path / "pareto.html").read_text()
    axes = set(re.findall(r'"title":\{"text":"([^"]+ \([^"]+\))"\}', page))
    assert len(axes) == panels + 1, "every axis has its unit"
    assert "WER on the development split (%)" in axes


def test_the_page_opens_offline_and_shows_the_candidate(tmp_path: Path) -> None:
    report.write(results(tmp_path))
    page = (tmp_path / "pareto.html").read_text()
    assert re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=[\"']?(?:https?:)?//", page) == []
    figure = page[page.rindex("Plotly.newPlot") :]
    assert "H-LSTM 2x48, gates 1x32 direct, gp 10.0%" in figure
    assert "hidden_size = 48" in figure
    assert "pruned lstm" in figure


def test_latencies_are_shown_at_one_speed(tmp_path: Path) -> None:
    seconds = (4e-3, 4e-3, 8e-3, 2e-3)  # of the reference, beside each trial
    rows = [
        row | {"latency_reference_s": s, "latency_ratio": s and row["latency_s"] / s}
        for row, s in zip(ROWS, (*seconds, None), strict=True)
    ]
    found = dataclasses.replace(results(tmp_path), rows=rows)
    before = [row["latency_s"] for row in ROWS[:4]]
    assert [found.at_one_speed(trial)["latency_s"] for trial in range(4)] == [
        before[0], before[1], pytest.approx(before[2] / 2), pytest.approx(before[3] * 2),
    ]  # fmt: skip
    assert found.row(2)["latency_s"] == before[2]  # files have what was measured

    final = {2: {**FINALS[2], "latency_reference_s": 2e-3, "latency_ratio": 0.55}}
    ended = dataclasses.replace(found, finals=final)
    assert ended.at_one_speed(2)["latency_s"] == 1.1e-3
    assert ended.at_one_speed(1)["latency_hi_s"] == pytest.approx(rows[1]["latency_hi_s"] / 2)
    (shown,) = (p for p in points(ended, ended.goals[1]) if p.trial == 1)
    assert shown.x == pytest.approx(before[1] / 2 * 1e3)


def test_estimated_joules_are_shown_at_one_speed_as_the_seconds_they_come_from(
    tmp_path: Path,
) -> None:
    rows = [
        row | {"energy_j": 30 * row["latency_s"], "latency_reference_s": 2e-3} for row in ROWS[:4]
    ]
    rows[2] |= {"latency_s": 2e-3, "energy_j": 0.06, "latency_reference_s": 4e-3}  # a slow spell
    found = dataclasses.replace(results(tmp_path, "error,energy"), rows=rows)
    assert found.at_one_speed(2)["energy_j"] == 0.06  # a counter's
    energy = estimated(OBJECTIVES["energy"])
    guessed = dataclasses.replace(found, goals=(OBJECTIVES["error"], energy))
    assert guessed.at_one_speed(2)["energy_j"] == pytest.approx(0.03)
    assert guessed.fewer(2, energy) == pytest.approx(2)


@pytest.mark.parametrize("name", ["cost$^$", "a[/x]b", "[old]lstm", "key:key:"])
def test_names_are_shown_as_they_are(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name.replace("/", "|")
    folder.mkdir()
    named = dataclasses.replace(results(folder), device=name)
    report.write(named)
    assert (folder / "pareto.png").stat().st_size > 10_000
    assert any(name in line for line in lines_of(named))


def test_costs_of_many_decades_have_a_tick_a_decade() -> None:
    from matplotlib.figure import Figure

    for decades, most in ((2, 8), (6, 9)):
        axes = Figure().subplots()
        axes.plot([1, 10**decades], [0, 1])
        plain_log(axes)
        low, high = axes.get_xlim()
        assert 2 <= sum(low <= tick <= high for tick in axes.get_xticks()) <= most
