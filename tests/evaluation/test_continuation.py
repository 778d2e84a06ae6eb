"""The loss of a continuation alone, against the sum of single predictions."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from hrs.errors import HRSError
from hrs.evaluation.continuation import bits_per_byte, context_room, continuation_nats
from hrs.evaluation.leaks import CausalMean, SkeletonLM
from hrs.models import LanguageModel, WindowContext, build_model
from hrs.presets import experiment


def dense() -> LanguageModel:
    torch.manual_seed(0)
    return SkeletonLM(lambda width: CausalMean(), vocab_size=30, max_seq_len=12).double().train()


def recurrent() -> LanguageModel:
    """A model that reads what stands before its window."""
    torch.manual_seed(0)
    overrides = {"data.tokenizer": "bpe:300", "model.max_seq_len": 32, "model.n_layers": 3, "model.engram.window": 8}
    return build_model(experiment("dense_recurrence", "micro", 0, overrides).model).double().eval()


def drawn(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(30, size=n).tolist()


def one_by_one(model: LanguageModel, context: list[int], continuation: list[int]) -> list[float]:
    """Minus the logarithm of the probability of each token after all that fits in front of it."""
    text, nats = context + continuation, []
    first = max(0, len(text) - 1 - model.max_seq_len)
    for position in range(len(context), len(text)):
        logits = model(torch.tensor([text[first:position]])).logits[0, -1]
        nats.append(-logits.log_softmax(-1)[text[position]].item())
    return nats


@pytest.mark.parametrize(("n_context", "n"), [(1, 1), (1, 12), (5, 4), (8, 5), (9, 5), (40, 5), (40, 12)])
def test_each_token_of_the_continuation_is_scored_after_all_that_fits(n_context: int, n: int) -> None:
    model, context, continuation = dense(), drawn(n_context), drawn(n, 1)
    found = continuation_nats(model, context, continuation)
    assert model.training, "the mode is given back"
    assert found.shape == (n,)
    np.testing.assert_allclose(found, one_by_one(model.eval(), context, continuation), rtol=1e-9)


def test_the_context_is_read_from_its_end_and_never_scored() -> None:
    model, continuation = dense(), drawn(5, 1)
    room = context_room(model, 5)
    assert room == 8
    base = continuation_nats(model, drawn(20), continuation)
    unread, read = drawn(20), drawn(20)
    unread[-room - 1] = (unread[-room - 1] + 1) % 30
    read[-room] = (read[-room] + 1) % 30
    assert (continuation_nats(model, unread, continuation) == base).all()
    assert (continuation_nats(model, read, continuation) != base).all()
    # A context of easy tokens would lower a mean over both; here the number of scored tokens stays what it is.
    assert len(continuation_nats(model, [3] * 7, continuation)) == len(base) == 5


def test_a_model_with_a_history_gets_what_does_not_fit() -> None:
    model = recurrent()
    n, continuation = model.history_tokens, drawn(10, 1)
    assert n > 0
    room = context_room(model, 10)

    def by_hand(history: list[int], context: list[int]) -> np.ndarray:
        ids = torch.tensor([[*context, *continuation]])
        with torch.no_grad():
            logits = model(ids[:, :-1], WindowContext(torch.tensor([history]))).logits[0, -10:]
        return -logits.log_softmax(-1)[torch.arange(10), ids[0, -10:]].numpy()

    long = drawn(room + n + 3)
    found = continuation_nats(model, long, continuation)
    np.testing.assert_allclose(found, by_hand(long[3 : 3 + n], long[3 + n :]), rtol=1e-9)
    short = drawn(room + 2)
    padded = [-1] * (n - 2) + short[:2]
    np.testing.assert_allclose(continuation_nats(model, short, continuation), by_hand(padded, short[2:]), rtol=1e-9)


def test_bits_per_byte_are_bits_of_all_over_bytes_of_all() -> None:
    assert bits_per_byte(np.array([1.0, 3.0]) * math.log(2), 8) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: continuation_nats(m, [], [1]), "after one token at least"),
        (lambda m: continuation_nats(m, [1], []), "after one token at least"),
        (lambda m: continuation_nats(m, [1], [1] * 13), "13 tokens leaves no room for a context.*at most 12"),
        (lambda m: bits_per_byte(np.ones(1), 0), "without text"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(call: Callable[[LanguageModel], object], said: str) -> None:
    with pytest.raises(HRSError, match=said):
        call(dense())
