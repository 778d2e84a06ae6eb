"""Segments: which tokens they are, and that their keys and entropies are means over their own positions only."""

import math

import numpy as np
import pytest
import torch

from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.evaluation.diagnostics import block_outputs
from hrs.models import LanguageModel, build_model
from hrs.presets import experiment
from hrs.retrieval.engrams import engrams
from hrs.retrieval.segments import Cut, Segment, cut_split, cut_text, default_cut, read_segments

CONTEXT = 48


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    config = experiment("dense_baseline", "micro", 0, {"data.tokenizer": "bpe:300", "model.max_seq_len": str(CONTEXT)})
    return build_model(config.model).eval()


def one(ids: list[int], before: list[int]) -> Segment:
    return Segment(ids=np.array(ids), before=np.array(before, dtype=np.int64), source="s", topic=None)


def test_segments_are_each_documents_tokens_in_order(small_store: TokenStore) -> None:
    text = small_store.validation
    segments = cut_split(small_store, "validation", Cut(length=20, fewest=5))
    for number, title in enumerate(text.titles):
        own = [s for s in segments if s.source == title]
        start, end = text.document_starts[number], text.document_starts[number + 1] - 1
        joined = np.concatenate([s.ids for s in own])
        np.testing.assert_array_equal(joined, text.tokens[start : start + len(joined)])
        assert 0 <= end - start - len(joined) < 5  # a shorter end makes no segment
        assert {s.topic for s in own} == {title.split()[0]}
        assert all(len(s.ids) == 20 for s in own[:-1]) and all(len(s.before) == 0 for s in own)


def test_full_context_has_what_stands_in_front_in_the_same_document(small_store: TokenStore) -> None:
    text = small_store.validation
    segments = cut_split(small_store, "validation", Cut(length=20, condition="full_context", previous=25, fewest=5))
    start = text.document_starts[0]
    own = [s for s in segments if s.source == text.titles[0]]
    np.testing.assert_array_equal(own[0].before, [small_store.eot_id])
    np.testing.assert_array_equal(own[1].before, text.tokens[start - 1 : start + 20])  # all 21 there are
    np.testing.assert_array_equal(own[2].before, text.tokens[start + 15 : start + 40])
    isolated = cut_split(small_store, "validation", Cut(length=20, fewest=5))
    assert [s.ids.tolist() for s in segments] == [s.ids.tolist() for s in isolated]


def test_isolated_keys_are_engrams_and_entropies_those_of_the_own_tokens(model: LanguageModel) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(300, size=n).tolist() for n in (20, 7, 20, 13)]
    segments = [one(row, []) for row in rows]
    for block in (None, -2, 1):
        keys, bits = read_segments(model, segments, block=block, batch_size=2)
        np.testing.assert_allclose(keys, engrams(model, rows, block=block), atol=1e-6)
    for row, found in zip(rows, bits, strict=True):
        with torch.no_grad():
            p = model(torch.tensor([row])).logits[0, :-1].double().softmax(-1)
        expected = -(p * p.log()).sum(-1).mean().item() / math.log(2)
        assert found == pytest.approx(expected, rel=1e-5)


def test_in_full_context_only_the_own_positions_count(model: LanguageModel) -> None:
    rng = np.random.default_rng(1)
    ids, before, other = (rng.integers(300, size=n).tolist() for n in (12, 30, 30))
    keys, bits = read_segments(model, [one(ids, before), one(ids, other), one(ids, [])])
    with torch.no_grad(), block_outputs(model):
        output = model(torch.tensor([before + ids]))
    np.testing.assert_allclose(keys[0], output.hidden[0, 30:, : model.d_model].mean(0), atol=1e-5)
    p = output.logits[0, 29:-1].double().softmax(-1)  # position 29 is where the first own token is expected
    assert bits[0] == pytest.approx(-(p * p.log()).sum(-1).mean().item() / math.log(2), rel=1e-5)
    assert np.abs(keys[0] - keys[1]).max() > 1e-3 and np.abs(keys[0] - keys[2]).max() > 1e-3  # it was read
    whole = output.hidden[0, :, : model.d_model].mean(0).numpy()
    assert np.abs(keys[0] - whole).max() > 1e-3  # and is no part of the mean


def test_the_mode_of_the_model_is_left_as_it_was(model: LanguageModel) -> None:
    model.train()
    keys, _ = read_segments(model, [one([1, 2, 3], [])])
    assert model.training
    np.testing.assert_array_equal(keys, read_segments(model.eval(), [one([1, 2, 3], [])])[0])


def test_conditions_that_would_be_the_same_are_refused(model: LanguageModel) -> None:
    assert default_cut(model, "isolated") == Cut(length=24, fewest=24)
    assert default_cut(model, "full_context", 40) == Cut(length=40, condition="full_context", previous=8)
    with pytest.raises(HRSError, match="with full_context there must be some, or both would be the same"):
        default_cut(model, "full_context", CONTEXT)  # as the original cut them
    with pytest.raises(HRSError, match="isolated segments have none"):
        Cut(length=40, previous=3)
    with pytest.raises(
        HRSError, match="segments of 40 tokens with 9 in front do not fit into the model's context of 48"
    ):
        Cut(length=40, condition="full_context", previous=9).require_fit(model)
    with pytest.raises(HRSError, match="segments need 2 tokens at least"):
        Cut(length=1, fewest=1)
    with pytest.raises(HRSError, match="have 49 tokens and the model reads 48"):
        read_segments(model, [one([1] * 40, [1] * 9)])
    with pytest.raises(HRSError, match="block 9 is none of the model's"):
        read_segments(model, [one([1, 2], [])], block=9)


def test_a_text_too_short_for_a_segment_has_none(small_store: TokenStore) -> None:
    assert cut_text(np.arange(4), Cut(length=9, fewest=5), opening=np.array([0]), source="s") == []
    with pytest.raises(HRSError, match="no document of the validation split has 900 tokens"):
        cut_split(small_store, "validation", Cut(length=1000, fewest=900))
