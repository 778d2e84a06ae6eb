"""Slots of memories that are texts: a bank's, for the same tokens, and a rule for texts that no bank has."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_models import first_documents
from torch.nn import functional as F

from hrs.config import ExperimentConfig
from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.generation import Sampling
from hrs.models import LanguageModel, build_model
from hrs.presets import experiment
from hrs.retrieval.bank import open_bank, weights_fingerprint
from hrs.retrieval.bank.slots import TextSlots, slot_maker
from hrs.retrieval.bits import measure_retrieval, retrieval_bits
from hrs.retrieval.engine import RetrievalEngine
from hrs.retrieval.engrams import engrams, model_fingerprint
from hrs.retrieval.entropy import GateSettings
from hrs.retrieval.retriever import RetrievalOptions, Retriever
from hrs.retrieval.store import EngramStore, Hit, Memory, NewMemory
from hrs.training import Runtime, load_model, train
from hrs.training.retrieval import start_from

T, D, K = 32, 16, 2
SMALL = {
    "data.tokenizer": "bpe:300", "model.d_model": D, "model.n_heads": 2, "model.d_ff": 32, "model.max_seq_len": T,
    "training.steps": 2, "training.validations": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(small_store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("base")
    list(train(experiment("dense_baseline", "micro", overrides=SMALL), small_store, folder, Runtime(device="cpu")))
    return folder


def config_for(base: Path, per_chunk: int = 4, c: int = 8, **retrieval: object) -> ExperimentConfig:
    named = {"base": "base", "fingerprint": weights_fingerprint(load_model(base)[0]), "chunk_tokens": c}
    named |= {"neighbours": K} | retrieval
    changes = {f"training.retrieval.{name}": value for name, value in named.items()}
    return experiment("dense_retrieved", "micro", overrides=SMALL | {"model.engram.slots": 2 * K * per_chunk} | changes)


def reader(base: Path, config: ExperimentConfig) -> LanguageModel:
    """A model as its training begins, but for a cross-attention that does something."""
    torch.manual_seed(0)
    model = build_model(config.model)
    start_from(load_model(base)[0].state_dict(), model)
    for name, parameter in model.named_parameters():
        if ".cross.output" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def hit(text: str, id: str = "m-0") -> Hit:
    memory = Memory(id=id, text=text, entropy=None, source="book", topic=None, created=0.0)
    return Hit(memory=memory, similarity=0.5, key=np.zeros(D, dtype=np.float32))


def document(store: TokenStore, number: int) -> list[int]:
    """The tokens of a document of the training text."""
    starts = store.train.document_starts
    return store.train.tokens[starts[number] : starts[number + 1] - 1].tolist()


def text_of(store: TokenStore, n_tokens: int) -> tuple[str, list[int]]:
    """A text of exactly so many tokens, and these."""
    for number in range(len(store.train.topic_ids)):
        text = store.tokenizer.decode(document(store, number)[:n_tokens])
        if len(ids := store.tokenizer.encode(text, add_special_tokens=False).ids) == n_tokens:
            return text, ids
    raise AssertionError(f"no document begins with a text of {n_tokens} tokens")


# ---- what a bank has, too --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["tokens", "states", "means"])
@pytest.mark.parametrize("c", [8, 12, 20])
def test_a_document_gives_the_slots_of_its_first_chunk_and_of_the_one_after_it(
    values: str, c: int, base: Path, small_store: TokenStore, tmp_path: Path
) -> None:
    """With chunks of 20 tokens the base reads each alone, for two do not fit into its context."""
    config = config_for(base, c=c, values=values)
    bank = open_bank(config, small_store, base, tmp_path)
    maker = TextSlots(load_model(base)[0], small_store.tokenizer, config)
    for number in (0, 1, 40):
        ids = document(small_store, number)
        assert len(ids) >= 2 * c
        first = int(np.flatnonzero(bank.chunks["train"].documents == number)[0])
        expected = torch.from_numpy(bank.slots[first : first + 2].astype(np.float32)).flatten(0, 1)
        found = maker([hit(small_store.tokenizer.decode(ids))])
        # Pieces of another length are summed in another order, and both are rounded to 16 bits.
        torch.testing.assert_close(found, expected[expected.any(-1)], rtol=2e-3, atol=2e-3)


def test_of_the_best_memories_as_many_are_read_as_in_training_and_none_twice(
    base: Path, small_store: TokenStore
) -> None:
    config = config_for(base)
    maker = TextSlots(load_model(base)[0], small_store.tokenizer, config)
    one, two, three = (hit(small_store.tokenizer.decode(document(small_store, n)), f"m-{n}") for n in (3, 4, 5))
    again = hit(one.memory.text, "m-6")
    alone = {h.memory.id: maker([h]) for h in (one, two, three)}
    assert torch.equal(maker([two, one, three]), torch.cat((alone["m-4"], alone["m-3"])))
    assert torch.equal(maker([one, again, three]), torch.cat((alone["m-3"], alone["m-5"])))
    assert len(maker([one, two, three])) <= config.model.engram.slots
    assert maker([]).shape == (0, D)


def test_a_text_is_read_once(base: Path, small_store: TokenStore) -> None:
    model, passes = load_model(base)[0], []
    model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    maker = TextSlots(model, small_store.tokenizer, config_for(base))
    first = maker([hit("The wave and the ship and the storm")])
    assert len(passes) == 1
    assert torch.equal(maker([hit("The wave and the ship and the storm", "m-9")]), first)
    assert len(passes) == 1
    maker([hit("The wave and the ship and the sail")])
    assert len(passes) == 2


# ---- what a bank has not ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["tokens", "states", "means"])
@pytest.mark.parametrize("n", [2, 3, 6, 7, 8, 11])
def test_a_text_without_two_chunks_gives_what_there_is(
    values: str, n: int, base: Path, small_store: TokenStore
) -> None:
    """Reference: token by token. Below a chunk of 8 all tokens are one; from there on the whole one counts alone."""
    h = 4
    model = load_model(base)[0]
    text, ids = text_of(small_store, n)
    found = TextSlots(model, small_store.tokenizer, config_for(base, per_chunk=h, values=values))([hit(text)])
    ids = torch.tensor(ids[:8])
    with torch.no_grad():
        output = model(ids[None])
    states, scores = output.hidden[0], output.logits[0].log_softmax(-1)
    if values == "means":
        parts = min(h, len(ids))
        size = len(ids) // parts
        expected = [states[i * size : (i + 1) * size].mean(0) for i in range(parts)]
    else:
        first = [p for p in range(1, len(ids)) if ids[p] not in ids[:p]]
        best = sorted(first, key=lambda p: float(scores[p - 1, ids[p]]))[:h]
        unit = lambda v: F.rms_norm(v, (D,))  # noqa: E731
        expected = [
            states[p] if values == "states" else unit(states[p - 1]) + unit(model.embedding.weight[ids[p]])
            for p in best
        ]
    assert expected
    wanted = torch.stack([F.rms_norm(v, (D,)) for v in expected]).detach()
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


def test_one_token_gives_no_slot_and_nothing_is_read_of_it(base: Path, small_store: TokenStore, tmp_path: Path) -> None:
    """Nor held: every loss is the one without retrieval."""
    config = config_for(base)
    model = reader(base, config)
    maker = slot_maker(model, config, small_store.tokenizer, base)
    assert maker is not None and maker([hit("e")]).shape == (0, D)
    retriever = retriever_over(["e", "w"], model, small_store, tmp_path, maker)
    assert retriever.slots([hit("e")]) is None
    right, off = (
        retrieval_bits(retriever, first_documents(small_store, 2), OPTIONS, control=c) for c in ("right", "off")
    )
    assert right.n_events > 0 and right.n_used == right.n_injected.sum() == 0
    np.testing.assert_allclose(right.bits, off.bits, rtol=1e-6)


# ---- whose slots they are --------------------------------------------------------------------------------------------


def test_a_model_without_cross_attention_needs_none(base: Path, small_store: TokenStore) -> None:
    model, config = load_model(base)
    assert slot_maker(model, config, small_store.tokenizer, base) is None


def test_the_base_reads_the_texts_or_the_model_itself_without_memory(base: Path, small_store: TokenStore) -> None:
    """At the start of its training they are one; a model that has learned since makes other slots."""
    config = config_for(base)
    model = reader(base, config)
    hits = [hit(small_store.tokenizer.decode(document(small_store, 0)))]
    by_base, by_itself = (slot_maker(model, config, small_store.tokenizer, where) for where in (base, None))
    assert by_base is not None and by_itself is not None
    torch.testing.assert_close(by_base(hits), by_itself(hits), rtol=2e-3, atol=2e-3)
    with torch.no_grad():
        model.embedding.weight.mul_(torch.randn(D))
    fresh = [slot_maker(model, config, small_store.tokenizer, where) for where in (base, None)]
    assert torch.equal(fresh[0](hits), by_base(hits))  # type: ignore[misc]
    assert (fresh[1](hits) - by_base(hits)).abs().max() > 0.1  # type: ignore[misc]


def test_a_base_that_is_not_the_one_is_refused(base: Path, small_store: TokenStore, tmp_path: Path) -> None:
    config = config_for(base)
    model = reader(base, config)
    with pytest.raises(HRSError, match="does not exist"):
        slot_maker(model, config, small_store.tokenizer, tmp_path / "nowhere")
    with pytest.raises(HRSError, match=r"has fingerprint .* and training.retrieval.fingerprint says 0000"):
        slot_maker(model, config_for(base, fingerprint="0" * 16), small_store.tokenizer, base)
    engram = dataclasses.replace(config.model.engram, slots=7)
    odd = dataclasses.replace(config, model=dataclasses.replace(config.model, engram=engram))
    with pytest.raises(HRSError, match=r"engram.slots 7 must be a multiple of 2 \* training.retrieval.neighbours = 4"):
        slot_maker(model, odd, small_store.tokenizer, None)


# ---- in retrieval ----------------------------------------------------------------------------------------------------

OPTIONS = RetrievalOptions(
    mode="slots", gate=GateSettings(threshold_bits=0.0, window=3, cooldown=8), k=2, min_similarity=-1.0, hold=5
)


def retriever_over(
    texts: list[str], model: LanguageModel, store: TokenStore, path: Path, maker: object, **more: object
) -> Retriever:
    """Over memories with these texts, of three sources."""
    memories = EngramStore.open(path, fingerprint=model_fingerprint(model), width=D)
    ids = [store.tokenizer.encode(text, add_special_tokens=False).ids[:T] for text in texts]
    new = [NewMemory(text=text, entropy=None, source=f"train:{n % 3}", topic=None) for n, text in enumerate(texts)]
    memories.add(new, engrams(model, ids))
    return Retriever(model, store.tokenizer, memories, slots=maker, **more)  # type: ignore[arg-type]


def test_measuring_and_generating_read_the_same_slots(base: Path, small_store: TokenStore, tmp_path: Path) -> None:
    """More than the keys, and to the same end."""
    config = config_for(base)
    model = reader(base, config)
    maker = slot_maker(model, config, small_store.tokenizer, base)
    texts = [small_store.tokenizer.decode(document(small_store, n)) for n in range(9)]
    retriever = retriever_over(texts, model, small_store, tmp_path, maker)
    text = first_documents(small_store, 2)
    report = measure_retrieval(retriever, text, OPTIONS)
    assert report.conditions["right"].n_used == report.conditions["right"].n_events > 10
    by_keys = retrieval_bits(
        Retriever(model, small_store.tokenizer, retriever.store), first_documents(small_store, 2), OPTIONS
    )
    for control in ("off", "shuffled"):
        assert np.abs(np.subtract(report.documents["right"], report.documents[control])).min() > 1e-3
    assert np.abs(report.documents["right"] - by_keys.bits).min() > 1e-3

    engine = RetrievalEngine(model, small_store.tokenizer, retriever.store, slots=maker)
    engine.add(document(small_store, 20)[:4], Sampling(max_new_tokens=12, seed=0), OPTIONS)
    events = []
    while engine.n_active:
        events += [event for _, event in engine.step() if event is not None]
    assert events
    for event in events:
        assert len(event.hits) == 2
        made = retriever.slots(event.hits)
        assert made is not None and event.n_slots == len(made) <= config.model.engram.slots
        assert event.n_slots > 2, "more than a key of each"
