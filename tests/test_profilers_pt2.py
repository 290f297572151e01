"""torch.export's files as a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpsearch.profilers.pt2 import Pt2Profiler  # type: ignore[import-not-found]
from torch import Tensor, nn

from gpsearch import HLSTM, UserError, measure
from gpsearch.profiling import Host


class Deciding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_the_device_measures(tmp_path: Path) -> None:
    reading = measure(
        Pt2Profiler(),
        HLSTM(3, 4, gate_hidden=(2,)),
        (torch.ones(2, 1, 3),),
        max_seconds=0.2,
        host=Host(locks=tmp_path, recovery_s=0.0),
    )
    assert reading["latency_s"].number > 0
    assert reading.fingerprint["runtime"] == f"torch.export {torch.__version__}"


def test_what_torch_cannot_export_is_the_users_to_know() -> None:
    with pytest.raises(UserError, match=r"^unsupported: torch.export cannot export this model"):
        Pt2Profiler().load(Deciding(), (torch.ones(3),))
