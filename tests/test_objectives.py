import math

import pytest

from gpsearch.errors import UserError
from gpsearch.objectives import constraint, feasible, front, objectives


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


def test_no_row_is_an_empty_front():
    assert front([], objectives("error,flops")) == []
