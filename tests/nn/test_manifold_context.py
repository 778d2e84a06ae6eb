"""The direction of the context, against a loop over positions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from hrs.nn.manifold.context import SHORTEST, ahead, context_velocity, recency_weights, unit

B, T, N = 2, 9, 5


def distances(n: int, length: int) -> torch.Tensor:
    places = torch.arange(length)
    return places[length - n :, None] - places[None, :]


def directions(seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(B, T, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("recency", [0.3, 4.0, 1e9])
def test_velocity_equals_a_loop(recency: float) -> None:
    own = directions()
    got = context_velocity(own, recency_weights(distances(T, T), recency, torch.float64))
    assert not got[:, 0].any()  # no past
    for b in range(B):
        for t in range(1, T):
            weights = [math.exp(-(t - j) / recency) for j in range(t)]
            mean = sum(w * own[b, j] for j, w in enumerate(weights)) / sum(weights)
            difference = mean - own[b, t]
            torch.testing.assert_close(got[b, t], difference / difference.norm(), rtol=0, atol=1e-12)


@examples(30)
@given(n=st.integers(1, 12), before=st.integers(0, 2000), recency=st.floats(0.01, 100))
def test_weights_sum_to_one_and_fall_with_distance(n: int, before: int, recency: float) -> None:
    """At any distance from the beginning: nothing under- or overflows."""
    weights = recency_weights(distances(n, before + n), recency, torch.float64)
    has_past = (torch.arange(before, before + n) > 0).double()
    # Two sums of at most 2,012 positive terms: 4,024 roundings, 4.5e-13.
    torch.testing.assert_close(weights.sum(-1), has_past, rtol=1e-12, atol=0)
    assert not weights[distances(n, before + n) <= 0].any()
    for t, row in enumerate(weights):
        assert (row[: before + t].diff() >= 0).all()  # neighbours differ by 1 % or more, or both are 0


def test_last_tokens_alone_give_the_rows_of_the_whole() -> None:
    own = directions()
    whole = context_velocity(own, recency_weights(distances(T, T), 4.0, torch.float64))
    last = context_velocity(own, recency_weights(distances(3, T), 4.0, torch.float64))
    torch.testing.assert_close(last, whole[:, -3:], rtol=0, atol=1e-14)


def test_a_repeated_token_has_no_velocity() -> None:
    """Mean and own direction agree up to rounding, which must not become a direction."""
    own = directions()[:, :1].expand(B, T, N)
    assert context_velocity(own, recency_weights(distances(T, T), 4.0, torch.float64)).abs().max() < 1e-13


def test_unit_is_continuous_with_a_bounded_gradient_at_zero() -> None:
    x = torch.zeros(1, N, dtype=torch.float64, requires_grad=True)
    unit(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / SHORTEST))
    edge = torch.zeros(N, dtype=torch.float64)
    edge[0] = SHORTEST
    torch.testing.assert_close(unit(edge * 0.999999), unit(edge * 1.000001), rtol=0, atol=1e-5)
    assert unit(2 * edge).norm() == 1


def test_ahead_goes_along_the_velocity_and_stays_on_the_sphere() -> None:
    c, u = torch.eye(N, dtype=torch.float64)[:2]
    torch.testing.assert_close(ahead(c, u), (c + 0.4 * u) / math.sqrt(1 + 0.16), rtol=0, atol=1e-12)
    assert torch.equal(ahead(c, 0 * u), c)
