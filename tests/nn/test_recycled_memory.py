"""Memory of large results is used again, and never while anything still looks at it."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hrs.nn import expert_kernels, recycled_memory
from hrs.nn.expert_ops import mix_experts, mix_experts_naive

SHAPE = (64, 8)


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycled_memory, "LARGE_BYTES", 0)
    recycled_memory._free.clear()


def new() -> Tensor:
    return recycled_memory.empty(SHAPE, torch.float32)


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "use",
    [
        lambda tensor: tensor[3:],
        lambda tensor: tensor.detach().numpy(),
        lambda tensor: tensor.view(-1).requires_grad_().clone().grad_fn,
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: torch.sparse_coo_tensor(torch.arange(64)[None], tensor, SHAPE, check_invariants=False),
    ],
    ids=["view", "array", "graph", "storage", "sparse"],
)
def test_memory_comes_back_when_its_last_user_is_gone(use: Callable[[Tensor], object]) -> None:
    first = new()
    where, user = address(first), use(first)
    del first
    assert address(new()) != where
    del user
    gc.collect()
    assert where in {address(t) for t in [new(), new()]}


def test_results_of_one_step_do_not_share_memory_and_those_of_the_next_use_it() -> None:
    step = [new(), new()]
    addresses = {address(t) for t in step}
    assert len(addresses) == 2
    step.clear()
    assert {address(t) for t in [new(), new()]} == addresses


def test_smaller_results_within_the_same_most() -> None:
    first = recycled_memory.empty((10, 8), torch.float64, most=160)
    assert first.shape == (10, 8) and first.dtype is torch.float64
    where = address(first)
    del first
    assert address(recycled_memory.empty((20, 8), torch.float64, most=160)) == where


def test_only_the_sizes_asked_for_last_are_kept() -> None:
    for n in (1, 2, 3, 4, 1, 5):
        recycled_memory.empty((n, 8), torch.float32)
    assert [size // 32 for size in recycled_memory._free] == [3, 4, 1, 5]


def test_released_memory_is_neither_kept_nor_taken_from_its_users() -> None:
    used, unused = new().fill_(1.0), new()
    del unused
    recycled_memory.release()
    assert not recycled_memory._free
    new().fill_(2.0)
    assert (used == 1.0).all()


def test_small_results_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycled_memory, "LARGE_BYTES", 2**20)
    new()
    assert not recycled_memory._free


def gradients(tables: list[Tensor], *, naive: bool, sparse: bool = False) -> list[Tensor]:
    """Of two tables [64, 8], from the same draw each time."""
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(30, 8, generator=generator), torch.randn(30, 5, generator=generator)
    indices = torch.randint(60, (30, 5), generator=generator)
    mix = mix_experts_naive if naive else mix_experts
    result = mix(x, *tables, indices, weights, torch.sigmoid, sparse_gradients=sparse)
    result.square().sum().backward()
    return [table.grad for table in tables if table.grad is not None]


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_tables_are_right_while_earlier_ones_are_kept(
    sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accumulated, kept beside the parameters, and made anew on memory that held other numbers."""
    monkeypatch.setattr(expert_kernels, "SUM_BYTES", 7 * 8 * 4)  # pieces of 7 rows, the last one shorter
    drawn = [torch.randn(64, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    expected = gradients([t.clone().requires_grad_() for t in drawn], naive=True)
    tables = [t.clone().requires_grad_() for t in drawn]

    def check(times: int, found: list[Tensor]) -> None:
        for ours, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.to_dense(), times * reference)

    check(1, gradients(tables, naive=False, sparse=sparse))
    kept = gradients(tables, naive=False, sparse=sparse)  # gradients are added up
    check(2, kept)
    for table in tables:
        table.grad = None
    for _ in range(3):
        check(1, gradients(tables, naive=False, sparse=sparse))
        for table in tables:
            table.grad = None
    check(2, kept)
