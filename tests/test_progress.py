import re

import pytest

from gpsearch.candidate import Candidate
from gpsearch.profiling import Quantity
from gpsearch.progress import Progress, devices_text, diagnosis, epoch_line, quantity_text
from gpsearch.sampling import Proposal
from gpsearch.settings import Settings
from gpsearch.study import Study
from gpsearch.train import Epoch

EPOCH = Epoch(2, "prune", 0.25, 1000, 3.5, 0.125, 0.001, 4.0, "prune 0.500 to 0.250")


def test_a_log_file_reads_well(tmp_path, capsys):
    settings = Settings.of({"space": "tests/toy.toml", "budget": 3})
    renewed = []
    progress = Progress(Study.create(tmp_path / "s", settings), lambda: renewed.append(1))

    progress.trial_begins(0, Proposal(Candidate(), {}, {}, {}, "dense_lstm"))
    progress.epoch_ends(0, EPOCH, 10)
    row = {"state": "complete", "error": 0.125, "latency_s": 0.002, "flops_effective": 5e6}
    progress.trial_ends(0, row)
    progress.trial_begins(1, Proposal(Candidate(), {}, {}, {}))
    progress.trial_ends(1, {"state": "failed", "reason": "the loss is nan"})
    progress.final_ends(0, {"latency_s": 0.002, "test_error": None})

    assert capsys.readouterr().err.splitlines() == [
        "trial 0 (1 of 3)  baseline dense_lstm: H-LSTM 2x128, gates 1x64, dense",
        "trial 0 (1 of 3)  epoch 3/10  prune  density 0.250  loss 3.500  dev error 12.50%  4.0 s  "
        "(prune 0.500 to 0.250)  trial 0:28 left",
        "trial 0 (1 of 3)  complete  error 12.5 %  latency 2 ms  flops 5 MFLOP",
        "trial 1 (2 of 3)  H-LSTM 2x128, gates 1x64, dense",
        "trial 1 (2 of 3)  failed  the loss is nan",
        "front: trial 0 measured again: latency 2 ms, test error unknown",
    ]
    assert renewed == [1, 1]


def test_the_trial_in_hand_is_no_more_to_come(tmp_path, capsys):
    settings = Settings.of({"space": "tests/toy.toml", "budget": 2})
    progress = Progress(Study.create(tmp_path / "s", settings), lambda: None)
    progress.trial_begins(0, Proposal(Candidate(), {}, {}, {}))
    progress.trial_ends(0, {"state": "complete"})
    progress.started_s -= 60

    progress.trial_begins(1, Proposal(Candidate(), {}, {}, {}))
    progress.epoch_ends(1, EPOCH, 10)

    assert capsys.readouterr().err.rstrip().endswith("trial 0:28 left, study 0:28")


def test_an_uneventful_epoch_is_short():
    assert "(" not in epoch_line(Epoch(0, "dense", 1.0, 1, 1.0, 1.0, 0.1, 1.0, ""), 5)


@pytest.mark.parametrize(
    ("quantity", "text"),
    [
        (
            Quantity(0.002, "s", "measured", (0.0019, 0.0021), 100, "perf_counter", "process"),
            "0.002 s  (95 %: 0.0019 to 0.0021)  measured, perf_counter",
        ),
        (Quantity(1234567, "1", "analytic"), "1,234,567  analytic"),
        (Quantity.unavailable("J", "no counter"), "unavailable: no counter"),
    ],
)
def test_a_quantity_tells_its_unit_spread_and_origin(quantity, text):
    assert quantity_text(quantity) == text


def test_devices_tell_what_they_can_and_why_not():
    text = devices_text()

    assert "cpu  (gpsearch" in text
    assert "latency  yes, by perf_counter" in text
    assert "gpu  (gpsearch" in text


def test_the_doctor_looks_at_torch_devices_timing_and_disk():
    text = diagnosis()

    assert devices_text() in text
    for line in (
        r"torch \d.+ threads",
        r"timing  (a model against itself: \d\.\d{3}, good enough|noisy: .+; stop other work)",
        r"disk    \d+\.\d GB free here",
    ):
        assert re.search(f"^{line}", text, re.MULTILINE)
