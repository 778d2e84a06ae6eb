"""Each kernel's scores against pair-by-pair formulas, and what is special to some of them."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hrs.config import AttentionConfig, ModelConfig
from hrs.models import build_model
from hrs.nn import kernels
from hrs.nn.attention import Attention
from hrs.nn.kernels import Kernel, LearnedFeatures, ProductKernel, RandomProjection, build_kernel, coarse_and_rest

HEADS, D_HEAD, FEATURES, N, S = 2, 6, 5, 4, 7
PRODUCTS = ("dot", "exponential", "mlp", "random_projection")
NAMES = (*PRODUCTS, "l1", "sin_product", "soft_rank")
ALL = torch.ones(N, S, dtype=torch.bool)


def config(name: str, **changes: int) -> ModelConfig:
    attention = AttentionConfig(kernel=name, features=FEATURES)  # type: ignore[arg-type]
    shape = {"d_model": HEADS * D_HEAD, "n_heads": HEADS, "n_layers": 2, "d_ff": 16, "vocab_size": 50} | changes
    return ModelConfig(**shape, dropout=0.0, attention=attention)  # type: ignore[arg-type]


def kernel(name: str) -> Kernel:
    torch.manual_seed(0)
    return build_kernel(config(name)).double()


def queries_and_keys() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(3, HEADS, n, D_HEAD, generator=generator, dtype=torch.float64) for n in (N, S))  # type: ignore[return-value]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.special.erf(x / math.sqrt(2))) / 2


def pairwise(made: Kernel, name: str) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The score of one query and one key, each [d_head], in a head. ``soft_rank`` is no function of a pair."""
    match name:
        case "dot":
            return lambda q, k, head: sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(D_HEAD)  # type: ignore[return-value]
        case "exponential":
            return lambda q, k, head: -((q - k) ** 2).sum() / D_HEAD
        case "l1":
            return lambda q, k, head: -(q - k).abs().sum() / D_HEAD
        case "sin_product":
            return lambda q, k, head: torch.sin(q * k).sum()
        case "mlp":
            assert isinstance(made, LearnedFeatures)
            wq, bq, wk, bk = made.query_weight, made.query_bias, made.key_weight, made.key_bias
            return lambda q, k, head: gelu(wq @ q + bq) @ gelu(wk @ k + bk) / math.sqrt(FEATURES)
    assert isinstance(made, RandomProjection)
    pq, pk = made.query_projection, made.key_projection
    return lambda q, k, head: (q @ pq[head]).clamp_min(0) @ (k @ pk[head]).clamp_min(0) / math.sqrt(FEATURES)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "soft_rank"])
def test_scores_equal_the_formula_pair_by_pair(name: str) -> None:
    q, k = queries_and_keys()
    made = kernel(name)
    score, formula = made.score(q, k, ALL), pairwise(made, name)
    for b, h, i, j in itertools.product(range(3), range(HEADS), range(N), range(S)):
        torch.testing.assert_close(score[b, h, i, j], formula(q[b, h, i], k[b, h, j], h), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PRODUCTS)
def test_features_give_the_weights_of_the_score(name: str) -> None:
    """Scale times the product of features is the score up to a term per query, so the softmax is the same."""
    q, k = queries_and_keys()
    made = kernel(name)
    assert isinstance(made, ProductKernel)
    weights = (made.scale * made.queries(q) @ made.keys(k).mT).softmax(-1)
    torch.testing.assert_close(weights, made.score(q, k, ALL).softmax(-1), rtol=1e-12, atol=1e-12)


# ---- soft_rank -------------------------------------------------------------------------------------------------------


def test_soft_rank_runs_from_the_nearest_to_the_farthest_visible_key() -> None:
    q, k = queries_and_keys()
    visible = torch.arange(N)[:, None] + S - N >= torch.arange(S)[None, :]
    score = kernel("soft_rank").score(q, k, visible)
    for b, h, i in itertools.product(range(3), range(HEADS), range(N)):
        seen = int(visible[i].sum())
        distance = torch.stack([((q[b, h, i] - k[b, h, j]) ** 2).sum() for j in range(seen)])
        expected = -D_HEAD * (distance - distance.min()) / (distance.max() - distance.min() + 1e-6)
        torch.testing.assert_close(score[b, h, i, :seen], expected, rtol=1e-10, atol=1e-10)
        assert score[b, h, i, distance.argmin()] == 0


def test_soft_rank_is_blind_to_keys_that_are_not_visible() -> None:
    """Bit by bit; normalised over the whole row, as the original did it, every score moves."""
    q, k = queries_and_keys()
    changed = k.clone()
    changed[..., -1, :] *= 100
    visible = ALL.clone()
    visible[:, -1] = False
    made = kernel("soft_rank")
    assert torch.equal(made.score(q, k, visible)[..., :-1], made.score(q, changed, visible)[..., :-1])
    far_from_zero = made.score(q, k, visible)[..., :-1] < -0.1
    moved = made.score(q, k, ALL)[..., :-1] != made.score(q, changed, ALL)[..., :-1]
    assert moved[far_from_zero].all()


# ---- sin_product -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 3 * HEADS * N * S * 4, 2**22])
def test_sum_of_sines_has_the_gradient_of_its_formula(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its six coordinates are summed one by one, or four and two."""
    monkeypatch.setattr(kernels, "_ELEMENTS_AT_ONCE", elements)
    q, k = (t.requires_grad_() for t in queries_and_keys())
    score = kernel("sin_product").score(q, k, ALL)
    plain = torch.sin(q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)
    torch.testing.assert_close(score, plain, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(score)
    torch.testing.assert_close(
        torch.autograd.grad(score, (q, k), cotangent), torch.autograd.grad(plain, (q, k), cotangent)
    )


# ---- parameters and buffers ------------------------------------------------------------------------------------------


def test_only_the_learned_kernel_adds_parameters_and_only_the_random_one_adds_state() -> None:
    for name in NAMES:
        layer = Attention(config(name), n_positions=4)
        parameters = {n for n, _ in layer.named_parameters() if n.startswith("kernel.")}
        assert len(parameters) == (4 if name == "mlp" else 0)
        state = {n for n in layer.state_dict() if n.startswith("kernel.")} - parameters
        assert len(state) == (2 if name == "random_projection" else 0)


def test_random_projections_follow_the_seed_and_come_back_from_a_state_dict() -> None:
    torch.manual_seed(3)
    first = build_kernel(config("random_projection", d_model=128))
    torch.manual_seed(3)
    again = build_kernel(config("random_projection", d_model=128))
    other = build_kernel(config("random_projection", d_model=128))
    assert isinstance(first, RandomProjection) and isinstance(other, RandomProjection)
    assert torch.equal(first.query_projection, again.query_projection)
    assert not torch.equal(first.query_projection, other.query_projection)
    assert not torch.equal(first.query_projection, first.key_projection)
    assert first.query_projection.std().item() == pytest.approx(0.1, rel=0.1)
    other.load_state_dict(first.state_dict())
    assert torch.equal(first.query_projection, other.query_projection)


def test_a_models_own_initialisation_leaves_the_learned_kernel_alone() -> None:
    torch.manual_seed(0)
    model = build_model(config("mlp"))
    found = [module for module in model.modules() if isinstance(module, LearnedFeatures)]
    assert len(found) == 2
    for made in found:
        assert made.query_weight.abs().max() > 0.3  # uniform up to 1 / sqrt(6) = 0.41, not N(0, 0.02)
        assert made.key_bias.abs().max() > 0.1


# ---- half precision --------------------------------------------------------------------------------------------------


def test_coarse_and_rest_survive_bfloat16() -> None:
    positions = torch.arange(2**16, dtype=torch.float32)
    assert torch.equal(coarse_and_rest(positions).bfloat16().float().sum(-1), positions)
    assert (positions.bfloat16().float() - positions).abs().max() >= 128
    numbers = torch.rand(1000) * 300
    split = coarse_and_rest(numbers).bfloat16().float().sum(-1)
    assert ((split - numbers).abs() / numbers).max() < 2**-16
    x = torch.rand(5, requires_grad=True)
    (gradient,) = torch.autograd.grad(coarse_and_rest(x).sum(), x)
    assert torch.equal(gradient, torch.ones(5))
