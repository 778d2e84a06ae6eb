"""Models at the original's dimensions have the original's parameters, to the unit."""

import pytest

from hrs.models import count_parameters
from hrs.presets import PRESETS, SCALES, experiment

ORIGINAL = {
    "dense_baseline": 38_323_712,
    "dual_head": 38_585_856,
    "dual_head_router": 38_750_724,
    "dual_head_router_sink": 38_750_728,
    "full_core": 38_750_728,
    "full_hrs": 41_376_776,
    "full_hrs_refined": 41_376_776,
    "full_hrs_trc": 41_376_776,
    "v2_attn_conv": 36_760_064,
    "v2_attn_conv_dual": 37_022_208,
    "v2_attn_conv_peer": 167_049_728,
    "v2_full": 169_675_776,
    "v3_full": 175_586_312,
    "v4_full": 175_590_156,
    "v4_1024": 175_590_156,
    "v5_replace": 176_182_030,
    "v6_gate": 175_590_349,
    "v8_bdh": 176_114_444,
    "v9_learnable": 176_114_447,
    "v10_control": 168_640_007,
    "v11_no_p5": 176_114_447,
    "v12_247m": 249_861_269,
    "v13_low_sparsity": 249_861_269,
    "v14_attn_sink": 249_833_237,
    "v15_vanilla_route": 164_096_780,
    "v16_peer_engram": 509_751_302,
    "v17_peer_only": 499_256_326,
    "v18_cross_attn": 511_896_635,
}
"""Counted from the original's code; v18_cross_attn as its run logged it."""

REPAIRED = {
    # One engram per token for four per window: the encoder's output layer is a quarter as large. Two gates of 512
    # vectors are new, the type embedding is gone.
    "v2_full": -(2 * 512 + 1) * 3 * 512 + 2 * 512 - 512,
    # Two blocks that read no engrams have no synapse: two networks 512 -> 64 -> 512 each.
    **dict.fromkeys(
        ("v8_bdh", "v9_learnable", "v11_no_p5", "v12_247m", "v13_low_sparsity", "v14_attn_sink"), -2 * 2 * 2 * 512 * 64
    ),
    # A norm that was never used, in every block.
    "v10_control": -4 * 2 * 512,
    "v16_peer_engram": -6 * 2 * 1024,
    "v17_peer_only": -6 * 2 * 1024,
    # The same, and a norm of the slots in every second block.
    "v18_cross_attn": -6 * 2 * 1024 + 3 * 2 * 1024,
}
"""Where the repaired form has other parameters than the original, and how many more."""


def parameters(preset: str, scale: str = "paper") -> int:
    return count_parameters(experiment(preset, scale).model)


@pytest.mark.parametrize("preset", ORIGINAL)
def test_parameters_are_the_originals_to_the_unit(preset: str) -> None:
    legacy = f"{preset}_legacy"
    assert parameters(legacy if legacy in PRESETS else preset) == ORIGINAL[preset]


@pytest.mark.parametrize("preset", ORIGINAL)
def test_repairs_cost_what_they_say(preset: str) -> None:
    assert parameters(preset) == ORIGINAL[preset] + REPAIRED.get(preset, 0)


def test_the_manifold_guided_network_as_built_has_the_originals_parameters() -> None:
    """Its plain form keeps the vocabulary and width of the scale, so that it compares with the other rows."""
    assert parameters("manifold_v18_legacy") == PRESETS["manifold_v18_legacy"].original_params == 20_705_679


def test_presets_carry_the_originals_count() -> None:
    carried = {p.name: p.original_params for p in PRESETS.values() if p.original_params and not p.legacy}
    assert carried == ORIGINAL


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("wide", "other"),
    [
        ("dense_wide_recurrence", "dense_recurrence"),
        ("dense_wide_recurrence", "dense_window"),
        ("dense_wide_memory", "dense_memory"),
        ("dense_wide_manifold", "manifold_v18"),
    ],
)
def test_controls_of_equal_size_are_within_one_percent(wide: str, other: str, scale: str) -> None:
    assert parameters(wide, scale) == pytest.approx(parameters(other, scale), rel=0.01)


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_wide_experts_are_as_large_as_the_narrow_ones(scale: str) -> None:
    assert parameters("v17_paper_peer", scale) == pytest.approx(parameters("v17_peer_only", scale), rel=0.05)
