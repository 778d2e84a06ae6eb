"""Filters and the draw against slow references that follow their definitions token by token."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from hrs.errors import HRSError
from hrs.generation.sampling import (
    Sampling,
    apply_temperature,
    best_ids,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_tokens,
    penalise_repetition,
)

# Quarters, so that ties are common; some tokens are impossible from the start.
LOGITS = st.lists(st.integers(-12, 12).map(lambda n: n / 4) | st.just(-math.inf), min_size=1, max_size=12)
PROBABILITY = st.floats(0.01, 0.99)


def kept(filtered: Tensor) -> set[int]:
    return {i for i, value in enumerate(filtered[0].tolist()) if value > -math.inf}


def rows(logits: list[float]) -> Tensor:
    assume(max(logits) > -math.inf)
    return torch.tensor([logits], dtype=torch.float64)


def probabilities(logits: list[float]) -> list[float]:
    weights = [math.exp(x) for x in logits]
    return [w / sum(weights) for w in weights]


def possible(logits: list[float]) -> set[int]:
    return {i for i, x in enumerate(logits) if x > -math.inf}


@given(LOGITS, st.integers(1, 14))
def test_top_k(logits: list[float], k: int) -> None:
    """Everything that fewer than k tokens are better than."""
    expected = {i for i, x in enumerate(logits) if sum(y > x for y in logits) < k}
    assert kept(keep_top_k(rows(logits), k)) == expected & possible(logits)


@given(LOGITS, st.integers(1, 11))
def test_ids_of_the_best_are_those_top_k_keeps_unless_more_tie(logits: list[float], k: int) -> None:
    assume(k < len(logits))
    ids, expected = best_ids(rows(logits), k), {i for i, x in enumerate(logits) if sum(y > x for y in logits) < k}
    assert (ids is None) == (len(expected) > k)
    assert ids is None or ids[0].tolist() == sorted(expected)


@given(LOGITS, PROBABILITY)
def test_top_p_is_the_smallest_set_that_reaches_p(logits: list[float], p: float) -> None:
    result, share = keep_top_p(rows(logits), p), probabilities(logits)
    mass, expected = 0.0, set()
    for i in sorted(range(len(logits)), key=lambda i: (-logits[i], i)):
        assume(abs(mass - p) > 1e-9)  # sums of 12 probabilities are off by at most 1e-14
        if mass < p:
            expected.add(i)
        mass += share[i]
    assert kept(result) == expected & possible(logits)


def test_top_p_on_the_edge_and_among_equals() -> None:
    """Mass that reaches p exactly is enough; of equals the first ones stay; the best one always does."""
    equal = torch.zeros(1, 4, dtype=torch.float64)
    assert kept(keep_top_p(equal, 0.5)) == {0, 1}
    assert kept(keep_top_p(equal, 0.51)) == {0, 1, 2}
    assert kept(keep_top_p(torch.tensor([[0.0, 3.0, 1.0]]), 0.0)) == {1}


@given(LOGITS, PROBABILITY)
def test_min_p(logits: list[float], p: float) -> None:
    result, share = keep_min_p(rows(logits), p), probabilities(logits)
    assume(all(abs(x / max(share) - p) > 1e-9 for x in share))  # quotients are off by at most 1e-14
    assert kept(result) == {i for i, x in enumerate(share) if x >= p * max(share)}


@given(LOGITS, st.floats(0.5, 4), st.data())
def test_repetition_penalty(logits: list[float], penalty: float, data: st.DataObject) -> None:
    seen = data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)))
    expected = [
        (x / penalty if x > 0 else x * penalty) if was_seen else x for x, was_seen in zip(logits, seen, strict=True)
    ]
    assert penalise_repetition(rows(logits), torch.tensor([seen]), penalty)[0].tolist() == expected


@given(LOGITS, st.floats(0.01, 50))
def test_temperature_flattens_the_distribution(logits: list[float], temperature: float) -> None:
    expected = probabilities([x / temperature for x in [y - max(logits) for y in logits]] if logits else [])
    result = apply_temperature(rows(logits), temperature).softmax(-1)[0]
    # Both exponentiate the same quotients, none below -600, to one unit in the last place, and divide by a sum of 12.
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=32 * 2**-53, atol=0)


def test_the_smallest_temperature_is_greedy_not_nan() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert apply_temperature(logits, 1e-45).softmax(-1).tolist() == [[0.0, 1.0, 0.0]]


def test_filters_leave_rows_alone_and_what_they_keep_unchanged() -> None:
    logits = torch.randn(5, 20, dtype=torch.float64)
    for keep in (lambda x: keep_top_k(x, 3), lambda x: keep_top_p(x, 0.6), lambda x: keep_min_p(x, 0.2)):
        together = keep(logits)
        assert torch.equal(together, torch.cat([keep(row[None]) for row in logits]))
        assert 0 < torch.isinf(together).sum() < logits.numel()
        assert torch.equal(together[~torch.isinf(together)], logits[~torch.isinf(together)])


# ---- the draw --------------------------------------------------------------------------------------------------------


@given(LOGITS, st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_distribution_function(logits: list[float], uniform: float) -> None:
    share = probabilities(logits) if max(logits) > -math.inf else []
    drawn = int(draw(rows(logits), torch.tensor([uniform], dtype=torch.float64)))
    assert share[drawn] > 0
    # Two sums of 12 probabilities, each off by at most 2 * 12 roundings: 6e-15.
    assert sum(share[:drawn]) <= uniform + 1e-12
    assert uniform < sum(share[: drawn + 1]) + 1e-12


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_tokens_at_both_ends_are_never_drawn(uniform: float, dtype: torch.dtype) -> None:
    logits = torch.randn(1, 1000, dtype=dtype)
    logits[:, :10] = logits[:, -10:] = -math.inf
    drawn = int(draw(logits, torch.tensor([uniform], dtype=torch.float64)))
    assert drawn == (10 if uniform == 0 else 989)


def test_even_chances_give_the_models_frequencies() -> None:
    logits = torch.randn(1, 8, dtype=torch.float64).expand(20_000, 8)
    drawn = draw(logits, (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    frequencies = torch.bincount(drawn, minlength=8) / 20_000
    torch.testing.assert_close(frequencies.double(), logits[0].softmax(-1), rtol=0, atol=1e-4)


@given(
    st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=4, max_size=12),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([1.0, 0.55]),
    st.sampled_from([0.0, 0.35]),
    st.sampled_from([1.0, 1.7]),
)
def test_filters_act_in_the_documented_order(
    logits: list[float], uniform: float, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    """Penalty, temperature, top-k, top-p, min-p; temperature 0 takes the best of the penalised."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    seen = torch.tensor([[i % 2 == 0 for i in range(len(logits))]])
    uniforms = torch.tensor([uniform], dtype=torch.float64)
    result = int(next_tokens(rows(logits), uniforms, sampling, seen))
    expected = penalise_repetition(rows(logits), seen, penalty)
    if temperature == 0:
        assert result == expected[0].tolist().index(expected.max())
        return
    expected = apply_temperature(expected, temperature)
    expected = keep_top_k(expected, top_k or len(logits))
    expected = keep_min_p(keep_top_p(expected, top_p), min_p)
    assert result in kept(expected)
    assert result == int(draw(expected, uniforms))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("seed", -1),
        ("stop", ("a", "")),
        ("stop", "a bare string"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(HRSError, match=f"^{field} must"):
        Sampling(**{field: value})
