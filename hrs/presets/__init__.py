"""Named ablations as data: a preset is a small difference from its parent, a scale is one dial for size.

experiment("full_hrs", scale="tiny", seed=1, overrides={"model.router.trc_window": "8"})
"""

from hrs.presets.compose import Difference, compare, experiment
from hrs.presets.lineage import FAMILIES, PRESETS, get_preset, lineage
from hrs.presets.preset import Preset, Relative
from hrs.presets.scales import SCALES, get_scale
from hrs.presets.studies import STUDIES, get_study

__all__ = [
    "FAMILIES", "PRESETS", "SCALES", "STUDIES", "Difference", "Preset", "Relative",
    "compare", "experiment", "get_preset", "get_scale", "get_study", "lineage",
]  # fmt: skip
