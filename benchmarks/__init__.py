"""Measurements behind what the README and results/ claim; run one with `python -m`."""
