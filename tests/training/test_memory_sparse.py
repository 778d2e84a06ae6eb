"""Prediction of steps with lazily updated expert tables: an upper bound, exact where every lookup hits another row."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hrs.config import OptimizerConfig, PeerConfig
from hrs.nn.peer import Peer
from hrs.training.memory_sparse import carry_sparse_gradients
from hrs.training.memory_step import measure_step
from hrs.training.memory_trace import Peak, StorageCounter
from hrs.training.optimizer import build_optimizer

N_EXPERTS, WIDTH, LOOKUPS_PER_TOKEN = 64**2, 8, 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.peer = Peer(PeerConfig(sub_keys=64, n_heads=2, top_k=4), 2 * WIDTH, dropout=0.0)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"expert": list(self.parameters())}


def step_peak(updates: str, n_tokens: int, n_micro_batches: int, *, fake: bool) -> tuple[Peak, int]:
    """Peak of a step, and the rows of a table's gradient at its end."""
    with FakeTensorMode() if fake else nullcontext(), StorageCounter() as counter:
        torch.manual_seed(0)
        model = Layer()
        optimizer = build_optimizer(model, OptimizerConfig(expert_updates=updates))
        carry_sparse_gradients(optimizer, n_micro_batches)
        batches = torch.randn(min(2, n_micro_batches) if fake else n_micro_batches, 1, n_tokens, 2 * WIDTH)

        def accumulate_gradients() -> None:
            for batch in batches:
                model.peer(batch)[0].sum().backward()

        top = measure_step(counter, model, optimizer, accumulate_gradients, clip_norm=1.0)
        gradient = model.peer.down.grad
        return top, gradient._nnz() if gradient.is_sparse else len(gradient)


@pytest.mark.parametrize("n_micro_batches", [1, 2, 4])
@pytest.mark.parametrize("n_tokens", [8, 64, 2048])
def test_the_fake_step_of_lazy_tables_bounds_the_real_one(n_tokens: int, n_micro_batches: int) -> None:
    fake, fake_rows = step_peak("lazy", n_tokens, n_micro_batches, fake=True)
    real, real_rows = step_peak("lazy", n_tokens, n_micro_batches, fake=False)
    assert fake_rows == min(n_tokens * LOOKUPS_PER_TOKEN * n_micro_batches, N_EXPERTS) >= real_rows
    assert fake.bytes >= real.bytes
    for category in ("parameters", "optimizer"):
        assert fake.by_category[category] == real.by_category[category]


def test_few_lookups_are_not_charged_a_gradient_of_the_whole_table() -> None:
    lazy, _ = step_peak("lazy", 8, 2, fake=True)
    dense, _ = step_peak("dense", 8, 2, fake=True)
    table_bytes = 4 * N_EXPERTS * WIDTH
    assert lazy.by_category["gradients"] < table_bytes / 4 < dense.by_category["gradients"] / 8
    assert lazy.by_category["optimizer"] == dense.by_category["optimizer"] + 2 * 4 * N_EXPERTS  # a step per row
