"""Which tokens one training batch sees, what stands before them, what they are about and what is remembered for them,
and which tokens each evaluation window scores.

A window reads the end of text in front of a document as that document's first token, since it predicts what follows: a
window thus belongs to the document of its first target.
"""

from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hrs.data.categories import TokenLabels
from hrs.data.store import TokenSplit
from hrs.errors import HRSError


class TrainingWindows:
    """Batches of random non-overlapping windows, a pure function of (seed, step): to resume is to know the step.

    An epoch shifts the grid of windows by a random offset, shuffles it, and drops what does not fill a batch. Windows
    share one token at their border, the last target of one being the first input of the next.
    """

    def __init__(self, tokens: NDArray[Any], window: int, batch: int, seed: int) -> None:
        """``tokens`` 1-D, ``window`` targets per row, ``batch`` rows.

        Raises:
            HRSError: if the tokens do not fill one batch.
        """
        # One window fewer than fits without an offset, so that every epoch has as many steps whatever its offset.
        self._n_windows = (len(tokens) - window) // window
        self.steps_per_epoch = self._n_windows // batch
        if self.steps_per_epoch < 1:
            raise HRSError(
                f"training text of {len(tokens)} tokens is shorter than one batch, which needs {window * (batch + 1)} "
                f"({batch} windows of {window} and room to shift them): use more text, or a smaller batch or context"
            )
        self._tokens, self._window, self._batch, self._seed = tokens, window, batch, seed
        self._epoch, self._starts = -1, np.empty(0, dtype=np.int64)

    def starts(self, step: int) -> NDArray[np.int64]:
        """Positions [batch] of the first input of each window of a step >= 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch_starts(epoch)[index * self._batch : (index + 1) * self._batch]

    def batch(self, step: int) -> NDArray[np.int64]:
        """Token ids int64 [batch, window + 1] of a step >= 0: inputs are ``[:, :-1]``, targets ``[:, 1:]``."""
        positions = self.starts(step)[:, None] + np.arange(self._window + 1)  # [batch, window + 1]
        return self._tokens[positions].astype(np.int64)

    def _epoch_starts(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            offset = rng.integers(len(self._tokens) - self._n_windows * self._window)
            self._epoch, self._starts = epoch, offset + self._window * rng.permutation(self._n_windows)
        return self._starts


def history(split: TokenSplit, starts: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """The ``n`` ids int64 [B, n] in front of windows that begin at ``starts`` [B], the last one next to the window.

    They reach back to the end of text that opens the window's document, itself included; -1 stands where there is
    nothing. A window that begins with that end of text has no history at all.
    """
    documents = split.document_of(starts + 1)
    positions = starts[:, None] + np.arange(-n, 0)  # [B, n]
    known = positions >= split.document_starts[documents][:, None] - 1
    return np.where(known, split.tokens[np.maximum(positions, 0)].astype(np.int64), -1)


def window_categories(labels: TokenLabels, starts: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """The label int64 [B] that most of the ``window`` inputs of each window have, the smaller one of two as frequent.

    No label, -1, is one of them: a window mostly without is without.
    """
    by_token = labels.at(starts[:, None] + np.arange(window)) + 1  # [B, window], 0 for none
    rows, n_labels = len(starts), int(by_token.max()) + 1
    bins = np.arange(rows)[:, None] * n_labels + by_token
    counts = np.bincount(bins.ravel(), minlength=rows * n_labels).reshape(rows, n_labels)
    return counts.argmax(axis=1) - 1


Shown = Literal["right", "shuffled", "none"]
"""What windows are given of their memories: their own, another window's, or nothing."""


class WindowMemories(Protocol):
    """Memories from other documents for the windows of a token store."""

    def read(
        self, split: str, starts: NDArray[np.int64], seekers: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Slots [B, S, d] of windows of ``split`` that begin at ``starts`` [B]; absent ones are zero.

        They depend on the text in front of each window, never on its own tokens, and come from no document of the
        window. With ``seekers`` [B] each window is given what belongs to the window that begins there instead.
        """


def window_memory(
    memories: WindowMemories, shown: Shown, split: str, starts: NDArray[np.int64], seekers: NDArray[np.int64]
) -> NDArray[np.float32] | None:
    """Slots [B, S, d] of windows that begin at ``starts`` [B], if ``shuffled`` those of ``seekers`` [B]."""
    if shown == "none":
        return None
    return memories.read(split, starts, seekers if shown == "shuffled" else None)


def strangers(starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of N >= 2 windows [N] another one, drawn at random, always the same; each is another's once."""
    order = np.random.default_rng(0).permutation(len(starts))
    other = np.empty_like(starts)
    other[order] = starts[np.roll(order, 1)]
    return other


def evaluation_windows(n_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int]]:
    """Sliding windows that score every token but the first exactly once: yields (start, first_scored).

    A window reads ``tokens[start : start + window + 1]``, its inputs and one more target, and scores the targets from
    position ``first_scored`` of the stream to its end. A target has at least ``window - stride`` tokens of context, or
    all there are. All windows are full, the last by moving back, unless the text is shorter than one.

    Raises:
        HRSError: if the stride is not within 1..window, or there is no target.
    """
    if not 1 <= stride <= window:
        raise HRSError(f"stride {stride} must be between 1 and the window of {window} tokens")
    if n_tokens < 2:
        raise HRSError(f"text of {n_tokens} tokens has nothing to predict: use a longer one")
    last_start = max(n_tokens - 1 - window, 0)
    first_scored = 1
    for start in range(0, last_start + stride, stride):
        start = min(start, last_start)
        yield start, first_scored
        first_scored = start + window + 1
