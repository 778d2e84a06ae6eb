"""The audit must find each known leak, by the right check and in the right module, and nothing in honest models."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hrs.evaluation import AuditReport, AuditTest, audit
from hrs.evaluation.audit_training import random_tokens
from hrs.evaluation.leaks import LEAKS, BatchCentring, CausalMean, SkeletonLM
from hrs.models import Cache, ModelOutput, build_model
from hrs.presets import PRESETS, experiment


def failures(report: AuditReport) -> set[str]:
    return {test.name for test in report.tests if not test.passed}


def check(report: AuditReport, name: str) -> AuditTest:
    return next(test for test in report.tests if test.name == name)


@pytest.mark.parametrize("name", LEAKS)
def test_each_known_leak_fails_exactly_the_checks_it_must_in_the_module_that_leaks(name: str) -> None:
    torch.manual_seed(0)
    report = audit(LEAKS[name].build())
    assert failures(report) == LEAKS[name].fails, str(report)
    assert report.causal == (name == "control")
    for test in report.tests:
        if not test.passed and ("flip" in test.name or test.name == "batch_independence"):
            assert test.module in {"blocks.0.mixer", "blocks.1.mixer"} and test.positions, str(report)


def test_the_finite_mask_hides_below_the_tolerance_that_float32_needs() -> None:
    """The reason for float64 and exact equality: an ordinary float32 comparison calls this model causal."""
    torch.manual_seed(0)
    model = LEAKS["finite_mask"].build().eval()
    tokens = torch.randint(31, (2, 24))
    changed = torch.cat([tokens[:, :-1], (tokens[:, -1:] + 1) % 31], dim=1)
    torch.testing.assert_close(model(tokens).logits[:, :-1], model(changed).logits[:, :-1], atol=1e-4, rtol=0)
    assert check(audit(model), "suffix_flip").positions == tuple(range(23))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_causal_unless_they_reproduce_the_original(name: str) -> None:
    config = experiment(
        name, "micro", overrides={"model.max_seq_len": 32, "model.engram.window": 8, "model.n_layers": 3}
    ).model
    torch.manual_seed(0)
    report = audit(build_model(replace(config, vocab_size=64)))
    if not PRESETS[name].legacy:
        assert report.causal, str(report)
        return
    flip = check(report, "suffix_flip")
    assert failures(report) == {
        "suffix_flip", "suffix_flip_training", "prefix_consistency", "gradient", "cached_decode",
    }, str(report)  # fmt: skip
    assert flip.module is not None and flip.module.startswith(f"blocks.{config.engram.extract_after + 1}."), str(report)
    assert "which engram made" in flip.detail, str(report)
    assert flip.positions == tuple(range(31)), str(report)


# ---- leaks that only one check can see -------------------------------------------------------------------------------


class OnlyInTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True).expand_as(x) if self.training else torch.zeros_like(x)


class ShutGate(nn.Module):
    """Adds the mean over the sequence, through a gate that initialisation put at exactly zero."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate * x.mean(1, keepdim=True).expand_as(x)


class WindowMean(nn.Module):
    """Means of windows of 5, each visible from the last but ``early`` token of its window on."""

    def __init__(self, early: int) -> None:
        super().__init__()
        self.early = early

    def forward(self, x: Tensor) -> Tensor:
        sums = torch.zeros_like(x)
        for end in range(4, x.shape[1], 5):
            mean = x[:, end - 4 : end + 1].mean(1, keepdim=True)
            sums = sums + mean * (torch.arange(x.shape[1]) >= end - self.early)[None, :, None]
        return sums


def test_a_leak_in_training_mode_only_is_found() -> None:
    report = audit(SkeletonLM(lambda width: OnlyInTraining()))
    assert failures(report) == {"suffix_flip_training"}, str(report)
    assert check(report, "suffix_flip_training").module == "blocks.0.mixer"


def test_a_leak_behind_a_gate_at_exactly_zero_is_found_by_magnification() -> None:
    report = audit(SkeletonLM(lambda width: ShutGate()))
    assert failures(report) == {"suffix_flip", "suffix_flip_training"}, str(report)
    assert "weights x10," not in check(report, "suffix_flip").detail
    assert "with weights x10" in check(report, "suffix_flip").detail


def test_a_batch_leak_behind_a_zero_gate_is_found_by_magnification() -> None:
    class Gated(BatchCentring):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.gate * super().forward(x)

    assert failures(audit(SkeletonLM(lambda width: Gated()))) == {"batch_independence"}


def test_decoding_finds_a_summary_shown_one_token_early_at_every_window() -> None:
    """The windows of 5 do not divide the 24 tokens, so flips meet few of their ends; decoding meets them all."""
    assert audit(SkeletonLM(lambda width: WindowMean(early=0))).causal
    report = audit(SkeletonLM(lambda width: WindowMean(early=1)))
    assert check(report, "cached_decode").positions == (3, 8, 13, 18), str(report)


# ---- naming the module -----------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.unflatten(1, (-1, 4)).mean(2))  # [B, T / 4, d]


class Reader(nn.Module):
    def forward(self, x: Tensor, *, summary: Tensor) -> Tensor:
        return x + summary.mean(1, keepdim=True)


class Summarised(nn.Module):
    """Hands a summary of the sequence from one submodule to another by keyword, after an addition of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.before, self.reader = Encoder(), nn.Linear(16, 16), Reader()

    def forward(self, x: Tensor) -> Tensor:
        summary = self.encoder(nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 4))) + 1.0
        return self.reader(self.before(x), summary=summary)


class InItsOwnForward(nn.Module):
    """The leak is not in the causal submodule, whose input is already spoilt, but in the parent's arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CausalMean()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + x.mean(1, keepdim=True))


def test_the_reader_of_a_summary_is_named_with_its_carrier_and_its_maker() -> None:
    flip = check(audit(SkeletonLM(lambda width: Summarised())), "suffix_flip")
    assert flip.module == "blocks.0.mixer.reader"
    assert "carried by argument summary, which blocks.0.mixer.encoder made" in flip.detail


def test_a_leak_in_a_modules_own_arithmetic_is_not_blamed_on_its_children() -> None:
    flip = check(audit(SkeletonLM(lambda width: InItsOwnForward())), "suffix_flip")
    assert flip.module == "blocks.0.mixer"


def test_a_leak_outside_every_submodule_is_blamed_on_the_model() -> None:
    class Reversed(SkeletonLM):
        def encode(self, tokens: Tensor) -> ModelOutput:
            output = super().encode(tokens)
            output.hidden = output.hidden + output.hidden.flip(1)
            return output

    report = audit(Reversed(lambda width: CausalMean()))
    assert check(report, "suffix_flip").module == ""
    assert "through the model itself" in str(report)


# ---- what must not be mistaken for a leak, or for its absence --------------------------------------------------------


class Exploding(nn.Module):
    """Position-wise, but its ten-fold weights overflow float64."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(self.rate**4) * x.tanh()


def test_magnifications_that_overflow_are_skipped_and_said_to_be() -> None:
    report = audit(SkeletonLM(lambda width: Exploding()))
    assert report.causal, str(report)
    assert "weights x1; skipped x10, x100, where logits overflow" in check(report, "suffix_flip").detail


def test_noise_in_evaluation_is_named_for_what_it_is() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.randn_like(x)

    test = check(audit(SkeletonLM(lambda width: Noisy())), "repeatability")
    assert not test.passed and test.detail == "Two passes over the same tokens differ."


def test_a_model_that_goes_around_its_embedding_cannot_pass_the_gradient_check() -> None:
    class Around(SkeletonLM):
        @property
        def input_embedding(self) -> nn.Module:
            return self.unused

        def __init__(self) -> None:
            super().__init__(lambda width: CausalMean())
            self.unused = nn.Embedding(31, 16)

    assert failures(audit(Around())) == {"gradient"}


def test_a_model_without_any_dependence_on_its_input_passes() -> None:
    class Constant(SkeletonLM):
        def unembed(self, hidden: Tensor) -> Tensor:
            return hidden.new_zeros(*hidden.shape[:-1], self.vocab_size)

    assert audit(Constant(lambda width: CausalMean())).causal


def test_logits_that_are_not_finite_fail() -> None:
    model = SkeletonLM(lambda width: CausalMean())
    nn.init.constant_(model.norm.weight, float("nan"))
    report = audit(model)
    assert not any(test.passed for test in report.tests), str(report)
    assert check(report, "suffix_flip").detail == "The logits are not finite."


def test_noise_and_state_of_training_mode_are_not_leaks() -> None:
    class Noisy(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)
            self.register_buffer("mean", torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            noisy = self.dropout(x) + (torch.randn_like(x) if self.training else 0) + self.mean
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 1))
            return noisy

    report = audit(SkeletonLM(lambda width: Noisy()))
    assert report.causal, str(report)


def test_a_wrong_or_missing_decode_fails_that_check_alone() -> None:
    class Forgetful(SkeletonLM):
        def decode(self, tokens: Tensor, cache: Cache) -> ModelOutput:
            return self.forward(tokens)

    class Unfinished(SkeletonLM):
        def decode(self, tokens: Tensor, cache: Cache) -> ModelOutput:
            raise RuntimeError("no cache here")

    assert failures(audit(Forgetful(lambda width: CausalMean()))) == {"cached_decode"}
    report = audit(Unfinished(lambda width: CausalMean()))
    assert failures(report) == {"cached_decode"}
    assert "raises RuntimeError: no cache here" in check(report, "cached_decode").detail


def test_the_audited_model_and_the_random_generator_stay_as_they_were() -> None:
    model = SkeletonLM(lambda width: CausalMean()).train()
    model(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    before = copy.deepcopy({**model.state_dict(), **{f"{n}.grad": p.grad for n, p in model.named_parameters()}})
    generator = torch.get_rng_state()
    audit(model)
    after = {**model.state_dict(), **{f"{n}.grad": p.grad for n, p in model.named_parameters()}}
    assert model.training and torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_equal_seeds_give_equal_reports() -> None:
    torch.manual_seed(0)
    model = LEAKS["expert_choice"].build()
    assert audit(model, seed=3) == audit(model, seed=3)
    assert audit(model, seed=3) != audit(model, seed=4)


def test_a_report_survives_json_and_reads_well() -> None:
    report = AuditReport(
        [
            AuditTest(name="gradient", passed=True, detail="None."),
            AuditTest(
                name="suffix_flip", passed=False, detail="Some.", positions=(0, 1, 2, 5, 7, 8), module="blocks.1"
            ),
        ]
    )
    assert AuditReport.from_json(report.to_json()) == report
    assert str(report).splitlines() == [
        "NOT CAUSAL: 1 of 2 checks passed",
        "  pass  gradient: None.",
        "  FAIL  suffix_flip: Some.",
        "        positions 0-2, 5, 7-8",
        "        through blocks.1",
    ]


# ---- training on what cannot be learned ------------------------------------------------------------------------------


def test_random_tokens_expose_a_symmetric_convolution_and_clear_the_control() -> None:
    torch.manual_seed(0)
    caught = random_tokens(LEAKS["symmetric_convolution"].build(), seed=0, steps=60)
    assert not caught.passed and 23 not in caught.positions, caught.detail  # no one can see past the end
    cleared = random_tokens(LEAKS["control"].build(), seed=0, steps=60)
    assert cleared.passed, cleared.detail


@pytest.mark.slow
@pytest.mark.parametrize(("name", "passes"), [("full_hrs", True), ("full_hrs_legacy", False)])
def test_random_tokens_expose_prepended_engrams(name: str, passes: bool) -> None:
    overrides = {"model.max_seq_len": 16, "model.engram.window": 8, "model.dropout": 0.0}
    torch.manual_seed(0)
    model = build_model(replace(experiment(name, "micro", overrides=overrides).model, vocab_size=16))
    report = audit(model, random_token_training=True)
    test = check(report, "random_tokens")
    assert test.passed == passes, test.detail
    if not passes:  # the target of the last position lies outside of every summary
        assert test.positions == tuple(range(15)), test.positions
