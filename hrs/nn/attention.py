"""Causal multi-head self-attention: any kernel, any positions, optional extra keys; one path to train and to decode."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.nn.cache import KeyValueCache, KeyValueSlots, SlotTable
from hrs.nn.cpu_attention import project_and_attend
from hrs.nn.dropout import Dropout
from hrs.nn.eager import on_eager_cpu
from hrs.nn.kernels import Dot, ProductKernel, attend_by_scores, build_kernel, coarse_and_rest
from hrs.nn.products import Linear

_ALIGNMENT = 8
"""Widths that fused attention kernels take, in elements."""


@dataclass(slots=True)
class SlotMemory:
    """Vectors that a step of slots adds as keys and values: M rows get E vectors each."""

    vectors: Tensor
    """[M, E, d]"""
    rows: Tensor
    """[M] int64, the slots that get them, at the positions of their present tokens."""
    places: Tensor
    """[M, E] int64, where in the slots' room for keys that are no tokens'."""


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
        """Turn vectors [..., n, d_head] by the angles of ``positions`` [n], or [..., B, H, n, d_head] by those of
        ``positions`` [B, n]."""
        cos, sin = self.cos[positions].to(x.dtype), self.sin[positions].to(x.dtype)  # [n, d_head / 2]
        if positions.ndim > 1:
            cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # [B, 1, n, d_head / 2]
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def matrices(self, dtype: torch.dtype) -> Tensor:
        """[n_positions, 3, d_head, d_head]: x @ m turns a query (0) and a key (1) and leaves a value (2) as it is.

        One product then does what takes several passes over all three, which counts where each is a single token.
        """
        n, half = self.cos.shape
        turned = self.cos.new_zeros(n, 2 * half, 2 * half)
        turned.diagonal(dim1=1, dim2=2).copy_(self.cos.repeat(1, 2))
        turned[:, :half, half:].diagonal(dim1=1, dim2=2).copy_(self.sin)
        turned[:, half:, :half].diagonal(dim1=1, dim2=2).copy_(-self.sin)
        unturned = torch.eye(2 * half, dtype=turned.dtype, device=turned.device).expand_as(turned)
        return torch.stack((turned, turned, unturned), dim=1).to(dtype)

    def turns(self, positions: Tensor) -> Tensor:
        """Return the same rotation as factors [n, d_head / 2] of complex numbers x_i + i x_(i + d_head / 2)."""
        return torch.complex(self.cos[positions], self.sin[positions])


def alibi_slopes(n_heads: int) -> Tensor:
    """[H], 2^(-8 h / H) for h from 0: how fast each head forgets. Press et al. (2022) start at h = 1, HRS at 0."""
    return 2.0 ** (-8 * torch.arange(n_heads, dtype=torch.float64) / n_heads)


class Attention(nn.Module):
    """Multi-head attention in which a key is visible from its own position on.

    ``attention.positions`` of the config decides what is done here: ``rotary`` turns queries and keys, ``alibi`` takes
    slope * distance off the score, ``learned`` leaves positions to the model's embeddings.

    A product kernel (see :mod:`hrs.nn.kernels`) runs fused, and so does ALiBi with it: -slope * (t - s) is slope * s up
    to what all keys of a query share, hence one more coordinate of the key. The cache holds finished features.

    Args:
        config: the model's; gives width, heads, dropout (on attention weights and on the output) and positions.
        n_positions: positions 0 .. n_positions - 1 may occur.
        n_extra_keys: room in the cache for keys that are not tokens.
    """

    fused: bool
    """Whether it runs fused. May be set to False to take a product kernel through the whole matrix of scores."""
    slopes: Tensor

    def __init__(self, config: ModelConfig, *, n_positions: int, n_extra_keys: int = 0) -> None:
        super().__init__()
        d_model, self.n_heads = config.d_model, config.n_heads
        self.d_head = d_model // self.n_heads
        self.n_keys = n_positions + n_extra_keys
        self.qkv = Linear(d_model, 3 * d_model, bias=False)
        self.output = Linear(d_model, d_model, bias=False)
        positions = config.attention.positions
        self.rotary = RotaryEmbedding(self.d_head, n_positions, config.rope_base) if positions == "rotary" else None
        self.alibi = positions == "alibi"
        if self.alibi:
            self.register_buffer("slopes", alibi_slopes(self.n_heads).to(torch.get_default_dtype()), persistent=False)
        self.kernel = build_kernel(config)
        self.fused = isinstance(self.kernel, ProductKernel)
        self.scale = self.kernel.scale if isinstance(self.kernel, ProductKernel) else 1.0
        self.dropout = Dropout(config.dropout)

    def new_cache(self, memory_positions: Tensor | None = None) -> KeyValueCache:
        """Return an empty cache for as many keys as there can be; ``memory_positions``: see :class:`KeyValueCache`."""
        return KeyValueCache(self.n_keys, memory_positions)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: KeyValueCache | None = None,
        memory: Tensor | None = None,
        memory_positions: Tensor | None = None,
        query_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend from tokens to all visible keys.

        Args:
            x: normalised tokens [B, n, d].
            positions: their positions [n], consecutive.
            cache: keys and values of earlier tokens; those of ``x`` and ``memory`` are added.
            memory: normalised vectors [B, E, d] that become keys and values but ask nothing themselves.
            memory_positions: the position [E] of each, for rotation, distance and visibility alike.
            query_scale: factor [B, H, n] of each query's scores, before ALiBi: an inverse temperature.

        Returns:
            [B, n, d], to be added to the residual stream.
        """
        dropout = self.dropout.p if self.training else 0.0
        alone = cache is None and memory is None and query_scale is None
        if alone and self._has_fast_training(x):
            turns = None if self.rotary is None else self.rotary.turns(positions)
            attended = project_and_attend(
                x, self.qkv.weight, turns, n_heads=self.n_heads, scale=self.scale, dropout=dropout
            )
            return self.dropout(self.output(attended))
        pair, v = self._heads(self.qkv(x), 3).split((2, 1))
        q, k = self._turned(pair, positions).unbind(0)  # [B, H, n, d_head]
        v = v.squeeze(0)
        key_positions = positions
        if memory is not None and memory_positions is not None:
            memory_k, memory_v = self._heads(F.linear(memory, self.qkv.weight[self.qkv.in_features :]), 2).unbind(0)
            k = torch.cat((self._turned(memory_k, memory_positions), k), dim=2)  # [B, H, E + n, d_head]
            v = torch.cat((memory_v, v), dim=2)
            key_positions = torch.cat((memory_positions, positions))
        if self.fused:
            q, k, v = self._features(q, k, v, key_positions, query_scale)
        if cache is not None:
            n_memory = 0 if memory_positions is None else len(memory_positions)
            k, v, key_positions = cache.append(k, v, key_positions, n_memory)
        if self.fused:
            visible = None
            is_causal = k.shape[2] == q.shape[2]  # the tokens themselves are the only keys
            if not is_causal and (cache is None or q.shape[2] > 1):  # a single newest token sees the whole cache
                visible = positions[:, None] >= key_positions[None, :]  # [n, S]
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=is_causal, dropout_p=dropout, scale=self.scale
            )[..., : self.d_head]
        else:
            distance = positions[:, None] - key_positions  # [n, S]
            bias = -self.slopes[:, None, None] * distance if self.alibi else None
            attended = attend_by_scores(
                self.kernel, q, k, v, distance >= 0, bias=bias, query_scale=query_scale, dropout=dropout
            )
        return self.dropout(self.output(attended.transpose(1, 2).flatten(2)))

    # ---- decoding: one token for each slot -----------------------------------------------------------------------

    def step(
        self, x: Tensor, slots: KeyValueSlots, memory: "SlotMemory | None" = None, query_scale: Tensor | None = None
    ) -> Tensor:
        """Attend from one new token of each slot to all keys that it sees.

        Args:
            x: normalised tokens [n, 1, d] at the positions of the slots' table.
            slots: keys and values of earlier tokens; those of ``x`` and ``memory`` are added.
            memory: normalised vectors that become keys and values of some slots.
            query_scale: factor [n, H, 1] of each query's scores.

        Returns:
            [n, 1, d], before the output projection.
        """
        table = slots.table
        parts = F.linear(x, table.matrix(self.qkv.weight)).view(len(x), 3, self.n_heads, self.d_head)
        if self.rotary is not None:
            turns = self.turns(table, parts.dtype)
            parts = torch.bmm(parts.flatten(0, 1), turns.flatten(0, 1)).view_as(parts)
        if memory is not None:
            self._write_memory(memory, slots)
        q, pairs = parts[:, 0].unsqueeze(2), parts[:, 1:]  # [n, H, 1, d_head], [n, 2, H, d_head]
        if not self.plain or query_scale is not None:
            q, pairs = self._step_features(q, pairs, table.positions, query_scale)
        slots.write(pairs)
        k, v = slots.filled()
        if self.fused:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=slots.mask(q.dtype), scale=self.scale)
            return attended[..., : self.d_head].flatten(1).unsqueeze(1)
        bias = None
        if self.alibi:
            distance = table.positions - slots.positions()  # [n, S]
            bias = -self.slopes[:, None, None] * distance[:, None, None]
        attended = attend_by_scores(self.kernel, q, k, v, slots.visible(), bias=bias, query_scale=query_scale)
        return attended.flatten(1).unsqueeze(1)

    @property
    def plain(self) -> bool:
        """True if keys and queries are their own features."""
        return self.fused and isinstance(self.kernel, Dot) and not self.alibi

    def turns(self, table: SlotTable, dtype: torch.dtype) -> Tensor:
        """[n, 3, d_head, d_head], what turns query, key and value of each row of a step."""
        rotary = self.rotary
        assert rotary is not None
        key = ("turns", rotary.cos.shape, dtype)  # the same in all layers
        every = table.constant(key, lambda: rotary.matrices(dtype))
        return table.in_step(key, lambda: every.index_select(0, table.places))

    def _step_features(
        self, q: Tensor, pairs: Tensor, positions: Tensor, query_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Features of queries [n, H, 1, F] and of keys and values [n, 2, H, F]; unchanged for kernels without."""
        if not self.fused:
            return q, pairs
        k, v = pairs.unsqueeze(3).unbind(1)
        q, k, v = self._features(q, k, v, positions, query_scale)
        return q, torch.stack((k, v), dim=1).squeeze(3)

    def _write_memory(self, memory: "SlotMemory", slots: KeyValueSlots) -> None:
        """Add the keys and values of vectors that are no tokens, at the positions of their slots' present tokens."""
        m, n_vectors = memory.vectors.shape[:2]
        weight = self.qkv.weight[self.qkv.in_features :]
        pairs = F.linear(memory.vectors, weight).view(m, n_vectors, 2, self.n_heads, self.d_head)
        if self.rotary is not None:
            turns = self.turns(slots.table, pairs.dtype)[memory.rows, 1:]  # [m, 2, d_head, d_head]
            pairs = torch.einsum("mepha,mpab->mephb", pairs, turns)
        pairs = pairs.flatten(0, 1)  # [m E, 2, H, d_head]
        if not self.plain:
            positions = slots.table.positions[memory.rows].repeat_interleave(n_vectors, dim=0)  # [m E, 1]
            _, pairs = self._step_features(pairs[:, :1].transpose(1, 2), pairs, positions, None)
        rows = memory.rows.repeat_interleave(n_vectors)
        slots.write_memory(pairs, rows, memory.places.flatten())

    def _has_fast_training(self, x: Tensor) -> bool:
        """Return True if :mod:`hrs.nn.cpu_attention` computes a training pass over ``x`` alone."""
        return (
            self.training
            and self.plain
            and self.dropout.p < 1
            and on_eager_cpu(x)
            and x.dtype in (torch.float32, torch.float64)
            and x.dtype == self.qkv.weight.dtype
            and not torch.is_autocast_enabled("cpu")
        )

    def _features(
        self, q: Tensor, k: Tensor, v: Tensor, key_positions: Tensor, query_scale: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What fused attention gets: [B, H, n or S, F], all three of one width."""
        assert isinstance(self.kernel, ProductKernel)
        q, k = self.kernel.queries(q), self.kernel.keys(k)
        if query_scale is not None:
            q = q * query_scale.unsqueeze(-1)
        if self.alibi:
            # Two coordinates, because bfloat16 counts only to 256.
            places = key_positions.to(torch.promote_types(k.dtype, torch.float32))
            places = coarse_and_rest(places).to(k.dtype)  # [S, 2]
            if places.ndim > 2:
                places = places.unsqueeze(1)  # [B, 1, S, 2]
            slopes = (self.slopes / self.scale).to(q.dtype)[:, None, None]
            q = torch.cat((q, slopes.expand(*q.shape[:-1], 2)), dim=-1)
            k = torch.cat((k, places.expand(*k.shape[:-1], 2)), dim=-1)
        if k.shape[-1] != self.d_head:
            # Fused kernels refuse unequal widths, and zeros add nothing to a product.
            too_wide = k.shape[-1] > self.d_head
            width = -(-k.shape[-1] // _ALIGNMENT) * _ALIGNMENT if too_wide else self.d_head
            q, k, v = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
        return q, k, v

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.rotary is None else self.rotary(x, positions)

    def _heads(self, projected: Tensor, n: int) -> Tensor:
        """[B, T, n * d] to [n, B, H, T, d_head]."""
        return projected.unflatten(-1, (n, self.n_heads, self.d_head)).permute(2, 0, 3, 1, 4)
