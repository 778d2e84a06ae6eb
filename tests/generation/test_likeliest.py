"""The likeliest tokens that are told with every new one, against one forward pass per token and a plain sort."""

import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from hrs.errors import HRSError
from hrs.generation import SampledToken, Sampling, decoding, generate, window_length
from hrs.generation.batching import ContinuousBatch
from hrs.generation.decoding import likeliest
from hrs.models import LanguageModel, WindowContext, build_model
from hrs.presets import experiment

CONTEXT, VOCABULARY, KEEP = 16, 300, 6
PRESETS = ("dense_baseline", "dual_head_router", "dense_recurrence")
"""Models that read all requests in one pass; the last one is told what stands before a window."""
LOGITS = st.lists(st.integers(-6, 6).map(lambda n: n / 4) | st.just(-math.inf), min_size=7, max_size=7)
REQUESTS = (
    (3, Sampling(max_new_tokens=18, seed=1), 5),
    (20, Sampling(max_new_tokens=9, seed=2, temperature=0.7, top_k=40, repetition_penalty=1.4), 0),
    (14, Sampling(max_new_tokens=6, temperature=0.0), 1),
    (5, Sampling(max_new_tokens=7, seed=3, temperature=1.8, top_p=0.9), VOCABULARY),
    (9, Sampling(max_new_tokens=4, seed=4, repetition_penalty=1.6), 2),
)
"""Length of the prompt, how it is continued, and of how many tokens it is told."""


@functools.cache
def micro(preset: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """With weights large enough that no component is a rounding error."""
    torch.manual_seed(0)
    sizes = {"data.tokenizer": f"bpe:{VOCABULARY}", "model.max_seq_len": CONTEXT}
    sizes |= {"model.engram.window": 4, "model.engram.per_window": 2, "model.locality.window": 4}
    model = build_model(experiment(preset, "micro", overrides=sizes).model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("embedding.weight"):
                parameter.mul_(5 if parameter.ndim > 1 else 1)
    return model.to(dtype).eval()


def text(n: int) -> list[int]:
    return torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist()


def run(model: LanguageModel, requests: tuple[tuple[int, Sampling, int], ...]) -> list[list[SampledToken]]:
    """All requests side by side, one more than there are slots, prompts read in pieces of five."""
    batch = ContinuousBatch(model, n_slots=len(requests) - 1 or 1, keep=KEEP, prefill_tokens=5)
    for length, sampling, n_best in requests:
        batch.add(text(length), sampling, n_best=n_best)
    rows: list[list[SampledToken]] = [[] for _ in requests]
    while batch.n_active:
        for token in batch.step():
            rows[token.row].append(token)
    return rows


@torch.no_grad()
def distribution(model: LanguageModel, ids: list[int]) -> Tensor:
    """Log-probabilities [V] after a text: one forward pass over the window it has come to."""
    start, n = len(ids) - window_length(len(ids), CONTEXT, KEEP), model.history_tokens
    before = ([-1] * n + ids[:start])[-n:] if n else []
    context = WindowContext(history=torch.tensor([before])) if n else None
    logits = model(torch.tensor([ids[start:]]), context).logits
    assert logits is not None
    return logits[0, -1].log_softmax(dim=-1)


@pytest.mark.parametrize("preset", PRESETS)
def test_each_request_is_told_as_many_as_it_asks_for(preset: str) -> None:
    model = micro(preset)
    for (length, _, n_best), row in zip(REQUESTS, run(model, REQUESTS), strict=True):
        ids = text(length)
        for token in row:
            log_p = distribution(model, ids)
            expected = log_p.topk(n_best)
            assert [id for id, _ in token.best] == expected.indices.tolist()
            assert [value for _, value in token.best] == pytest.approx(expected.values.tolist(), rel=0, abs=1e-12)
            assert token.log_prob == pytest.approx(float(log_p[token.id]), rel=0, abs=1e-12)
            ids.append(token.id)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_sampled_stays_the_same_to_the_last_bit(dtype: torch.dtype) -> None:
    model = micro("dense_baseline", dtype)
    told = run(model, REQUESTS)
    silent = run(model, tuple((length, sampling, 0) for length, sampling, _ in REQUESTS))
    assert [[dataclasses.replace(token, best=()) for token in row] for row in told] == silent
    for row in told:
        for token in row:
            assert dict(token.best).get(token.id, token.log_prob) == token.log_prob


def test_the_greedy_token_is_the_first() -> None:
    greedy = run(micro("dual_head_router"), ((4, Sampling(max_new_tokens=20, temperature=0.0), 3),))
    for token in greedy[0]:
        assert token.best[0] == (token.id, token.log_prob)


def test_generate_tells_the_same_of_every_row() -> None:
    model, sampling = micro("dense_baseline"), Sampling(max_new_tokens=15, seed=2)
    rows: list[list[SampledToken]] = [[], []]
    for step in generate(model, [text(3), text(8)], sampling, keep=KEEP, n_best=4):
        for token in step:
            rows[token.row].append(token)
    alone = run(model, ((3, sampling, 4),))[0]
    assert [[id for id, _ in token.best] for token in rows[0]] == [[id for id, _ in token.best] for token in alone]
    ids = text(8)
    for token in rows[1]:
        expected = distribution(model, ids).topk(4)
        assert [id for id, _ in token.best] == expected.indices.tolist()
        assert [value for _, value in token.best] == pytest.approx(expected.values.tolist(), rel=0, abs=1e-12)
        ids.append(token.id)


def test_only_rows_that_ask_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks, nothing is ranked; else once per step, whoever asks."""
    asked: list[list[int]] = []

    def counting(logits: Tensor, log_p: Tensor, n_best: list[int]) -> list[decoding.Best]:
        asked.append(list(n_best))
        return likeliest(logits, log_p, n_best)

    monkeypatch.setattr(decoding, "likeliest", counting)
    model = micro("dense_baseline")
    run(model, ((3, Sampling(max_new_tokens=4), 0), (5, Sampling(max_new_tokens=4), 0)))
    assert asked == []
    batch = ContinuousBatch(model)
    for n_best, n_new in ((2, 3), (0, 5), (3, 1)):
        batch.add([1, 2], Sampling(max_new_tokens=n_new), n_best=n_best)
    while batch.n_active:
        batch.step()
    assert asked == [[2, 0, 3], [2, 0], [2, 0]]


@given(st.lists(st.tuples(LOGITS, st.integers(0, 7)), min_size=1, max_size=4))
def test_equal_logits_stand_in_the_order_of_their_ids(rows: list[tuple[list[float], int]]) -> None:
    n_best = [n for _, n in rows]
    assume(any(n_best))
    logits = torch.tensor([row for row, _ in rows], dtype=torch.float64)
    log_p = -torch.arange(logits.numel(), dtype=torch.float64).view_as(logits)  # says which entry was taken
    expected = [
        tuple((id, float(log_p[row, id])) for id in sorted(range(7), key=lambda id: (-logits[row, id], id))[:n])
        for row, n in enumerate(n_best)
    ]
    assert likeliest(logits, log_p, n_best) == expected


def test_logits_decide_where_log_probabilities_round_to_the_same() -> None:
    logits = torch.tensor([[1.0, 1.0 + 2**-23, 20.0]])
    log_p = logits.log_softmax(dim=-1)
    assert log_p[0, 0] == log_p[0, 1]
    ((_, second),) = likeliest(logits, log_p, [2])
    assert second[0] == 1


@pytest.mark.parametrize("n_best", [-1, VOCABULARY + 1])
def test_a_number_out_of_range_is_refused_and_takes_no_slot(n_best: int) -> None:
    batch = ContinuousBatch(micro("dense_baseline"))
    with pytest.raises(HRSError, match=f"n_best must lie between 0 and the model's vocabulary of 300, got {n_best}"):
        batch.add([1], Sampling(), n_best=n_best)
    assert (batch.n_active, batch.n_waiting) == (0, 0)
