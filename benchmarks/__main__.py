"""The one door: `python -m benchmarks NAME`."""

from __future__ import annotations

import sys
from importlib import import_module

from gpsearch.errors import UserError

COMMANDS = {
    "train": "one training step of a layer, in all the ways there are to take it",
    "decode": "a layer at batch 1, a whole sequence at once and step by step",
    "trial": "the parts of a whole speech trial, and its time against another revision's",
    "accuracy": "what dense, narrow, pruned and grown networks reach on AN4",
    "deployed": "word errors and latency of deployed speech networks, 8-bit LSTMs among them",
    "masks": "what masks cost a training step",
    "stability": "latency ratios beside other work: how much they vary",
}


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names."""
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        print("python -m benchmarks NAME [--help]\n")
        print("\n".join(f"  {command:11}{about}" for command, about in COMMANDS.items()))
        return 0 if name in ("-h", "--help") else 2
    try:
        import_module(f"benchmarks.{name}").main(arguments[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
