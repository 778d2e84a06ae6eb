"""What a model is given of a text when it is measured: windows of tokens, what stands before them, and memories."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrs.data.store import TokenSplit
from hrs.data.windows import history
from hrs.models.base import LanguageModel, WindowContext


def read_windows(
    model: LanguageModel,
    text: TokenSplit,
    starts: NDArray[np.int64],
    length: int,
    memory: NDArray[np.float32] | None = None,
) -> tuple[Tensor, WindowContext | None]:
    """Ids [B, length + 1] of the windows that begin at ``starts`` [B], on the model's device, and their context.

    The context holds as much history as the model can use, the ``memory`` [B, S, d] that is given, and never a topic;
    it is None for models without history that are given no memory.
    """
    device = next(model.parameters()).device
    ids = torch.from_numpy(text.tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)).to(device)
    if not model.history_tokens and memory is None:
        return ids, None
    before = torch.from_numpy(history(text, starts, model.history_tokens)) if model.history_tokens else None
    context = WindowContext(history=before, memory=None if memory is None else torch.from_numpy(memory))
    return ids, context.to(device)
