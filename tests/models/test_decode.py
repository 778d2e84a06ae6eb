"""Incremental decoding equals the parallel pass, for every preset and every way to cut the text."""

import functools
import itertools

import pytest
import torch
from distinct_models import DISTINCT
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from hrs.models import WindowContext, build_model
from hrs.models.hrs import HRSModel
from hrs.presets import PRESETS, experiment

T = 64
RERUN = [name for name in DISTINCT if PRESETS[name].leaks]
INCREMENTAL = [name for name in DISTINCT if name not in RERUN]
MECHANISMS = [
    "full_hrs_trc", "v2_full", "v3_full", "v5_replace", "v6_gate", "v7_full", "v8_bdh", "v18_cross_attn",
    "full_hrs_running", "full_hrs_recurrence", "v17_paper_peer", "kernel_soft_rank", "attention_alibi",
]  # fmt: skip


@functools.cache
def micro(preset: str, dtype: torch.dtype) -> HRSModel:
    """In float64 with weights five times larger than at the start, so that no component is a rounding error; in float32
    as they are, for there a larger rounding error may choose another expert."""
    torch.manual_seed(0)
    model = build_model(experiment(preset, "micro").model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("embedding.weight"):
                parameter.mul_(5 if parameter.ndim > 1 and dtype is torch.float64 else 1)
    model.to(dtype).train()
    for _ in range(3):  # slots and gates that open once training has shown something
        model(text(4))
        model.keep_observations()
    return model.eval()


def text(batch: int = 2) -> torch.Tensor:
    return torch.randint(512, (batch, T), generator=torch.Generator().manual_seed(1))


def history(model: HRSModel) -> torch.Tensor | None:
    """Half of it unknown."""
    if not model.history_tokens:
        return None
    ids = torch.randint(512, (2, model.history_tokens), generator=torch.Generator().manual_seed(2))
    ids[1, : model.history_tokens // 2] = -1
    return ids


def decode(model: HRSModel, tokens: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache = model.new_cache(len(tokens), history(model))
    outputs = []
    for piece in tokens.split(sizes, dim=1):
        before = cache.length
        outputs.append(model.decode(piece, cache))
        assert cache.length == before + piece.shape[1]
    torch.testing.assert_close(model.unembed(outputs[-1].hidden), outputs[-1].logits)
    return torch.cat([output.logits for output in outputs], dim=1)


def sizes_from(cuts: list[int]) -> list[int]:
    edges = [0, *sorted(cuts), T]
    return [b - a for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("preset", MECHANISMS)
@examples(8)
@given(cuts=st.lists(st.integers(1, T - 1), unique=True, max_size=20))
def test_any_chunking_equals_forward(preset: str, cuts: list[int]) -> None:
    """Prefills and chunks of any size, windows (16 tokens) completing at their edges and inside them."""
    model = micro(preset, torch.float64)
    decoded = decode(model, text(), sizes_from(cuts))
    whole = model(text(), WindowContext(history(model))).logits
    # Some 40 sums of at most 512 products follow each other, 20,000 roundings of numbers below 10: 2e-11 at worst.
    torch.testing.assert_close(decoded, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("preset", INCREMENTAL)
def test_token_by_token_equals_forward(preset: str) -> None:
    """Every distinct model, after a prefill that ends next to a window's edge."""
    for dtype, bound, prefill in ((torch.float32, 1e-5, 17), (torch.float64, 1e-10, 15)):
        model = micro(preset, dtype)
        decoded = decode(model, text(), [prefill] + [1] * (T - prefill))
        whole = model(text(), WindowContext(history(model))).logits
        torch.testing.assert_close(decoded, whole.detach(), rtol=0, atol=bound)


@pytest.mark.parametrize("preset", RERUN)
def test_leaky_models_decode_what_they_know_so_far(preset: str) -> None:
    """Each step equals forward on the text so far, unlike what forward says of that place in a longer text."""
    model, tokens = micro(preset, torch.float64), text()
    decoded = decode(model, tokens, [20, 10, 1, 1, 17, 1, 14])
    for t in (20, 31, 32, 50, T):
        torch.testing.assert_close(decoded[:, t - 1], model(tokens[:, :t]).logits[:, -1], rtol=1e-10, atol=1e-12)
    assert (decoded - model(tokens).logits)[:, : T - 1].abs().max() > 1e-3


def test_two_caches_do_not_disturb_each_other() -> None:
    model, tokens = micro("full_hrs_trc", torch.float64), text(4)
    first, second = model.new_cache(2), model.new_cache(2)
    pieces: list[list[torch.Tensor]] = [[], []]
    for a, b in zip(tokens[:2].split(7, 1), tokens[2:].split(7, 1), strict=True):
        pieces[0].append(model.decode(a, first).logits)
        pieces[1].append(model.decode(b, second).logits)
    whole = model(tokens).logits
    torch.testing.assert_close(torch.cat([torch.cat(p, 1) for p in pieces]), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("preset", ["full_hrs", "full_hrs_legacy"])
def test_mistakes_are_refused_and_leave_the_cache_usable(preset: str) -> None:
    """Wrong batch, training mode and too long a text raise; decoding then goes on as if nothing had happened."""
    model, tokens = micro(preset, torch.float64), text()
    cache = model.new_cache(2)
    model.decode(tokens[:, :60], cache)
    with pytest.raises(ValueError, match="batch size"):
        model.decode(tokens[:1, 60:], cache)
    with pytest.raises(ValueError, match="65 tokens exceed"):
        model.decode(tokens[:, :5], cache)
    model.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        model.decode(tokens[:, 60:], cache)
    model.eval()
    last = model.decode(tokens[:, 60:], cache).logits[:, -1]
    torch.testing.assert_close(last, model(tokens).logits[:, -1], rtol=1e-10, atol=1e-12)
