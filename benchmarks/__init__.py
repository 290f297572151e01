"""Measurements behind what the README and results/ claim: `python -m benchmarks --help`."""
