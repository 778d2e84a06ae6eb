"""The router against a loop over positions that gathers messages neighbour by neighbour."""

import math

import pytest
import torch
import torch.nn.functional as F

from hrs.config import GeometryConfig, ManifoldConfig
from hrs.nn.manifold import TokenWindow, WindowReader
from hrs.nn.manifold.router import GeodesicRoute, NeighbourRoute, Router
from hrs.nn.manifold.transport import orthonormal_lift

V, N, K, D, B, T = 7, 4, 3, 6, 2, 11


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def window(tokens: torch.Tensor | None = None) -> TokenWindow:
    if tokens is None:
        tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    neighbours = (torch.arange(V)[:, None] + torch.tensor([1, 3, 4])) % V
    neighbours[2, 2] = -1
    reader = WindowReader(ManifoldConfig(geometry=GeometryConfig(neighbours=K), confidence_tokens=4))
    return reader(tokens, tokens.shape[1], draws(V, N, seed=2), neighbours)


def router() -> Router:
    torch.manual_seed(0)
    layer = Router(D, 5.0).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def sparsemax_by_bisection(scores: list[float]) -> list[float]:
    low, high = max(scores) - 1, max(scores)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(max(s - middle, 0) for s in scores) > 1 else (low, middle)
    return [max(s - low, 0) for s in scores]


def direction(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm()


@torch.no_grad()
def test_equals_a_loop_over_positions() -> None:
    layer, seen = router(), window()
    state, messages, velocity = draws(B, T, D, seed=3), draws(B, T, D, seed=4), draws(B, T, N, seed=5)
    lift = orthonormal_lift(N, D).double()
    received, statistics = layer(state, messages, velocity, velocity @ lift.T, seen)
    support, null = [], []
    for b in range(B):
        c, m = seen.directions[b], messages[b]
        for t in range(T):
            ahead = direction(c[t] + 0.4 * velocity[b, t])
            aim = direction(direction(state[b, t]) + 0.3 * lift @ velocity[b, t])
            certainty = torch.sigmoid(layer.certainty(state[b, t]))
            scores = [
                layer.geo.temperature.item() * float(certainty * ahead @ c[j] + 0.5 * aim @ direction(m[j]))
                for j in range(t)
            ]
            weights = sparsemax_by_bisection([*scores, layer.geo.null_score.item()])
            geodesic = sum((w * m[j] for j, w in enumerate(weights[:-1])), torch.zeros(D).double())
            support.append(sum(w > 1e-12 for w in weights[:-1]))
            null.append(weights[-1])

            shares = torch.softmax(layer.neighbour.edge(seen.evidence[b, t][:, None])[:, 0], dim=0)
            neighbours = torch.zeros(D, dtype=torch.float64)
            for k in range(K):
                for j in range(t + 1):
                    neighbours += shares[k] * float(seen.ranks[b, t, j] == k) * m[j]
            nearby = sum((seen.local[b, t, j] * m[j] for j in range(t)), torch.zeros(D).double())

            gamma = seen.coverage[b, t, 0]
            base = gamma * neighbours + (1 - gamma) * nearby
            share = torch.sigmoid(layer.geo_gate(state[b, t])) * min(t, 4) / 4
            total = share * geodesic + (1 - share) * base
            cosine = F.cosine_similarity(total, layer.probe(state[b, t]), dim=0)
            torch.testing.assert_close(received[b, t], total * torch.sigmoid(cosine), rtol=0, atol=1e-9)
    assert math.isclose(float(statistics.support), sum(support) / len(support))
    assert math.isclose(float(statistics.null), sum(null) / len(null), rel_tol=1e-9)


def test_neighbour_weights_equal_the_gathered_form() -> None:
    """W m = sum_k q_tk sum_j match_tkj m_j with every flag match_tkj made and every message gathered."""
    seen, messages = window(), draws(B, T, D)
    torch.manual_seed(0)
    layer = NeighbourRoute().double()
    weights = layer(seen.evidence, seen.ranks)
    shares = layer.edge(seen.evidence[..., None])[..., 0].softmax(-1)
    match = seen.ranks[:, :, None, :] == torch.arange(K)[:, None]  # [B, T, K, T]
    gathered = torch.einsum("btk,btkj,bjd->btd", shares, match.double(), messages)
    torch.testing.assert_close(weights @ messages, gathered, rtol=0, atol=1e-12)
    assert not weights[:, ~torch.ones(T, T, dtype=torch.bool).tril()].any()


def test_the_first_token_receives_nothing() -> None:
    received, _ = router()(draws(B, T, D), draws(B, T, D), draws(B, T, N), draws(B, T, D), window())
    assert not received[:, 0].any()
    assert received[:, 1:].any(dim=-1).all()


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_null_slot_takes_what_no_token_deserves(scale: float) -> None:
    torch.manual_seed(0)
    route = GeodesicRoute(5.0).double()
    earlier = torch.ones(T, T, dtype=torch.bool).tril(-1)
    query, key = -scale * torch.ones(B, T, 1).double(), torch.ones(B, T, 1).double()
    low = route(query, key, earlier)
    assert (low[..., -1] == 1).all() and not low[..., :-1].any()
    high = route(-query, key, earlier)
    assert (high[:, 0, -1] == 1).all() and not high[:, 1:, -1].any()
    assert not high[..., :-1][:, ~earlier].any()
    torch.testing.assert_close(high.sum(-1), torch.ones(B, T).double())


@pytest.mark.parametrize("cut", [1, 5, 10])
def test_later_messages_and_states_leave_earlier_tokens_untouched(cut: int) -> None:
    """To the bit, also with scores a hundred times larger and with weights that saturate."""
    layer = router()
    with torch.no_grad():
        layer.geo.temperature.mul_(100)
    inputs = [draws(B, T, width, seed=seed) for seed, width in enumerate((D, D, N, D))]
    changed = [torch.cat((x[:, :cut], -7 * x[:, cut:]), dim=1) for x in inputs]
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    others = torch.cat((tokens[:, :cut], (tokens[:, cut:] + 1) % V), dim=1)
    before, _ = layer(*inputs, window(tokens))
    after, _ = layer(*changed, window(others))
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.equal(before[:, cut:], after[:, cut:])


def test_messages_of_zero_length_have_finite_gradients() -> None:
    layer, messages = router(), torch.zeros(B, T, D, dtype=torch.float64, requires_grad=True)
    state = torch.zeros(B, T, D, dtype=torch.float64, requires_grad=True)
    received, _ = layer(state, messages, torch.zeros(B, T, N).double(), torch.zeros(B, T, D).double(), window())
    received.square().sum().add(received.sum()).backward()
    for x in (messages, state):
        assert x.grad is not None and x.grad.isfinite().all()
