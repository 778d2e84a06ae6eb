"""Shape and composition of a model of the HRS family."""

from dataclasses import dataclass, field
from typing import Literal

from hrs.config.checks import require_at_least, require_within
from hrs.errors import HRSError


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """Per-layer soft router over the tiers (Gumbel-softmax, Jang et al. 2017)."""

    hidden: int = 64
    """Width of the router's hidden layer."""
    temperature_start: float = 1.0
    """Gumbel-softmax temperature at the first step."""
    temperature_end: float = 0.3
    """Temperature after annealing, and the softmax temperature in evaluation."""
    temperature_decay_frac: float = 0.8
    """Share of all training steps over which the temperature falls linearly."""
    balance_weight: float = 0.1
    """Weight of n * sum p_k^2 over mean routing shares; 1 (times the weight) when uniform."""
    entropy_weight: float = 0.01
    """Weight of minus the mean normalised routing entropy."""
    flops_weight: float = 0.0
    """Weight of the expected relative cost of the chosen tiers."""
    trc_window: int = 0
    """Temporal routing consistency: causal mean of the router's logits over this many tokens; 0 is off."""

    def __post_init__(self) -> None:
        require_at_least(self, hidden=1, temperature_start=1e-6, temperature_end=1e-6, trc_window=0)
        require_within(self, temperature_decay_frac=(0.0, 1.0))


TIER_NAMES = ("conv", "expert", "attention", "sink")


@dataclass(frozen=True, kw_only=True, slots=True)
class TierConfig:
    """Parallel paths that the router mixes in place of the MLP, cheapest idea first."""

    names: tuple[str, ...] = TIER_NAMES
    """Which tiers exist, in routing order."""
    conv_kernel: int = 7
    """Taps of the causal depthwise convolution."""
    n_experts: int = 4
    """Experts of the top-1 expert tier."""
    expert_hidden: int = 256
    """Hidden width of one expert."""
    sink_rescale: bool = False
    """Shrink the residual stream by the share that went to the sink tier."""
    renormalise_gate: bool = False
    """Divide the chosen expert's gate by itself, as the original did. Its gate then never gets a gradient."""

    def __post_init__(self) -> None:
        unknown = [n for n in self.names if n not in TIER_NAMES]
        if unknown or not self.names or len(set(self.names)) != len(self.names):
            raise HRSError(f"tiers.names must be distinct names out of {', '.join(TIER_NAMES)}, got {self.names}")
        require_at_least(self, conv_kernel=1, n_experts=1, expert_hidden=1)
        if self.sink_rescale and "sink" not in self.names:
            raise HRSError("tiers.sink_rescale needs the sink tier in tiers.names")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngramConfig:
    """Window summaries that later blocks may attend to."""

    kind: Literal["none", "window", "prefix"] = "none"
    """``window``: extra keys and values, visible once their window is complete (causal). ``prefix``: the original's
    prepended summaries, visible to every token (they leak the future; only for ``*_legacy`` presets)."""
    window: int = 128
    """Tokens summarised by one group of engrams."""
    per_window: int = 4
    """Engram vectors per window."""
    extract_after: int = 1
    """Index of the block whose output is summarised; blocks after it read the engrams."""
    recon_weight: float = 0.1
    """Weight of 1 - cos(window mean, mean engram)."""
    dropout: float = 0.1
    """Probability that a training micro-batch runs without engrams."""

    def __post_init__(self) -> None:
        require_at_least(self, window=1, per_window=1, extract_after=0)
        require_within(self, dropout=(0.0, 1.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalityConfig:
    """Second head: InfoNCE between nearby positions on the output of every block (van den Oord et al. 2018)."""

    enabled: bool = False
    """Whether the locality projection exists."""
    weight: float = 0.1
    """Weight of the loss averaged over blocks."""
    window: int = 16
    """Anchors keep this distance from both ends; positives lie within half of it."""
    n_anchors: int = 64
    """Anchor positions drawn per batch."""
    n_negatives: int = 64
    """Negative positions drawn per batch, shared by the anchors."""
    temperature: float = 0.1
    """Temperature of the cosine similarities."""

    def __post_init__(self) -> None:
        require_at_least(self, window=2, n_anchors=1, n_negatives=1, temperature=1e-6)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape and composition of one language model of the HRS family."""

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
    feed_forward: Literal["mlp", "tiers"] = "mlp"
    """``mlp``: a GELU MLP. ``tiers``: routed tiers in its place."""
    router: RouterConfig = field(default_factory=RouterConfig)
    tiers: TierConfig = field(default_factory=TierConfig)
    engram: EngramConfig = field(default_factory=EngramConfig)
    locality: LocalityConfig = field(default_factory=LocalityConfig)

    def __post_init__(self) -> None:
        require_at_least(self, vocab_size=2, n_layers=1, n_heads=1, d_model=2, d_ff=1, max_seq_len=2)
        require_within(self, dropout=(0.0, 1.0))
        if self.d_model % (2 * self.n_heads):
            raise HRSError(f"d_model {self.d_model} must be a multiple of 2 * n_heads = {2 * self.n_heads}")
        if self.engram.kind != "none" and self.engram.extract_after >= self.n_layers - 1:
            raise HRSError(
                f"engram.extract_after {self.engram.extract_after} leaves no block to read the engrams: "
                f"it must be below n_layers - 1 = {self.n_layers - 1}"
            )
