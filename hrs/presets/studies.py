"""Named lists of presets that belong in one table; the first is the baseline of the paired differences."""

from hrs.errors import HRSError
from hrs.presets.controls import CONTROLS, KERNELS
from hrs.presets.legacy import LEGACY
from hrs.presets.manifold import MANIFOLD, MANIFOLD_LEGACY
from hrs.presets.preset import Preset
from hrs.presets.retrieval import RETRIEVAL
from hrs.presets.v1 import V1
from hrs.presets.v2_to_v7 import V2_TO_V7
from hrs.presets.v8_to_v18 import V8_TO_V14, V15_TO_V18


def _names(*families: tuple[Preset, ...]) -> tuple[str, ...]:
    return tuple(preset.name for family in families for preset in family)


_V1 = _names(V1)

STUDIES: dict[str, tuple[str, ...]] = {
    "v1": _V1,
    "v1_with_legacy": (*_V1, *(preset.name for preset in LEGACY if preset.parent in _V1 and preset.leaks)),
    "lineage": _names(V1, V2_TO_V7, V8_TO_V14, V15_TO_V18, CONTROLS),
    "lineage_legacy": ("dense_baseline", *_names(LEGACY)),
    "engrams": (
        "dense_baseline", "dense_window", "dense_recurrence", "dense_wide_recurrence", "dense_running",
        "dense_memory", "dense_wide_memory",
    ),
    "peer": (
        "dense_baseline", "v10_control", "v16_peer_engram", "v17_peer_only", "v17_unphased", "v17_paper_peer",
    ),
    "manifold": ("dense_baseline", *_names(MANIFOLD)),
    "manifold_with_legacy": ("dense_baseline", *_names(MANIFOLD), MANIFOLD_LEGACY.name),
    "kernels": ("dense_baseline", *_names(KERNELS)),
    "retrieval": ("dense_baseline", *_names(RETRIEVAL)),
}  # fmt: skip


def get_study(name: str) -> tuple[str, ...]:
    """The study's presets, baseline first.

    Raises:
        HRSError: if there is no such study.
    """
    if name not in STUDIES:
        raise HRSError(f"unknown study '{name}': choose one of {', '.join(STUDIES)}, or name presets with --presets")
    return STUDIES[name]
