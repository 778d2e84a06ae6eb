"""Slots of memories that are texts, made as those that a model reads in its training.

    slots = slot_maker(model, config, tokenizer, storage.run(config.training.retrieval.base))
    retriever = Retriever(model, tokenizer, memories, slots=slots)

A bank gives a window the chunk that was found and the one after it. Of a text that was found these are its first two.
"""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from hrs.config import ExperimentConfig
from hrs.models import LanguageModel
from hrs.retrieval.bank.base import base_of, slots_per_chunk
from hrs.retrieval.bank.chunks import encode_pieces
from hrs.retrieval.retriever import SlotMaker
from hrs.retrieval.store import Hit

_KEPT_TEXTS = 256
_CHUNKS_PER_TEXT = 2


def slot_maker(
    model: LanguageModel, config: ExperimentConfig, tokenizer: Tokenizer, base_directory: Path | None
) -> SlotMaker | None:
    """What turns memories into slots for ``model``; None for a model that reads none (``engram.kind`` is not
    ``retrieved``).

    Args:
        model: in evaluation mode.
        config: of its run.
        base_directory: of its base's run, or one of its checkpoints. None lets the model itself read the memories,
            without memory: it began as the base, but its training has moved it since.

    Raises:
        HRSError: if that is not the base that the config names, or the config's slots do not divide. A base that is
            not at hand is never replaced silently.
    """
    if not model.takes_memory:
        return None
    base = (
        model
        if base_directory is None
        else base_of(config, base_directory, tokenizer).to(next(model.parameters()).device)
    )
    return TextSlots(base, tokenizer, config)


class TextSlots:
    """Slots [S, d] of the texts of memories, best first: at most ``engram.slots``, of ``training.retrieval.neighbours``
    memories with different texts.

    Each text gives those of its first two whole chunks, as :func:`hrs.retrieval.bank.chunks.encode_chunks` makes them
    of a document that begins with these tokens. A text shorter than a chunk is one chunk of the length that it has,
    and gives at most a slot per token; a single token gives none. Absent slots, zero in a bank, are left out. The
    slots of the texts used last are kept. Not for several threads at once.

    Args:
        base: the model that reads the texts, in evaluation mode.
        config: of the run that reads the slots.

    Raises:
        HRSError: if the slots do not divide.
    """

    def __init__(self, base: LanguageModel, tokenizer: Tokenizer, config: ExperimentConfig) -> None:
        self._base, self._tokenizer, self._config = base, tokenizer, config.training.retrieval
        self._per_chunk = slots_per_chunk(config)
        self._device = next(base.parameters()).device
        self._of = lru_cache(maxsize=_KEPT_TEXTS)(self._read)

    def __call__(self, hits: Sequence[Hit]) -> Tensor:
        texts = list(dict.fromkeys(hit.memory.text for hit in hits))  # a text twice would only be heeded twice
        parts = [self._of(text) for text in texts[: self._config.neighbours]]
        return torch.cat(parts) if parts else torch.empty(0, self._base.d_model, device=self._device)

    def _read(self, text: str) -> Tensor:
        """[S, d] of one text."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        config, n_slots = self._config, self._per_chunk
        if len(ids) < 2:
            return torch.empty(0, self._base.d_model, device=self._device)
        if len(ids) < config.chunk_tokens:
            n_slots = min(n_slots, len(ids))
            equal = len(ids) // n_slots * n_slots if config.values == "means" else len(ids)
            config = dataclasses.replace(config, chunk_tokens=equal)
        c = config.chunk_tokens
        n = min(len(ids) // c, _CHUNKS_PER_TEXT)
        per_piece = min(self._base.max_seq_len // c, n)
        pieces = torch.tensor(ids[: n * c], device=self._device).view(n // per_piece, per_piece * c)
        _, slots = encode_pieces(self._base, pieces, config, n_slots)  # [P, per_piece, n_slots, d]
        slots = slots.flatten(0, 2).half().float()  # a bank keeps 16 bits
        return slots[slots.any(-1)]
