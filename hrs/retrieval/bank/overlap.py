"""Where a memory holds the very words it is to help predict: news told twice, or a page copied from another."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from hrs.data.windows import evaluation_windows
from hrs.retrieval.bank.memory_bank import MemoryBank


def documents_that_share(bank: MemoryBank, split: str, stride: int, n_tokens: int) -> NDArray[np.bool_]:
    """[D], the documents of ``split`` of which some window has ``n_tokens`` tokens in a row that its memory has, too.

    A gain that is left on the other documents is not one of copied text.

    Args:
        stride: between the windows that are read, as in :func:`hrs.data.windows.evaluation_windows`.
        n_tokens: shared in a row; a memory is its chunk and the one after it.
    """
    text, train = bank.store.split(split), bank.store.train
    starts = np.array([start for start, _ in evaluation_windows(len(text), bank.window, stride)])
    shares = np.zeros(len(text.document_starts) - 1, dtype=bool)
    for start, chunks in zip(starts, bank.neighbours_of(split, starts), strict=True):
        known = {gram for chunk in chunks[chunks >= 0] for gram in _grams(train.tokens[bank.span(chunk)], n_tokens)}
        places = slice(start + 1, min(start + 1 + bank.window, len(text)))
        shared = [i for i, gram in enumerate(_grams(text.tokens[places], n_tokens)) if gram in known]
        shares[text.document_of(start + 1 + np.array(shared, dtype=np.int64))] = True
    return shares


def _grams(tokens: NDArray[np.integer], n: int) -> list[bytes]:
    return [gram.tobytes() for gram in sliding_window_view(tokens, n)] if len(tokens) >= n else []
