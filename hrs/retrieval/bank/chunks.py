"""Text cut into chunks, and what a base model makes of each: a key that finds it and a few slots that tell of it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hrs.config import RetrievalConfig
from hrs.data import TokenSplit
from hrs.models import LanguageModel

_PIECES_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Chunks:
    """Whole chunks of equal length, document by document from each one's first token; what is left over is in none."""

    ends: NDArray[np.int64]
    """[n], position after the last token of each, increasing."""
    documents: NDArray[np.int64]
    """[n], index of the document each comes from."""

    def __len__(self) -> int:
        return len(self.ends)

    def before(self, starts: NDArray[np.int64], documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """The last chunk [B] that ends at or before each of the positions ``starts`` [B] and lies in the document
        ``documents`` [B]; -1 where there is none."""
        found = np.searchsorted(self.ends, starts, side="right") - 1
        if not len(self):
            return np.full(len(starts), -1)
        return np.where((found >= 0) & (self.documents[np.maximum(found, 0)] == documents), found, -1)


def cut(split: TokenSplit, length: int) -> Chunks:
    """The chunks of ``length`` tokens of all documents; ends of text are in none."""
    first, last = split.document_starts[:-1], split.document_starts[1:] - 1
    counts = (last - first) // length
    documents = np.repeat(np.arange(len(counts)), counts)
    nth = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Chunks(ends=first[documents] + (nth + 1) * length, documents=documents)


@torch.no_grad()
def encode_chunks(
    model: LanguageModel, split: TokenSplit, chunks: Chunks, config: RetrievalConfig, n_slots: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float16]]]:
    """Keys [n, d] and slots [n, n_slots, d] of the chunks in order, a few at a time.

    The model reads each document in pieces as long as its context allows, every piece as if a text began with it. The
    key of a chunk is its engram, the mean of its final normalised states. Its slots have unit mean square; where a
    chunk has too few different tokens the rest are zero.

    Args:
        model: in evaluation mode.
        n_slots: per chunk, at most its tokens.
    """
    device, c = next(model.parameters()).device, config.chunk_tokens
    per_piece = model.max_seq_len // c
    # A piece begins with every per_piece-th chunk of a document.
    nth = np.arange(len(chunks)) - np.searchsorted(chunks.documents, chunks.documents)
    firsts = np.flatnonzero(nth % per_piece == 0)
    sizes = np.diff(np.append(firsts, len(chunks)))
    for batch in range(0, len(firsts), _PIECES_AT_ONCE):
        rows = slice(batch, batch + _PIECES_AT_ONCE)
        starts = chunks.ends[firsts[rows]] - c
        # A short piece is filled with what follows, which no state of its own can see.
        places = np.minimum(starts[:, None] + np.arange(per_piece * c), len(split) - 1)
        ids = torch.from_numpy(split.tokens[places].astype(np.int64)).to(device)
        keys, slots = encode_pieces(model, ids, config, n_slots)
        own = torch.from_numpy(np.arange(per_piece) < sizes[rows, None]).to(device)  # [P, per_piece]
        yield keys[own].cpu().numpy(), slots[own].half().cpu().numpy()


@torch.no_grad()
def encode_pieces(model: LanguageModel, ids: Tensor, config: RetrievalConfig, n_slots: int) -> tuple[Tensor, Tensor]:
    """Keys [P, m, d] and slots [P, m, n_slots, d] of the m chunks of each of some pieces, see :func:`encode_chunks`.

    Args:
        ids: [P, m * chunk_tokens], on the model's device.
    """
    c = config.chunk_tokens
    hidden = model.encode(ids).hidden
    states = hidden[..., : model.d_model].float()
    keys = states.unflatten(1, (-1, c)).mean(2)  # [P, m, d]
    if config.values == "means":
        slots = states.unflatten(1, (-1, n_slots, c // n_slots)).mean(3)  # [P, m, n_slots, d]
    else:
        slots = _surprising(model, ids, hidden, config, n_slots)
    return keys, F.rms_norm(slots, slots.shape[-1:])


def _surprising(model: LanguageModel, ids: Tensor, hidden: Tensor, config: RetrievalConfig, n_slots: int) -> Tensor:
    """Slots [P, per_piece, n_slots, d] of the tokens of each chunk that cost the model most, each id once."""
    states, c = hidden[..., : model.d_model].float(), config.chunk_tokens
    costs = torch.stack(
        [
            F.cross_entropy(model.unembed(row[:-1]).float(), targets[1:], reduction="none")
            for row, targets in zip(hidden, ids, strict=True)
        ]
    )  # [P, n - 1]
    costs = F.pad(costs, (1, 0), value=-torch.inf).unflatten(1, (-1, c))  # a piece's first token is not predicted
    chunk_ids = ids.unflatten(1, (-1, c))  # [P, per_piece, c]
    repeats = (chunk_ids[..., :, None] == chunk_ids[..., None, :]).tril(-1).any(-1)
    best = costs.masked_fill(repeats, -torch.inf).topk(n_slots, dim=-1)  # [P, per_piece, n_slots]
    if config.values == "tokens":
        d = states.shape[-1]
        in_front = F.rms_norm(F.pad(states[:, :-1], (0, 0, 1, 0)), (d,))
        states = in_front + F.rms_norm(model.input_embedding(ids).float(), (d,))
    by_chunk = states.unflatten(1, (-1, c))  # [P, per_piece, c, d]
    chosen = by_chunk.gather(2, best.indices[..., None].expand(-1, -1, -1, by_chunk.shape[-1]))
    return chosen * best.values.isfinite()[..., None]
