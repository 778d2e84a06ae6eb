"""From logits to the next token: what may be drawn, and the draw."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hrs.config.checks import require_at_least, require_within
from hrs.errors import HRSError
from hrs.nn.eager import on_eager_cpu

_SMALLEST_DIVISOR = 1e-30
"""A temperature above it leaves the largest log-probability, which is above -100, finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How texts are continued. The filters act in the order of these fields after ``repetition_penalty`` and
    ``temperature``, each on what the one before left."""

    temperature: float = 1.0
    """Logits are divided by it. 0 takes the best token always (the filters then change nothing)."""
    top_k: int = 0
    """Only the k best tokens; 0 for all. See :func:`keep_top_k`."""
    top_p: float = 1.0
    """Only the smallest set of best tokens whose mass reaches p; 1 for all. See :func:`keep_top_p`."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the best; 0 for all. See :func:`keep_min_p`."""
    repetition_penalty: float = 1.0
    """Makes every token of the text so far, prompt included, less likely; 1 for no change. See
    :func:`penalise_repetition`."""
    max_new_tokens: int = 128
    """Tokens added to each prompt at most."""
    stop: tuple[str, ...] = ()
    """Strings that end a text; they are not part of it."""
    seed: int = 0
    """Every row of a batch draws from a stream of its own, made from the seed and the row's number."""

    def __post_init__(self) -> None:
        require_within(self, temperature=(0.0, 100.0), top_p=(0.0, 1.0), min_p=(0.0, 1.0))
        require_within(self, repetition_penalty=(0.01, 100.0))
        require_at_least(self, top_k=0, max_new_tokens=1)
        require_within(self, seed=(0, 2**64 - 1))  # the endpoint draws from all of them
        if not isinstance(self.stop, tuple) or "" in self.stop:  # a bare string would count letter by letter
            raise HRSError(f"stop must be a tuple of strings, none of them empty, got {self.stop!r}")


# ---- what may be drawn: logits [B, V] to logits [B, V] ---------------------------------------------------------------


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen tokens by ``penalty`` and multiply negative ones (Keskar et al. 2019, CTRL).

    Args:
        seen: [B, V] bool, tokens of each row's text so far.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits over ``temperature`` > 0, shifted so that the largest of each row is 0: none can overflow."""
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for every logit below the k-th largest of its row: k are left, and all that tie with the last of them."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k, dim=-1).values[..., -1:], -torch.inf)


def best_ids(logits: Tensor, k: int) -> Tensor | None:
    """Ids [B, k] of the k largest logits of each row, ascending; None if further logits tie with the last of them.

    With them :func:`keep_top_k` and what follows it need no pass over all logits. The host waits for the answer.
    """
    values, ids = logits.topk(k + 1, dim=-1)
    if torch.eq(values[:, k - 1], values[:, k]).any():
        return None
    return ids[:, :k].sort(dim=-1).values


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf outside the nucleus, the smallest set of best tokens whose mass reaches p (Holtzman et al. 2020).

    A token stays if the mass of all better ones is below p; of equal ones the smaller id counts as better. The best
    token always stays.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    mass = ordered.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    outside = F.pad(mass[..., :-1] >= p, (1, 0), value=False)  # [B, V], in the order of ``ids``
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, ids, outside), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """-inf for tokens less than ``p`` times as likely as the best of their row (Nguyen et al. 2024)."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


# ---- the draw --------------------------------------------------------------------------------------------------------


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Ids [B] drawn from softmax(logits [B, V]) by inverting its distribution function at ``uniforms`` [B] in [0, 1).

    A token of probability 0 is never drawn. The row's own number alone decides, so no row disturbs another.
    """
    mass = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(mass, uniforms.unsqueeze(-1) * mass[:, -1:], right=True).squeeze(-1)


def next_tokens(
    logits: Tensor,
    uniforms: Tensor,
    sampling: Sampling,
    seen: Tensor | None = None,
    log_p: Tensor | None = None,
) -> Tensor:
    """The next token of each row, ids [B].

    Args:
        logits: [B, V].
        uniforms: [B] float64 in [0, 1), the chance of each row.
        seen: [B, V] bool, tokens of each row's text so far; needed for a repetition penalty only.
        log_p: [B, V], log-softmax of ``logits`` where it is known.
    """
    if seen is not None and sampling.repetition_penalty != 1:
        logits, log_p = penalise_repetition(logits, seen, sampling.repetition_penalty), None
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # Log-probabilities need no shift before they are divided.
    is_shifted = log_p is not None and sampling.temperature > _SMALLEST_DIVISOR
    logits = log_p if log_p is not None and is_shifted else logits
    ids = best_ids(logits, sampling.top_k) if 0 < sampling.top_k < logits.shape[-1] and on_eager_cpu(logits) else None
    if ids is not None:
        logits = logits.gather(-1, ids)
    if not is_shifted:
        logits = apply_temperature(logits, sampling.temperature)
    elif sampling.temperature != 1:
        logits = logits / sampling.temperature
    if sampling.top_k > 0 and ids is None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    drawn = draw(logits, uniforms)
    return drawn if ids is None else ids.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
