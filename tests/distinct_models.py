"""Presets whose models differ: some presets differ from another in training only."""

from hrs.presets import PRESETS, experiment

DISTINCT = list({experiment(name, "micro").model: name for name in reversed(PRESETS)}.values())
"""One preset of each distinct model."""
