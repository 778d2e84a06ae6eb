"""InfoNCE against a loop, and the positions it is taken at."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from hrs.config import LocalityConfig
from hrs.nn.locality import LocalityHead, info_nce


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_equals_loop_reference() -> None:
    anchors, positives, negatives = (torch.randn(2, n, 5).double() for n in (3, 3, 4))
    total = 0.0
    for b in range(2):
        for a in range(3):
            right = cosine(anchors[b, a], positives[b, a]) / 0.2
            scores = [right] + [cosine(anchors[b, a], n) / 0.2 for n in negatives[b]]
            total -= right - math.log(sum(math.exp(s) for s in scores))
    assert info_nce(anchors, positives, negatives, 0.2).item() == pytest.approx(total / 6)


@examples(60)
@given(n_tokens=st.integers(1, 80), window=st.integers(2, 20), seed=st.integers(0, 100))
def test_sampled_positions_keep_their_bounds(n_tokens: int, window: int, seed: int) -> None:
    """Anchors keep ``window`` from both ends where there is room, positives half of it from their anchor."""
    torch.manual_seed(seed)
    head = LocalityHead(LocalityConfig(window=window), 4)
    anchors, positives, negatives = head.sample(n_tokens, torch.device("cpu"))
    if n_tokens > 2 * window:
        assert anchors.min() >= window and anchors.max() <= n_tokens - 1 - window
    assert (anchors - positives).abs().max() <= window // 2
    for positions in (anchors, positives, negatives):
        assert positions.min() >= 0 and positions.max() < n_tokens


def test_loss_falls_when_neighbours_are_alike() -> None:
    """Slowly turning states beat shuffled ones, and beat ln(1 + N), the loss of a head that cannot tell."""
    torch.manual_seed(0)
    head = LocalityHead(LocalityConfig(), 2)
    torch.nn.init.eye_(head.projection.weight)
    angle = torch.linspace(0, 2 * math.pi, 256)
    ordered = torch.stack((angle.cos(), angle.sin()), -1)[None]
    shuffled = ordered[:, torch.randperm(256)]
    assert head(ordered) < math.log(65) < head(shuffled)
