import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from training_checks import different, weights

from hrs.config import OptimizerConfig, PeerConfig
from hrs.models import build_model
from hrs.nn.peer import Peer
from hrs.training.optimizer import ExpertTables, build_optimizer, clip_gradients, gradient_norm, set_rates


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


class Tables(nn.Module):
    """Two expert tables; ``key`` beside them is no table."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.zeros(5, 2)), nn.Parameter(torch.zeros(5, 2))
        self.key = nn.Parameter(torch.zeros(5, 2))
        self.sparse_gradients = False

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"expert": list(self.parameters())}


def test_lazy_updates_concern_the_expert_tables_alone() -> None:
    model = Tables()
    optimizer = build_optimizer(model, OptimizerConfig(expert_updates="lazy", weight_decay=0.3))
    assert model.sparse_gradients
    dense, lazy = optimizer.param_groups
    assert [id(p) for p in dense["params"]] == [id(model.key)]
    assert [id(p) for p in lazy["params"]] == [id(model.down), id(model.up)]
    assert (lazy["role"], lazy["weight_decay"], lazy["lazy"]) == ("expert", 0.3, True)


def test_peer_has_expert_tables_and_a_linear_layer_has_not() -> None:
    peer = Peer(PeerConfig(sub_keys=4, n_heads=2, top_k=2), 8, dropout=0.0)
    assert isinstance(peer, ExpertTables) and peer.down.shape[0] == peer.up.shape[0] == 16
    assert not isinstance(nn.Linear(2, 2), ExpertTables)


def test_dense_updates_are_plain_adamw_with_dense_gradients() -> None:
    model = Tables()
    model.sparse_gradients = True
    optimizer = build_optimizer(model, OptimizerConfig())
    assert type(optimizer) is torch.optim.AdamW and len(optimizer.param_groups) == 1
    assert not model.sparse_gradients


def test_lazy_updates_change_nothing_where_there_are_no_tables(small_experiment) -> None:
    """Bit for bit: one training config serves presets with and without retrieved experts."""
    results = []
    for updates in ("dense", "lazy"):
        torch.manual_seed(0)
        model = build_model(small_experiment("dense_baseline").model)
        optimizer = build_optimizer(model, OptimizerConfig(expert_updates=updates))
        set_rates(optimizer, 0.01, {})
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        clip_gradients(optimizer, 1.0, gradient_norm(optimizer))
        optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(dense, lazy) for dense, lazy in zip(*results, strict=True))


def test_a_lazy_run_resumes_bit_exactly_with_real_experts(small_experiment, run, tmp_path: Path) -> None:
    """Through the loop: accumulation, clipping, checkpoint; and it is another run than the dense one."""
    peer = {"model.n_layers": 2, "model.peer.sub_keys": 8, "model.peer.n_heads": 2, "model.peer.top_k": 2}
    changes = peer | {"training.steps": 4, "training.validations": 0, "training.optimizer.expert_updates": "lazy"}
    config = small_experiment("v17_peer_only", changes)
    run(config, tmp_path / "whole", checkpoint_every=2, micro_batch=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_00000004")
    assert [report.step for report in run(config, tmp_path / "resumed", micro_batch=2)] == [3, 4]
    assert different(weights(tmp_path / "whole"), weights(tmp_path / "resumed")) == []
    run(small_experiment("v17_peer_only", changes | {"training.optimizer.expert_updates": "dense"}), tmp_path / "dense")
    assert any(".down" in name for name in different(weights(tmp_path / "whole"), weights(tmp_path / "dense")))
