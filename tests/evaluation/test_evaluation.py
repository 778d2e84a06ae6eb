"""Evaluation against slow, obvious references on small texts."""

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from torch import Tensor, nn
from torch.nn import functional as F

from hrs.config import DataConfig, ModelConfig
from hrs.data import TokenStore, open_tokens
from hrs.data.windows import history
from hrs.errors import HRSError
from hrs.evaluation import Evaluation, evaluate, perplexity
from hrs.evaluation.diagnostics import block_outputs, effective_rank, flops_per_token
from hrs.evaluation.leaks import CausalMean, HistoryLM, SkeletonLM
from hrs.models import LanguageModel, ModelOutput, WindowContext, build_model
from hrs.presets import experiment

T = 16


class UnigramLM(SkeletonLM):
    """Predicts the same distribution everywhere."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(lambda width: CausalMean(), vocab_size=len(logits), max_seq_len=T)
        self.register_buffer("constant", logits)

    def unembed(self, hidden: Tensor) -> Tensor:
        return self.constant.expand(*hidden.shape[:-1], -1)


@pytest.fixture(scope="module")
def model(small_store: TokenStore) -> LanguageModel:
    torch.manual_seed(0)
    return SkeletonLM(lambda width: CausalMean(), vocab_size=small_store.vocab_size, max_seq_len=T)


@pytest.fixture(scope="module")
def evaluation(model: LanguageModel, small_store: TokenStore) -> Evaluation:
    return evaluate(model, small_store)


def test_a_uniform_model_costs_exactly_the_logarithm_of_the_vocabulary(small_store: TokenStore) -> None:
    evaluation = evaluate(UnigramLM(torch.zeros(small_store.vocab_size)), small_store)
    text, log_v = small_store.validation, math.log(small_store.vocab_size)
    n_text = len(text) - 1 - len(text.titles)  # without one end of text per document
    assert evaluation.n_tokens == len(text) - 1
    assert evaluation.nats_per_token == pytest.approx(log_v, rel=1e-6)
    assert evaluation.perplexity == pytest.approx(small_store.vocab_size, rel=1e-5)
    assert evaluation.bits_per_byte == pytest.approx(log_v / math.log(2) * n_text / text.n_bytes.sum(), rel=1e-6)
    assert math.log(evaluation.word_perplexity) == pytest.approx(log_v * n_text / text.n_words.sum(), rel=1e-6)
    np.testing.assert_allclose(evaluation.loss_by_position, np.full(T, log_v), rtol=1e-6)


def test_text_without_spaces_and_hopeless_losses_have_no_perplexity_but_whole_files(tmp_path: Path) -> None:
    """Words between spaces do not exist in every language: no warning, no infinity, strict JSON, the same when read."""
    rows = [{"text": chr(0x4E00 + i) * 400, "split": s} for i, s in enumerate(("train", "train", "validation", "test"))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = open_tokens(DataConfig(corpus=f"jsonl:{tmp_path}", tokenizer="bpe:257"), tmp_path / "tokens")
    logits = torch.zeros(store.vocab_size)
    logits[store.eot_id] = 2000.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluation = evaluate(UnigramLM(logits), store)
        evaluation.save(tmp_path)
    assert evaluation.perplexity is None and evaluation.word_perplexity is None
    assert not {"perplexity", "word_perplexity"} & evaluation.metrics().keys()
    assert all(math.isfinite(value) for value in evaluation.metrics().values())
    text = (tmp_path / "evaluation.json").read_text()
    assert "Infinity" not in text and "NaN" not in text
    assert Evaluation.load(tmp_path).metrics() == evaluation.metrics()


def test_a_unigram_model_costs_what_counting_says(small_store: TokenStore) -> None:
    logits = torch.randn(small_store.vocab_size, generator=torch.Generator().manual_seed(0))
    nats = -logits.double().log_softmax(0).numpy()
    text = small_store.test
    evaluation = evaluate(UnigramLM(logits), small_store, "test", stride_frac=0.3)
    assert evaluation.nats_per_token == pytest.approx(nats[text.tokens[1:]].mean(), rel=1e-6)
    rows = evaluation.documents.to_pylist()
    assert [row["document"] for row in rows] == list(range(len(text.titles)))
    for i, row in enumerate(rows):
        tokens = text.tokens[text.document_starts[i] : text.document_starts[i + 1]]
        assert row["nats"] == pytest.approx(nats[tokens].sum(), rel=1e-6)
        assert row["text_nats"] == pytest.approx(nats[tokens[tokens != small_store.eot_id]].sum(), rel=1e-6)
        assert (row["tokens"], row["bytes"], row["words"]) == (len(tokens), text.n_bytes[i], text.n_words[i])
        assert (row["title"], row["topic"]) == (text.titles[i], text.titles[i].split()[0])


@pytest.mark.parametrize("stride_frac", [1.0, 0.5, 0.3])
def test_every_target_is_scored_in_the_first_window_that_reaches_it(
    model: LanguageModel, small_store: TokenStore, stride_frac: float
) -> None:
    """The reference goes target by target: the first window of the stride's grid that contains it."""
    tokens = torch.from_numpy(small_store.validation.tokens.astype(np.int64))
    n, stride = len(tokens), round(stride_frac * T)
    starts = [min(s, n - 1 - T) for s in range(0, n - 1 - T + stride, stride)]
    with torch.no_grad():
        losses = {
            s: F.cross_entropy(
                model.double()(tokens[s : s + T][None]).logits[0], tokens[s + 1 : s + T + 1], reduction="none"
            )
            for s in starts
        }
    model.float()
    expected = [next(losses[s][p - s - 1].item() for s in starts if s < p <= s + T) for p in range(1, n)]
    evaluation = evaluate(model, small_store, stride_frac=stride_frac, batch_windows=5)
    assert evaluation.nats_per_token == pytest.approx(np.mean(expected), rel=1e-6)
    by_document = [sum(expected[a - 1 : b - 1]) for a, b in zip(*_bounds(small_store), strict=True)]
    np.testing.assert_allclose(evaluation.documents["nats"].to_numpy(), by_document, rtol=1e-6)
    by_position = torch.stack([losses[s] for s in starts]).mean(0).numpy()
    np.testing.assert_allclose(evaluation.loss_by_position, by_position, rtol=1e-5)


def _bounds(store: TokenStore) -> tuple[list[int], list[int]]:
    starts = store.validation.document_starts.tolist()
    return starts[:-1], starts[1:]


def test_documents_add_up_to_the_total(evaluation: Evaluation) -> None:
    table = evaluation.documents
    assert table["tokens"].to_numpy().sum() == evaluation.n_tokens
    assert table["nats"].to_numpy().sum() == pytest.approx(evaluation.nats_per_token * evaluation.n_tokens, rel=1e-12)
    bits = table["text_nats"].to_numpy().sum() / math.log(2)
    assert evaluation.bits_per_byte == pytest.approx(bits / table["bytes"].to_numpy().sum(), rel=1e-12)
    words = table["words"].to_numpy().sum()
    assert evaluation.word_perplexity == pytest.approx(np.exp(table["text_nats"].to_numpy().sum() / words), rel=1e-12)


def test_the_batch_size_changes_nothing_but_rounding(
    model: LanguageModel, small_store: TokenStore, evaluation: Evaluation
) -> None:
    again = evaluate(model, small_store, batch_windows=1)
    np.testing.assert_allclose(again.documents["nats"].to_numpy(), evaluation.documents["nats"].to_numpy(), rtol=1e-5)
    np.testing.assert_allclose(again.effective_rank, evaluation.effective_rank, rtol=1e-4)


def test_chunked_logits_change_nothing_but_rounding(
    model: LanguageModel, small_store: TokenStore, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 0

    def unembed(hidden: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, hidden.shape[0])
        return type(model).unembed(model, hidden)

    monkeypatch.setattr(perplexity, "_LOGITS_AT_ONCE", 7 * model.vocab_size + 3)
    monkeypatch.setattr(model, "unembed", unembed)
    monkeypatch.setattr(perplexity, "flops_per_token", lambda model, tokens, context: 0.0)
    chunked = evaluate(model, small_store)
    assert largest == 7
    assert chunked.nats_per_token == pytest.approx(evaluation.nats_per_token, rel=1e-6)


def test_a_text_shorter_than_the_context_is_one_window(small_store: TokenStore) -> None:
    text = small_store.validation
    end = int(text.document_starts[1])
    short = replace(
        text,
        tokens=text.tokens[:end],
        document_starts=text.document_starts[:2],
        topic_ids=text.topic_ids[:1],
        n_bytes=text.n_bytes[:1],
        n_words=text.n_words[:1],
        documents=text.documents.slice(0, 1),
    )
    model = SkeletonLM(lambda width: CausalMean(), vocab_size=small_store.vocab_size, max_seq_len=end + 5)
    evaluation = evaluate(model, replace(small_store, validation=short))
    assert evaluation.n_tokens == len(evaluation.loss_by_position) == end - 1
    assert evaluation.loss_by_position.mean() == pytest.approx(evaluation.nats_per_token, rel=1e-12)


def test_saved_and_loaded_again_it_is_the_same(evaluation: Evaluation, tmp_path: Path) -> None:
    evaluation.save(tmp_path / "run")
    loaded = Evaluation.load(tmp_path / "run")
    assert loaded.metrics() == evaluation.metrics()
    assert loaded.documents.equals(evaluation.documents)
    np.testing.assert_array_equal(loaded.loss_by_position, evaluation.loss_by_position)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["documents.arrow", "evaluation.json"]


@pytest.mark.parametrize("spoil", ["missing", "cut"])
def test_an_unreadable_evaluation_says_what_to_do(evaluation: Evaluation, tmp_path: Path, spoil: str) -> None:
    evaluation.save(tmp_path)
    if spoil == "missing":
        (tmp_path / "documents.arrow").unlink()
    else:
        (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(HRSError, match="evaluate the run again"):
        Evaluation.load(tmp_path)


def test_a_loss_that_is_not_finite_is_an_error_not_a_number(small_store: TokenStore) -> None:
    with pytest.raises(HRSError, match="not finite: training diverged"):
        evaluate(UnigramLM(torch.full((small_store.vocab_size,), float("nan"))), small_store)


def test_a_model_of_a_smaller_vocabulary_is_refused(small_store: TokenStore) -> None:
    with pytest.raises(HRSError, match="the model only 31"):
        evaluate(SkeletonLM(lambda width: CausalMean()), small_store)


def test_the_model_keeps_its_mode_and_has_no_hooks_left(model: LanguageModel, small_store: TokenStore) -> None:
    model.train()
    evaluate(model, small_store)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.eval()


# ---- routing, rank, work ---------------------------------------------------------------------------------------------


def test_routing_is_averaged_over_every_window(small_store: TokenStore) -> None:
    """Against one pass over all windows at once; the batches are of unequal size."""
    torch.manual_seed(0)
    config = experiment("dual_head_router", "micro", overrides={"model.max_seq_len": T, "model.n_layers": 2}).model
    model = build_model(replace(config, vocab_size=small_store.vocab_size)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    evaluation = evaluate(model, small_store, stride_frac=1.0, batch_windows=7)
    tokens, n = torch.from_numpy(small_store.validation.tokens.astype(np.int64)), len(small_store.validation)
    starts = [min(s, n - 1 - T) for s in range(0, n - 1, T)]
    assert len(starts) % 7
    with torch.no_grad():
        metrics = model(torch.stack([tokens[s : s + T] for s in starts])).metrics
    np.testing.assert_allclose(evaluation.tier_share, metrics["tier_share"], rtol=1e-4)
    np.testing.assert_allclose(evaluation.routing_entropy, metrics["routing_entropy"], rtol=1e-4)
    numbers = evaluation.metrics()
    assert sum(numbers[f"tier_share_{i}"] for i in range(4)) == pytest.approx(1, abs=1e-5)
    assert numbers["routing_entropy"] == pytest.approx(np.mean(evaluation.routing_entropy))
    assert len(evaluation.effective_rank_projected) == 2
    assert evaluation.effective_rank_projected != evaluation.effective_rank


def test_metrics_of_a_model_without_router_name_no_routing(evaluation: Evaluation) -> None:
    assert set(evaluation.metrics()) == {
        "nats_per_token", "perplexity", "bits_per_byte", "word_perplexity", "flops_per_token", "effective_rank",
    }  # fmt: skip


@given(rank=st.integers(1, 8), seed=st.integers(0, 99))
@examples(20)
def test_equal_singular_values_have_their_number_as_effective_rank(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(20, rank, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(10, rank, generator=generator, dtype=torch.float64)).Q
    # Singular values are off by at most about 1,000 roundings (3e-13). The entropy of equal shares is stationary, and
    # each of the other values adds at most -s ln s with s = 3e-13: 10 times 9e-12.
    assert effective_rank(3 * left @ right.T) == pytest.approx(rank, rel=1e-9)


def test_effective_rank_does_not_centre() -> None:
    """Equal rows are of rank one; centred, they would vanish."""
    assert effective_rank(torch.ones(50, 7)) == pytest.approx(1.0)
    assert effective_rank(torch.zeros(5, 3)) == 0.0


def test_ranks_are_of_raw_block_outputs_at_every_target(
    model: LanguageModel, small_store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stride 1.0 and fewer targets than the sample, the rows are all states, each once."""
    monkeypatch.setattr(perplexity, "RANK_ROWS", 10**6)
    tokens, n = torch.from_numpy(small_store.validation.tokens.astype(np.int64)), len(small_store.validation)
    states: list[list[Tensor]] = [[], []]
    done = 0
    with torch.no_grad(), block_outputs(model) as outputs:
        for start in [min(s, n - 1 - T) for s in range(0, n - 1, T)]:
            model(tokens[start : start + T][None])
            for collected, stream in zip(states, outputs, strict=True):
                collected.append(stream[0, done - start :])
            done = start + T
    expected = [effective_rank(torch.cat(rows)) for rows in states]
    assert torch.cat(states[0]).shape[0] == n - 1
    np.testing.assert_allclose(evaluate(model, small_store, stride_frac=1.0).effective_rank, expected, rtol=1e-4)


def test_flops_are_those_of_the_matrix_products_attention_included() -> None:
    config = ModelConfig(vocab_size=50, n_layers=3, n_heads=2, d_model=32, d_ff=48, max_seq_len=T, dropout=0.0)
    per_layer = 2 * 32 * (4 * 32 + 2 * 48) + 2 * 2 * T * 32  # projections, MLP; scores and mixture over all T keys
    measured = flops_per_token(build_model(config).eval(), torch.zeros(2, T, dtype=torch.long))
    assert measured == 3 * per_layer + 2 * 32 * 50


# ---- history, experts, projections -----------------------------------------------------------------------------------


def test_every_window_is_scored_with_what_stands_before_it(small_store: TokenStore) -> None:
    """Reference: one window at a time, its history read off the text; the model moves with its history."""
    torch.manual_seed(0)
    model = HistoryLM(lambda width: nn.Linear(width, width), vocab_size=small_store.vocab_size, max_seq_len=T).double()
    text, n = small_store.validation, len(small_store.validation)
    tokens, starts = torch.from_numpy(text.tokens.astype(np.int64)), [min(s, n - 1 - T) for s in range(0, n - 1, T)]
    rows = [torch.from_numpy(history(text, np.array([s]), model.history_tokens)) for s in starts]
    losses, bare, done = [], [], 0
    with torch.no_grad():
        for start, row in zip(starts, rows, strict=True):
            for found, context in ((losses, WindowContext(row)), (bare, None)):
                logits = model(tokens[None, start : start + T], context).logits[0, done - start :]
                found.append(F.cross_entropy(logits, tokens[done + 1 : start + T + 1], reduction="none"))
            done = start + T
    expected, without = float(torch.cat(losses).mean()), float(torch.cat(bare).mean())
    assert evaluate(model, small_store, stride_frac=1.0).nats_per_token == pytest.approx(expected, rel=1e-12)
    assert abs(expected - without) > 1e-4


class Counting(SkeletonLM):
    """Says of each pass which ids it read: in block 0 all of them, in block 1 the even ones."""

    def encode(self, tokens: Tensor, context: WindowContext | None = None) -> ModelOutput:
        output = super().encode(tokens, context)
        usage = torch.bincount(tokens.flatten(), minlength=self.vocab_size).double()
        even = usage * (torch.arange(self.vocab_size) % 2 == 0)
        output.metrics = {"expert_usage": torch.stack([usage, even])}
        return output


@pytest.mark.parametrize("batch_windows", [3, 100])
def test_experts_are_counted_over_all_windows(small_store: TokenStore, batch_windows: int) -> None:
    n_ids = small_store.vocab_size
    model = Counting(lambda width: CausalMean(), vocab_size=n_ids, max_seq_len=T)
    evaluation = evaluate(model, small_store, stride_frac=1.0, batch_windows=batch_windows)
    text, n = small_store.validation, len(small_store.validation)
    windows = [min(s, n - 1 - T) for s in range(0, n - 1, T)]
    usage = np.bincount(np.concatenate([text.tokens[s : s + T] for s in windows]), minlength=n_ids).astype(float)
    used = [np.count_nonzero(usage), np.count_nonzero(usage[::2])]
    assert evaluation.dead_experts == [n_ids - used[0], n_ids - used[1]]
    assert evaluation.expert_coverage == pytest.approx([used[0] / n_ids, used[1] / n_ids])
    shares = [usage[usage > 0] / usage.sum(), usage[::2][usage[::2] > 0] / usage[::2].sum()]
    divergence = [float((p * np.log(p * n_ids)).sum()) for p in shares]
    assert evaluation.expert_unevenness == pytest.approx(divergence)
    assert evaluation.metrics()["dead_experts"] == pytest.approx(np.mean(evaluation.dead_experts))
    assert evaluation.metrics()["expert_unevenness"] == pytest.approx(np.mean(divergence))


def test_projected_ranks_are_those_of_the_projected_states(small_store: TokenStore) -> None:
    class Narrow(SkeletonLM):
        def project(self, states: Tensor) -> Tensor:
            return states[:, :1].expand(-1, 5)

    torch.manual_seed(0)
    model = Narrow(lambda width: CausalMean(), vocab_size=small_store.vocab_size, max_seq_len=T)
    evaluation = evaluate(model, small_store)
    assert evaluation.effective_rank_projected == pytest.approx([1.0, 1.0], abs=1e-6)
    assert min(evaluation.effective_rank) > 2
    assert evaluation.metrics()["effective_rank_projected"] == pytest.approx(1.0, abs=1e-6)


class Summarising(UnigramLM):
    """Its logits are other ones while it reads the summaries of others."""

    summarises = True

    @contextmanager
    def reading_others(self) -> Iterator[None]:
        self.constant.neg_()
        yield
        self.constant.neg_()


@pytest.mark.parametrize("batch_windows", [1, 7, 1000])
def test_shuffled_summaries_are_scored_over_the_same_text(small_store: TokenStore, batch_windows: int) -> None:
    logits = torch.randn(small_store.vocab_size, generator=torch.Generator().manual_seed(0))
    evaluation = evaluate(Summarising(logits), small_store, batch_windows=batch_windows)
    expected = evaluate(UnigramLM(-logits), small_store, batch_windows=batch_windows)
    assert evaluation.bits_per_byte_shuffled == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert evaluation.bits_per_byte != pytest.approx(expected.bits_per_byte, rel=1e-3)


def test_no_window_reads_its_own_summaries_when_they_are_shuffled(small_store: TokenStore) -> None:
    """Engrams made to matter change the loss with another window's content."""
    torch.manual_seed(0)
    overrides = {"model.engram.kind": "window", "data.tokenizer": f"bpe:{small_store.vocab_size}"}
    model = build_model(experiment("dense_baseline", "micro", overrides=overrides).model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    evaluation = evaluate(model, small_store)
    assert evaluation.bits_per_byte_shuffled is not None
    assert abs(evaluation.bits_per_byte_shuffled - evaluation.bits_per_byte) > 1e-4
    with model.reading_others():
        assert model.engram.from_others
    assert not model.engram.from_others


def test_models_without_these_parts_have_no_number_for_them(evaluation: Evaluation) -> None:
    assert evaluation.expert_coverage == evaluation.expert_unevenness == evaluation.dead_experts == []
    assert evaluation.effective_rank_projected == []
    assert evaluation.category_accuracy is evaluation.category_majority is evaluation.category_probe is None


def test_an_evaluation_saved_before_these_numbers_existed_is_still_read(evaluation: Evaluation, tmp_path: Path) -> None:
    evaluation.save(tmp_path)
    path = tmp_path / "evaluation.json"
    numbers = json.loads(path.read_text())
    new = ("expert_coverage", "expert_unevenness", "dead_experts", "effective_rank_projected", "category_accuracy",
           "category_majority", "category_probe")  # fmt: skip
    path.write_text(json.dumps({name: value for name, value in numbers.items() if name not in new}))
    assert Evaluation.load(tmp_path).metrics() == evaluation.metrics()
