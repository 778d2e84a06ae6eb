"""Training windows are a pure function of the step; evaluation windows score every target once, with context."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrs.data import TokenSplit, TrainingWindows, evaluation_windows
from hrs.data.categories import TokenLabels
from hrs.data.windows import history, window_categories
from hrs.errors import HRSError

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(0, 200))  # window, batch, tokens beyond one batch


def windows_of(shape: tuple[int, int, int], seed: int = 0) -> TrainingWindows:
    window, batch, extra = shape
    return TrainingWindows(np.arange(window * (batch + 1) + extra, dtype=np.uint16), window, batch, seed)


@given(SHAPES, st.integers(0, 2**31), st.integers(0, 3))
def test_an_epoch_shows_each_target_at_most_once(shape: tuple[int, int, int], seed: int, epoch: int) -> None:
    windows = windows_of(shape, seed)
    steps = range(epoch * windows.steps_per_epoch, (epoch + 1) * windows.steps_per_epoch)
    rows = np.concatenate([windows.batch(step) for step in steps])
    assert rows.dtype == np.int64 and rows.shape[1] == shape[0] + 1
    assert (np.diff(rows, axis=1) == 1).all(), "each row is a contiguous piece of the stream"
    targets = rows[:, 1:].ravel()
    assert len(np.unique(targets)) == len(targets)
    n_tokens = shape[0] * (shape[1] + 1) + shape[2]
    # What is dropped is less than one batch and the two windows that the random offset may cost.
    assert n_tokens - len(targets) < shape[0] * (shape[1] + 2) + 1


@given(SHAPES, st.lists(st.integers(0, 500), min_size=1, max_size=8))
def test_a_batch_depends_on_seed_and_step_alone(shape: tuple[int, int, int], steps: list[int]) -> None:
    """Reading steps in any order, as a resumed run does, gives what reading each alone gives."""
    shared = windows_of(shape)
    for step in steps:
        assert np.array_equal(shared.batch(step), windows_of(shape).batch(step))


def test_seeds_and_epochs_differ_in_order_and_offset() -> None:
    tokens = np.arange(10_000)
    first, other = TrainingWindows(tokens, 16, 4, seed=0), TrainingWindows(tokens, 16, 4, seed=1)
    assert not np.array_equal(first.batch(0), other.batch(0))
    assert not np.array_equal(first.batch(0), first.batch(first.steps_per_epoch))
    offsets = {int(first.batch(epoch * first.steps_per_epoch)[0, 0]) % 16 for epoch in range(64)}
    assert len(offsets) > 8


def test_every_token_is_a_target_in_some_epoch() -> None:
    windows = TrainingWindows(np.arange(100), 8, 2, seed=0)
    seen = {int(t) for step in range(400) for t in windows.batch(step)[:, 1:].ravel()}
    assert seen == set(range(1, 100))


def test_text_shorter_than_a_batch_is_refused_and_text_of_one_batch_is_not() -> None:
    with pytest.raises(HRSError, match="training text of 39 tokens is shorter than one batch, which needs 40"):
        TrainingWindows(np.arange(39), 8, 4, seed=0)
    assert TrainingWindows(np.arange(40), 8, 4, seed=0).steps_per_epoch == 1


@given(st.integers(2, 300), st.integers(1, 40), st.data())
def test_evaluation_scores_every_target_once_with_context(n_tokens: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    found = list(evaluation_windows(n_tokens, window, stride))
    scored = []
    for start, first_scored in found:
        end = min(start + window + 1, n_tokens)
        assert end - start == min(window + 1, n_tokens), "all windows are full, or the text is shorter than one"
        assert start < first_scored < end, "a scored target has a token before it and every window scores something"
        scored += range(first_scored, end)
        assert first_scored - start >= min(window - stride, first_scored), "context of the poorest target"
    assert scored == list(range(1, n_tokens))
    assert len(found) == 1 + max(0, -(-(n_tokens - 1 - window) // stride)), "no more windows than the stride asks for"


@pytest.mark.parametrize("stride", [0, 9])
def test_evaluation_refuses_strides_that_skip_or_stand_still(stride: int) -> None:
    with pytest.raises(HRSError, match=f"stride {stride} must be between 1 and the window of 8"):
        next(evaluation_windows(100, 8, stride))


def test_evaluation_refuses_text_without_a_target() -> None:
    with pytest.raises(HRSError, match="nothing to predict"):
        next(evaluation_windows(1, 8, 4))


# ---- what stands before a window, and what it is about ---------------------------------------------------------------


def documents_of(lengths: list[int], eot_id: int = 0) -> TokenSplit:
    """A split of documents whose tokens count up from 1: none is like another, and none is the end of text."""
    tokens, ends, next_id = [eot_id], [], 1
    for length in lengths:
        tokens += [*range(next_id, next_id + length), eot_id]
        next_id += length
        ends.append(len(tokens))
    nothing = np.zeros(len(lengths), dtype=np.int64)
    return TokenSplit(
        tokens=np.array(tokens, dtype=np.uint16),
        document_starts=np.array([1, *ends]),
        topic_ids=nothing.astype(np.int32),
        n_bytes=nothing,
        n_words=nothing,
        documents=pa.table({"title": [""] * len(lengths)}),
    )


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 20))
def test_history_is_the_text_between_the_opening_of_the_document_and_the_window(lengths: list[int], n: int) -> None:
    """Reference: walk back from the window, token by token, until the end of text that opens the document."""
    split = documents_of(lengths)
    starts = np.arange(len(split) - 1)  # every place where a window with a target can begin
    for start, row in zip(starts, history(split, starts, n), strict=True):
        expected, position = [], start
        while split.tokens[position] != 0:
            position -= 1
            expected.append(int(split.tokens[position]))
        expected = expected[:n][::-1]
        assert row.dtype == np.int64 and row.tolist() == [-1] * (n - len(expected)) + expected


def test_history_knows_nothing_of_the_window_or_later() -> None:
    split = documents_of([9, 4, 7])
    starts = np.array([3, 8, 12, 17])
    before = history(split, starts, 6)
    for start, row in zip(starts, before, strict=True):
        later = replace(split, tokens=np.where(np.arange(len(split)) < start, split.tokens, 999))
        assert np.array_equal(history(later, np.array([start]), 6)[0], row)


@given(SHAPES, st.integers(0, 400))
def test_starts_are_where_the_windows_of_the_batch_begin(shape: tuple[int, int, int], step: int) -> None:
    windows = windows_of(shape)
    assert np.array_equal(windows.batch(step)[:, 0], windows.starts(step))  # the tokens count their positions


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(-1, 3)), min_size=1, max_size=9), st.integers(1, 20))
def test_a_window_has_the_label_that_most_of_its_tokens_have(runs: list[tuple[int, int]], window: int) -> None:
    by_token = [label for length, label in runs for _ in range(length)]
    window = min(window, len(by_token))
    lengths = np.array([length for length, _ in runs])
    labels = TokenLabels(starts=np.cumsum(lengths) - lengths, labels=np.array([label for _, label in runs]))
    starts = np.arange(len(by_token) - window + 1)
    for start, found in zip(starts, window_categories(labels, starts, window), strict=True):
        inside = by_token[start : start + window]
        assert found == min(set(inside), key=lambda label: (-inside.count(label), label))
