"""Whether operations are recorded or transformed: then they have to be torch's own."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def traced() -> bool:
    """Tell whether somebody takes torch's operations for more than their results.

    So do tracing and compiling, modes that watch what is dispatched (`FlopCounterMode`, fake
    tensors), transforms of functions (`vmap`), and derivatives forward.
    """
    return (
        torch._C._is_tracing()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )
