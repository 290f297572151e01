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
    compact     `compact`: the smallest module with equal outputs
    formats     which way a recurrent layer runs fastest on this processor
    compact_units  which units a model has, who makes them and who reads them
    flops       how many FLOPs and weights a model has
    exporting   a model as a flat program, for devices without torch: numpy, ONNX
    profiling   `measure`: a model on a device; `find_device`: a device by its name
    candidate   one point of a search space: architecture, schedule, training
    space       a search space: a TOML file that suggests candidates
    tasks       what a candidate is trained to do: speech, translation, captioning
    objectives  what is minimised, and what must stay below a limit
    pareto      which of many costs no other is better than
    settings    the flags of ``gpsearch run``
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
    files       writing files so that a kill leaves no halves
    errors      `UserError`: a mistake that its message mends
"""

from importlib import metadata

from gpsearch.cell import HLSTM, HLSTMCell
from gpsearch.compact import compact
from gpsearch.errors import UserError
from gpsearch.growprune import GrowPrune
from gpsearch.profiling import Quantity, Reading, measure
from gpsearch.profiling import find as find_device

__version__ = metadata.version("gpsearch")

__all__ = [
    "HLSTM",
    "GrowPrune",
    "HLSTMCell",
    "Quantity",
    "Reading",
    "UserError",
    "__version__",
    "compact",
    "find_device",
    "measure",
]
