"""Operators on chosen rows against gathers of them, and product-key retrieval against looking at every expert."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hrs.nn import expert_kernels
from hrs.nn.expert_ops import chosen_dot, chosen_sum, mix_experts, mix_experts_naive
from hrs.nn.expert_retrieval import product_key_top_k, retrieve, retrieve_naive

R, K, N, W = 7, 5, 12, 6
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def draw(dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Inputs that learn (x, down, up, weights), and indices in which rows choose experts twice and some never."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((R, W), (N, W), (N, W), (R, K))
    leaves = [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in shapes]
    indices = torch.randint(N - 2, (R, K), generator=generator)
    indices[:, 1] = indices[:, 0]
    return leaves, indices


def mixed(leaves: list[Tensor], indices: Tensor, *, naive: bool = False, sparse: bool = False) -> Tensor:
    x, down, up, weights = leaves
    mix = mix_experts_naive if naive else mix_experts
    return mix(x, down, up, indices, weights, torch.nn.functional.gelu, sparse_gradients=sparse)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(3))
def test_mixture_and_its_gradients_equal_gathering(dtype: torch.dtype, seed: int) -> None:
    leaves, indices = draw(dtype, seed)
    tolerance = TOLERANCE[dtype]
    fast, naive = mixed(leaves, indices), mixed(leaves, indices, naive=True)
    torch.testing.assert_close(fast, naive, rtol=tolerance, atol=tolerance)
    direction = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad(fast, leaves, direction), torch.autograd.grad(naive, leaves, direction), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_gradients_equal_finite_differences() -> None:
    (x, table, _, weights), indices = draw(torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: chosen_dot(a, b, indices), (x, table))
    assert torch.autograd.gradcheck(lambda a, b: chosen_sum(a, b, indices), (weights, table))


def test_operators_keep_the_rules_of_the_library() -> None:
    """Schema, fake shapes and autograd registration, as torch.library checks them."""
    (x, table, _, weights), indices = draw(torch.float32)
    for operator, arguments in ((chosen_dot, (x, table, indices)), (chosen_sum, (weights, table, indices))):
        torch.library.opcheck(operator, arguments)
    query, keys = torch.randn(3, 2, 1, 4, requires_grad=True), torch.randn(2, 2, 5, 4, requires_grad=True)
    # The remaining check of opcheck wants to differentiate the integer output.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(product_key_top_k, (query, keys, 3), test_utils=checks)


def test_sparse_gradients_equal_dense_ones_over_two_backward_passes() -> None:
    dense, indices = draw(torch.float64)
    sparse = [leaf.detach().clone().requires_grad_() for leaf in dense]
    for chosen in (indices, (indices + 3) % N):
        mixed(dense, chosen).square().sum().backward()
        mixed(sparse, chosen, sparse=True).square().sum().backward()
    for a, b in zip(dense, sparse, strict=True):
        assert a.grad is not None and b.grad is not None
        is_table = len(a) == N
        assert b.grad.is_sparse == is_table
        assert not is_table or b.grad._indices()[0].diff().min() > 0
        torch.testing.assert_close(b.grad.to_dense(), a.grad, rtol=1e-12, atol=1e-12)


def test_sparse_gradient_holds_only_rows_that_were_chosen() -> None:
    leaves, indices = draw(torch.float32)
    down_gradient = torch.autograd.grad(mixed(leaves, indices, sparse=True).sum(), leaves[1])[0]
    assert down_gradient.is_coalesced()
    assert down_gradient.indices().flatten().tolist() == indices.unique().tolist()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_do_not_depend_on_each_other_to_the_last_bit(dtype: torch.dtype) -> None:
    """At equal shapes, in results and in gradients: what the causality audit rests on."""
    generator = torch.Generator().manual_seed(0)
    rows, width = 64, 33
    x, table = (torch.randn(n, width, dtype=dtype, generator=generator).requires_grad_() for n in (rows, 200))
    weights = torch.randn(rows, 16, dtype=dtype, generator=generator).requires_grad_()
    indices = torch.randint(200, (rows, 16), generator=generator)
    kept = torch.arange(rows) % 3 == 0

    def results(x: Tensor, weights: Tensor, indices: Tensor) -> list[Tensor]:
        dots, sums = chosen_dot(x, table, indices), chosen_sum(weights, table, indices)
        return [dots, sums, *torch.autograd.grad((dots.sum() + sums.sum()), (x, weights))]

    other_x, other_weights, other_indices = x.detach().clone(), weights.detach().clone(), indices.clone()
    other_x[~kept], other_weights[~kept] = torch.randn(2, 1, 1, dtype=dtype, generator=generator)
    other_indices[~kept] = torch.randint(200, (int((~kept).sum()), 16), generator=generator)
    after = results(other_x.requires_grad_(), other_weights.requires_grad_(), other_indices)
    for a, b in zip(results(x, weights, indices), after, strict=True):
        assert torch.equal(a[kept], b[kept])
        assert not torch.equal(a[~kept], b[~kept]) or a.unique().numel() == 1


def test_dot_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path for devices and types that have no better one."""
    (x, table, _, _), indices = draw(torch.float64)
    monkeypatch.setattr(expert_kernels, "GATHER_BYTES", 2 * K * W * 8)
    expected = torch.einsum("rw,rkw->rk", x, table[indices])
    torch.testing.assert_close(expert_kernels.gathered_dot(x, table, indices), expected, rtol=1e-12, atol=1e-12)
    half = expert_kernels.dot(x.bfloat16(), table.bfloat16(), indices)
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0.05, atol=0.1)


def test_autocast_leaves_the_operators_in_float32() -> None:
    leaves, indices = draw(torch.float32)
    half = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        result = mixed(half, indices)
    assert result.dtype is torch.float32
    expected = mixed([leaf.detach().float() for leaf in half], indices)
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)
    result.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype is torch.bfloat16 for leaf in half)


@pytest.mark.parametrize("sparse", [False, True])
def test_backward_on_fake_tensors(sparse: bool) -> None:
    with FakeTensorMode():
        leaves, indices = draw(torch.float32)
        result = mixed(leaves, indices, sparse=sparse)
        result.sum().backward()
    assert result.shape == (R, W)
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)


@examples(60)
@given(
    n_keys=st.sampled_from([2, 3, 8, 16, 33, 48, 64, 130]),
    k=st.integers(1, 8),
    halves=st.booleans(),
    shared=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_product_key_top_k_equals_looking_at_every_expert(
    n_keys: int, k: int, halves: bool, shared: bool, seed: int
) -> None:
    k = min(k, n_keys)
    tokens, heads, width = 4, 3, 5
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(tokens, heads, 2 if halves else 1, width, dtype=torch.float64, generator=generator)
    keys = torch.randn(2, 1 if shared else heads, n_keys, width, dtype=torch.float64, generator=generator)
    experts, scores = retrieve(query, keys, k)
    every = [
        torch.stack([keys[side, 0 if shared else h] @ query[t, h, side if halves else 0] for side in range(2)])
        for t in range(tokens)
        for h in range(heads)
    ]
    all_sums = torch.stack([(a[:, None] + b[None, :]).flatten() for a, b in every])  # [T H, S S]
    best, chosen = all_sums.topk(k, dim=-1).values, experts.flatten(0, 1)
    # Sums of two products of 5 normal numbers, off by at most 12 roundings of about 30: 4e-14. By value, not by index:
    # which of two experts nearer than that is the better one depends on the order of adding.
    torch.testing.assert_close(scores.flatten(0, 1), best, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(all_sums.gather(1, chosen), best, rtol=1e-12, atol=1e-12)
    assert (chosen.sort(dim=-1).values.diff() > 0).all(), "no expert twice"


def test_ties_still_give_the_highest_scores() -> None:
    """With whole numbers most scores are shared; which of the equal experts is taken is open, the scores are not."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-2, 3, (20, 2, 1, 3), generator=generator).double()
    keys = torch.randint(-2, 3, (2, 2, 64, 3), generator=generator).double()
    experts, scores = retrieve(query, keys, 8)
    assert torch.equal(scores, retrieve_naive(query, keys, 8)[1])
    assert all(len(set(row.tolist())) == 8 for row in experts.flatten(0, 1))


@pytest.mark.parametrize(("n_queries", "n_key_heads"), [(1, 3), (2, 1)])
def test_retrieval_gradients_equal_those_through_all_scores(n_queries: int, n_key_heads: int) -> None:
    query = torch.randn(6, 3, n_queries, 5, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, n_key_heads, 24, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (retrieve, retrieve_naive):
        experts, scores = function(query, keys, 4)
        gradients = torch.autograd.grad(scores.softmax(-1).square().sum(), (query, keys))
        results.append((experts, scores, *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_retrieval_in_pieces_equals_retrieval_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from hrs.nn import expert_retrieval

    query, keys = torch.randn(9, 2, 1, 4).double(), torch.randn(2, 2, 16, 4).double()
    whole = product_key_top_k(query, keys, 3)
    monkeypatch.setattr(expert_retrieval, "SCORE_BYTES", 4 * 2 * 16 * 8)
    for a, b in zip(product_key_top_k(query, keys, 3), whole, strict=True):
        assert torch.equal(a, b)
