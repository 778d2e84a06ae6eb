"""Causal multi-head self-attention with rotary positions and optional extra keys; one path to train and to decode."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.nn.cache import KeyValueCache


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021), half-split: dimension i turns together with i + d_head / 2."""

    cos: Tensor
    sin: Tensor

    def __init__(self, d_head: int, n_positions: int, base: float) -> None:
        super().__init__()
        frequencies = base ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
        angles = torch.outer(torch.arange(n_positions, dtype=torch.float64), frequencies)  # [n_positions, d_head / 2]
        # Not in checkpoints: they follow from the config.
        self.register_buffer("cos", angles.cos().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", angles.sin().to(torch.get_default_dtype()), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn vectors [..., n, d_head] by the angles of ``positions`` [n]."""
        cos, sin = self.cos[positions].to(x.dtype), self.sin[positions].to(x.dtype)  # [n, d_head / 2]
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Multi-head attention in which a key is visible from its own position on.

    Args:
        d_model: width, a multiple of ``2 * n_heads``.
        n_heads: heads.
        dropout: on attention weights and on the output.
        n_positions: positions 0 .. n_positions - 1 may occur.
        rope_base: base of the rotary frequencies.
        n_extra_keys: room in the cache for keys that are not tokens.
    """

    def __init__(
        self, d_model: int, n_heads: int, *, dropout: float, n_positions: int, rope_base: float, n_extra_keys: int = 0
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.d_head = d_model // n_heads
        self.n_keys = n_positions + n_extra_keys
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.rotary = RotaryEmbedding(self.d_head, n_positions, rope_base)
        self.dropout = nn.Dropout(dropout)

    def new_cache(self) -> KeyValueCache:
        """An empty cache for as many keys as there can be."""
        return KeyValueCache(self.n_keys)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: KeyValueCache | None = None,
        memory: Tensor | None = None,
        memory_positions: Tensor | None = None,
    ) -> Tensor:
        """Attend from tokens to all visible keys.

        Args:
            x: normalised tokens [B, n, d].
            positions: their positions [n], consecutive.
            cache: keys and values of earlier tokens; those of ``x`` and ``memory`` are added.
            memory: normalised vectors [B, E, d] that become keys and values but ask nothing themselves.
            memory_positions: the position [E] of each, for rotation and visibility alike.

        Returns:
            [B, n, d], to be added to the residual stream.
        """
        qkv = self._heads(self.qkv(x), 3)
        q, k = self.rotary(qkv[:2], positions).unbind(0)  # [B, H, n, d_head]
        v = qkv[2]
        key_positions = positions
        if memory is not None and memory_positions is not None:
            memory_k, memory_v = self._heads(F.linear(memory, self.qkv.weight[self.qkv.in_features :]), 2).unbind(0)
            k = torch.cat((self.rotary(memory_k, memory_positions), k), dim=2)  # [B, H, E + n, d_head]
            v = torch.cat((memory_v, v), dim=2)
            key_positions = torch.cat((memory_positions, positions))
        if cache is not None:
            k, v, key_positions = cache.append(k, v, key_positions)
        visible = None
        is_causal = k.shape[2] == q.shape[2]  # the tokens themselves are the only keys
        if not is_causal and (cache is None or q.shape[2] > 1):  # a single newest token sees the whole cache
            visible = positions[:, None] >= key_positions[None, :]  # [n, S]
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=is_causal, dropout_p=self.dropout.p if self.training else 0.0
        )
        return self.dropout(self.output(attended.transpose(1, 2).flatten(2)))

    def _heads(self, projected: Tensor, n: int) -> Tensor:
        """[B, T, n * d] to [n, B, H, T, d_head]."""
        return projected.unflatten(-1, (n, self.n_heads, self.d_head)).permute(2, 0, 3, 1, 4)
