"""Matrix products without any rounding: the same bits on every processor.

Libraries of linear algebra add in an order that depends on the processor and fuse products into sums where it can. So
the last bits of a product differ between machines, and hundreds of steps of an optimiser make large differences of
them. Whole numbers whose sums of products stay below 2^53 have no last bits to lose: float64 holds every intermediate
sum, in any order, fused or not. Factors rounded to multiples of powers of two are such numbers.

Addition, subtraction, multiplication, division and square root of single numbers are correctly rounded everywhere
(IEEE 754), and ``numpy.sum`` adds in an order that does not depend on the processor. Logarithms are not: rounding them
hides their last bits, except where these decide between two multiples, about once in 10^9 values.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FRACTION_BITS = 20
"""Positions and logarithms are multiples of 2^-20; positions far out are multiples of more."""
NORM_BITS = 25
"""Norms of positions are below 2^25 of their multiples, so that |a|^2 + |b|^2 + 2 |a| |b| is at most 2^52."""


def rounded(values: Array, bits: int = FRACTION_BITS) -> NDArray[np.float64]:
    """``values`` rounded to multiples of 2^-bits."""
    whole = np.asarray(values, dtype=np.float64) * 2.0**bits
    np.rint(whole, out=whole)
    whole *= 2.0**-bits
    return whole


def snapped(x: Array) -> tuple[NDArray[np.float64], int]:
    """Positions [V, d] rounded to multiples of 2^-bits, and bits: their inner products and distances are exact."""
    reach = math.frexp(float(np.abs(x).max(initial=0.0)) * math.sqrt(x.shape[1]))[1]  # norms are below 2^reach
    bits = min(FRACTION_BITS, NORM_BITS - 1 - reach)  # one bit for rounding up
    return rounded(x, bits), bits


def exact_product(coefficients: Array, x: Array, bits: int) -> tuple[Array, Array]:
    """The sums [B, 1] of rows of coefficients [B, V], and their product [B, d] with x [V, d], multiples of 2^-bits.

    The coefficients are first rounded, in place, to multiples of a power of two of each row: the finest with which no
    sum can exceed 2^52. That is about 2^-30 of the sum of the row's magnitudes.
    """
    reach = math.frexp(float(np.abs(x).max(initial=0.0)))[1] + bits  # entries of x are below 2^reach multiples
    total = np.frexp(np.abs(coefficients).sum(axis=1))[1] + 1  # sums of magnitudes are below 2^total, rounded up too
    # The sum with 1.5 * 2^52 multiples has no digits below a multiple, as it fills the 53 bits of a number.
    shift = np.ldexp(1.5, total + reach)[:, None]  # [B, 1]
    coefficients += shift
    coefficients -= shift
    return coefficients.sum(axis=1, keepdims=True), coefficients @ x
