"""A deployed model without torch: a flat program of operations that any runtime can be given.

program     what a model computes: `Program`
recording   from a module to a program
functions   how each function of torch is written down
agent       the program in numpy, on a device at the end of a pipe
onnx        the program as an ONNX graph
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import torch
from torch import nn

from gpsearch.computed import copied
from gpsearch.errors import Unsupported
from gpsearch.exporting import agent, functions
from gpsearch.exporting.agent import machine, seconds_of
from gpsearch.exporting.onnx import to_onnx
from gpsearch.exporting.program import Program, checksum, packed
from gpsearch.exporting.recording import arguments_on, record

__all__ = [
    "AGENT",
    "Program",
    "arguments_on",
    "checksum",
    "exported",
    "functions",
    "machine",
    "packed",
    "seconds_of",
    "to_onnx",
]

AGENT = files("gpsearch.exporting") / "agent.py"
"""The file that a device runs."""


@torch.inference_mode(False)  # tensors made within it do not tell whether they are overwritten
def exported(model: nn.Module, example: tuple[Any, ...]) -> Program:
    """Return what ``model`` computes in evaluation mode, for arguments shaped as ``example``.

    Args:
        model: Any module that is made of the functions in `gpsearch.exporting.functions`.
        example: Its arguments, tensors or tuples of them: a whole sequence, or for a recurrent
            layer that works step by step one step and the state, ``(x, (h, c))``.

    Raises:
        UserError: It cannot be written as a program, or a program would not have its outputs.
    """
    program = record(copied(model).cpu().eval(), example)
    loaded = agent.Program(program.text, program.weights)
    if difference := program.check(loaded.run(*program.example)):
        raise Unsupported(f"{type(model).__name__} as a program is wrong: {difference}")
    return program
