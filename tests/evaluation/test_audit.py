"""The audit must find each known leak, by the right check and in the right module, and nothing in honest models."""

import copy
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from hrs.evaluation import AuditReport, AuditTest, audit
from hrs.evaluation.audit_training import random_tokens
from hrs.evaluation.leaks import LEAKS, BatchCentring, CausalMean, HistoryLM, SkeletonLM, TopicLM
from hrs.models import Cache, ModelOutput, WindowContext, build_model
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
    assert report.causal == (not LEAKS[name].reason) == (not LEAKS[name].fails)
    for test in report.tests:
        if not test.passed and test.name not in ("prefix_consistency", "gradient", "cached_decode"):
            assert test.module is not None and test.positions, str(report)
            assert test.module.rpartition(".")[2] == LEAKS[name].through, str(report)


def test_the_finite_mask_hides_below_the_tolerance_that_float32_needs() -> None:
    """The reason for float64 and exact equality: an ordinary float32 comparison calls this model causal."""
    torch.manual_seed(0)
    model = LEAKS["finite_mask"].build().eval()
    tokens = torch.randint(31, (2, 24))
    changed = torch.cat([tokens[:, :-1], (tokens[:, -1:] + 1) % 31], dim=1)
    torch.testing.assert_close(model(tokens).logits[:, :-1], model(changed).logits[:, :-1], atol=1e-4, rtol=0)
    assert check(audit(model), "suffix_flip").positions == tuple(range(23))


ONE_OF_EACH_KIND = (
    "dense_baseline", "full_hrs_trc", "full_hrs_recurrence", "full_hrs_running", "v2_full", "v5_replace", "v6_gate",
    "v7_full", "v17_peer_only", "v18_cross_attn", "full_hrs_legacy", "v5_replace_legacy", "v18_cross_attn_legacy",
)  # fmt: skip


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_fresh_presets_are_causal_unless_they_reproduce_a_leak(name: str) -> None:
    """The audit itself must find what only training opens, and name the block that reads the leak."""
    config = experiment(
        name, "micro", overrides={"model.max_seq_len": 32, "model.engram.window": 8, "model.n_layers": 3}
    ).model
    torch.manual_seed(0)
    report = audit(build_model(replace(config, vocab_size=64)))
    assert report.causal != PRESETS[name].leaks, str(report)
    if config.category.enabled:
        assert check(report, "category_blindness").passed
    if report.causal:
        return
    assert {"suffix_flip", "suffix_flip_training"} <= failures(report) <= {
        "suffix_flip", "suffix_flip_training", "prefix_consistency", "gradient", "cached_decode",
    }, str(report)  # fmt: skip
    flip = check(report, "suffix_flip")
    if config.engram.kind == "prefix":
        reader = f"blocks.{config.engram.extraction_block(config.n_layers) + 1}."
        assert flip.module is not None and flip.module.startswith(reader), str(report)
        assert "which engram.encoder made" in flip.detail or config.engram.synapse, str(report)
        assert flip.positions == tuple(range(31)) or config.conv_blocks, str(report)
    else:
        assert "after training passes" in flip.detail, str(report)


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
        def encode(self, tokens: Tensor, context: WindowContext | None = None) -> ModelOutput:
            output = super().encode(tokens, context)
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


# ---- what stands before a window, and what it is about ---------------------------------------------------------------


def test_every_check_gives_the_model_its_history_and_its_topic() -> None:
    """Ids all over the vocabulary, unknown ones among them; and evaluation never goes without."""

    class Demanding(HistoryLM):
        n_categories = 3
        seen: ClassVar[list[Tensor]] = []

        def embed(self, tokens: Tensor, context: WindowContext) -> Tensor:
            assert context.history is not None and context.history.shape == (len(tokens), self.history_tokens)
            self.seen.append(context.history)
            return super().embed(tokens, context)

        def encode(self, tokens: Tensor, context: WindowContext | None = None) -> ModelOutput:
            assert context is not None
            return super().encode(tokens, context)

    report = audit(Demanding(lambda width: nn.Linear(width, width)), random_token_training=False)
    assert report.causal, str(report)
    ids = torch.cat(Demanding.seen)
    assert (ids[:, :3] == -1).any() and (ids[:, 3:] >= 0).all() and len(ids.unique()) > 8


def test_decoding_that_forgets_the_history_fails_that_check_alone() -> None:
    class Forgetful(HistoryLM):
        def new_cache(self, batch_size: int, history: Tensor | None = None) -> Cache:
            return super().new_cache(batch_size)

    assert failures(audit(Forgetful(lambda width: nn.Linear(width, width)))) == {"cached_decode"}


def test_a_model_that_learns_from_its_history_is_not_taken_to_see_the_future() -> None:
    """Its history has as many ids as its window, and the gradient reaches them all."""

    class Long(HistoryLM):
        history_tokens = 24

    report = audit(Long(lambda width: nn.Linear(width, width)))
    assert report.causal, str(report)


@pytest.mark.parametrize("gate", [0.0, 1e-9])
def test_a_topic_read_in_training_alone_is_found_also_behind_a_gate(gate: float) -> None:
    class InTraining(TopicLM):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.full((), gate))

        def embed(self, tokens: Tensor, context: WindowContext) -> Tensor:
            bare = SkeletonLM.embed(self, tokens, context)
            return bare + self.gate * (super().embed(tokens, context) - bare) if self.training else bare

    report = audit(InTraining())
    assert failures(report) == {"category_blindness"}, str(report)
    assert f"in training mode moves 24 of 24 positions, with weights x{1 if gate else 10}" in str(report)


def test_a_topic_that_only_a_loss_reads_is_no_leak() -> None:
    class Judged(SkeletonLM):
        n_categories = 5

        def encode(self, tokens: Tensor, context: WindowContext | None = None) -> ModelOutput:
            output = super().encode(tokens, context)
            output.category_logits = output.hidden.mean(1)[:, : self.n_categories]
            if self.training and context is not None and context.category is not None:
                loss = nn.functional.cross_entropy(output.category_logits, context.category)
                output.losses["category"] = loss
            return output

    report = audit(Judged(lambda width: CausalMean()))
    assert report.causal and check(report, "category_blindness").passed, str(report)


def test_models_without_topics_are_not_asked_about_them() -> None:
    assert "category_blindness" not in str(audit(SkeletonLM(lambda width: CausalMean())))


def test_random_token_training_has_random_history_and_lets_the_model_remember() -> None:
    class Remembering(HistoryLM):
        kept: ClassVar[list[int]] = []

        def embed(self, tokens: Tensor, context: WindowContext) -> Tensor:
            assert context.history is not None and int(context.history.max()) < 8
            return super().embed(tokens, context)

        def keep_observations(self) -> None:
            self.kept.append(1)

    torch.manual_seed(0)
    test = random_tokens(Remembering(lambda width: nn.Linear(width, width)), seed=0, steps=20)
    assert test.passed, test.detail
    assert len(Remembering.kept) == 20


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
