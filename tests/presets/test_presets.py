"""Lineage is data: presets differ from their parents by what they say, and compose with every scale."""

import pytest
import torch

from hrs.errors import HRSError
from hrs.models import build_model
from hrs.presets import (
    FAMILIES,
    PRESETS,
    SCALES,
    STUDIES,
    Preset,
    compare,
    experiment,
    get_preset,
    get_study,
    lineage,
)
from hrs.training.phases import ROLES, check_phases, phases_of

LEGACY = [preset for preset in PRESETS.values() if preset.legacy]
PLAIN = [preset for preset in PRESETS.values() if not preset.legacy]


def name_of(preset: Preset) -> str:
    return preset.name


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_changes_exactly_the_fields_it_names(preset: str, scale: str) -> None:
    parent = PRESETS[preset].parent
    if parent is None:
        return
    differences = {d.field for d in compare(experiment(parent, scale), experiment(preset, scale))}
    named = set(PRESETS[preset].changes) | (set(PRESETS[preset].paper) if scale == "paper" else set())
    follows = {"model.vocab_size"} if "data.tokenizer" in named else set()
    assert differences - {"preset"} - follows <= named
    assert differences - {"preset"}, "a preset that changes nothing is not an ablation"


def test_every_named_change_is_one_at_the_scale_it_is_meant_for() -> None:
    """Nothing is set to what the parent has already, except by copies that share one list of confounds."""
    for preset in PLAIN:
        if preset.parent:
            differences = compare(experiment(preset.parent, "paper"), experiment(preset.name, "paper"))
            assert {d.field for d in differences} - {"preset"} == {*preset.changes, *preset.paper}, preset.name


def test_lineage_runs_from_the_root() -> None:
    names = [p.name for p in lineage("full_hrs_trc_legacy")]
    assert names[0] == "dense_baseline"
    assert names[-2:] == ["full_hrs_trc", "full_hrs_trc_legacy"]


def test_families_hold_every_preset_once() -> None:
    names = [preset.name for family in FAMILIES.values() for preset in family]
    assert len(names) == len(set(names))
    assert names == list(PRESETS)


# ---- the original's protocol -----------------------------------------------------------------------------------------


def test_only_legacy_presets_use_the_original_confounds() -> None:
    for name, preset in PRESETS.items():
        config = experiment(name, "paper")
        model = config.model
        assert config.training.optimizer.decay_vectors == preset.legacy, name
        assert (config.training.validation_windows > 0) == preset.legacy, name
        assert (config.training.label_smoothing > 0) == (preset.legacy and model.routed), name
        assert model.tiers.renormalise_gate == (preset.legacy and model.routed and "expert" in model.tiers.names), name
        if not preset.legacy:
            assert model.engram.kind != "prefix" and not model.engram.as_original, name
            assert model.loss_scales != "original" and not model.peer.idle_norm, name
            assert model.engram.dropout > 0 and model.category.labels == "exact", name


@pytest.mark.parametrize("preset", LEGACY, ids=name_of)
def test_a_legacy_preset_is_a_copy_of_a_repaired_one(preset: Preset) -> None:
    plain = PRESETS[preset.name.removesuffix("_legacy")]
    assert preset.parent == plain.name
    assert plain.repaired and not plain.legacy and not plain.leaks
    if experiment(preset.name).model.family == "hrs":
        assert preset.original_params == plain.original_params


@pytest.mark.parametrize("preset", [p for p in LEGACY if p.name != "manifold_v18_legacy"], ids=name_of)
def test_the_original_chose_its_models_on_ten_micro_batches(preset: Preset) -> None:
    training = experiment(preset.name, "paper").training
    assert preset.original_micro_batch is not None
    assert training.validation_windows == 10 * preset.original_micro_batch
    assert training.batch_sequences % preset.original_micro_batch == 0


@pytest.mark.parametrize(
    ("presets", "tokens_per_step", "steps"),
    [
        ("full_hrs full_hrs_refined full_hrs_trc v2_full v3_full v4_full", 24_576, 50_000),
        ("v4_1024 v5_replace v6_gate", 24_576, 38_000),
        ("v8_bdh v10_control", 16_384, 38_000),
        (
            "v9_learnable v11_no_p5 v12_247m v13_low_sparsity v14_attn_sink v15_vanilla_route v16_peer_engram "
            "v17_peer_only v18_cross_attn",
            16_384,
            50_000,
        ),
    ],
)
def test_legacy_rows_train_at_paper_scale_as_the_original_did(presets: str, tokens_per_step: int, steps: int) -> None:
    for name in presets.split():
        config = experiment(f"{name}_legacy", "paper")
        assert (config.tokens_per_step, config.training.steps) == (tokens_per_step, steps), name
        assert round(config.training.schedule.warmup_frac * steps) == 1000, name


def test_plain_rows_all_read_as_much_at_paper_scale() -> None:
    for preset in PLAIN:
        config = experiment(preset.name, "paper")
        assert (config.tokens_per_step, config.training.steps) == (24_576, 50_000), preset.name


def test_the_paper_scale_is_the_original_setting() -> None:
    config = experiment("full_hrs", "paper")
    assert (config.model.max_seq_len, config.training.batch_sequences, config.training.steps) == (512, 48, 50_000)
    assert (config.model.vocab_size, config.data.tokenizer) == (50257, "gpt2")
    assert config.training.schedule.warmup_frac * config.training.steps == 1000
    wide = experiment("v17_peer_only", "paper").model
    assert (wide.n_layers, wide.d_model, wide.n_heads, wide.d_ff) == (6, 1024, 16, 4096)
    assert (wide.peer.sub_keys, wide.peer.n_heads, wide.peer.top_k) == (512, 8, 16)


# ---- phases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "steps", "phases"),
    [
        ("full_core", 50_000, [10_000, 10_000, 10_000, 20_000]),
        ("full_hrs", 50_000, [8000, 8000, 10_000, 12_000, 12_000]),
        ("v2_full", 50_000, [12_000, 12_000, 14_000, 12_000]),
        ("v4_full", 50_000, [8000, 8000, 10_000, 12_000, 12_000]),
        ("v5_replace", 38_000, [8000, 8000, 10_000, 12_000]),
        ("v6_gate", 38_000, [8000, 8000, 10_000, 12_000]),
        ("v7_full", 38_000, [8000, 8000, 10_000, 12_000]),
        ("v8_bdh", 38_000, [8000, 8000, 10_000, 12_000]),
        ("v9_learnable", 50_000, [8000, 8000, 10_000, 12_000, 12_000]),
        ("v10_control", 38_000, [8000, 8000, 10_000, 12_000]),
        ("v11_no_p5", 50_000, [8000, 8000, 10_000, 24_000]),
        ("v18_cross_attn", 50_000, [8000, 8000, 10_000, 24_000]),
    ],
)
def test_phases_are_those_of_the_protocol(preset: str, steps: int, phases: list[int]) -> None:
    lengths = [phase.end - phase.start for phase in phases_of(experiment(preset, "paper").training.phases, steps)]
    assert lengths == phases


def multipliers(preset: str, group: str) -> list[float]:
    return [dict(phase.multipliers)[group] for phase in experiment(preset, "paper").training.phases]


def test_multipliers_are_those_of_the_protocol() -> None:
    assert multipliers("v16_peer_engram", "expert") == [0.01, 0.1, 1.0, 0.3]
    assert multipliers("v9_learnable", "engram") == [0, 0, 0, 1, 0]
    assert multipliers("v4_full", "engram") == [0, 0, 0, 1, 0.5]
    assert multipliers("v2_full", "expert") == [0.1, 1.0, 0.3, 0.5]
    assert multipliers("v2_full", "engram") == [0, 0, 1, 0.5]
    assert multipliers("v7_full", "test_time_memory") == [0, 0, 0.5, 1]
    assert multipliers("v10_control", "loss_scales") == [0.1] * 4


@pytest.mark.parametrize("preset", PRESETS)
def test_phases_name_groups_and_parameters_that_exist(preset: str) -> None:
    config = experiment(preset, "micro")
    with torch.device("meta"):
        model = build_model(config.model)
    check_phases(phases_of(config.training.phases, 20), model)
    assert set(model.parameter_groups()) <= set(ROLES)
    for phase in config.training.phases:  # a group without a multiplier would learn at full rate
        assert set(model.parameter_groups()) <= {group for group, _ in phase.multipliers}, phase.name


# ---- relative values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_relative_changes_hold_at_every_scale(scale: str) -> None:
    plain, long, deep = (experiment(name, scale) for name in ("v4_full", "v6_gate", "v13_low_sparsity"))
    assert long.model.max_seq_len == 2 * plain.model.max_seq_len
    assert long.tokens_per_step == plain.tokens_per_step
    assert 2 * deep.model.n_layers == 3 * plain.model.n_layers


@pytest.mark.parametrize("scale", ["micro", "tiny", "small"])
def test_every_row_has_the_width_of_its_scale(scale: str) -> None:
    assert {experiment(name, scale).model.d_model for name in PRESETS} == {SCALES[scale]["model.d_model"]}


# ---- overrides and names ---------------------------------------------------------------------------------------------


def test_overrides_win_over_the_preset() -> None:
    assert experiment("full_hrs", "micro", overrides={"model.engram.kind": "none"}).model.engram.kind == "none"
    assert experiment("v12_247m", "micro", overrides={"model.n_layers": "4"}).model.n_layers == 4


def test_the_vocabulary_follows_the_tokenizer() -> None:
    assert experiment("dense_baseline", "tiny", overrides={"data.tokenizer": "bpe:700"}).model.vocab_size == 700
    with pytest.raises(HRSError, match="cannot be overridden"):
        experiment("dense_baseline", "tiny", overrides={"model.vocab_size": "9"})
    with pytest.raises(HRSError, match="unknown tokenizer 'bpe:200'"):
        experiment("dense_baseline", "tiny", overrides={"data.tokenizer": "bpe:200"})


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(HRSError, match="did you mean full_hrs"):
        get_preset("full_hr")
    with pytest.raises(HRSError, match="micro, tiny, small, paper"):
        experiment("full_hrs", "huge")
    with pytest.raises(HRSError, match="v1"):
        get_study("v0")


# ---- studies ---------------------------------------------------------------------------------------------------------


def test_the_first_study_is_the_eight_rows_and_its_extension_the_three_that_leaked() -> None:
    v1 = get_study("v1")
    assert len(v1) == 8
    assert get_study("v1_with_legacy") == (
        *v1, "full_hrs_legacy", "full_hrs_refined_legacy", "full_hrs_trc_legacy",
    )  # fmt: skip


def test_studies_begin_with_the_baseline_and_name_each_preset_once() -> None:
    for name, study in STUDIES.items():
        assert study[0] == "dense_baseline", name
        assert len(set(study)) == len(study), name
        assert set(study) <= set(PRESETS), name


def test_every_preset_is_in_a_study() -> None:
    assert {preset for study in STUDIES.values() for preset in study} == set(PRESETS)
