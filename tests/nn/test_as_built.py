"""The original's layers do what the original did, defects included."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrs.config import ModelConfig
from hrs.config.manifold import GeometryConfig, ManifoldConfig
from hrs.nn.as_built import ManifoldAttention, TokenContext, read_tokens
from hrs.nn.as_built.directions import unit
from hrs.nn.as_built.hop_cell import GeodesicMixer
from hrs.nn.as_built.router import HopRouter
from hrs.nn.as_built.transport import transport
from hrs.nn.sparsemax import Sparsemax

CONFIG = ModelConfig(
    family="manifold",
    vocab_size=40,
    d_model=24,
    n_layers=2,
    n_heads=2,
    max_seq_len=12,
    manifold=ManifoldConfig(as_built=True, geometry=GeometryConfig(modes=12, directional=2, syntactic=2, neighbours=5)),
)
COORDINATES = torch.randn(40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NEIGHBOURS = (torch.arange(40)[:, None] + torch.arange(1, 6)) % 40
NEIGHBOURS[7] = -1


def context_of(tokens: Tensor) -> TokenContext:
    return read_tokens(tokens, COORDINATES, NEIGHBOURS, CONFIG.manifold)


def test_the_first_token_hears_the_whole_window_in_equal_parts() -> None:
    router, context = HopRouter(CONFIG).double(), context_of(torch.arange(12)[None])
    states, messages = torch.randn(2, 1, 12, 24, dtype=torch.float64)
    velocities, entropy = torch.randn(1, 12, 16, dtype=torch.float64), torch.ones(1, 12, 1, dtype=torch.float64)
    heard = router(states, messages, velocities, entropy, context)
    mean = messages.mean(dim=1)
    agreement = F.cosine_similarity(mean, router.probe(states[:, 0])).sigmoid()
    torch.testing.assert_close(heard[:, 0], agreement * mean, atol=1e-12, rtol=0)


def test_clamping_after_the_mask_shows_the_future_to_a_head_without_likes() -> None:
    attention = ManifoldAttention(CONFIG).double()
    states, directions = torch.randn(1, 12, 24, dtype=torch.float64), torch.zeros(1, 12, 16, dtype=torch.float64)
    states[..., 0] = states[..., 0].abs() + 1
    with torch.no_grad():
        for projection, sign in ((attention.query, 1.0), (attention.key, -1.0)):
            projection.weight.zero_()
            for first_of_head in (0, 12):
                projection.weight[first_of_head, 0] = sign * 20
        attended = attention(states, directions, directions)
        everything = attention.value(states).mean(dim=1, keepdim=True)
        expected = attention.norm(states + attention.output(everything))
    torch.testing.assert_close(attended, expected, atol=1e-12, rtol=0)


def test_the_past_is_weighed_from_the_wrong_end() -> None:
    recency = context_of(torch.zeros(1, 64, dtype=torch.int64)).recency
    assert recency[63, 0] == recency[63].max() and recency[63, 0] == pytest.approx(0.2212, abs=1e-4)
    lag = 63 - torch.arange(64)
    assert (recency[63] * lag).sum() == pytest.approx(59.5, abs=0.1)
    assert not recency[0].any() and not recency.triu().any()
    torch.testing.assert_close(recency[1:].sum(-1), torch.ones(63, dtype=torch.float64))


def test_transport_is_minus_one_on_the_plane_of_the_velocities() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = (unit(torch.randn(1, 1, 6, generator=generator, dtype=torch.float64)) for _ in range(2))
    share = 2 / (1 - float((before * after).sum()))  # cancels the angle, so that all of the state is replaced
    in_plane = F.pad(before, (0, 3))
    torch.testing.assert_close(transport(in_plane, before, after, share), -in_plane)
    outside = torch.cat((torch.zeros(1, 1, 6), torch.ones(1, 1, 3)), dim=-1).double()
    torch.testing.assert_close(transport(outside, before, after, share), outside)
    assert torch.equal(transport(in_plane, before, before, 0.2), in_plane)
    assert torch.equal(transport(in_plane, 0.01 * before, after, 0.2), in_plane), "too slow to be transported"


def test_the_local_route_falls_back_on_the_last_six_tokens() -> None:
    coordinates = torch.eye(16)[:, :16].repeat(3, 1)[:40]
    tokens = torch.arange(12)[None]  # twelve different modes
    config = ManifoldConfig()
    scores = read_tokens(tokens, coordinates, torch.full((40, 5), -1), config).local_scores
    weights = Sparsemax()(config.temperature * scores)[0, 11]
    expected = [0.0] * 5 + [0.042, 0.092, 0.142, 0.192, 0.242, 0.292, 0.0]
    torch.testing.assert_close(weights, torch.tensor(expected), atol=5e-4, rtol=0)


def test_the_local_route_prefers_the_same_mode() -> None:
    coordinates = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 1.0]])
    scores = read_tokens(torch.tensor([[1, 0, 2, 0]]), coordinates, torch.full((3, 1), -1), ManifoldConfig())
    cosine = F.cosine_similarity(coordinates[0], coordinates[2], dim=0)
    torch.testing.assert_close(
        scores.local_scores[0, 3], torch.stack((cosine * 0, cosine * 0 + 1, cosine, cosine * 0 - 1e4))
    )


def test_the_static_route_is_the_sum_over_neighbours() -> None:
    """Against the definition: for each neighbour its weight times the messages of all its occurrences."""
    tokens = torch.randint(12, (2, 12), generator=torch.Generator().manual_seed(0))
    context, router = context_of(tokens), HopRouter(CONFIG).double()
    messages = torch.randn(2, 12, 24, dtype=torch.float64)
    expected, coverage = torch.zeros_like(messages), torch.zeros(2, 12, 1, dtype=torch.float64)
    for b in range(2):
        for t in range(12):
            own = int(tokens[b, t])
            found = [[j for j in range(t + 1) if tokens[b, j] == k] for k in NEIGHBOURS[own]]
            cosines = F.cosine_similarity(COORDINATES[own], COORDINATES[NEIGHBOURS[own]])
            evidence = torch.tensor([len(places) for places in found]) * cosines
            weights = router.edge(evidence[:, None]).squeeze(-1).softmax(0)
            for weight, places in zip(weights, found, strict=True):
                expected[b, t] += weight * messages[b, places].sum(0)
            coverage[b, t] = sum(map(bool, found)) / 5
    assert (tokens == 7).any() and coverage.max() > 0
    torch.testing.assert_close(router._static(messages, context), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(context.coverage, coverage, atol=1e-12, rtol=0)


def test_a_mixer_step_is_at_most_a_fifth_of_the_state() -> None:
    mixer = GeodesicMixer(CONFIG)
    states, coordinates = torch.randn(2, 5, 24), torch.randn(2, 5, 16)
    assert torch.equal(mixer(states, coordinates), states), "starts without a step"
    torch.nn.init.normal_(mixer.down.weight)
    step = mixer(states, coordinates) - states
    torch.testing.assert_close(step.norm(dim=-1), 0.2 * states.norm(dim=-1))
    torch.nn.init.normal_(mixer.down.weight, std=1e-3)
    step = mixer(states, coordinates) - states
    assert (step.norm(dim=-1) < 0.1 * states.norm(dim=-1)).all() and step.any()


def test_attention_is_causal_at_ordinary_scores() -> None:
    attention = ManifoldAttention(CONFIG).double()
    attention.initialise(COORDINATES)
    states, directions = torch.randn(1, 12, 24).double(), unit(torch.randn(1, 12, 16).double())
    changed = states.clone()
    changed[:, 7:] += 1
    first, second = (attention(x, directions, directions)[:, :7] for x in (states, changed))
    torch.testing.assert_close(first, second, atol=1e-20, rtol=1e-15)
