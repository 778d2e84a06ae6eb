"""Counts of pairs against three nested loops, for any cut of the stream."""

import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from properties import examples

from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.manifold.statistics import Counts, count_shard, count_store, merged

V = 7
Reference = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def slow_counts(tokens: list[int], vocab_size: int, document: Sequence[int]) -> Reference:
    """Offsets 1..10, 1..5 and 1 of pairs whose tokens have the same entry in ``document``, in multiples of 1/2520."""
    wide, narrow, successors = (np.zeros((vocab_size, vocab_size), dtype=np.int64) for _ in range(3))
    for i, first in enumerate(tokens):
        for offset in range(1, 11):
            if i + offset < len(tokens) and document[i] == document[i + offset]:
                second = tokens[i + offset]
                assert 2520 % offset == 0
                wide[first, second] += 2520 // offset
                narrow[first, second] += 2520 // offset if offset <= 5 else 0
                successors[first, second] += offset == 1
    return wide, narrow, successors


def assert_equal(counts: Counts, reference: Reference) -> None:
    for matrix, expected in zip((counts.after_10, counts.forward, counts.successors), reference, strict=True):
        assert matrix.dtype == np.int64
        assert (matrix.toarray() == expected).all()
        assert np.all(matrix.data > 0)
        rows = [matrix.indices[start:stop] for start, stop in pairwise(matrix.indptr)]
        assert all(np.all(np.diff(row) > 0) for row in rows), "not canonical"


def assert_same(counts: Counts, other: Counts) -> None:
    assert counts.n_tokens == other.n_tokens
    for name in ("after_10", "forward", "successors"):
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(getattr(counts, name), part), getattr(getattr(other, name), part))


streams = st.lists(st.integers(0, V - 1), max_size=60)


@given(
    streams,
    st.sets(st.integers(0, 70)),
    st.booleans(),
    st.lists(st.integers(0, 60)),
    st.integers(1, 70),
    st.randoms(use_true_random=False),
)
@examples(150)
def test_any_cut_and_any_chunk_give_the_counts_of_three_loops(
    stream: list[int], starts: set[int], within: bool, cuts: list[int], chunk: int, random: Any
) -> None:
    """Shards may be cut anywhere and added in any order: a pair belongs to the shard of its first token."""
    segments = np.array(sorted(starts), dtype=np.int64) if within else None
    tokens = np.array(stream, dtype=np.uint16)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    parts = [
        count_shard(
            tokens[a : b + 10],
            V,
            segment_starts=None if segments is None else segments[segments >= a] - a,
            n_first=b - a,
            chunk_tokens=chunk,
        )
        for a, b in pairwise(edges)
    ]
    random.shuffle(parts)
    reference = slow_counts(
        stream, V, [sum(start <= i for start in starts) if within else 0 for i in range(len(stream))]
    )
    assert_equal(merged(parts), reference)
    assert merged(parts).n_tokens == len(stream)


@pytest.mark.parametrize(("vocab_size", "kind"), [(16_384, np.uint16), (16_385, np.uint16), (70_000, np.int32)])
def test_the_largest_ids_fit_into_the_keys(vocab_size: int, kind: type) -> None:
    """The last tokens of a vocabulary that just fits 32-bit keys, of one that does not, and of one beyond 16 bits."""
    top = vocab_size - 1
    stream = [top, top, 0, top - 1, top, 0, 0, top]
    counts = count_shard(np.array(stream, dtype=kind), vocab_size)
    names = {0: 0, top - 1: 1, top: 2}
    reference = slow_counts([names[token] for token in stream], 3, [0] * len(stream))
    few = np.array(list(names))
    for matrix, expected in zip((counts.after_10, counts.forward, counts.successors), reference, strict=True):
        assert (matrix[few][:, few].toarray() == expected).all()
        assert matrix.sum() == expected.sum()


def test_symmetric_counts_both_orders_and_a_token_beside_itself_twice() -> None:
    counts = count_shard(np.array([0, 1, 0]), 3)
    assert counts.weight_unit == 2520
    assert (counts.symmetric.toarray() == [[2520, 5040, 0], [5040, 0, 0], [0, 0, 0]]).all()


def test_shards_of_a_store_add_up_whatever_their_number(small_store: TokenStore) -> None:
    """Against the loops, with and without pairs across documents; only the training split is counted."""
    split = small_store.train
    stream = split.tokens.tolist()
    for across in (False, True):
        whole = count_store(small_store, across_documents=across)
        # The end of text before a document is the first of its tokens.
        document = np.zeros(len(stream), dtype=np.int64) if across else split.document_of(np.arange(len(stream)) + 1)
        assert_equal(whole, slow_counts(stream, small_store.vocab_size, document.tolist()))
        for n in (2, 3, 7, 200):
            shards = [count_store(small_store, across_documents=across, shard=(i, n)) for i in range(n)]
            assert sum(shard.n_tokens for shard in shards) == len(stream)
            assert_same(merged(shards), whole)
            if n <= 7:
                longest = np.diff(split.document_starts).max()
                assert all(abs(shard.n_tokens - len(stream) / n) <= longest for shard in shards), "unbalanced"


def test_no_pair_ends_at_an_end_of_text_within_documents(small_store: TokenStore) -> None:
    eot = small_store.eot_id
    within = count_store(small_store, across_documents=False)
    assert within.after_10[:, [eot]].nnz == 0
    assert within.successors[[eot]].sum() == len(small_store.train.topic_ids)
    assert count_store(small_store, across_documents=True).after_10[:, [eot]].nnz > 0


def test_counts_survive_a_file_and_a_pickle_and_can_be_added_when_read_only(tmp_path: Path) -> None:
    counts = count_shard(np.array([0, 1, 2, 1, 0, 4]), 5)
    path = tmp_path / "counts"  # without a suffix: the file is named as asked
    counts.save(path)
    loaded, sent = Counts.load(path), pickle.loads(pickle.dumps(counts))
    assert loaded.vocab_size == 5
    assert_same(loaded, counts)
    for matrix in (sent.after_10, sent.forward, sent.successors):
        for array in (matrix.data, matrix.indices, matrix.indptr):
            array.flags.writeable = False
    assert_same(merged([sent, loaded]), counts + counts)


def test_mistakes_are_named(tmp_path: Path, small_store: TokenStore) -> None:
    with pytest.raises(HRSError, match="outside the vocabulary of 3"):
        count_shard(np.array([0, 3]), 3)
    with pytest.raises(HRSError, match="outside the vocabulary"):
        count_shard(np.array([0, -1], dtype=np.int32), 3)
    with pytest.raises(HRSError, match="no shard 2 of 2"):
        count_store(small_store, across_documents=True, shard=(2, 2))
    with pytest.raises(HRSError, match="no counts to merge"):
        merged([])
    with pytest.raises(HRSError, match="over 3 and 4 tokens"):
        merged([count_shard(np.array([0]), 3), count_shard(np.array([0]), 4)])
    path = tmp_path / "counts.npz"
    with pytest.raises(HRSError, match="cannot be read"):
        Counts.load(path)
    count_shard(np.array([0, 1]), 3).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(HRSError, match="delete the file"):
        Counts.load(path)
