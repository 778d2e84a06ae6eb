"""What a categorisation head is worth beside its two baselines, on texts whose answers are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.evaluation import category, evaluate
from hrs.evaluation.category import category_scores
from hrs.evaluation.leaks import CausalMean, SkeletonLM
from hrs.models import ModelOutput, WindowContext, build_model
from hrs.presets import experiment

T = 32


class WithHead(SkeletonLM):
    """Answers by ``answer(tokens)`` and has ``states(tokens)`` as its final states."""

    n_categories = 4

    def __init__(self, store: TokenStore, answer, states=None) -> None:  # type: ignore[no-untyped-def]
        super().__init__(lambda width: CausalMean(), vocab_size=store.vocab_size, max_seq_len=T)
        self.answer, self.states, self.read = answer, states, []

    def encode(self, tokens: Tensor, context: WindowContext | None = None) -> ModelOutput:
        assert not self.training and (context is None or context.category is None), "no topic is told"
        output = super().encode(tokens, context)
        self.read.append(tokens)
        if self.states is not None:
            output.hidden = self.states(tokens)
        output.category_logits = torch.nn.functional.one_hot(self.answer(tokens), self.n_categories).float()
        return output


def of_the_text(store: TokenStore) -> dict[bytes, int]:
    """The topic of every window that lies on the grid, token by token, for the windows of all splits."""
    found = {}
    for name in ("train", "validation"):
        split = store.split(name)
        owner = [i for i in range(len(split.titles)) for _ in range(*split.document_starts[i : i + 2])]
        for start in [min(s, len(split) - 1 - T) for s in range(0, len(split) - 1, T)]:
            inside = [int(split.topic_ids[owner[p]]) for p in range(start, start + T)]
            topic = min(set(inside), key=lambda t: (-inside.count(t), t))
            found[split.tokens[start : start + T].astype(np.int64).tobytes()] = topic
    return found


def right(store: TokenStore):  # type: ignore[no-untyped-def]
    topics = of_the_text(store)
    return lambda tokens: torch.tensor([topics[row.numpy().tobytes()] for row in tokens])


def constant(topic: int):  # type: ignore[no-untyped-def]
    return lambda tokens: torch.full((len(tokens),), topic)


def test_a_head_that_is_right_scores_one_and_one_that_is_wrong_by_one_scores_nothing(small_store: TokenStore) -> None:
    answer = right(small_store)
    model = WithHead(small_store, answer).eval()
    assert category_scores(model, small_store, "validation", 7)["category_accuracy"] == 1.0
    wrong = WithHead(small_store, lambda tokens: (answer(tokens) + 1) % 4).eval()
    assert category_scores(wrong, small_store, "validation", 7)["category_accuracy"] == 0.0


def test_the_majority_is_that_of_the_training_text(small_store: TokenStore) -> None:
    train = small_store.train
    tokens = np.bincount(train.topic_ids, weights=np.diff(train.document_starts))
    scores = category_scores(
        WithHead(small_store, constant(int(tokens.argmax()))).eval(), small_store, "validation", 16
    )
    assert scores["category_majority"] == scores["category_accuracy"]
    assert 0.2 < scores["category_majority"] < 0.5  # three topics, nearly as long


def test_the_probe_finds_what_lies_in_the_states_and_nothing_in_noise(small_store: TokenStore) -> None:
    answer = right(small_store)

    def telling(tokens: Tensor) -> Tensor:
        noise = torch.randn(*tokens.shape, 16, generator=torch.Generator().manual_seed(int(tokens.sum())))
        return noise + torch.nn.functional.one_hot(answer(tokens), 16)[:, None]

    def silent(tokens: Tensor) -> Tensor:
        return torch.randn(*tokens.shape, 16, generator=torch.Generator().manual_seed(int(tokens.sum())))

    for states, lowest, highest in ((telling, 0.9, 1.0), (silent, 0.0, 0.6)):
        model = WithHead(small_store, constant(3), states).eval()
        scores = category_scores(model, small_store, "validation", 16)
        assert lowest <= scores["category_probe"] <= highest, scores
        assert scores["category_accuracy"] == 0.0


def test_the_probe_reads_training_windows_and_only_so_many(
    small_store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(category, "PROBE_WINDOWS", 9)
    monkeypatch.setattr(category, "HELD_OUT_WINDOWS", 5)
    model = WithHead(small_store, constant(0)).eval()
    category_scores(model, small_store, "validation", 4)
    rows = torch.cat(model.read).numpy()
    assert len(rows) == 14
    for part, split in ((rows[:9], small_store.train), (rows[9:], small_store.validation)):
        views = np.lib.stride_tricks.sliding_window_view(split.tokens, T)
        starts = [int((views == row).all(1).nonzero()[0][0]) for row in part]
        assert starts == sorted(starts) and starts[0] == 0 and starts[-1] > 0.7 * len(split)


def test_one_topic_for_all_windows_is_a_probe_without_a_choice(small_store: TokenStore) -> None:
    train, validation = (
        replace(split, topic_ids=np.ones_like(split.topic_ids)) for split in (small_store.train, small_store.validation)
    )
    store = replace(small_store, train=train, validation=validation)
    scores = category_scores(WithHead(store, constant(1)).eval(), store, "validation", 16)
    assert scores == {"category_accuracy": 1.0, "category_majority": 1.0, "category_probe": 1.0}


def test_text_without_topics_in_a_corpus_that_has_some_gives_no_score(small_store: TokenStore) -> None:
    validation = replace(small_store.validation, topic_ids=np.full_like(small_store.validation.topic_ids, -1))
    store = replace(small_store, validation=validation)
    assert category_scores(WithHead(store, constant(1)).eval(), store, "validation", 16) == {}


def test_an_evaluation_holds_the_scores_of_a_head_and_its_metrics_name_them(small_store: TokenStore) -> None:
    model = WithHead(small_store, constant(0))
    scores = category_scores(model.eval(), small_store, "validation", 16)
    evaluation = evaluate(model, small_store)
    assert {name: value for name, value in evaluation.metrics().items() if name.startswith("category")} == scores


def test_a_corpus_of_more_topics_than_the_head_knows_is_refused(small_store: TokenStore) -> None:
    model = WithHead(small_store, constant(0)).eval()
    model.n_categories = 2
    with pytest.raises(HRSError, match="3 topics and the categorisation head 2 classes"):
        category_scores(model, small_store, "validation", 16)


def test_the_preset_with_a_head_and_experts_has_all_its_numbers(small_store: TokenStore) -> None:
    torch.manual_seed(0)
    overrides = {"model.max_seq_len": T, "model.n_layers": 2, "model.engram.extract_after": 0}
    config = replace(
        experiment("v18_cross_attn", "micro", overrides=overrides).model, vocab_size=small_store.vocab_size
    )
    evaluation = evaluate(build_model(config), small_store)
    n_experts = config.peer.sub_keys**2
    for coverage, unevenness, dead in zip(
        evaluation.expert_coverage, evaluation.expert_unevenness, evaluation.dead_experts, strict=True
    ):
        assert coverage == pytest.approx(1 - dead / n_experts) and 0 < unevenness < np.log(n_experts)
    assert len(evaluation.dead_experts) == 2
    assert {"category_accuracy", "category_majority", "category_probe"} <= set(evaluation.metrics())
