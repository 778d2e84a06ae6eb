"""Lineage is data: presets differ from their parents by what they say, and compose with every scale."""

import pytest

from hrs.errors import HRSError
from hrs.presets import PRESETS, SCALES, compare, experiment, get_preset, get_study, lineage


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_changes_exactly_the_fields_it_names(preset: str, scale: str) -> None:
    parent = PRESETS[preset].parent
    if parent is None:
        return
    differences = {d.field for d in compare(experiment(parent, scale), experiment(preset, scale))}
    named = set(PRESETS[preset].changes)
    assert differences - {"preset"} <= named
    assert differences - {"preset"}, "a preset that changes nothing is not an ablation"


def test_lineage_runs_from_the_root() -> None:
    names = [p.name for p in lineage("full_hrs_trc_legacy")]
    assert names[0] == "dense_baseline"
    assert names[-2:] == ["full_hrs_trc", "full_hrs_trc_legacy"]


def test_only_legacy_presets_use_the_original_confounds() -> None:
    for name, preset in PRESETS.items():
        config = experiment(name, "paper")
        original = (
            config.training.label_smoothing > 0,
            config.model.engram.kind == "prefix",
            config.training.optimizer.decay_vectors,
            config.model.tiers.renormalise_gate,
            config.training.validation_windows > 0,
        )
        assert all(original) if preset.legacy else not any(original), name


def test_the_paper_scale_is_the_original_setting() -> None:
    config = experiment("full_hrs", "paper")
    assert (config.model.max_seq_len, config.training.batch_sequences, config.training.steps) == (512, 48, 50_000)
    assert (config.model.vocab_size, config.data.tokenizer) == (50257, "gpt2")
    assert config.training.schedule.warmup_frac * config.training.steps == 1000
    assert [round(p.frac * config.training.steps) for p in config.training.phases] == [8000, 8000, 10000, 12000, 12000]


def test_overrides_win_over_the_preset() -> None:
    assert experiment("full_hrs", "micro", overrides={"model.engram.kind": "none"}).model.engram.kind == "none"


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


def test_the_first_study_is_the_eight_rows_and_its_extension_the_legacy_ones() -> None:
    assert len(get_study("v1")) == 8
    assert get_study("v1")[0] == "dense_baseline"
    assert set(get_study("v1_with_legacy")) == set(PRESETS)
