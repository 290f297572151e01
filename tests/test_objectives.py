import math

import pytest

from gpsearch.errors import UserError
from gpsearch.objectives import (
    _LIMITS,
    OBJECTIVES,
    SLOWDOWN,
    constraint,
    cost,
    estimated,
    feasible,
    front,
    objectives,
    slowdown,
)


def row(error, flops, **rest):
    return {"state": "complete", "error": error, "flops_effective": flops, **rest}


def test_objectives_are_parsed_in_order():
    assert [goal.column for goal in objectives("error, flops,latency")] == [
        "error",
        "flops_effective",
        "latency_s",
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("error,speed", "'speed' is none of error, latency"),
        ("error,flops,flops", "twice"),
        ("flops,latency", "should be error and at least one cost"),
        ("error", "at least one cost"),
    ],
)
def test_wrong_objectives_are_named(names, message):
    with pytest.raises(UserError, match=message):
        objectives(names)


def test_a_constraint_is_converted_to_the_columns_unit():
    limit = constraint("latency_ms <= 5")

    assert (limit.column, limit.limit) == ("latency_s", 0.005)
    assert limit.violation({"latency_s": 0.006}) == pytest.approx(0.2)
    assert limit.violation({"latency_s": 0.004}) < 0
    assert limit.violation({"latency_s": None}) == math.inf


LIMITS = [
    ("error<=0.2", "error", 0.2),
    ("latency_s<=0.005", "latency_s", 0.005),
    ("latency_ms<=5", "latency_s", 0.005),
    ("latency_us<=5000", "latency_s", 0.005),
    ("energy_j<=0.2", "energy_j", 0.2),
    ("energy_mj<=200", "energy_j", 0.2),
    ("flops<=4e6", "flops_effective", 4e6),
    ("mflops<=4", "flops_effective", 4e6),
    ("flops_dense<=4e6", "flops_dense", 4e6),
    ("params<=1e5", "params_nonzero", 1e5),
    ("memory_bytes<=3e5", "weight_bytes", 3e5),
    ("memory_kb<=300", "weight_bytes", 3e5),
]


@pytest.mark.parametrize(("text", "column", "limit"), LIMITS)
def test_every_name_of_a_limit_has_its_column_and_unit(text, column, limit):
    found = constraint(text)

    assert found.column == column
    assert found.limit == pytest.approx(limit)


def test_no_name_of_a_limit_is_left_out_above():
    assert [text.partition("<=")[0] for text, _, _ in LIMITS] == list(_LIMITS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latency_ms<5", "should look like"),
        ("speed<=5", "'speed' is none of"),
        ("params<=many", "'many' .* is no positive number"),
        ("params<=-1", "no positive number"),
        ("params<=nan", "no positive number"),
    ],
)
def test_wrong_constraints_are_named(text, message):
    with pytest.raises(UserError, match=message):
        constraint(text)


def test_the_front_holds_what_is_complete_feasible_and_not_dominated():
    rows = [
        row(0.30, 10),
        row(0.20, 20),
        row(0.25, 30),  # dominated by the one above
        row(0.10, 99),  # infeasible
        {"state": "failed"},
        {"state": "gated"},
        row(0.30, None),  # a cost that could not be had
    ]
    goals, limits = objectives("error,flops"), [constraint("mflops<=50e-6")]

    assert front(rows, goals, limits) == [0, 1]
    assert not feasible(rows[3], limits)


def test_latencies_of_a_slow_spell_are_judged_at_the_usual_speed():
    """In the second trial all takes twice as long; by its ratio it is the fastest."""
    seconds, ratios = [4e-3, 6e-3, 4e-3], [1.0, 0.75, 1.0]
    rows = [
        row(error, 1, latency_s=s, latency_ratio=ratio, energy_j=30 * s)
        for error, s, ratio in zip((0.3, 0.2, 0.25), seconds, ratios, strict=True)
    ]
    latency, energy = OBJECTIVES["latency"], OBJECTIVES["energy"]
    goals = objectives("error,latency")
    assert front(rows, goals) == [1, 2]  # an older study's

    judged = [one | {SLOWDOWN: slowdown(one, 4e-3)} for one in rows]
    assert [one[SLOWDOWN] for one in judged] == [1, 2, 1]
    assert [cost(one, latency) for one in judged] == [4e-3, 3e-3, 4e-3]
    assert front(judged, goals) == [1]
    assert cost(judged[1], energy) == 0.18, "a counter's joules are what was used"
    assert cost(judged[1], estimated(energy)) == 0.09, "watts times seconds are as slow as these"


def test_what_was_measured_alone_has_no_slowdown():
    alone = row(0.2, 1, latency_s=4e-3, latency_ratio=None)
    assert slowdown(alone, 4e-3) is None
    assert slowdown(alone | {"latency_ratio": 0.5}, None) is None
    assert cost(alone | {SLOWDOWN: None}, OBJECTIVES["latency"]) == 4e-3


def test_no_row_is_an_empty_front():
    assert front([], objectives("error,flops")) == []
