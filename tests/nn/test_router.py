"""Routing weights, their causal mean, and the routing losses."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from hrs.config import RouterConfig
from hrs.nn.router import RELATIVE_COST, Router, routing_losses, routing_statistics, zipf_shares

D, T = 8, 20
TIERS = ("conv", "expert", "attention", "sink")


def router(**changes: float) -> Router:
    torch.manual_seed(0)
    return Router(RouterConfig(hidden=4, **changes), D, len(TIERS), max_seq_len=T).double().eval()


def logits_of(layer: Router, x: torch.Tensor) -> torch.Tensor:
    return layer.output(torch.nn.functional.gelu(layer.hidden(x)))


@pytest.mark.parametrize("window", [0, 1, 2, 8, 1000])
def test_weights_are_softmax_of_the_causal_mean(window: int) -> None:
    """Evaluation: softmax(mean of the last ``window`` logits / final temperature), computed token by token."""
    layer, x = router(trc_window=window, temperature_end=0.5), torch.randn(3, T, D).double()
    logits = logits_of(layer, x)
    means = [logits[:, max(0, t - max(window, 1) + 1) : t + 1].mean(dim=1) for t in range(T)]
    torch.testing.assert_close(layer(x), (torch.stack(means, 1) / 0.5).softmax(-1), rtol=1e-12, atol=1e-12)


@examples(25)
@given(cuts=st.lists(st.integers(1, T - 1), unique=True), window=st.integers(0, 25))
def test_pieces_equal_the_whole(cuts: list[int], window: int) -> None:
    layer, x = router(trc_window=window), torch.randn(2, T, D).double()
    cache = layer.new_cache()
    edges = [0, *sorted(cuts), T]
    pieces = [layer(x[:, a:b], cache) for a, b in itertools.pairwise(edges)]
    # Logits below 2 in size: differences of sums of 20 lose 2 * 20 * 20 * 2 roundings, 2e-13, the temperature (0.5)
    # doubles that, and weights move by half of what their logits do.
    torch.testing.assert_close(torch.cat(pieces, 1), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [0, 8])
def test_later_tokens_leave_earlier_weights_untouched(window: int) -> None:
    layer, x = router(trc_window=window), torch.randn(2, T, D).double()
    changed = x.clone()
    changed[:, 9:] = torch.randn(2, T - 9, D).double()
    assert torch.equal(layer(changed)[:, :9], layer(x)[:, :9])


def test_training_draws_gumbel_softmax_samples() -> None:
    """The strongest tier is k with probability softmax(logits)_k, whatever the temperature (the Gumbel-max law)."""
    layer, x = router(temperature_start=0.7).train(), torch.randn(1, 1, D).double()
    layer.output.weight.data.mul_(3.0)
    weights = layer(x.expand(20_000, 1, D))
    shares = torch.bincount(weights.argmax(-1).flatten(), minlength=len(TIERS)) / 20_000
    torch.testing.assert_close(shares.double(), logits_of(layer, x).softmax(-1).flatten(), rtol=0, atol=0.015)
    torch.testing.assert_close(weights.sum(-1), torch.ones(20_000, 1).double())


def test_temperature_anneals_linearly_and_stops() -> None:
    layer = router(temperature_start=1.0, temperature_end=0.2, temperature_decay_frac=0.8)
    expected = {0.0: 1.0, 0.4: 0.6, 0.8: 0.2, 1.0: 0.2}
    for fraction, temperature in expected.items():
        layer.set_progress(fraction)
        assert layer.temperature.item() == pytest.approx(temperature)
    at_once = router(temperature_end=0.2, temperature_decay_frac=0.0)
    at_once.set_progress(0.0)
    assert at_once.temperature.item() == pytest.approx(0.2)


def losses_of(routings: list[torch.Tensor], **changes: float) -> dict[str, torch.Tensor]:
    return routing_losses(*routing_statistics(routings), RouterConfig(**changes), TIERS)


def test_losses_equal_explicit_sums() -> None:
    routings = [torch.rand(2, 5, 4).double().softmax(-1) for _ in range(3)]
    balance = entropy = flops = 0.0
    for r in routings:
        flat = r.reshape(-1, 4)
        p = flat.mean(0)
        balance += 4 * sum(float(p[k]) ** 2 for k in range(4)) / 3
        entropy += sum(float(q) * math.log(float(q)) for row in flat for q in row) / len(flat) / math.log(4) / 3
        flops += sum(float(p[k]) * RELATIVE_COST[TIERS[k]] for k in range(4)) / 3
    losses = losses_of(routings, balance_weight=0.3, entropy_weight=0.2, flops_weight=0.5)
    assert losses["balance"].item() == pytest.approx(0.3 * balance)
    assert losses["entropy"].item() == pytest.approx(0.2 * entropy)
    assert losses["flops"].item() == pytest.approx(0.5 * flops)
    assert "flops" not in losses_of(routings)


@examples(50)
@given(scale=st.floats(0, 20), seed=st.integers(0, 1000))
def test_balance_is_least_when_uniform(scale: float, seed: int) -> None:
    """Balance is 1 for uniform shares and never less; entropy lies in [-1, 0]."""
    generator = torch.Generator().manual_seed(seed)
    routing = (scale * torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)).softmax(-1)
    losses = losses_of([routing], balance_weight=1.0, entropy_weight=1.0)
    # Sums of at most 12 shares: less than 100 roundings.
    assert losses["balance"].item() >= 1 - 1e-12
    assert -1 - 1e-12 <= losses["entropy"].item() <= 1e-12
    uniform = losses_of([torch.full((1, 3, 4), 0.25).double()], balance_weight=1.0, entropy_weight=1.0)
    assert uniform["balance"].item() == 1
    assert uniform["entropy"].item() == pytest.approx(-1, rel=1e-15)


def test_a_weight_of_zero_has_a_finite_gradient() -> None:
    """Logits so far apart that a weight underflows to 0 must not turn the entropy's gradient into NaN."""
    logits = torch.tensor([[[0.0, -1000.0, 0.0, 3.0]]], requires_grad=True)
    losses_of([logits.softmax(-1)])["entropy"].backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize(("n", "exponent", "shares"), [(3, 1.5, [0.647, 0.229, 0.125]), (2, 5.5, [0.978, 0.022])])
def test_zipf_shares(n: int, exponent: float, shares: list[float]) -> None:
    assert zipf_shares(n, exponent) == pytest.approx(shares, abs=6e-4)
    assert sum(zipf_shares(n, exponent)) == pytest.approx(1)


def test_hub_takes_the_place_of_balance() -> None:
    """Squared distance of each layer's ranked shares from the target, whichever tier is the hub."""
    routings = [torch.rand(2, 5, 4).double().softmax(-1) for _ in range(3)]
    total = 0.0
    for r in routings:
        ranked = sorted(r.reshape(-1, 4).mean(0).tolist(), reverse=True)
        total += sum((p - target) ** 2 for p, target in zip(ranked, zipf_shares(4, 1.5), strict=True)) / 3
    losses = losses_of(routings, hub_exponent=1.5, balance_weight=0.3)
    assert losses["hub"].item() == pytest.approx(0.3 * total)
    assert losses.keys() == {"hub", "entropy"}


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_hub_loss_is_zero_at_the_target_in_any_order(order: tuple[int, ...]) -> None:
    shares = torch.tensor(zipf_shares(4, 1.5)).double()[list(order)]
    assert losses_of([shares.expand(2, 3, 4)], hub_exponent=1.5)["hub"].item() == pytest.approx(0, abs=1e-12)
