"""Which way a recurrent layer runs fastest on this processor: found out by running it.

Every weight is packed in each format that could pay and the layer runs on, round by round; what
remains is the best format of each, or none, where torch is faster. A weight is tried in its place,
among all the others, because they share the caches.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gpsearch.cell import HLSTM, HLSTMCell
from gpsearch.kernels.decode import FORMATS, Decoder, Key, Packed, suits
from gpsearch.kernels.native import Native, native

_FEW_WEIGHTS = 4096
"""A weight of one gate with fewer elements is left dense: there is nothing to gain."""
_SMALLER = 0.75
"""A format that takes a larger share of the dense one's memory cannot win."""
_GAIN = 0.97
"""What takes more than this share of the time is no better."""
_SEQUENCE = 64
"""Time steps in which the kernels are held against torch, which packs its weights at every call."""
_SECONDS = 0.01
"""To try the formats of one weight; there are at least three rounds, and at most 40."""


@torch.inference_mode()
def choose(model: nn.Module) -> nn.Module:
    """Let every recurrent layer run in the way that is fastest here; outputs stay equal to 1e-5.

    It is found in one thread, as the device `cpu` measures, however many torch may use now.

    `HLSTM` and `HLSTMCell` get their ``formats``, and a `torch.nn.LSTM` becomes an `HLSTM` where
    that is faster. Layers on other devices, of another precision, with ``gate_norm`` or whose
    weights are computed (by `torch.nn.utils.prune`, say) stay with torch, and so does everything
    where there are no kernels.

    Args:
        model: In eval mode; its modules are changed in place.

    Returns:
        The model; another one only where it is itself a `torch.nn.LSTM`.
    """
    with one_thread():
        return _chosen(model)


def _chosen(model: nn.Module) -> nn.Module:
    kernels = native()
    for module in model.modules():
        if isinstance(module, HLSTM | HLSTMCell):
            module.formats = {} if kernels is None else _best_formats(module, kernels)
    if kernels is None:
        return model
    exchanged: dict[nn.Module, nn.Module] = {
        module: _faster(module, kernels)
        for module in model.modules()
        if type(module) is nn.LSTM and _may_go(module, model)
    }
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and module in exchanged:  # one that stands in two places is one module still
            model.set_submodule(name, exchanged[module])
    return exchanged.get(model, model)


def _best_formats(module: HLSTM | HLSTMCell, kernels: Native) -> Mapping[str, str]:
    """Return the fastest formats, or none where torch is faster."""
    if module.gate_norm or module.is_parametrized() or not suits(*module.parameters()):
        return {}
    single = isinstance(module, HLSTMCell)
    steps = 1 if single else _SEQUENCE
    x = torch.randn(steps, 1, module.input_size, dtype=torch.float32, device="cpu")
    formats = _packing(module, kernels, x)
    decoder = module.packed(kernels, formats)
    module.formats = {}
    as_given = x[0] if single else x.transpose(0, 1) if module.batch_first else x
    ways = {
        "torch": lambda: module(as_given),
        "kernels": lambda: decoder.run(x, None),
    }
    seconds = _time(ways, 3)
    return formats if seconds["kernels"] < _GAIN * seconds["torch"] else {}


def _packing(module: HLSTM | HLSTMCell, kernels: Native, x: Tensor) -> dict[str, str]:
    """Find the best format of every weight, the largest weights first."""
    weights = {name: p for name, p in module.named_parameters() if p.dim() == 2}
    promising = {name: _promising(weight, kernels) for name, weight in weights.items()}
    # At first the smallest, so that all the others leave about as much of the caches to a weight
    # that is tried as they will in the end.
    formats = {name: found[0] for name, found in promising.items()}
    packed = dict[Key, Packed]()
    for name in sorted(weights, key=lambda name: -weights[name].numel()):
        if len(promising[name]) > 1:
            decoders = {
                format: module.packed(kernels, formats | {name: format}, packed)
                for format in promising[name]
            }
            formats[name] = _fastest(decoders, x[:2])
    return formats


def _promising(weight: Tensor, kernels: Native) -> list[str]:
    """List dense, and those formats that take clearly less memory; the smallest first."""
    gates = weight.chunk(4)
    if gates[0].numel() < _FEW_WEIGHTS:
        return ["dense"]
    sizes = {}
    for format in FORMATS:
        bytes_ = [Packed.bytes_of(kernels, gate, format) for gate in gates]
        if min(bytes_) >= 0:
            sizes[format] = sum(bytes_)
    most = _SMALLER * sizes["dense"]
    paying = [format for format, size in sizes.items() if format == "dense" or size <= most]
    return sorted(paying, key=lambda format: sizes[format])


def _fastest(decoders: dict[str, Decoder], x: Tensor) -> str:
    calls: dict[str, Callable[[], Any]] = {
        format: lambda decoder=decoder: decoder.run(x, None)  # type: ignore[misc]
        for format, decoder in decoders.items()
    }
    one = sum(_time(calls, 1).values())
    seconds = _time(calls, max(3, min(40, int(_SECONDS / one))))
    best = min(seconds, key=lambda format: seconds[format])
    return best if seconds[best] < _GAIN * seconds["dense"] else "dense"


def _time(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return each call's shortest time of some rounds, in which all take turns.

    A call that is timed follows an untimed one of its own: what the others left in the caches is
    no concern of a model that runs alone.
    """
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.thread_time()
            call()
            seconds[name] = min(seconds[name], time.thread_time() - start)
    return seconds


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread, then in as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _may_go(lstm: nn.LSTM, model: nn.Module) -> bool:
    """Tell whether an LSTM can be exchanged: nothing hangs on it, is kept there or is shared."""
    owners = Counter(
        id(p) for module in model.modules() for p in set(module.parameters(recurse=False))
    )
    shared = any(owners[id(p)] > 1 for p in lstm.parameters())
    # What a user keeps on it a forward may read.
    more = vars(lstm).keys() - vars(nn.LSTM(1, 1, device="meta")).keys()
    return not (lstm.proj_size or shared or more or hooked(lstm))


def hooked(module: nn.Module) -> bool:
    """Tell whether hooks see, and may change, what goes into a module or comes out."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _faster(lstm: nn.LSTM, kernels: Native) -> nn.Module:
    """Return the LSTM, or an equal HLSTM with formats where that is faster."""
    with torch.inference_mode(False), torch.no_grad():
        other = HLSTM.from_lstm(lstm)
    other.formats = _best_formats(other, kernels)
    return other if other.formats else lstm
