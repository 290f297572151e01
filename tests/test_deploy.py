from dataclasses import replace

import pytest
import torch
from torch import nn

from gpsearch.deploy import (
    at_least,
    columns,
    lacking,
    load_model,
    read_costs,
    reference_model,
    reference_name,
    save_model,
    untrained,
)
from gpsearch.errors import UserError
from gpsearch.objectives import objectives
from gpsearch.profiling import Host, Quantity, Reading, aa_gate
from gpsearch.quantize import quantize_weights
from gpsearch.space import Space
from tests.toy import Lopsided, ToyDevice, ToyTask

SPACE = Space.read("tests/toy.toml")


def test_a_reading_has_every_cost():
    task = ToyTask()
    reference = reference_model(SPACE, task)
    reading = read_costs(ToyDevice(), reference, task, reference=reference)
    row = columns(reading)

    assert row["params"] == sum(p.numel() for p in reference.parameters())
    assert row["latency_lo_s"] <= row["latency_s"] <= row["latency_hi_s"]
    assert row["latency_ratio"] == 1
    assert {"flops_dense", "flops_effective", "weight_bytes", "energy_j"} <= row.keys()


def test_a_device_that_fails_the_aa_gate_is_flagged_in_every_reading(tmp_path):
    device, task = Lopsided(), ToyTask()
    reference = reference_model(SPACE, task)
    impatient = Host(sleep=lambda seconds: None, locks=tmp_path)
    doubts = aa_gate(device, reference, task.example(), host=impatient)
    for beside in (reference, None):
        reading = read_costs(device, reference, task, reference=beside)
        assert not reading.stable
        assert reading.flags == doubts
    assert "a model against itself: 1.300" in doubts[0]

    fair = read_costs(ToyDevice(), reference, task, reference=reference)
    assert (fair.stable, fair.flags) == (True, [])
    assert fair.workload["example"] == ["float32[1, 6, 3]"]


def test_a_glance_is_taken_for_the_least_that_it_may_mean():
    glance = Reading(
        {
            "latency_s": Quantity(9e-3, "s", "measured", n=7),
            "latency_ratio": Quantity(2.0, "1", "measured", (1.5, 2.5), 7),
            "latency_reference_s": Quantity(5e-3, "s", "measured", n=7),
            "energy_j": Quantity(0.09, "J", "estimated", reason="10 W"),
            "params": Quantity(7, "1", "analytic"),
        },
        stable=False,
    )
    usual = at_least(glance, 4e-3)
    assert usual == {
        "latency_s": pytest.approx(6e-3),
        "energy_j": pytest.approx(0.06),
        "energy_kind": "estimated",
        "params": 7,
    }
    for quicker in (None, 8e-3):
        assert at_least(glance, quicker)["latency_s"] == pytest.approx(7.5e-3)
    few = Quantity(2.0, "1", "measured", n=3)
    hasty = replace(glance, quantities={**glance.quantities, "latency_ratio": few})
    assert at_least(hasty, None)["latency_s"] == pytest.approx(5e-3)


def test_what_an_objective_lacks_is_told_with_the_reason():
    joules = Quantity.unavailable("J", "the GPU was in use")
    reading = Reading({"energy_j": joules}, stable=True)
    assert lacking(reading, objectives("error,energy")) == (
        "no measured energy: the GPU was in use"
    )
    assert lacking(reading, objectives("error,flops")) == "no analytic flops: not measured"
    assert lacking(reading, ()) is None


def test_the_reference_is_the_first_baseline_and_always_the_same():
    first, again = (reference_model(SPACE, ToyTask()) for _ in range(2))

    assert reference_name(SPACE) == "dense_lstm"
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert a.equal(b)


def test_a_model_survives_its_file(tmp_path):
    model = nn.LSTM(3, 4)
    save_model(model, tmp_path / "model.pt")
    x = torch.randn(5, 1, 3)

    assert load_model(tmp_path / "model.pt")(x)[0].equal(model(x)[0])


@pytest.mark.parametrize("content", [b"", b"half a model", None])
def test_an_unreadable_model_is_named(tmp_path, content):
    path = tmp_path / "model.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.pt: (not a readable model|no such model)"):
        load_model(path)


def test_a_file_of_something_else_is_named(tmp_path):
    torch.save({"weights": 1}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="holds no model"):
        load_model(tmp_path / "model.pt")


def test_a_candidates_file_gives_its_model_at_its_final_density(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        "[architecture]\nhidden_size = 12\ngate_depth = 0\n"
        '[schedule]\nname = "gmp"\nfinal_density = 0.25\n'
    )
    model = untrained(path, ToyTask())
    weights = [p for n, p in model.named_parameters() if "weight" in n and "layers" in n]

    assert sum(int(w.count_nonzero()) for w in weights) == round(0.25 * 4 * 12 * (3 + 12))
    assert quantize_weights(model, "int8")

    path.write_text(path.read_text() + '[deployment]\nweights = "int8"\n')
    assert not quantize_weights(untrained(path, ToyTask()), "int8")
