"""Attention against a slow reference, alone, with extra keys, and in pieces."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrs.nn.attention import Attention, RotaryEmbedding

D, HEADS, T = 8, 2, 12
WINDOW_ENDS = torch.tensor([3, 3, 7, 7, 11, 11])


def attention(dropout: float = 0.0) -> Attention:
    torch.manual_seed(0)
    return Attention(D, HEADS, dropout=dropout, n_positions=T + 1, rope_base=100.0, n_extra_keys=6).double().eval()


def turn(vector: torch.Tensor, position: int) -> torch.Tensor:
    """Rotate the pairs (i, i + half) one by one."""
    half = len(vector) // 2
    turned = vector.clone()
    for i in range(half):
        angle = position * 100.0 ** (-2 * i / len(vector))
        a, b = vector[i], vector[i + half]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def reference(layer: Attention, x: torch.Tensor, memory: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Query by query, head by head, over exactly the keys that may be seen. x [T, d], memory [E, d]."""
    d_head = D // HEADS
    wq, wk, wv = layer.qkv.weight.detach().split(D)
    rows = []
    for t in range(len(x)):
        sources = [(x[s], s) for s in range(t + 1)]
        sources += [(memory[e], int(ends[e])) for e in range(len(memory)) if ends[e] <= t]
        heads = []
        for h in range(HEADS):
            part = slice(h * d_head, (h + 1) * d_head)
            q = turn((wq @ x[t])[part], t)
            scores = torch.stack([q @ turn((wk @ v)[part], p) for v, p in sources]) / math.sqrt(d_head)
            values = torch.stack([(wv @ v)[part] for v, _ in sources])
            heads.append(scores.softmax(0) @ values)
        rows.append(layer.output.weight.detach() @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("n_memory", [0, 6])
def test_equals_slow_reference(n_memory: int) -> None:
    """A query sees tokens up to itself and an engram from its window's last token on, rotated to that position."""
    layer = attention()
    x, memory = torch.randn(2, T, D).double(), torch.randn(2, n_memory, D).double()
    ends = WINDOW_ENDS[:n_memory]
    extra = (memory, ends) if n_memory else ()
    result = layer(x, torch.arange(T), None, *extra)
    for b in range(2):
        torch.testing.assert_close(result[b], reference(layer, x[b], memory[b], ends), rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(1, T - 1), unique=True, max_size=T - 1), with_memory=st.booleans())
def test_pieces_equal_the_whole(cuts: list[int], with_memory: bool) -> None:
    """Any chunking through the cache gives the one-pass result, also where a window completes inside a chunk."""
    layer = attention()
    x, memory = torch.randn(2, T, D).double(), torch.randn(2, 6, D).double()
    whole = layer(x, torch.arange(T), None, *((memory, WINDOW_ENDS) if with_memory else ()))
    cache, pieces, edges = layer.new_cache(), [], [0, *sorted(cuts), T]
    for start, end in itertools.pairwise(edges):
        new = torch.isin(WINDOW_ENDS, torch.arange(start, end))
        extra = (memory[:, new], WINDOW_ENDS[new]) if with_memory else ()
        pieces.append(layer(x[:, start:end], torch.arange(start, end), cache, *extra))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)


def test_memory_after_the_last_token_changes_nothing() -> None:
    """Extra keys at position T are out of sight: the result is that without them."""
    layer = attention()
    x, memory = torch.randn(1, T, D).double(), 100 * torch.randn(1, 6, D).double()
    hidden = layer(x, torch.arange(T), None, memory, torch.full((6,), T))
    torch.testing.assert_close(hidden, layer(x, torch.arange(T)), rtol=1e-12, atol=1e-12)


def test_rotation_depends_on_distance_only() -> None:
    """<turn(q, m), turn(k, n)> is a function of m - n."""
    rotary = RotaryEmbedding(6, 32, 100.0).double()
    q, k = torch.randn(6).double(), torch.randn(6).double()
    products = [rotary(q[None], torch.tensor([m + 5])) @ rotary(k[None], torch.tensor([m])).T for m in range(20)]
    torch.testing.assert_close(torch.cat(products), products[0].expand(20, 1), rtol=1e-6, atol=1e-6)


def test_dropout_acts_in_training_only() -> None:
    layer, x = attention(dropout=0.5), torch.randn(1, T, D).double()
    assert torch.equal(layer(x, torch.arange(T)), layer(x, torch.arange(T)))
    layer.train()
    assert not torch.equal(layer(x, torch.arange(T)), layer(x, torch.arange(T)))
