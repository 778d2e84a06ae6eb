"""Slots that each window is given from outside: engrams of other documents, found while the model trains and reads."""

import torch
from torch import Tensor

from hrs.nn.engrams.base import EngramMechanism, EngramState


class RetrievedEngrams(EngramMechanism):
    """``retrieved``: blocks read the slots [B, S, d] of :attr:`hrs.models.base.WindowContext.memory`.

    They were found with text in front of the window (RETRO, Borgeaud et al. 2022) and are constants of a pass, the same
    at all of its positions, so nothing of a window can reach its own predictions through them. Without memory the model
    is exactly the one without cross-attention; ``dropout`` trains it for that, and is drawn for every window, so that
    one batch holds both.

    The module has neither weights nor state: those are in :class:`hrs.nn.cross_attention.CrossAttention`.
    """

    def offer(self, memory: Tensor, state: EngramState) -> None:
        if self.training and self.config.dropout > 0:
            kept = torch.rand(len(memory), 1, 1, device=memory.device) >= self.config.dropout
            memory = memory * kept
        state.inputs.slots = memory
