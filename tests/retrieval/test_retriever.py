"""The way from a text to what the model reads, part by part."""

import dataclasses

import numpy as np
import pytest
import torch
from memory_models import CONTEXT, filled_store, small_model

from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.retrieval.retriever import RetrievalOptions, Retriever


@pytest.fixture(scope="module")
def retriever(small_store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    """Over a model that takes memory."""
    model = small_model("retrieved")
    store = filled_store(model, small_store, tmp_path_factory.mktemp("store"))
    return Retriever(model, small_store.tokenizer, store, segment_tokens=4)


def test_a_segment_begins_after_the_last_end_of_text(retriever: Retriever, small_store: TokenStore) -> None:
    end = small_store.eot_id
    assert retriever.segment([7, 8, 9, 10, 11]) == [8, 9, 10, 11]
    assert retriever.segment([7, 8, end, 10, 11]) == [10, 11]
    assert retriever.segment([end, end]) == [end, end], "there is nothing else"


def test_slots_are_distinct(retriever: Retriever) -> None:
    query = retriever.queries([[5, 6, 7]])[0]
    hits = retriever.find(query, RetrievalOptions(k=3, min_similarity=-1.0))
    twice = (hits[1], hits[0], dataclasses.replace(hits[2], key=hits[0].key))
    memory = retriever.slots(twice)
    assert memory is not None and torch.equal(memory, torch.from_numpy(np.stack([hits[1].key, hits[0].key])))
    assert retriever.slots(()) is None


def test_the_best_memory_is_next_to_the_text(retriever: Retriever) -> None:
    """All that fit are read; of the one that does not, the beginning; a separator follows each."""
    found = retriever.find(retriever.queries([[5, 6, 7]])[0], RetrievalOptions(k=3, min_similarity=-1.0))
    texts = ("The wave", " and the barn", " and the moon")
    hits = [
        dataclasses.replace(hit, memory=dataclasses.replace(hit.memory, text=text))
        for hit, text in zip(found, texts, strict=True)
    ]
    best, second, third = (retriever.tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    end = retriever.tokenizer.encode("\n", add_special_tokens=False).ids
    assert len(end) == 1 and len(third) > 2
    assert retriever.spliced(hits, 99) == third + end + second + end + best + end
    room = len(best) + len(second) + 2
    assert retriever.spliced(hits, room + 3) == third[:2] + end + second + end + best + end
    assert retriever.spliced(hits, room + 1) == retriever.spliced(hits, room) == second + end + best + end
    assert retriever.spliced(hits, 1) == retriever.spliced((), 9) == []


def test_retrieved_text_goes_before_context(retriever: Retriever) -> None:
    """Where both do not fit, the context loses its beginning for as long as retrieved text is there."""
    hits = retriever.find(retriever.queries([[5, 6, 7]])[0], RetrievalOptions(k=1, min_similarity=-1.0))
    context = list(range(200, 200 + CONTEXT))
    retrieved = retriever.spliced(hits, 6)
    assert len(retrieved) == 6
    assert retriever.prefix(context, hits, 6) == (context[-(CONTEXT // 2 - 6) :] + retrieved, 6)
    assert retriever.prefix(context, (), 6) == (context[-CONTEXT // 2 :], 0)
    assert retriever.prefix(context[:3], (), 6) == (context[:3], 0)
    long = retriever.prefix(context, hits * 9, CONTEXT)
    assert long == (retriever.spliced(hits * 9, CONTEXT // 2), CONTEXT // 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"hold": 0}, "hold must be at least 1"),
        ({"context_tokens": 0}, "context_tokens must be at least 1"),
        ({"min_similarity": 1.5}, "min_similarity must lie between"),
        ({"mode": "prompt"}, "unknown retrieval mode 'prompt'"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(HRSError, match=said):
        RetrievalOptions(**changes)  # type: ignore[arg-type]
