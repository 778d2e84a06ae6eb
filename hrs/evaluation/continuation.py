"""What a text costs a model after a given context: the context is read and never scored.

A mean over context and continuation together falls whenever the context is easy, or repeats the continuation, so it
says nothing of what the context is worth. Here only the continuation counts, and the same continuation is scored after
no context, one context or another.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hrs.errors import HRSError
from hrs.evaluation.perplexity import target_losses
from hrs.models.base import LanguageModel, WindowContext


def context_room(model: LanguageModel, n_continuation: int) -> int:
    """Tokens of context that the model reads in front of a continuation of so many tokens.

    The last token of a continuation is predicted and never read, so ``max_seq_len`` holds one more than it seems.

    Raises:
        HRSError: if not one token is left, without which the first token of the continuation has no prediction.
    """
    room = model.max_seq_len + 1 - n_continuation
    if room < 1:
        raise HRSError(
            f"a continuation of {n_continuation} tokens leaves no room for a context: "
            f"this model scores at most {model.max_seq_len}"
        )
    return room


@torch.no_grad()
def continuation_nats(model: LanguageModel, context: Sequence[int], continuation: Sequence[int]) -> NDArray[np.float64]:
    """Loss [n] in nats of each of the n tokens of ``continuation`` after ``context``, in evaluation mode.

    Of a context that is too long the last :func:`context_room` tokens are read, and the continuation is never cut. A
    model that can use what stands before its window gets the tokens in front of those.

    Raises:
        HRSError: if either is empty, or the continuation too long. "No context" is one end-of-text token.
    """
    if not len(context) or not len(continuation):
        raise HRSError("a continuation is scored after one token at least: give end of text for no context")
    room = context_room(model, len(continuation))
    device = next(model.parameters()).device
    ids = torch.tensor([[*context[-room:], *continuation]], device=device)  # [1, T + 1]
    before = list(context[:-room])[-model.history_tokens :] if model.history_tokens else []
    known = None
    if before:
        history = [-1] * (model.history_tokens - len(before)) + before
        known = WindowContext(torch.tensor([history], device=device))
    was_training = model.training
    model.eval()
    try:
        hidden = model.encode(ids[:, :-1], known).hidden[:, -len(continuation) :]  # [1, n, k]
        return target_losses(model, hidden, ids[:, -len(continuation) :])[0]
    finally:
        model.train(was_training)


def bits_per_byte(nats: NDArray[np.float64], n_bytes: int) -> float:
    """The losses of a continuation as bits per byte of its text.

    Raises:
        HRSError: if it has no bytes.
    """
    if n_bytes < 1:
        raise HRSError("a continuation without text has no bits per byte: leave it out")
    return float(nats.sum()) / (math.log(2) * n_bytes)
