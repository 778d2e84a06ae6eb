"""Documents cut into segments, and each segment read: its key for a store, and how unsure the model was of it.

Two ways to read a segment. ``isolated``: alone, as a query is read later. ``full_context``: behind the tokens that
stand in front of it in its document; key and entropy are then means over the segment's own positions, never over those
of the text in front. Segment and text in front share the model's context, so a segment must be shorter than it: the
original gave its segments the whole context, which left no room, and its two conditions were the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hrs.data.store import TokenStore
from hrs.errors import HRSError
from hrs.evaluation.diagnostics import block_outputs
from hrs.models.base import LanguageModel
from hrs.retrieval.calibration import entropies

Condition = Literal["isolated", "full_context"]
FEWEST_TOKENS = 32
"""Shorter ends of documents make no segment, as in the original."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
    """A stretch of one document."""

    ids: NDArray[np.int64]
    """[L], its own tokens, 2 at least."""
    before: NDArray[np.int64]
    """[P], what is read in front of it: empty for ``isolated``."""
    source: str
    """Title of its document: documents of one title are versions of one text, and never in two splits."""
    topic: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How documents become segments."""

    length: int
    """Tokens of a segment."""
    condition: Condition = "isolated"
    previous: int = 0
    """Tokens in front of a segment that ``full_context`` reads, at most; the end of text that opens the document is
    one of them."""
    fewest: int = FEWEST_TOKENS
    """The end of a document that is shorter makes no segment."""

    def __post_init__(self) -> None:
        if not 2 <= self.fewest <= self.length:
            raise HRSError(f"segments need 2 tokens at least: got {self.fewest} to {self.length}")
        if (self.previous > 0) != (self.condition == "full_context"):
            raise HRSError(
                f"condition '{self.condition}' with {self.previous} tokens in front: isolated segments have none, and "
                "with full_context there must be some, or both would be the same"
            )

    def require_fit(self, model: LanguageModel) -> None:
        """Raises HRSError if a segment and what is read in front of it are longer than the model's context."""
        if self.length + self.previous > model.max_seq_len:
            raise HRSError(
                f"segments of {self.length} tokens with {self.previous} in front do not fit into the model's context "
                f"of {model.max_seq_len}: what is in front would be cut away, so make them shorter"
            )


def default_cut(model: LanguageModel, condition: Condition, length: int | None = None) -> Cut:
    """Segments of half the context by default; in full context the rest of it stands in front.

    Raises:
        HRSError: if the length leaves nothing in front, or does not fit.
    """
    length = max(2, model.max_seq_len // 2) if length is None else length
    previous = model.max_seq_len - length if condition == "full_context" else 0
    cut = Cut(length=length, condition=condition, previous=max(previous, 0), fewest=min(FEWEST_TOKENS, length))
    cut.require_fit(model)
    return cut


def cut_text(
    ids: NDArray[np.int64], cut: Cut, *, opening: NDArray[np.int64], source: str, topic: str | None = None
) -> list[Segment]:
    """Segments of one text [n], one after the other. ``opening`` [m] is what stands in front of the whole text."""
    text = np.concatenate((opening, ids))
    segments = []
    for start in range(len(opening), len(text) - cut.fewest + 1, cut.length):
        segments.append(
            Segment(
                ids=text[start : start + cut.length],
                before=text[max(start - cut.previous, 0) : start],
                source=source,
                topic=topic,
            )
        )
    return segments


def cut_split(store: TokenStore, split: str, cut: Cut) -> list[Segment]:
    """Segments of all documents of a split, in its order.

    Raises:
        HRSError: if there is no such split, or it has none.
    """
    text = store.split(split)
    opening = np.array([store.eot_id])
    segments = []
    for title, topic, (start, end) in zip(text.titles, text.topic_ids, pairwise(text.document_starts), strict=True):
        ids = text.tokens[start : end - 1].astype(np.int64)  # without the end of text behind it
        name = store.topics[topic] if topic >= 0 else None
        segments += cut_text(ids, cut, opening=opening, source=title, topic=name)
    if not segments:
        raise HRSError(
            f"no document of the {split} split has {cut.fewest} tokens: use shorter segments, or another split"
        )
    return segments


@torch.no_grad()
def read_segments(
    model: LanguageModel, segments: Sequence[Segment], *, block: int | None = None, batch_size: int = 16
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Keys [N, d] and mean entropies [N] (bits) of segments, in evaluation mode.

    Both are means over a segment's own tokens: the key of the states at their positions, the entropy of the
    distributions they were drawn from. The first token of a segment that is read alone has none.

    Args:
        model: on any device; its mode is restored.
        block: as in :func:`hrs.retrieval.engrams.engrams`, which gives isolated segments the same keys.
        batch_size: segments read at once; all of them have the same lengths, so nothing is padded.

    Raises:
        HRSError: if a segment and what is in front of it do not fit, or there is no such block.
    """
    n_blocks = len(model.blocks)
    if block is not None and not -n_blocks <= block < n_blocks:
        raise HRSError(f"block {block} is none of the model's {n_blocks}: give {-n_blocks} to {n_blocks - 1}")
    longest = max((len(s.before) + len(s.ids) for s in segments), default=0)
    if longest > model.max_seq_len:
        raise HRSError(f"a segment and its context have {longest} tokens and the model reads {model.max_seq_len}")
    device = next(model.parameters()).device
    by_shape: dict[tuple[int, int], list[int]] = {}
    for number, segment in enumerate(segments):
        by_shape.setdefault((len(segment.before), len(segment.ids)), []).append(number)
    keys = np.empty((len(segments), model.d_model), dtype=np.float32)
    bits = np.empty(len(segments))
    was_training = model.training
    model.eval()
    try:
        for (n_before, n_own), rows in by_shape.items():
            for chosen in (rows[start : start + batch_size] for start in range(0, len(rows), batch_size)):
                read = np.stack([np.concatenate((segments[i].before, segments[i].ids)) for i in chosen])
                with block_outputs(model) as outputs:
                    hidden = model.encode(torch.from_numpy(read).to(device)).hidden
                states = hidden[..., : model.d_model] if block is None else outputs[block]
                keys[chosen] = states[:, -n_own:].double().mean(dim=1).cpu().numpy()
                # Position t tells what the model expects at t + 1.
                bits[chosen] = entropies(model, hidden[:, max(n_before - 1, 0) : -1]).mean(dim=1).cpu().numpy()
    finally:
        model.train(was_training)
    return keys, bits
