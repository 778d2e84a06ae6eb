import math

import pytest
import torch

from hrs.config import OptimizerConfig
from hrs.models import build_model
from hrs.training.optimizer import build_optimizer, clip_gradients, gradient_norm, set_rates


@pytest.fixture
def model(small_experiment):
    torch.manual_seed(0)
    return build_model(small_experiment("full_hrs").model)


def test_groups_hold_every_parameter_once_and_decay_only_matrices(model) -> None:
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    members = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, members)) == sorted(map(id, model.parameters()))
    for group in optimizer.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] == 0.3) for p in group["params"])


def test_decay_vectors_decays_everything(model) -> None:
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3, decay_vectors=True))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}


def test_a_model_that_leaves_a_parameter_out_of_its_groups_is_caught(model, monkeypatch) -> None:
    groups = model.parameter_groups()
    del groups["router"]
    monkeypatch.setattr(model, "parameter_groups", lambda: groups)
    with pytest.raises(AssertionError, match="router"):
        build_optimizer(model, OptimizerConfig())


def test_rates_are_the_schedule_times_the_role(model) -> None:
    optimizer = build_optimizer(model, OptimizerConfig())
    set_rates(optimizer, 0.2, {"router": 0.5, "engram": 0.0})
    rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
    assert (rates["router"], rates["engram"], rates["backbone"]) == (0.1, 0.0, 0.2)


def test_the_norm_counts_only_what_has_a_gradient(model) -> None:
    optimizer = build_optimizer(model, OptimizerConfig())
    first, second = list(model.parameters())[:2]
    first.grad = torch.full_like(first, 2.0)
    second.grad = torch.full_like(second, -1.0)
    expected = math.sqrt(4 * first.numel() + second.numel())
    norm = gradient_norm(optimizer)
    assert norm.item() == pytest.approx(expected)
    clip_gradients(optimizer, 0.5, norm)
    assert gradient_norm(optimizer).item() == pytest.approx(0.5, rel=1e-4)
    clip_gradients(optimizer, 9.0, gradient_norm(optimizer))
    assert gradient_norm(optimizer).item() == pytest.approx(0.5, rel=1e-4)


def test_one_update_equals_adamw_by_hand(model) -> None:
    """First step: both moments, corrected, give g / (|g| + eps); decay is decoupled."""
    config = OptimizerConfig(weight_decay=0.1, eps=1e-8)
    optimizer = build_optimizer(model, config)
    set_rates(optimizer, 0.01, {})
    weight = model.embedding.weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    expected = before * (1 - 0.01 * 0.1) - 0.01 * weight.grad / (weight.grad.abs() + 1e-8)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, atol=1e-6, rtol=1e-5)
