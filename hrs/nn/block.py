"""One pre-norm transformer block: attention or a convolution, then one or more feed-forward branches."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.nn.attention import Attention
from hrs.nn.cache import CachePart, KeyValueCache, KeyValueSlots, SlotPart, SlotTable, TailCache, TailSlots
from hrs.nn.conv_mixer import ConvMixer
from hrs.nn.cross_attention import CrossAttention
from hrs.nn.engrams import BlockInputs
from hrs.nn.engrams.synapse import Synapse
from hrs.nn.feedforward import FeedForward
from hrs.nn.peer import Peer
from hrs.nn.tiers import RoutedTiers, TiersCache, TiersSlots


@dataclass(slots=True)
class BlockCache:
    """What one block remembers while decoding."""

    attention: KeyValueCache | None
    conv: TailCache | None
    tiers: TiersCache | None

    def parts(self) -> list[CachePart]:
        """All of it that remembers something, always in one order."""
        own: list[CachePart] = [part for part in (self.attention, self.conv) if part is not None]
        return own if self.tiers is None else own + self.tiers.parts()

    def slots(self, table: SlotTable) -> "BlockSlots":
        """The same for sequences of unequal length."""
        return BlockSlots(
            table=table,
            attention=None if self.attention is None else self.attention.slots(table),
            conv=None if self.conv is None else self.conv.slots(table),
            tiers=None if self.tiers is None else self.tiers.slots(table),
        )


@dataclass(slots=True)
class BlockSlots:
    """What one block remembers of sequences of unequal length."""

    table: SlotTable
    attention: KeyValueSlots | None
    conv: TailSlots | None
    tiers: TiersSlots | None

    def parts(self) -> list[SlotPart]:
        """All of it that remembers something, in the order of :meth:`BlockCache.parts`."""
        own: list[SlotPart] = [part for part in (self.attention, self.conv) if part is not None]
        return own if self.tiers is None else own + self.tiers.parts()


@dataclass(slots=True)
class BlockStatistics:
    """What a block tells about one pass."""

    routing: Tensor | None = None
    """[B, n, n_tiers], weights of the tiers."""
    expert_usage: Tensor | None = None
    """[n_experts], weight that each product-key expert got; eval mode only."""


class Block(nn.Module):
    """x + mix(norm(x)), then for every branch in ``feed_forward`` x + branch(norm(x)).

    With ``memory`` engrams every second block reads their slots in between.
    ``tiers`` and ``mlp`` share a norm, as in the original; ``peer`` has its own, and a scalar gate.

    Args:
        config: the model's.
        index: which block, from 0.
        n_positions: positions 0 .. n_positions - 1 may occur.
        n_memory: vectors besides the tokens that the attention may be given.
    """

    def __init__(self, config: ModelConfig, index: int, *, n_positions: int, n_memory: int) -> None:
        super().__init__()
        d, dropout = config.d_model, config.dropout
        self.order = config.feed_forward
        self.attention_norm = nn.LayerNorm(d)
        is_conv = index >= config.n_layers - config.conv_blocks
        self.attention = None if is_conv else Attention(config, n_positions=n_positions, n_extra_keys=n_memory)
        self.synapse = self._build_synapse(config, index)
        # Every second block reads slots.
        reads_slots = config.engram.kind in ("memory", "retrieved") and index % 2
        self.cross = CrossAttention(config) if reads_slots else None
        self.conv = ConvMixer(d, config.tiers.conv_kernel, dropout=dropout) if is_conv else None
        has_peer = "peer" in self.order
        self.feed_forward_norm = nn.LayerNorm(d) if self.order != ("peer",) or config.peer.idle_norm else None
        self.tiers = RoutedTiers(config, n_positions) if config.routed else None
        self.mlp = FeedForward(d, config.d_ff, dropout=dropout) if "mlp" in self.order else None
        self.peer = Peer(config.peer, d, dropout=dropout) if has_peer else None
        self.peer_norm = nn.LayerNorm(d) if has_peer else None
        self.peer_gate = nn.Parameter(torch.tensor(0.1)) if has_peer and config.peer.gated else None

    @staticmethod
    def _build_synapse(config: ModelConfig, index: int) -> Synapse | None:
        """The original has one in every block, though only those that see engrams use it."""
        engram = config.engram
        reads = engram.kind == "prefix" or index > engram.extraction_block(config.n_layers)
        return Synapse(config.d_model, config.n_heads, engram.synapse_hidden) if engram.synapse and reads else None

    def new_cache(self, memory_positions: Tensor | None = None) -> BlockCache:
        """Return an empty cache; ``memory_positions`` [E]: from where on vectors that are no tokens are visible."""
        return BlockCache(
            attention=None if self.attention is None else self.attention.new_cache(memory_positions),
            conv=None if self.conv is None else self.conv.new_cache(),
            tiers=None if self.tiers is None else self.tiers.new_cache(),
        )

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        inputs: BlockInputs | None = None,
        cache: BlockCache | BlockSlots | None = None,
    ) -> tuple[Tensor, BlockStatistics]:
        """The residual stream [B, n, d] at ``positions`` [n] after this block, and what it tells.

        With slots for a cache n is 1, and positions [B, 1] differ between rows.
        """
        inputs = inputs or BlockInputs()
        if isinstance(cache, BlockSlots):
            x = self._mix_step(x, inputs, cache)
        else:
            x = x + self._mix(x, positions, inputs, cache)
        if self.cross is not None and inputs.slots is not None:
            x = x + self.cross(x, inputs.slots)
        statistics = BlockStatistics()
        for name in self.order:
            if name == "peer" and self.peer is not None and self.peer_norm is not None:
                output, statistics.expert_usage = self.peer(self.peer_norm(x))
                x = x + (output if self.peer_gate is None else self.peer_gate * output)
                continue
            assert self.feed_forward_norm is not None
            normalised = self.feed_forward_norm(x)
            if name == "tiers" and self.tiers is not None:
                memory = None if cache is None else cache.tiers
                x, statistics.routing, usage = self.tiers(x, normalised, positions, memory)
                statistics.expert_usage = usage if statistics.expert_usage is None else statistics.expert_usage
            elif self.mlp is not None and isinstance(cache, BlockSlots):
                hidden = F.gelu(F.linear(normalised, cache.table.matrix(self.mlp.hidden.weight)))
                x = add_product(x, hidden, cache.table.matrix(self.mlp.output.weight))
            elif self.mlp is not None:
                x = x + self.mlp(normalised)
        return x, statistics

    def _mix(self, x: Tensor, positions: Tensor, inputs: BlockInputs, cache: BlockCache | None) -> Tensor:
        normalised = self.attention_norm(x)
        if self.conv is not None:
            return self.conv(normalised, None if cache is None else cache.conv)
        assert self.attention is not None
        memory = inputs.memory
        if memory is not None:
            memory = self.attention_norm(memory)
            if inputs.memory_gate is not None:
                memory = memory * inputs.memory_gate.unsqueeze(-1)
        query_scale = None
        if self.synapse is not None and inputs.synapse_means is not None and inputs.synapse_index is not None:
            query_scale = self.synapse(inputs.synapse_means)[:, inputs.synapse_index].mT  # [B, H, n]
        attention_cache = None if cache is None else cache.attention
        return self.attention(normalised, positions, attention_cache, memory, inputs.memory_positions, query_scale)

    def _mix_step(self, x: Tensor, inputs: BlockInputs, slots: BlockSlots) -> Tensor:
        """The residual stream [n, 1, d] after the mixing of tokens, of one new token for each slot."""
        normalised = self.attention_norm(x)
        if self.conv is not None:
            return x + self.conv(normalised, slots.conv)
        assert self.attention is not None and slots.attention is not None
        memory, query_scale = inputs.slot_memory, None
        if memory is not None:
            vectors = self.attention_norm(memory.vectors)
            if inputs.memory_gate is not None:
                vectors = vectors * inputs.memory_gate.unsqueeze(-1)
            memory = replace(memory, vectors=vectors)
        if self.synapse is not None and inputs.synapse_means is not None and inputs.synapse_index is not None:
            factors = self.synapse(inputs.synapse_means)  # [n, 2, H]
            query_scale = factors.take_along_dim(inputs.synapse_index[:, :, None], dim=1).mT  # [n, H, 1]
        attended = self.attention.step(normalised, slots.attention, memory, query_scale)
        return add_product(x, attended, slots.table.matrix(self.attention.output.weight))


def add_product(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``residual`` [n, 1, d] + x [n, 1, k] times ``weight`` [d, k], in one kernel where no type changes."""
    if torch.is_autocast_enabled(residual.device.type):
        return residual + F.linear(x, weight)  # the sum itself would run in half precision
    return torch.addmm(residual.squeeze(1), x.squeeze(1), weight.t()).unsqueeze(1)
