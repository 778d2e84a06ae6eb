"""What a model is given of a text when it is measured: windows of tokens, and what stands before them."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrs.data.store import TokenSplit
from hrs.data.windows import history
from hrs.models.base import LanguageModel, WindowContext


def read_windows(
    model: LanguageModel, text: TokenSplit, starts: NDArray[np.int64], length: int
) -> tuple[Tensor, WindowContext | None]:
    """Ids [B, length + 1] of the windows that begin at ``starts`` [B], on the model's device, and their context.

    The context holds as much history as the model can use, and never a topic; it is None for models without history.
    """
    device = next(model.parameters()).device
    ids = torch.from_numpy(text.tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)).to(device)
    if not model.history_tokens:
        return ids, None
    return ids, WindowContext(torch.from_numpy(history(text, starts, model.history_tokens)).to(device))
