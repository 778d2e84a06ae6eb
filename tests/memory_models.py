"""Models small enough for exact references, and stores with memories of a token store's documents."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from hrs.data import TokenStore
from hrs.data.store import TokenSplit
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


def first_documents(data: TokenStore, n: int, n_tokens: int = 60) -> TokenSplit:
    """A split of the beginnings of the first test documents."""
    text, parts = data.test, [data.test.tokens[:1]]
    for start in text.document_starts[:n]:
        parts += [text.tokens[start : start + n_tokens], text.tokens[:1]]
    return TokenSplit(
        tokens=np.concatenate(parts),
        document_starts=1 + np.arange(n + 1) * (n_tokens + 1),
        topic_ids=text.topic_ids[:n],
        n_bytes=np.array([data.token_bytes[part].sum() for part in parts[1::2]]),
        n_words=text.n_words[:n],
        documents=pa.table({"title": [f"test:{d}" for d in range(n)]}),
    )
