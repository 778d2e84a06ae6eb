"""Named lists of presets that belong in one table; the first is the baseline of the paired differences."""

from hrs.errors import HRSError
from hrs.presets.lineage import PRESETS

_V1 = (
    "dense_baseline", "dual_head", "dual_head_router", "dual_head_router_sink",
    "full_core", "full_hrs", "full_hrs_refined", "full_hrs_trc",
)  # fmt: skip

STUDIES: dict[str, tuple[str, ...]] = {
    "v1": _V1,
    "v1_with_legacy": (*_V1, *(name for name, preset in PRESETS.items() if preset.legacy and preset.parent in _V1)),
}


def get_study(name: str) -> tuple[str, ...]:
    """The study's presets, baseline first.

    Raises:
        HRSError: if there is no such study.
    """
    if name not in STUDIES:
        raise HRSError(f"unknown study '{name}': choose one of {', '.join(STUDIES)}, or name presets with --presets")
    return STUDIES[name]
