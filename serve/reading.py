"""What a model says of a text that is there: log-probabilities and entropies of its tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hrs.models import LanguageModel
from hrs.retrieval.engrams import engrams
from serve.backend import Scores

_LOGITS_AT_ONCE = 2**24


@torch.no_grad()
def score(model: LanguageModel, ids: Sequence[int], n_best: int = 0) -> Scores:
    """Read ids [n], n at most the model's context, and score every token but the first."""
    device = next(model.parameters()).device
    tokens = torch.tensor([ids], device=device)
    hidden = model.encode(tokens).hidden[0, :-1]  # [n - 1, k]
    scores = Scores([None], [None], [None])
    at_once = max(_LOGITS_AT_ONCE // model.vocab_size, 1)
    for start in range(0, len(ids) - 1, at_once):
        logits = model.unembed(hidden[start : start + at_once])
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        targets = tokens[0, start + 1 : start + 1 + len(log_p)]
        chosen = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        scores.log_probs.extend(chosen.tolist())
        scores.entropies.extend((torch.linalg.vecdot(log_p.exp(), log_p) / -math.log(2)).tolist())
        best = log_p.topk(min(n_best, model.vocab_size), dim=-1)
        for values, indices, target, own in zip(
            best.values.tolist(), best.indices.tolist(), targets.tolist(), chosen.tolist(), strict=True
        ):
            scores.best.append({**dict(zip(indices, values, strict=True)), target: own})
    return scores


def mean_entropy(model: LanguageModel, ids: Sequence[int]) -> float | None:
    """Bits per token; None for a text of one token."""
    known = [bits for bits in score(model, ids).entropies if bits is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reading:
    """What the model makes of a text."""

    ids: Sequence[int]
    engram: NDArray[np.float32]
    """[d]"""
    entropy: float | None
    """Mean, in bits per token; None for one token."""


def read(model: LanguageModel, segments: Sequence[Sequence[int]], block: int | None) -> list[Reading]:
    """Return what the model makes of segments, each no longer than the context.

    Args:
        block: whose output engrams are means of, see :func:`hrs.retrieval.engrams.engrams`.
    """
    return [
        Reading(ids=ids, engram=engram, entropy=mean_entropy(model, ids))
        for ids, engram in zip(segments, engrams(model, segments, block=block), strict=True)
    ]
