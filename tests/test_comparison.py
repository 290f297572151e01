from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gpsearch.candidate import Architecture, Candidate
from gpsearch.errors import UserError
from gpsearch.objectives import objectives
from gpsearch.report import Comparison, Results, comparison_text, draw_comparison
from gpsearch.report.comparison import RATIO, kendall, spearman
from gpsearch.report.paired import comparison_figure
from gpsearch.report.picture import points
from gpsearch.study import Row

#  trial   error    A: latency   B: latency
#    0      10 %       4 ms         4 ms       on both fronts
#    1      20 %       3 ms         5 ms       on A's only
#    2      30 %       2 ms         2 ms       on both
#    3      40 %       5 ms         1 ms       on B's only
ERRORS = (0.1, 0.2, 0.3, 0.4)
A, B = (4, 3, 2, 5), (4, 5, 2, 1)


def reading(kind: str = "measured", protocol: str = "aba-2", machine: str = "desk") -> str:
    """Return what a comparison asks of a reading.json."""
    latency = {"kind": kind, "scope": "device"}
    flops = {"kind": "analytic", "scope": "model"}
    quantities = {"latency_s": latency, "flops_effective": flops}
    about = {"protocol": protocol, "reference": "dense_lstm", "fingerprint": {"processor": machine}}
    return json.dumps({"quantities": quantities, **about})


def results(
    folder: Path,
    milliseconds: tuple[int, ...],
    *,
    goals: str = "error,latency",
    widths: tuple[int, ...] = (8, 16, 24, 32),
    metric: str = "wer",
    again: str = "",
    text: str = reading(),
) -> Results:
    rows: list[Row] = []
    for trial, (error, ms) in enumerate(zip(ERRORS, milliseconds, strict=False)):
        latency = {"latency_s": ms / 1e3, "latency_ratio": ms / 4, "flops_effective": 100 - trial}
        about = {"state": "complete", "metric": metric, "baseline": "dense_lstm" * (trial == 0)}
        rows += [{"trial": trial, **about, "error": error, **latency}]
        (folder / f"trials/{trial}").mkdir(parents=True)
        (folder / f"trials/{trial}/reading.json").write_text(text)
    shapes = {i: Candidate(Architecture(hidden_size=width)) for i, width in enumerate(widths)}
    return Results(folder, rows, shapes, objectives(goals), (), "cpu", again=again)


def again(folder: Path, milliseconds: tuple[int, ...]) -> Results:
    return results(folder / "remeasured" / "cpu", milliseconds, again=folder.name)


def timed(one: Results, reference_s: float) -> Results:
    """Return results as measured at the speed at which the reference takes so long."""
    rows = [
        row | {"latency_s": row["latency_ratio"] * reference_s, "latency_reference_s": reference_s}
        for row in one.rows
    ]
    return dataclasses.replace(one, rows=rows)


def test_the_same_networks_are_paired_by_trial(tmp_path: Path) -> None:
    found = Comparison.of(results(tmp_path, A), again(tmp_path, B))

    assert found.by == "trial"
    assert found.on(first=True, second=True) == [(0, 0), (2, 2)]
    assert found.on(first=True, second=False) == [(1, 1)]
    assert found.on(first=False, second=True) == [(3, 3)]
    assert found.alone() == ([], [])


def test_two_studies_are_paired_by_candidate(tmp_path: Path) -> None:
    mirrored = results(tmp_path / "b", (4, 3, 2), widths=(24, 16, 64))
    found = Comparison.of(results(tmp_path / "a", A), mirrored)

    assert found.by == "candidate"
    assert found.pairs == ((1, 1), (2, 0))
    assert found.alone() == ([0], [2])


def test_hypervolumes_share_one_reference_point(tmp_path: Path) -> None:
    # The worst on either front: 40 % and 4 ms, so the box ends at 44 % and 4.4 ms.
    found = Comparison.of(results(tmp_path, A), again(tmp_path, B))
    box = 44 * 4.4
    first = (44 - 10) * 0.4 + (44 - 20) * 1 + (44 - 30) * 1
    second = (44 - 10) * 0.4 + (44 - 30) * 2 + (44 - 40) * 1

    assert found.hypervolumes() == pytest.approx((first / box, second / box))


def test_latencies_are_ranked_by_the_paired_ratio_too(tmp_path: Path) -> None:
    found = Comparison.of(results(tmp_path, A), again(tmp_path, B))

    assert [goal.name for goal in found.ranked()] == ["error", "latency", "latency_ratio"]
    assert found.values(RATIO).tolist() == [[1, 1], [0.75, 1.25], [0.5, 0.5], [1.25, 0.25]]


def test_latencies_are_compared_at_one_speed(tmp_path: Path) -> None:
    """B's last trial was measured while the machine took twice as long."""
    a = results(tmp_path / "a", A)
    quiet, disturbed = (timed(results(tmp_path / name, B), 4e-3) for name in ("b", "c"))
    disturbed.rows[3].update(latency_s=2e-3, latency_reference_s=8e-3, latency_slowdown=2.0)
    found, spared = Comparison.of(a, disturbed), Comparison.of(a, quiet)
    latency = found.goals[1]
    assert found.values(latency).tolist() == spared.values(latency).tolist()
    assert found.hypervolumes() == pytest.approx(spared.hypervolumes())


SLOW, FAST = 4e-3, 2e-3  # what the reference takes


def test_a_front_is_no_better_for_a_faster_hour_of_its_machine(tmp_path: Path) -> None:
    first, second = timed(results(tmp_path, A), SLOW), timed(again(tmp_path, A), FAST)
    found = Comparison.of(first, second)
    latency = found.goals[1]

    assert found.values(latency)[:, 1].tolist() == pytest.approx([4e-3, 3e-3, 2e-3, 5e-3])
    assert found.hypervolumes()[1] == pytest.approx(found.hypervolumes()[0])
    assert [point.x for point in points(found.second, latency)] == pytest.approx([4, 3, 2, 5])
    lines = [" ".join(line.split()) for line in comparison_text(found).splitlines()]
    assert "A and B 1 H-LSTM 2x16, gates 1x64, dense 20 20 3 3" in lines
    assert "latency 4 1.000 1.000 1.000" in lines


@pytest.mark.parametrize(
    "other",
    [
        {"text": reading(machine="laptop")},
        {"widths": (96, 16, 24, 32)},  # its reference is another network
    ],
)
def test_the_speed_stays_of_another_machine_or_beside_another_reference(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    first = timed(results(tmp_path / "a", A), SLOW)
    second = timed(results(tmp_path / "b", A, **other), FAST)

    assert [point.x for point in points(Comparison.of(first, second).second, first.goals[1])] == (
        pytest.approx([2, 1.5, 1, 2.5])
    )


def test_a_study_that_went_on_elsewhere_is_of_no_one_machine(tmp_path: Path) -> None:
    found = results(tmp_path, A)
    assert found.machine == {"processor": "desk"}
    (tmp_path / "device.json").write_text('{"fingerprint": {"processor": "laptop"}}')
    assert found.machine is None


def test_ratios_to_other_networks_of_one_name_do_not_compare(tmp_path: Path) -> None:
    other = results(tmp_path / "b", B, widths=(96, 16, 24, 32))
    found = Comparison.of(results(tmp_path / "a", A), other)

    assert [goal.name for goal in found.ranked()] == ["error", "latency"]


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        (("speech", "", "one"), ("speech", "", "one"), False),
        (("speech", "", "one"), ("speech", "", "two"), True),
        (("speech", "", "one"), ("speech", "", ""), False),  # from before it was noted
        (("own", "/a", ""), ("own", "/a", ""), False),
        (("own", "/a", ""), ("own", "/b", ""), True),
        (("own", "", ""), ("other", "", ""), True),
    ],
)
def test_errors_on_other_data_do_not_compare(
    tmp_path: Path, first: tuple[str, ...], second: tuple[str, ...], refused: bool
) -> None:
    both = results(tmp_path / "a", A), results(tmp_path / "b", B)
    for one, noted in zip(both, (first, second), strict=True):
        source = dict(zip(("task", "data", "digest"), noted, strict=True))
        (one.folder / "data.json").write_text(json.dumps(source))
    if refused:
        with pytest.raises(UserError, match="their data differ"):
            Comparison.of(*both)
    else:
        assert Comparison.of(*both).pairs


def test_the_text_says_who_stays_and_how_alike_the_ranks_are(tmp_path: Path) -> None:
    found = Comparison.of(results(tmp_path, A), again(tmp_path, B))
    lines = [" ".join(line.split()) for line in comparison_text(found).splitlines()]

    assert "A and B 0 H-LSTM 2x8, gates 1x64, dense 10 10 4 4" in lines
    assert "A only 1 H-LSTM 2x16, gates 1x64, dense 20 20 3 5" in lines
    assert "B only 3 H-LSTM 2x32, gates 1x64, dense 40 40 5 1" in lines
    assert "latency 4 -0.400 -0.333 1.000" in lines
    assert "latency / that of dense_lstm 4 -0.400 -0.333 1.000" in lines
    assert any(line.startswith("hypervolume of error, latency: A 0.2665") for line in lines)


def test_the_picture_shows_both_fronts_and_what_is_the_same_network(tmp_path: Path) -> None:
    figure: Any = comparison_figure(Comparison.of(results(tmp_path, A), again(tmp_path, B)))
    (axes,) = figure.axes
    blue, red, grey = "#2a7f9e", "#d1495b", "#8b949e"
    drawn: dict[Any, list[Any]] = {}
    for line in axes.lines:
        kind = line.get_color(), line.get_marker(), line.get_drawstyle()
        drawn.setdefault(kind, []).append(line.get_xydata().tolist())

    assert drawn == {
        (blue, "o", "default"): [[[4, 10]], [[3, 20]], [[2, 30]], [[5, 40]]],
        (blue, "None", "steps-post"): [[[2, 30], [3, 20], [4, 10]]],
        (red, "o", "default"): [[[4, 10]], [[5, 20]], [[2, 30]], [[1, 40]]],
        (red, "None", "steps-post"): [[[1, 40], [2, 30], [4, 10]]],
        (grey, "None", "default"): [
            [[4, 10], [4, 10]], [[3, 20], [5, 20]], [[2, 30], [2, 30]], [[5, 40], [1, 40]],
        ],
    }  # fmt: skip


@pytest.mark.parametrize("goals", ["error,latency", "error,latency,flops"])
def test_the_picture_is_drawn(tmp_path: Path, goals: str) -> None:
    first = results(tmp_path / "a", A, goals=goals)
    draw_comparison(
        Comparison.of(first, results(tmp_path / "b", B, goals=goals)), tmp_path / "c.png"
    )

    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "c.png").read_bytes()) > 20_000


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"text": reading("estimated")}, r"latency is measured \(aba-2, device\) in .*estimated"),
        ({"text": reading(protocol="aba-1")}, r"measured \(aba-1, device\).*do not compare"),
        ({"goals": "error,flops"}, "share no cost"),
        ({"metric": "cer"}, "WER and CER, which do not compare"),
    ],
)
def test_fronts_that_do_not_compare_are_refused(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    first, second = results(tmp_path / "a", A), results(tmp_path / "b", B, **other)
    with pytest.raises(UserError, match=message):
        Comparison.of(first, second)


def test_a_study_without_a_front_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no front to compare"):
        Comparison.of(results(tmp_path / "a", A), results(tmp_path / "b", ()))


# Ranks


def test_rank_correlations_of_a_worked_example() -> None:
    # Ranks 1 2 3 4 and 1 3 2 4: rho = 1 - 6 * 2 / (4 * 15); one of six pairs is discordant.
    values = np.array([[10.0, 1], [20, 5], [30, 3], [40, 9]])

    assert spearman(values) == pytest.approx(0.8)
    assert kendall(values) == pytest.approx(4 / 6)


def test_ties_share_their_rank() -> None:
    values = np.array([[1.0, 1], [2, 2], [2, 3]])

    assert spearman(values) == pytest.approx(1.5 / np.sqrt(1.5 * 2))  # ranks 1 2.5 2.5, 1 2 3
    assert kendall(values) == pytest.approx(2 / np.sqrt(2 * 3))


@pytest.mark.parametrize("values", [[[1, 2], [2, 3]], [[1, 1], [1, 2], [1, 3]]])
def test_two_pairs_or_a_constant_have_no_correlation(values: list[list[float]]) -> None:
    assert spearman(np.array(values, dtype=float)) is None
    assert kendall(np.array(values, dtype=float)) is None


@given(arrays(float, st.tuples(st.integers(3, 8), st.just(2)), elements=st.integers(0, 5)))
def test_ranks_do_not_care_for_scale_and_change_sign_with_it(values: np.ndarray) -> None:
    for correlation in (spearman, kendall):
        rho = correlation(values)
        if rho is None:
            continue
        assert -1 - 1e-9 <= rho <= 1 + 1e-9
        assert correlation(values**3 + 7) == pytest.approx(rho)
        assert correlation(values * [1, -1]) == pytest.approx(-rho)
