"""Which grids fit a budget of bytes with the least error.

One number sets a model's size: the step of its rows in root mean squares, t. A coarser step means fewer bytes and more
error, whatever the width of the integers; the width only says where levels end, k = t * limit. So t is found by
bisection, and at each t every class of weights takes the width of the least error times 4^rate, which is what its error
would be at equal size. Rates come from the entropy of a sample of the levels, and are corrected by the size of the file
that was really written.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hrs.errors import HRSError, shown
from hrs.export.quantize import BITS, Grid, quantize, rows_of
from hrs.export.tensors import Entry, Grids, Packed

EMBEDDING_REFINEMENT = 4.0
"""Step of the matrices over that of the embeddings, whose errors reach the logits of every position. On a trained
transformer with tied embeddings this takes two thirds off the gap at 3.5 bits per weight."""
COARSEST_STEP = 1.0
"""In root mean squares: some two bits per weight and a relative squared error of 1/12."""
_LADDER = [1.5 * 1.25**i for i in range(11)]
"""Candidates for the best clipping, from uniform weights (1.7) over Gaussian ones (2.4 at 4 bits to 3.9 at 8; Max 1960,
"Quantizing for minimum distortion") to heavy tails."""
_SAMPLE = 2**15
_ROUNDS = 6
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_budget(text: str) -> int:
    """Bytes of ``16MB`` (decimal, 16,000,000), ``16MiB`` (binary, 16,777,216) or ``16000000``.

    Raises:
        HRSError: for anything else, or less than one byte.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if match is None or match[2].upper() not in _UNITS:
        raise HRSError(f"budget {shown(text)} is not a size: write bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    n_bytes = round(float(match[1]) * _UNITS[match[2].upper()])
    if n_bytes < 1:
        raise HRSError(f"budget {shown(text)} is less than one byte: write a size such as 16MB")
    return n_bytes


@dataclass(frozen=True, slots=True)
class Fit:
    """Grids, the tensors packed with them, and how many bytes the whole file takes."""

    grids: Grids
    packed: list[Packed]
    size: int


Attempt = Callable[[Grids], tuple[list[Packed], int]]
"""Packs a model with grids, and says how large its file becomes."""


def fit(entries: Sequence[Entry], attempt: Attempt, *, budget: int | None = None, bits: int | None = None) -> Fit:
    """The grids of the least error, within a budget if there is one. The same for the same model.

    Args:
        entries: a model's tensors.
        budget: bytes the whole file may take.
        bits: the only width to use; without it any.

    Raises:
        HRSError: if no grid makes the file small enough; it says how small it can be.
    """
    widths = BITS if bits is None else (Grid(bits).bits,)
    embedding, matrix = (_Class.of(entries, role) for role in ("embedding", "matrix"))
    finest = Grids(embedding.finest(widths[0]), matrix.finest(widths[0]))
    packed, size = attempt(finest)
    if budget is None or size <= budget:
        return Fit(finest, packed, size)

    def grids_at(t: float) -> Grids:
        return Grids(
            embedding.best_at(min(t / EMBEDDING_REFINEMENT, COARSEST_STEP), widths),
            matrix.best_at(min(t, COARSEST_STEP), widths),
        )

    def estimate(t: float) -> float:
        grids = grids_at(t)
        return embedding.rate_and_error(grids.embedding)[0] + matrix.rate_and_error(grids.matrix)[0]

    low = min(embedding.best_k(widths[0]) * EMBEDDING_REFINEMENT, matrix.best_k(widths[0])) / Grid(widths[0]).limit
    high = EMBEDDING_REFINEMENT * COARSEST_STEP
    grids = grids_at(high)
    packed, size = attempt(grids)
    if size > budget:
        raise HRSError(
            f"the model does not fit into {budget:,} bytes: the smallest artifact of it takes {size:,}, "
            "so allow as many, or train a smaller model"
        )
    found = Fit(grids, packed, size)
    rest = size - estimate(high)  # header, tokenizer, exact tensors, scales
    for _ in range(_ROUNDS):
        t = _smallest_that_fits(estimate, budget - rest, low, high)
        if (grids := grids_at(t)) == found.grids:
            break
        packed, size = attempt(grids)
        if found.size < size <= budget:
            found = Fit(grids, packed, size)
        if 0.998 * budget <= size <= budget:
            break
        # Codecs miss the entropy by a percent, nearly the same at nearby steps; a hair more, so as to end below.
        rest = size - estimate(t) + 2e-4 * budget
    return found


def weighted_error(entries: Sequence[Entry], grids: Grids) -> float:
    """What the search makes small: squared error of the rounded weights over their squares, mean over all of them. That
    of embeddings counts ``EMBEDDING_REFINEMENT`` squared times."""
    embedding, matrix = (_Class.of(entries, role) for role in ("embedding", "matrix"))
    of_embeddings = EMBEDDING_REFINEMENT**2 * embedding.n_weights * embedding.rate_and_error(grids.embedding)[1]
    of_matrices = matrix.n_weights * matrix.rate_and_error(grids.matrix)[1]
    return (of_embeddings + of_matrices) / max(1, embedding.n_weights + matrix.n_weights)


@dataclass(slots=True)
class _Class:
    """Weights that share a grid, by a sample of their rows."""

    samples: list[Tensor]
    counts: list[int]
    known: dict[Grid, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Sequence[Entry], role: str) -> "_Class":
        own = [e.tensor for e in entries if e.role == role]
        rows = [rows_of(tensor.float()) for tensor in own]
        every = [max(1, r.numel() // _SAMPLE) for r in rows]
        return cls([r[::n] for r, n in zip(rows, every, strict=True)], [tensor.numel() for tensor in own])

    @property
    def n_weights(self) -> int:
        return sum(self.counts)

    def rate_and_error(self, grid: Grid) -> tuple[float, float]:
        """Bytes by the entropy of all levels, and the mean relative squared error."""
        if grid not in self.known:
            found = [_rate_and_error(sample, grid) for sample in self.samples]
            size = sum(n * rate / 8 for n, (rate, _) in zip(self.counts, found, strict=True))
            error = sum(n * error for n, (_, error) in zip(self.counts, found, strict=True))
            self.known[grid] = (size, error / max(1, self.n_weights))
        return self.known[grid]

    def finest(self, bits: int) -> Grid:
        """The grid of the least error, whatever its size."""
        return min((Grid(bits), Grid(bits, self.best_k(bits))), key=lambda grid: self.rate_and_error(grid)[1])

    def best_k(self, bits: int) -> float:
        """Below it a finer step no longer pays for what is clipped."""
        return min(_LADDER, key=lambda k: self.rate_and_error(Grid(bits, k))[1])

    def best_at(self, t: float, widths: Sequence[int]) -> Grid:
        """The grid of step ``t`` with the least error at equal size, of those widths that do not clip too much."""
        grids = [Grid(bits, t * Grid(bits).limit) for bits in widths if t * Grid(bits).limit >= self.best_k(bits)]
        return min(grids or [Grid(widths[0], self.best_k(widths[0]))], key=self._error_at_equal_size)

    def _error_at_equal_size(self, grid: Grid) -> float:
        size, error = self.rate_and_error(grid)
        return error * 4.0 ** (8 * size / max(1, self.n_weights))


def _rate_and_error(rows: Tensor, grid: Grid) -> tuple[float, float]:
    """Entropy of the levels in bits each, and the squared error over the sum of squares."""
    quantized = quantize(rows, grid)
    share = torch.bincount(quantized.levels.flatten().int() + grid.limit).double() / rows.numel()
    square = rows.double().square().sum()
    error = (rows - quantized.dequantize()).double().square().sum() / square if square > 0 else torch.zeros(())
    return float(torch.special.entr(share).sum() / torch.log(torch.tensor(2.0, dtype=torch.float64))), float(error)


def _smallest_that_fits(estimate: Callable[[float], float], room: float, low: float, high: float) -> float:
    """The finest step from ``low`` to ``high`` whose estimate is within ``room``, to a thousandth."""
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if estimate(middle) <= room else (middle, high)
    return high
