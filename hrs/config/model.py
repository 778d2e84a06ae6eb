"""Shape and composition of a language model."""

from dataclasses import dataclass, field
from typing import Literal

from hrs.config.checks import require_at_least, require_finite, require_within
from hrs.config.components import (
    AttentionConfig,
    CategoryConfig,
    EngramConfig,
    LocalityConfig,
    PeerConfig,
    RouterConfig,
    TestTimeMemoryConfig,
    TierConfig,
)
from hrs.config.manifold import ManifoldConfig
from hrs.errors import HRSError, shown

FEED_FORWARDS = ("mlp", "tiers", "peer")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape and composition of one language model."""

    PLACE = "model."

    family: Literal["hrs", "manifold"] = "hrs"
    """``hrs``: a transformer of blocks, all fields but ``manifold``. ``manifold``: hops over a frozen geometry of
    tokens; it reads the sizes (vocab_size, n_layers, n_heads, d_model, max_seq_len, dropout, rope_base) and
    ``manifold``."""
    vocab_size: int = 50257
    """Token ids. Set from the tokenizer when an experiment is composed."""
    n_layers: int = 4
    """Blocks."""
    n_heads: int = 8
    """Attention heads per block."""
    d_model: int = 512
    """Width of the residual stream."""
    d_ff: int = 2048
    """Hidden width of the MLP."""
    max_seq_len: int = 512
    """Tokens per training window, and the longest context."""
    dropout: float = 0.1
    """On embeddings, attention weights, and every residual branch."""
    rope_base: float = 10000.0
    """Base of the rotary position frequencies (Su et al. 2021)."""
    feed_forward: tuple[str, ...] = ("mlp",)
    """What follows attention in every block, one after another: ``mlp`` (GELU), ``tiers`` (routed), ``peer``."""
    conv_blocks: int = 0
    """The last blocks, in which a causal convolution takes the place of attention."""
    loss_scales: Literal["fixed", "learned", "original"] = "fixed"
    """Weights of the auxiliary losses. ``learned``: by uncertainty (Kendall et al. 2018). ``original``: a learned
    factor with a constant pull, which drifts whatever the data."""
    placeholder_losses: bool = False
    """Three losses that mean nothing, in the place of hub, entropy and recon: the control of their weights."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    tiers: TierConfig = field(default_factory=TierConfig)
    peer: PeerConfig = field(default_factory=PeerConfig)
    engram: EngramConfig = field(default_factory=EngramConfig)
    locality: LocalityConfig = field(default_factory=LocalityConfig)
    category: CategoryConfig = field(default_factory=CategoryConfig)
    test_time_memory: TestTimeMemoryConfig = field(default_factory=TestTimeMemoryConfig)
    manifold: ManifoldConfig = field(default_factory=ManifoldConfig)

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, vocab_size=2, n_layers=1, n_heads=1, d_model=2, d_ff=1, max_seq_len=2)
        require_within(self, n_layers=(1, 1000), d_model=(2, 2**20), dropout=(0.0, 0.999), rope_base=(1.0, 1e12))
        require_at_least(self, conv_blocks=0)
        if self.d_model % (2 * self.n_heads):
            raise HRSError(f"d_model {self.d_model} must be a multiple of 2 * n_heads = {2 * self.n_heads}")
        unknown = [part for part in self.feed_forward if part not in FEED_FORWARDS]
        if unknown or not self.feed_forward or len(set(self.feed_forward)) != len(self.feed_forward):
            raise HRSError(
                f"feed_forward must be distinct names out of {', '.join(FEED_FORWARDS)}, got {shown(self.feed_forward)}"
            )
        if not 0 <= self.conv_blocks <= self.n_layers:
            raise HRSError(f"conv_blocks must lie between 0 and n_layers {self.n_layers}, got {self.conv_blocks}")
        self._check_engrams()
        if self.uses_peer and self.d_model % self.peer.n_heads:
            raise HRSError(f"d_model {self.d_model} must be a multiple of peer.n_heads {self.peer.n_heads}")

    def _check_engrams(self) -> None:
        engram = self.engram
        if engram.kind == "none":
            return
        block = engram.extraction_block(self.n_layers)
        reads_states = engram.kind not in ("memory", "retrieved")
        if not 0 <= block < self.n_layers or (block == self.n_layers - 1 and reads_states):
            raise HRSError(
                f"engram.extract_after {engram.extract_after} leaves no block to read the engrams: "
                f"it must be below n_layers - 1 = {self.n_layers - 1}"
            )
        if engram.kind == "recurrence" and engram.history_windows * engram.window > self.max_seq_len:
            raise HRSError(
                f"engram.history_windows {engram.history_windows} of {engram.window} tokens are more than max_seq_len "
                f"{self.max_seq_len}: summarise fewer windows"
            )
        if self.conv_blocks > 0 and engram.kind in ("window", "recurrence"):
            raise HRSError(
                f"engram.kind={engram.kind} needs attention to read the engrams, and the last {self.conv_blocks} "
                "blocks have none: use engram.kind=running, or conv_blocks=0"
            )
        if engram.kind == "prefix" and engram.dropout > 0:
            raise HRSError(
                "engram.dropout needs engram.kind=window: prepended engrams move every token, "
                "so they cannot be dropped for one micro-batch; set model.engram.dropout=0"
            )

    @property
    def routed(self) -> bool:
        """Whether blocks have a router."""
        return self.family == "hrs" and "tiers" in self.feed_forward

    @property
    def uses_peer(self) -> bool:
        """Whether blocks have product-key experts, as a layer or as a tier."""
        return self.family == "hrs" and ("peer" in self.feed_forward or (self.routed and "peer" in self.tiers.names))
