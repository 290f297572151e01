"""gpsearch: hardware-aware search of hidden-layer LSTMs trained by grow-and-prune.

A map, in reading order:

    search      the whole story of one trial, and the loop around it: start here
    train       one grow-and-prune training, with its checkpoint and history
    growprune   `GrowPrune`: the masks of a model while it trains
    block_masks the masks of single weights and of blocks of them
    unit_masks  the masks of whole units
    schedule    when connections grow or are pruned, and how many
    grow        which dormant weights wake
    prune       which weights sleep
    mask        choosing an exact number of weights
    blocks      weights that live or die together: 16x1, 8x1, 4x4
    groups      which weights compete, and which belong to one unit
    cell        `HLSTM` and `HLSTMCell`, with the equations
    gated       the parameters of its gates
    inference   the same in C, where there is no training to be done
    kernels     the recurrence itself, over time and over ragged batches
    dropout     dropout, without torch's slow random numbers on a CPU
    compact     `compact`: the smallest module with equal outputs
    formats     which way a recurrent layer runs fastest on this processor
    stream      a layer over sequences that come step by step
    quantize    recurrent weights rounded to 16 or 8 bits
    compact_units  which units a model has, who makes them and who reads them
    computed    weights that are computed when they are read
    flops       how many FLOPs and weights a model has
    exporting   a model as a flat program, for devices without torch: numpy, ONNX
    profiling   `measure`: a model on a device; `find_device`: a device by its name
    candidate   one point of a search space: architecture, schedule, training, deployment
    space       a search space: a TOML file that suggests candidates
    tasks       what a candidate is trained to do: speech, translation, captioning
    objectives  what is minimised, and what must stay below a limit
    pareto      which of many costs no other is better than
    settings    the flags of ``gpsearch run``
    learned     what data a study or a model has learnt from
    sampling    what to try next
    staircase   latency by a layer's width, and the right edges of its steps
    study       the results folder
    deploy      a finished model: saved, loaded, measured again in a fresh process
    remeasured  a front measured again, here or on another device
    reproduce   the rows of the paper's comparison, trained and measured here
    report      tables and pictures of a results folder
    testing     the conformance kit for profilers, and packages to begin with
    progress    what a person sees while a search works
    cli         the commands
    files       writing files so that a kill leaves no halves; a folder's lock
    errors      `UserError`: a mistake that its message mends; `Unsupported`: by a device
"""

from __future__ import annotations

import sys
from importlib import import_module, metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gpsearch.errors import Unsupported, UserError

if TYPE_CHECKING:
    from gpsearch.cell import HLSTM, HLSTMCell
    from gpsearch.compact import compact
    from gpsearch.growprune import GrowPrune
    from gpsearch.profiling import Quantity, Reading, measure
    from gpsearch.profiling import find as find_device
    from gpsearch.stream import Stream

__version__ = metadata.version("gpsearch")

__all__ = [
    "HLSTM",
    "GrowPrune",
    "HLSTMCell",
    "Quantity",
    "Reading",
    "Stream",
    "Unsupported",
    "UserError",
    "__version__",
    "compact",
    "find_device",
    "measure",
]

_HOMES = {
    "HLSTM": "cell.HLSTM",
    "GrowPrune": "growprune.GrowPrune",
    "HLSTMCell": "cell.HLSTMCell",
    "Quantity": "profiling.Quantity",
    "Reading": "profiling.Reading",
    "Stream": "stream.Stream",
    "compact": "compact.compact",
    "find_device": "profiling.find",
    "measure": "profiling.measure",
}
"""Where names come from when they are first used: torch takes seconds, and no help needs it."""


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, _, original = _HOMES[name].partition(".")
        value = getattr(import_module(f"{self.__name__}.{module}"), original)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # To import the module `gpsearch.compact` must not hide the function of this name.
        if name == "compact" and isinstance(value, ModuleType):
            value = value.compact
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
