"""Budgets: read right, met with little to spare, and spent on the least error."""

import pytest
import torch
from export_checks import small_model

from hrs.errors import HRSError
from hrs.export.quantize import Grid
from hrs.export.search import Fit, fit, parse_budget, weighted_error
from hrs.export.tensors import Grids, Packed, entries, pack

HEADER_BYTES = 5000
MODEL = small_model()


def attempt(grids: Grids) -> tuple[list[Packed], int]:
    packed = pack(MODEL, grids)
    return packed, HEADER_BYTES + sum(part.stored for part in packed)


FULL = attempt(Grids())[1]
COARSE = attempt(Grids(Grid(8, 127.0), Grid(8, 127.0)))[1]


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("16MB", 16_000_000),
        ("16MiB", 16_777_216),
        ("16 mb", 16_000_000),
        ("1.5KB", 1500),
        ("123", 123),
        ("2GiB", 2**31),
    ],
)
def test_budgets_are_decimal_or_binary_as_written(text: str, n_bytes: int) -> None:
    assert parse_budget(text) == n_bytes


@pytest.mark.parametrize("text", ["", "MB", "16 megs", "-3MB", "0", "0.1B", "1e6", "nan", "16MB!", "١٦"])
def test_other_texts_are_no_budget(text: str) -> None:
    with pytest.raises(HRSError, match="budget"):
        parse_budget(text)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_file_fills_its_budget_and_never_exceeds_it(share: float) -> None:
    budget = round(COARSE + share * (FULL - COARSE))
    found = fit(entries(MODEL), attempt, budget=budget)
    assert found.size == attempt(found.grids)[1] <= budget
    assert found.size >= 0.97 * budget


def test_more_bytes_buy_less_error_and_the_same_bytes_the_same_grids() -> None:
    budgets = [round(COARSE + share * (FULL - COARSE)) for share in (0.2, 0.6, 1.5)]
    found = [fit(entries(MODEL), attempt, budget=budget).grids for budget in budgets]
    assert fit(entries(MODEL), attempt, budget=budgets[0]).grids == found[0]
    errors = [weighted_error(entries(MODEL), grids) for grids in found]
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[-1]


def test_a_free_choice_is_no_worse_than_any_width_alone() -> None:
    budget = round(COARSE + 0.4 * (FULL - COARSE))
    free = weighted_error(entries(MODEL), fit(entries(MODEL), attempt, budget=budget).grids)
    for bits in (6, 5):
        alone = fit(entries(MODEL), attempt, budget=budget, bits=bits)
        assert {alone.grids.embedding.bits, alone.grids.matrix.bits} == {bits}
        assert free <= 1.05 * weighted_error(entries(MODEL), alone.grids)


def test_without_a_budget_the_error_is_the_least() -> None:
    found = fit(entries(MODEL), attempt)
    assert found.grids.matrix.bits == 8
    for k in (3.0, 4.5, 8.0, None):
        other = Grids(Grid(8, k), Grid(8, k))
        assert weighted_error(entries(MODEL), found.grids) <= 1.05 * weighted_error(entries(MODEL), other)
    four = fit(entries(MODEL), attempt, bits=4)
    assert four.grids.matrix.bits == 4 and four.size < found.size


def test_an_impossible_budget_says_what_is_possible() -> None:
    with pytest.raises(HRSError, match="does not fit into 1,000 bytes: the smallest artifact of it takes") as refused:
        fit(entries(MODEL), attempt, budget=1000)
    smallest = int(str(refused.value).partition("takes ")[2].split(", ")[0].replace(",", ""))
    possible: Fit = fit(entries(MODEL), attempt, budget=smallest)
    assert possible.size <= smallest


def test_a_model_of_zeros_can_be_fitted() -> None:
    model = small_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert fit(entries(model), lambda grids: (pack(model, grids), 5), budget=10).size == 5
