"""A deployed model without torch: a flat program of operations that any runtime can be given.

    program     what a model computes: `Program`
    recording   from a module to a program
    functions   how each function of torch is written down
    agent       the program in numpy, on a device at the end of a pipe
    onnx        the program as an ONNX graph
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from gpsearch.errors import UserError
from gpsearch.exporting import agent, functions
from gpsearch.exporting.program import Program
from gpsearch.exporting.recording import record

__all__ = ["Program", "exported", "functions"]


def exported(model: nn.Module, example: tuple[Tensor, ...]) -> Program:
    """Return what ``model`` computes in evaluation mode, for arguments shaped as ``example``.

    Raises:
        UserError: It cannot be written as a program, or a program would not have its outputs.
    """
    program = record(copy.deepcopy(model).cpu().eval(), example)
    loaded = agent.Program(program.text, program.weights)
    if difference := program.check(loaded.run(*program.example)):
        raise UserError(f"unsupported: {type(model).__name__} as a program is wrong: {difference}")
    return program
