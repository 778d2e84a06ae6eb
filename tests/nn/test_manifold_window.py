"""What hops read of the tokens alone: ranks, evidence, coverage, the local route, and rows evaluated once."""

import pytest
import torch
from torch import nn

from hrs.config import GeometryConfig, ManifoldConfig
from hrs.nn.manifold import WindowReader, per_token
from hrs.nn.manifold.window import LocalRoute, neighbour_ranks

V, N, K, B, T = 7, 4, 3, 2, 12


def geometry(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates [V, N], and neighbours [V, K] of which one is missing."""
    coordinates = torch.randn(V, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    neighbours = (torch.arange(V)[:, None] + torch.tensor([1, 3, 4])) % V
    neighbours[2, 2] = -1
    return coordinates, neighbours


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def reader(**changes: float) -> WindowReader:
    return WindowReader(ManifoldConfig(geometry=GeometryConfig(neighbours=K), **changes))


def test_ranks_evidence_and_coverage_equal_a_loop() -> None:
    coordinates, neighbours = geometry()
    ids = tokens()
    window = reader().forward(ids, T, coordinates, neighbours)
    unit = coordinates / coordinates.norm(dim=-1, keepdim=True)
    for b in range(B):
        for t in range(T):
            table = neighbours[ids[b, t]].tolist()
            seen = ids[b, : t + 1].tolist()
            for j in range(T):
                known = j <= t and seen[j] in table
                assert window.ranks[b, t, j] == (table.index(seen[j]) if known else K)
            counts = torch.tensor([seen.count(k) if k >= 0 else 0 for k in table])
            cosines = unit[neighbours[ids[b, t]]] @ unit[ids[b, t]]
            torch.testing.assert_close(window.evidence[b, t], counts * cosines, rtol=0, atol=1e-12)
            assert window.coverage[b, t, 0] == pytest.approx(float((counts > 0).sum()) / K)


def test_confidence_grows_to_one() -> None:
    window = reader(confidence_tokens=4).forward(tokens(), T, *geometry())
    assert window.confidence[:, 0].tolist() == [0.0, 0.25, 0.5, 0.75] + [1.0] * (T - 4)


@pytest.mark.parametrize("n", [1, 5])
def test_last_tokens_alone_give_the_rows_of_the_whole(n: int) -> None:
    coordinates, neighbours = geometry()
    whole = reader().forward(tokens(), T, coordinates, neighbours)
    last = reader().forward(tokens(), n, coordinates, neighbours)
    for name in ("tokens", "cosines", "ranks", "evidence", "coverage", "local"):
        torch.testing.assert_close(getattr(last, name), getattr(whole, name)[:, -n:], rtol=0, atol=1e-14)
    for name in ("positions", "visible", "earlier", "recency", "confidence"):
        torch.testing.assert_close(getattr(last, name), getattr(whole, name)[-n:], rtol=0, atol=1e-14)
    assert torch.equal(last.directions, whole.directions)


def distances(n: int) -> torch.Tensor:
    return torch.arange(n)[:, None] - torch.arange(n)[None, :]


def local(directions: torch.Tensor, temperature: float = 5.0) -> torch.Tensor:
    n = directions.shape[1]
    return LocalRoute(temperature)(directions, directions @ directions.mT, distances(n))


def test_without_a_mode_in_common_the_last_tokens_get_the_weight() -> None:
    """Scores -0.05 * distance and a null slot at 0: worked by hand, as sparsemax of an arithmetic series."""
    directions = torch.eye(20, dtype=torch.float64)[None]
    weights = local(directions)[0]
    assert not weights[0].any()
    torch.testing.assert_close(weights[1, 0].item(), 0.475)  # of (0, -0.05): tau = (-0.05 - 1) / 2
    # Six scores 0 ... -0.25 stay: tau = (-0.75 - 1) / 6.
    expected = [-0.05 * k + 1.75 / 6 for k in range(1, 6)]
    torch.testing.assert_close(weights[19].flip(0)[1:6], torch.tensor(expected).double())
    assert (weights[19] > 0).sum() == 5


def test_earlier_tokens_of_the_same_mode_get_the_weight() -> None:
    same, other = torch.tensor([[0.8, 0.6], [0.6, 0.8]], dtype=torch.float64)
    directions = torch.stack((other, same, other, same))[None]
    weights = local(directions, temperature=1.0)[0]
    # Token 3 finds token 1, cosine 1; the others score 0, as does the null slot.
    assert torch.equal(weights[3], torch.tensor([0.0, 1.0, 0.0, 0.0]).double())


def test_tokens_without_coordinates_have_no_mode() -> None:
    """All-zero directions are not alike: the fallback by nearness is left."""
    nothing, distinct = torch.zeros(1, 6, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)[None]
    torch.testing.assert_close(local(nothing), local(distinct))


def test_neighbours_that_do_not_exist_match_nothing() -> None:
    ids = tokens()
    none = torch.full((B, T, K), -1)
    assert (neighbour_ranks(ids, none, torch.ones(T, T, dtype=torch.bool)) == K).all()


@pytest.mark.parametrize("n", [1, T])
def test_rows_evaluated_once_equal_rows_evaluated_per_token(n: int) -> None:
    """Values and gradients on both sides of the choice: T tokens are more than V ids, one is fewer."""
    torch.manual_seed(0)
    coordinates, ids = geometry()[0], tokens()[:1, :n]
    layer = nn.Sequential(nn.Linear(N, 5), nn.GELU(), nn.Linear(5, 3)).double()
    rows: list[int] = []
    layer.register_forward_hook(lambda module, args, output: rows.append(output.flatten(0, -2).shape[0]))
    cotangent = torch.randn(1, n, 3, dtype=torch.float64)
    got = per_token(layer, coordinates, ids)
    gradients = torch.autograd.grad(got, list(layer.parameters()), cotangent)
    assert rows == [min(n, V)]
    expected = layer(coordinates[ids])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    for a, b in zip(gradients, torch.autograd.grad(expected, list(layer.parameters()), cotangent), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
