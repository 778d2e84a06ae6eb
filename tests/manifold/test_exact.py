"""Products of rounded numbers against Python's integers, which have no last bits to lose."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from properties import examples

from hrs.manifold.exact import exact_product, rounded, snapped

Matrix = NDArray[np.float64]


def fractions(matrix: Matrix) -> list[list[Fraction]]:
    return [[Fraction(float(value)) for value in row] for row in matrix]


def product(a: Matrix, b: Matrix) -> list[list[Fraction]]:
    """a [n, m] times the transpose of b [k, m]."""
    return [[sum(map(Fraction.__mul__, row, column), Fraction(0)) for column in fractions(b)] for row in fractions(a)]


SHAPES = {"seed": st.integers(0, 10**6), "n": st.integers(1, 20), "d": st.integers(1, 40)}


@given(**SHAPES, scale=st.sampled_from([0.0, 1e-9, 0.1, 3.0, 1e4, 1e9]))
@examples(25)
def test_inner_products_and_distances_of_snapped_positions_are_exact(seed: int, n: int, d: int, scale: float) -> None:
    raw = scale * np.random.default_rng(seed).standard_normal((n, d))
    x, bits = snapped(raw)
    # Scaling by a power of two is exact and so is rounding to whole numbers: half a multiple at most, without a margin.
    assert np.abs(x - raw).max() <= 2.0 ** (-bits - 1) and np.array_equal(np.rint(x * 2.0**bits), x * 2.0**bits)
    # 20 bits, or the most with which max |x| sqrt(d) stays below 2^24 multiples: with one bit more it would not.
    assert bits == 20 or (bits < 20 and np.abs(raw).max() * np.sqrt(d) * 2.0 ** (bits + 1) >= 2**24)
    expected = product(x, x)
    assert fractions(x @ x.T) == expected
    squares = np.einsum("vd,vd->v", x, x)
    distances = squares[:, None] + squares - 2 * (x @ x.T)
    assert fractions(distances) == [
        [expected[a][a] + expected[b][b] - 2 * expected[a][b] for b in range(n)] for a in range(n)
    ]
    assert not np.diagonal(distances).any()


@given(**SHAPES, scale=st.sampled_from([0.0, 1e-9, 0.1, 3.0, 1e4]), spread=st.sampled_from([0.0, 3.0, 20.0]))
@examples(25)
def test_products_with_coefficients_of_any_size_are_exact(
    seed: int, n: int, d: int, scale: float, spread: float
) -> None:
    """Coefficients over up to 20 orders of magnitude and of both signs, rounded to a share of their row."""
    draw = np.random.default_rng(seed)
    x, bits = snapped(scale * draw.standard_normal((n, d)))
    raw = draw.standard_normal((5, n)) * 10 ** draw.uniform(-spread / 2, spread / 2, (5, n))
    coefficients = raw.copy()
    sums, found = exact_product(coefficients, x, bits)
    # Entries of x are at most 2^24 multiples, so reach <= 25 in exact_product; 2^total <= 4 S, the sum of a row.
    # Numbers near shift = 1.5 * 2^(total + reach) are 2^(total + reach - 52) apart, and rounding moves by half of that:
    # by at most 2^(total - 28) <= 2^-26 S.
    assert (np.abs(coefficients - raw).max(axis=1) <= 2.0**-26 * np.abs(raw).sum(axis=1)).all()
    assert fractions(found) == product(coefficients, np.ascontiguousarray(x.T))
    assert fractions(sums) == product(coefficients, np.ones((1, n)))


def test_any_order_gives_the_same_bits() -> None:
    """Shuffled columns add in another order; plain factors notice."""
    draw = np.random.default_rng(0)
    raw, plain = draw.standard_normal((600, 30)), draw.random((8, 600))
    x, bits = snapped(raw)
    order = draw.permutation(600)
    coefficients = plain.copy()
    _, found = exact_product(coefficients, x, bits)
    assert np.array_equal(found, coefficients[:, order] @ x[order])
    assert not np.array_equal(plain @ raw, plain[:, order] @ raw[order])


def test_rounding_is_to_the_nearest_multiple() -> None:
    np.testing.assert_array_equal(rounded(np.array([0.3, -0.3, 0.126]), bits=2), [0.25, -0.25, 0.25])
    assert rounded(np.array([np.log(2.0)]))[0] == pytest.approx(np.log(2.0), rel=0, abs=2**-21)
