"""Sparsemax is the projection onto the simplex, forbidden entries have no say, and its gradient is right."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hrs.nn.sparsemax import Sparsemax, _threshold_by_search, _threshold_by_sorting

sparsemax = Sparsemax()


def by_bisection(scores: Tensor, allowed: Tensor | None = None) -> Tensor:
    """The reference: 100 halvings of the interval that holds the threshold, in float64."""
    scores = scores.double()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    scores = scores - scores.amax(-1, keepdim=True)  # NaN where nothing is allowed
    low, high = torch.full_like(scores[..., :1], -1.0), torch.zeros_like(scores[..., :1])
    for _ in range(100):
        middle = (low + high) / 2
        too_low = (scores - middle).clamp_min(0).sum(-1, keepdim=True) > 1
        low, high = middle.where(too_low, low), high.where(too_low, middle)
    return (scores - low).clamp_min(0).nan_to_num(0.0)


def by_sorting(scores: Tensor) -> Tensor:
    """The formula of the paper."""
    ordered = scores.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype)
    size = (1 + ranks * ordered > ordered.cumsum(-1)).sum(-1, keepdim=True)
    return (scores - (ordered.cumsum(-1).gather(-1, size - 1) - 1) / size).clamp_min(0)


def rows_of(kind: str, n: int) -> Tensor:
    draw = torch.Generator().manual_seed(n)
    noise = torch.randn(40, n, generator=draw)
    match kind:
        case "ordinary":
            return noise
        case "flat":
            return 0.01 * noise
        case "wide":
            return 1e4 * noise
        case "far from zero":
            return (noise * 4).round() / 4 + 1e4  # quarters are exact there in float32
        case "ties":
            return noise.round()
        case "constant":
            return noise[:, :1].expand(-1, n)
        case "one huge":
            return noise + 1e4 * torch.eye(n)[torch.arange(40) % n]
        case "every step drops one":
            return -(0.5 ** torch.arange(n).flip(0)).expand(40, -1)
    raise AssertionError(kind)


KINDS = ("ordinary", "flat", "wide", "far from zero", "ties", "constant", "one huge", "every step drops one")


# ---- the projection --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", (1, 2, 3, 17, 64, 1024))
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_bisection(kind: str, n: int) -> None:
    scores = rows_of(kind, n)
    torch.testing.assert_close(sparsemax(scores).double(), by_bisection(scores), atol=1e-6, rtol=0)
    torch.testing.assert_close(sparsemax(scores.double()), by_bisection(scores), atol=1e-12, rtol=0)


@examples(100)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=24), st.floats(-1000, 1000))
def test_is_a_distribution_that_does_not_feel_a_shift(row: list[float], shift: float) -> None:
    scores = torch.tensor([row], dtype=torch.float64)
    weights = sparsemax(scores)
    assert (weights >= 0).all()
    # Relative to the largest, a sum of at most 24 numbers in [-1, 0] gives a threshold off by 25 roundings; the sum of
    # 24 weights is off by 25 * 24 of them, 7e-14.
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, dtype=torch.float64), atol=1e-12, rtol=0)
    # There the numbers are as large as 50, and their running sum is off by 24 * 24 * 50 roundings, over 1 to 24: 4e-12.
    torch.testing.assert_close(weights, by_sorting(scores), atol=1e-11, rtol=0)
    # Each of the shifted scores, as large as 1,050, is rounded by 1.2e-13, and weights move by twice that at most.
    torch.testing.assert_close(weights, sparsemax(scores + shift), atol=1e-12, rtol=0)
    higher = scores <= scores.T  # [n, n]
    assert torch.where(higher, weights.T - weights, 0.0).min() >= 0  # order is kept


def test_a_row_does_not_depend_on_how_long_others_take() -> None:
    quick, slow = rows_of("one huge", 64).double(), rows_of("every step drops one", 64).double()
    together = sparsemax(torch.cat((quick, slow)))
    assert torch.equal(together, torch.cat((sparsemax(quick), sparsemax(slow))))


def test_any_leading_shape_and_any_stride() -> None:
    scores = torch.randn(3, 5, 2, 7, dtype=torch.float64)
    flat = sparsemax(scores.reshape(-1, 7)).reshape(scores.shape)
    assert torch.equal(sparsemax(scores), flat)
    assert torch.equal(sparsemax(scores[0, 0, 0]), flat[0, 0, 0])
    assert torch.equal(sparsemax(scores.transpose(0, 3)), sparsemax(scores.transpose(0, 3).contiguous()))


# ---- what is allowed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_forbidden_entries_take_no_part(kind: str) -> None:
    scores = rows_of(kind, 48)
    allowed = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    allowed[7] = False
    weights = sparsemax(scores, allowed)
    assert (weights[~allowed] == 0).all()
    torch.testing.assert_close(weights.double(), by_bisection(scores, allowed), atol=1e-6, rtol=0)
    torch.testing.assert_close(weights.sum(-1), (torch.arange(40) != 7).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", (-1e4, 0.0, 1e300, math.inf, -math.inf, math.nan))
def test_the_value_of_a_forbidden_score_moves_no_bit(value: float) -> None:
    """Causality rests on this: the future is forbidden, and may hold anything."""
    scores = torch.randn(6, 33, 33, dtype=torch.float64)
    past = torch.ones(33, 33, dtype=torch.bool).tril(-1)
    changed = scores.masked_fill(~past, value).requires_grad_()
    weights = sparsemax(changed, past)
    assert torch.equal(weights, sparsemax(scores, past))
    assert (weights[:, 0] == 0).all()  # nothing comes before the first
    (gradient,) = torch.autograd.grad(weights, changed, torch.randn_like(weights))
    assert gradient.isfinite().all() and (gradient[:, ~past] == 0).all()


def test_more_forbidden_entries_change_nothing_but_the_order_of_sums() -> None:
    scores, seen = torch.randn(50, 40, dtype=torch.float64), torch.arange(40) < 13
    torch.testing.assert_close(sparsemax(scores, seen)[:, :13], sparsemax(scores[:, :13]), atol=1e-12, rtol=0)


def test_a_finite_mask_is_no_mask_where_everything_is_masked() -> None:
    """The trap that ``allowed`` is there for."""
    assert torch.equal(sparsemax(torch.full((1, 64), -5e4)), torch.full((1, 64), 1 / 64))
    assert torch.equal(sparsemax(torch.full((1, 64), -math.inf)), torch.zeros(1, 64))


def test_nan_that_is_allowed_is_not_hidden() -> None:
    scores = torch.tensor([[0.0, math.nan, 1.0], [0.0, 0.5, 1.0]])
    weights = sparsemax(scores)
    assert weights[0].isnan().all() and torch.equal(weights[1], torch.tensor([0.0, 0.25, 0.75]))


# ---- the gradient ----------------------------------------------------------------------------------------------------


def test_gradient_agrees_with_differences() -> None:
    scores = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    allowed = torch.ones(5, 9, dtype=torch.bool).tril()
    assert torch.autograd.gradcheck(sparsemax, (scores,))
    assert torch.autograd.gradcheck(lambda z: sparsemax(z, allowed), (scores,))
    assert torch.autograd.gradgradcheck(sparsemax, (scores,))
    torch.library.opcheck(torch.ops.hrs.sparsemax.default, (scores, allowed))
    torch.library.opcheck(torch.ops.hrs.sparsemax.default, (scores, None))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_gradient_agrees_with_the_sorting_form(dtype: torch.dtype) -> None:
    ours, reference = (torch.randn(30, 50, dtype=dtype).requires_grad_() for _ in range(2))
    reference.data.copy_(ours.data)
    cotangent = torch.randn(30, 50, dtype=dtype)
    sparsemax(ours).backward(cotangent)
    by_sorting(reference).backward(cotangent)
    torch.testing.assert_close(ours.grad, reference.grad)


def test_autocast_computes_in_float32() -> None:
    query, key = torch.randn(4, 12, 8, requires_grad=True), torch.randn(4, 12, 8)
    with torch.autocast("cpu", torch.bfloat16):
        scores = query @ key.mT
        weights = sparsemax(scores)
        (weights @ key).sum().backward()
    assert scores.dtype == torch.bfloat16 and weights.dtype == torch.float32
    assert query.grad is not None and query.grad.isfinite().all() and query.grad.any()
    torch.testing.assert_close(weights, by_bisection(scores).float(), atol=1e-6, rtol=0)


def test_fake_tensors_have_the_shape_of_real_ones() -> None:
    with FakeTensorMode():
        scores = torch.randn(2, 3, 16, requires_grad=True)
        weights = sparsemax(scores, torch.ones(3, 16, dtype=torch.bool))
        weights.sum().backward()
    assert weights.shape == (2, 3, 16) and scores.grad is not None and scores.grad.shape == scores.shape


def test_compiles_in_one_graph() -> None:
    scores = torch.randn(6, 10, requires_grad=True)
    allowed = torch.rand(6, 10) < 0.5
    compiled = torch.compile(sparsemax, fullgraph=True, backend="aot_eager")
    cotangent = torch.randn(6, 10)
    gradients = [torch.autograd.grad(f(scores, allowed), scores, cotangent)[0] for f in (compiled, sparsemax)]
    assert torch.equal(compiled(scores, allowed), sparsemax(scores, allowed))
    assert torch.equal(*gradients)


@examples(40)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_sorting_finds_the_threshold_that_the_search_finds(n: int, seed: int) -> None:
    """What a GPU computes without waiting: ties, rows with one, some or nothing allowed (-1 throughout)."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(6, n, generator=generator, dtype=torch.float64) * 10.0 ** torch.arange(-2, 4)[:, None]
    scores[0] = scores[0].round(decimals=2)
    scores[1, 1:] = -math.inf
    below = (scores - scores.amax(-1, keepdim=True)).clamp_min(-1.0)
    below[2] = -1.0
    by_search, found = _threshold_by_search(below), _threshold_by_sorting(below)
    torch.testing.assert_close(found, by_search, atol=1e-12, rtol=0)
    assert torch.equal(below[2] > found[2], torch.zeros(n, dtype=torch.bool))
    rough = below.float()
    torch.testing.assert_close(_threshold_by_sorting(rough), _threshold_by_search(rough), atol=1e-6, rtol=0)
