"""Cross-attention from the residual stream to slots from outside the text."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.nn.dropout import Dropout
from hrs.nn.products import Linear


class CrossAttention(nn.Module):
    """Every token reads a few slots: gate * Wo attention(LN(x), LN(slots)), without positions.

    Where all slots are zero there are none, and the output is exactly 0. Of ``retrieved`` memories every single zero
    slot is absent: it takes no share of the attention. The output is also 0 at the start of training, because Wo
    starts at 0 while the gate starts at 1: Wo learns from the first step on, the gate and the other matrices as soon as
    Wo has moved (ReZero, Bachlechner et al. 2021, with the zero in the matrix).

    With ``engram.as_original`` the slots are not normalised, the gate is sigmoid(0) = 0.5 at the start, and Wo keeps
    the N(0, 0.02) of the model's general initialisation: a random vector is added to every token from the first
    update of the slots on.

    Args:
        config: the model's; gives width, heads and dropout (on attention weights and on the output).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, self.n_heads = config.d_model, config.n_heads
        self.as_original = config.engram.as_original
        self.by_slot = config.engram.kind == "retrieved"
        self.norm = nn.LayerNorm(d)
        self.slot_norm = None if self.as_original else nn.LayerNorm(d)
        self.query = Linear(d, d, bias=False)
        self.key = Linear(d, d, bias=False)
        self.value = Linear(d, d, bias=False)
        self.output = Linear(d, d, bias=False)
        self.gate = nn.Parameter(torch.tensor(0.0 if self.as_original else 1.0))
        self.dropout = Dropout(config.dropout)

    @torch.no_grad()
    def initialise(self) -> None:
        """Start as no change at all. Runs after the model's general initialisation, which would undo it."""
        if not self.as_original:
            nn.init.zeros_(self.output.weight)

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        """What tokens [B, n, d] read of ``slots``: [B, n, d], to be added to the residual stream.

        Args:
            slots: [S, d] for all sequences, or [B, S, d] for each its own.
        """
        slots = slots if slots.ndim == 3 else slots[None]  # [B or 1, S, d]
        memory = slots if self.slot_norm is None else self.slot_norm(slots)
        q = self._heads(self.query(self.norm(x)))  # [B, H, n, d_head]
        k = self._heads(self.key(memory)).expand(len(x), -1, -1, -1)  # [B, H, S, d_head]
        v = self._heads(self.value(memory)).expand(len(x), -1, -1, -1)
        present = slots.any(-1)  # [B or 1, S]
        some = present.any(-1)[:, None, None]  # [B or 1, 1, 1]
        mask = None
        if self.by_slot:
            # A row without any slot reads all of them, for a softmax over nothing is not a number, and forgets it.
            # One row for all queries: kernels that turn it into numbers write [B, S] of them, not [B, n, S].
            mask = present[:, None, None] | ~some[..., None]  # [B or 1, 1, 1, S]
        p = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        output = self.dropout(self.output(attended.transpose(1, 2).flatten(2)))
        gate = self.gate.sigmoid() if self.as_original else self.gate
        return gate * some * output

    def _heads(self, projected: Tensor) -> Tensor:
        """[B, T, d] to [B, H, T, d_head]."""
        return projected.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
