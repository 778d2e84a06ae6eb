"""Filling a store: what is in it afterwards, once however often it is asked for, and after any interruption."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.models import LanguageModel, build_model
from hrs.presets import experiment
from hrs.retrieval import populate as module
from hrs.retrieval.engrams import model_fingerprint
from hrs.retrieval.populate import Filled, Population, populate
from hrs.retrieval.segments import Condition, Cut, cut_split, default_cut, read_segments
from hrs.retrieval.store import EngramStore

PIECE = 16


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENTS_PER_PIECE", PIECE)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return build_model(experiment("dense_baseline", "micro", 0, {"data.tokenizer": "bpe:300"}).model).eval()


class Place:
    """A store and its readings in one folder."""

    def __init__(self, model: LanguageModel, tokens: TokenStore, folder: Path) -> None:
        self.model, self.tokens, self.folder = model, tokens, folder

    def store(self, condition: str = "isolated") -> EngramStore:
        fingerprint, width = model_fingerprint(self.model), self.model.d_model
        return EngramStore.open(self.folder / condition, fingerprint=fingerprint, width=width, normalisation="centred")

    def fill(self, keep_above: float = 0.0, condition: Condition = "isolated") -> Iterator[Filled]:
        plan = Population(cut=default_cut(self.model, condition), split="validation", keep_above=keep_above)
        return populate(self.model, self.tokens, plan, self.store(condition), self.folder / "readings")


@pytest.fixture
def place(model: LanguageModel, small_store: TokenStore, tmp_path: Path) -> Place:
    return Place(model, small_store, tmp_path)


def test_every_segment_is_a_memory_that_knows_its_document(place: Place) -> None:
    *_, done = place.fill()
    segments = cut_split(place.tokens, "validation", default_cut(place.model, "isolated"))
    keys, bits = read_segments(place.model, segments)
    assert (done.n_segments, done.n_kept, done.n_added, done.n_in_store) == (len(segments),) * 4
    assert done.mean_bits == pytest.approx(bits.mean()) and done.quantiles_bits[-1] == bits.max()
    store = place.store()
    memories = {(m.source, m.text): m for m in store.list()}
    for segment, key, entropy in zip(segments, keys, bits, strict=True):
        memory = memories[segment.source, place.tokens.tokenizer.decode(segment.ids.tolist())]
        assert memory.entropy == pytest.approx(entropy) and memory.topic == segment.topic
        hits = store.search(key[None], 3)[0]
        assert hits[0].memory.text == memory.text and hits[0].similarity == pytest.approx(1, abs=1e-5)
        others = store.search(key[None], 3, exclude_sources=[segment.source])[0]
        assert segment.source not in {hit.memory.source for hit in others}
    assert store.transform_version == 1  # centred over all of it


def test_filling_twice_adds_nothing_and_reads_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, first = place.fill()
    monkeypatch.setattr(module, "read_segments", None)
    *_, again = place.fill()
    assert (again.n_added, again.n_in_store) == (0, first.n_in_store)
    place.store().delete([place.store().list()[3].id])
    *_, mended = place.fill()
    assert (mended.n_added, mended.n_in_store) == (1, first.n_in_store)


def test_a_damaged_reading_is_named_and_read_again(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    *_, first = place.fill()
    damaged = sorted((place.folder / "readings").rglob("*.npz"))[:3]
    content = bytearray(damaged[0].read_bytes())
    content[200] ^= 1  # in the middle of the keys
    damaged[0].write_bytes(content)
    damaged[1].write_bytes(damaged[1].read_bytes()[:-40])
    damaged[2].write_bytes(b"")
    *_, again = place.fill()
    assert (again.n_added, again.mean_bits) == (0, first.mean_bits)
    assert all(f"{path} is damaged and is read again" in caplog.text for path in damaged)


@pytest.mark.parametrize("stage", ["reading", "adding"])
def test_a_filling_that_was_cut_off_goes_on(place: Place, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off = place.fill()
    for state in cut_off:
        if state.stage == stage and state.done == 2 * PIECE:
            break
    cut_off.close()
    assert len(place.store()) == (0 if stage == "reading" else 2 * PIECE)
    read = []
    real = module.read_segments
    monkeypatch.setattr(module, "read_segments", lambda m, s, **o: read.append(len(s)) or real(m, s, **o))
    *_, done = place.fill()
    assert sum(read) == (done.n_segments - 2 * PIECE if stage == "reading" else 0)
    assert len(place.store()) == done.n_segments > 3 * PIECE
    assert done.n_added == (done.n_segments if stage == "reading" else done.n_segments - 2 * PIECE)


def test_only_what_the_model_was_unsure_of_is_kept(place: Place) -> None:
    *_, done = place.fill(keep_above=0.75)
    kept = [m.entropy for m in place.store().list()]
    assert done.n_kept == len(kept) == pytest.approx(done.n_segments / 4, abs=1)
    assert done.threshold_bits is not None and min(kept) > done.threshold_bits
    *_, more = place.fill(keep_above=0.5)  # of the same readings
    assert more.n_added == more.n_kept - done.n_kept
    *_, fewer = place.fill(keep_above=0.75)
    assert (fewer.n_added, fewer.n_in_store) == (0, more.n_kept)


def test_the_two_conditions_are_not_the_same(place: Place) -> None:
    for condition in ("isolated", "full_context"):
        *_, done = place.fill(condition=condition)
    alone, behind = (stored_keys(place, condition) for condition in ("isolated", "full_context"))
    assert alone.keys() == behind.keys() and len(alone) == done.n_in_store
    assert min(np.abs(alone[name] - behind[name]).max() for name in alone) > 1e-3  # even the first reads end of text


def stored_keys(place: Place, condition: str) -> dict[tuple[str, str], np.ndarray]:
    hits = place.store(condition).search(np.ones((1, place.model.d_model)), 10_000)[0]
    return {(hit.memory.source, hit.memory.text): hit.key for hit in hits}


def test_another_models_store_is_refused(place: Place) -> None:
    foreign = EngramStore.open(place.folder / "foreign", fingerprint="0" * 16, width=place.model.d_model)
    plan = Population(cut=Cut(length=32))
    with pytest.raises(HRSError, match="the engram store belongs to model 0000000000000000 and this is"):
        next(populate(place.model, place.tokens, plan, foreign, place.folder / "readings"))
    with pytest.raises(HRSError, match="keep_above must be a quantile"):
        Population(cut=Cut(length=32), keep_above=1.0)
