"""Learned loss weights, losses without meaning, and the categorisation head."""

import math

import pytest
import torch
import torch.nn.functional as F

from hrs.nn.objectives import CategoryHead, LossScales, PlaceholderLosses

WEIGHTS = {"hub": 0.1, "entropy": 0.01, "recon": 0.1}


def weighted(values: dict[str, float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(WEIGHTS.get(name, 1.0) * value) for name, value in values.items()}


@pytest.mark.parametrize("original", [False, True])
def test_scales_start_at_the_fixed_weights(original: bool) -> None:
    scales = LossScales(WEIGHTS, original=original)
    losses = weighted({"hub": 2.0, "entropy": 0.5, "recon": 0.3, "locality": 4.0})
    scaled = scales(losses)
    for name, loss in losses.items():
        torch.testing.assert_close(scaled[name], loss)
    pull = sum((0.001 if original else w) * -math.log(w) for w in WEIGHTS.values())
    assert scaled["loss_scales"].item() == pytest.approx(pull, rel=1e-5)


def test_learned_scales_settle_where_the_uncertainty_says() -> None:
    """exp(s) = w / L: gradient descent on constant losses ends there, whatever the start."""
    scales = LossScales(WEIGHTS, original=False)
    values = {"hub": 2.0, "entropy": 0.5, "recon": 0.3}
    optimizer = torch.optim.Adam(scales.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        sum(scales(weighted(values)).values()).backward()
        optimizer.step()
    for name, value in values.items():
        assert scales.raw[name].exp().item() == pytest.approx(WEIGHTS[name] / value, rel=1e-2)


def test_original_scales_drift_to_the_published_values_without_data() -> None:
    """Constant gradient signs, 50,000 AdamW steps at 3e-5 with a cosine and decay 0.1: .0573 and .0287, as reported.

    So those values say nothing about the text they were trained on.
    """
    raw = {"hub": math.log(0.1), "entropy": math.log(0.01)}
    steps, warmup, peak = 50_000, 1000, 3e-5
    for step in range(steps):
        progress = (step - warmup) / (steps - warmup)
        lr = peak * (step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress)))
        for name, sign in (("hub", 1), ("entropy", -1)):
            raw[name] -= lr * (sign + 0.1 * raw[name])  # Adam's step has size 1 while the sign stays
    assert math.exp(raw["hub"]) == pytest.approx(0.0573, abs=5e-4)
    assert math.exp(raw["entropy"]) == pytest.approx(0.0287, abs=5e-4)


def test_placeholders_are_what_they_say() -> None:
    torch.manual_seed(0)
    losses, pooled = PlaceholderLosses(32).double(), torch.randn(3, 32).double()
    values = losses(pooled)
    hub = pooled @ losses.hub.weight.T
    assert losses.target.norm().item() == pytest.approx(1)
    torch.testing.assert_close(values["hub"], F.mse_loss(hub, losses.target.expand_as(hub)))
    torch.testing.assert_close(
        values["recon"], F.mse_loss(pooled @ losses.recon[0].weight.T, pooled @ losses.recon[1].weight.T)
    )
    shares = torch.distributions.Categorical(logits=pooled @ losses.entropy.weight.T)
    torch.testing.assert_close(values["entropy"], -shares.entropy().mean() / math.log(4))
    assert "target" in losses.state_dict()  # a resumed run aims at the same vector
    assert sum(p.numel() for p in losses.parameters()) == 32 * (8 + 4 + 2 * 16)


def test_windows_without_a_topic_do_not_count() -> None:
    torch.manual_seed(0)
    head, states = CategoryHead(8, 5), torch.randn(4, 8)
    logits = head(states)
    loss = head.loss(logits, torch.tensor([2, -1, 4, -1]))
    torch.testing.assert_close(loss, F.cross_entropy(logits[[0, 2]], torch.tensor([2, 4])))
    assert head.loss(logits, torch.full((4,), -1)) == 0
