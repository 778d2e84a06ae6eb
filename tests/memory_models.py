"""Models small enough for exact references, and stores with memories of a token store's documents."""

from pathlib import Path

import torch

from hrs.data import TokenStore
from hrs.models import LanguageModel, build_model
from hrs.presets import experiment
from hrs.retrieval.engrams import engrams, model_fingerprint
from hrs.retrieval.store import EngramStore, NewMemory

CONTEXT = 32
MEMORY_TOKENS = 24


def small_model(kind: str, **overrides: object) -> LanguageModel:
    """With engrams of a kind, in float64, with weights large enough that nothing is a rounding error."""
    small = {"data.tokenizer": "bpe:300", "model.max_seq_len": CONTEXT, "model.engram.kind": kind}
    torch.manual_seed(0)
    model = build_model(experiment("dense_baseline", "micro", overrides=small | overrides).model).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".cross.output" in name:
                parameter.normal_(std=0.3)  # it starts at 0, and slots would do nothing
            elif not name.endswith("embedding.weight"):
                parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model.eval()


def filled_store(model: LanguageModel, data: TokenStore, path: Path, split: str = "train") -> EngramStore:
    """One memory of the first 24 tokens of each of a split's first 30 documents; its source is ``split:number``."""
    store = EngramStore.open(path, fingerprint=model_fingerprint(model), width=model.d_model)
    text = data.split(split)
    starts = text.document_starts[:-1][:30]
    segments = [text.tokens[start : start + MEMORY_TOKENS].tolist() for start in starts]
    memories = [
        NewMemory(
            text=data.tokenizer.decode(ids),
            entropy=None,
            source=f"{split}:{document}",
            topic=data.topics[text.topic_ids[document]],
        )
        for document, ids in enumerate(segments)
    ]
    store.add(memories, engrams(model, segments))
    return store
