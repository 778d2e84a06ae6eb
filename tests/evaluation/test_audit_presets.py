"""Every preset is audited: none sees the future but the copies of originals that did."""

import functools
from dataclasses import replace

import pytest
import torch

from hrs.config import ModelConfig
from hrs.evaluation import AuditReport, audit
from hrs.evaluation.audit_all import audit_presets, new_model
from hrs.evaluation.audit_probe import draw_probe
from hrs.models.base import LanguageModel
from hrs.presets import PRESETS, experiment

SMALL = {"model.max_seq_len": 16, "model.engram.window": 4, "model.n_layers": 3, "data.tokenizer": "bpe:257"}
LEAKING = {"suffix_flip", "suffix_flip_training", "prefix_consistency", "gradient", "cached_decode"}


@functools.cache
def report_of(model: ModelConfig) -> AuditReport:
    """Presets that differ in training only share a model."""
    return audit(new_model(model))


def in_use(name: str, overrides: dict[str, object]) -> LanguageModel:
    """What the audit makes of a new model before it looks for leaks."""
    model = new_model(experiment(name, "micro", overrides=overrides).model)
    return draw_probe(model, 0, model.max_seq_len).in_use


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_causal_unless_they_reproduce_a_leak(name: str) -> None:
    report = report_of(experiment(name, "micro", overrides=SMALL).model)
    failing = {test.name for test in report.tests if not test.passed}
    assert failing == (LEAKING if PRESETS[name].leaks else set()), str(report)


def test_only_legacy_presets_are_said_to_leak() -> None:
    leaking = {name for name, preset in PRESETS.items() if preset.leaks}
    legacy = {name for name, preset in PRESETS.items() if preset.legacy}
    routed = {"dual_head_router_legacy", "dual_head_router_sink_legacy", "full_core_legacy"}
    assert legacy - leaking == routed | {"v10_control_legacy", "v17_peer_only_legacy", "v18_cross_attn_legacy"}
    assert leaking < legacy


# ---- where the originals leaked --------------------------------------------------------------------------------------


def moved(name: str, changed: int) -> list[int]:
    """Positions whose logits move when the token ``changed`` does, of 32 in windows of 8."""
    overrides = {"model.max_seq_len": 32, "model.engram.window": 8, "data.tokenizer": "bpe:257"}
    model = in_use(name, overrides).double()
    tokens = torch.randint(257, (1, 32), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[0, changed] = (tokens[0, changed] + 1) % 257
    with torch.no_grad():
        differs = (model(tokens).logits != model(other).logits).any(-1)[0]
    return [i for i in differs.nonzero().flatten().tolist() if i < changed]


@pytest.mark.parametrize("changed", [31, 20, 5])
def test_engrams_in_front_of_the_text_showed_every_token_the_future(changed: int) -> None:
    assert moved("v16_peer_engram_legacy", changed) == list(range(changed))
    assert moved("v16_peer_engram", changed) == []


@pytest.mark.parametrize("changed", [31, 20, 5])
def test_replacement_showed_tokens_the_rest_of_their_own_window(changed: int) -> None:
    assert moved("v5_replace_legacy", changed) == list(range(changed // 8 * 8, changed))
    assert moved("v5_replace", changed) == []


def test_two_convolutions_of_seven_taps_showed_the_first_twelve_tokens_the_future() -> None:
    assert moved("v2_full_legacy", 31) == list(range(12))
    assert moved("v2_full", 31) == []


# ---- the audit of many -----------------------------------------------------------------------------------------------


def test_a_preset_that_is_not_what_its_label_says_is_unexpected() -> None:
    right, leaky = PRESETS["dense_baseline"], PRESETS["full_hrs_legacy"]
    wrong = [replace(right, leaks=True), replace(leaky, leaks=False)]
    verdicts = list(audit_presets([right, leaky, *wrong], overrides=SMALL))
    assert [v.as_expected for v in verdicts] == [True, True, False, False]
    lines = [" ".join(str(v).split()) for v in verdicts]
    assert lines[0] == "dense_baseline causal, as expected"
    assert lines[1].startswith("full_hrs_legacy NOT CAUSAL (suffix_flip, ") and lines[1].endswith("), as expected")
    assert lines[2] == "dense_baseline causal, expected a leak"
    assert lines[3].endswith("), expected none")


def test_presets_that_differ_in_training_only_share_one_audit() -> None:
    first, second = audit_presets([PRESETS["full_core"], PRESETS["dual_head_router_sink"]], overrides=SMALL)
    assert first.report is second.report


def buffers(model: LanguageModel, part: str) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith(part)]


@pytest.mark.parametrize("name", ["v18_cross_attn", "v18_cross_attn_legacy", "dense_memory"])
def test_training_passes_of_the_audit_fill_slots(name: str) -> None:
    model = in_use(name, SMALL)
    (slots,) = buffers(model, ".slots")
    assert not model.training
    assert (slots != 0).any(-1).all()
    distinct = len(slots.unique(dim=0))
    assert distinct == (1 if name.endswith("_legacy") else len(slots))


def test_training_passes_of_the_audit_show_losses() -> None:
    (average,) = buffers(in_use("v5_replace_legacy", SMALL), ".average")
    assert (average[:-1] > 0).all()  # what follows the last token of a window is not in it
