"""One pre-norm transformer block: attention, then an MLP or routed tiers."""

from dataclasses import dataclass

from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.nn.attention import Attention
from hrs.nn.cache import KeyValueCache
from hrs.nn.feedforward import FeedForward
from hrs.nn.tiers import RoutedTiers, TiersCache


@dataclass(slots=True)
class BlockCache:
    """What one block remembers while decoding."""

    attention: KeyValueCache
    tiers: TiersCache | None


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    Args:
        config: the model's.
        n_positions: positions 0 .. n_positions - 1 may occur.
        n_memory: vectors besides the tokens that the attention may be given.
    """

    def __init__(self, config: ModelConfig, *, n_positions: int, n_memory: int) -> None:
        super().__init__()
        d, dropout = config.d_model, config.dropout
        self.attention_norm = nn.LayerNorm(d)
        self.attention = Attention(
            d,
            config.n_heads,
            dropout=dropout,
            n_positions=n_positions,
            rope_base=config.rope_base,
            n_extra_keys=n_memory,
        )
        self.feed_forward_norm = nn.LayerNorm(d)
        self.feed_forward: FeedForward | RoutedTiers
        if config.feed_forward == "tiers":
            self.feed_forward = RoutedTiers(config, n_positions)
        else:
            self.feed_forward = FeedForward(d, config.d_ff, dropout=dropout)

    def new_cache(self) -> BlockCache:
        tiers = self.feed_forward.new_cache() if isinstance(self.feed_forward, RoutedTiers) else None
        return BlockCache(self.attention.new_cache(), tiers)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        memory: Tensor | None = None,
        memory_positions: Tensor | None = None,
        cache: BlockCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream [B, n, d] after this block and, if it routes, the weights [B, n, n_tiers].

        ``memory`` [B, E, d] are vectors at ``memory_positions`` [E] that the attention reads besides the tokens.
        """
        if memory is not None:
            memory = self.attention_norm(memory)
        attention_cache = None if cache is None else cache.attention
        x = x + self.attention(self.attention_norm(x), positions, attention_cache, memory, memory_positions)
        normalised = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, RoutedTiers):
            return self.feed_forward(x, normalised, positions, None if cache is None else cache.tiers)
        return x + self.feed_forward(normalised), None
