"""The parts that a model of the HRS family may be composed of, each with its own fields."""

from dataclasses import dataclass
from typing import Literal

from hrs.config.checks import require_at_least, require_finite, require_within
from hrs.errors import HRSError, shown


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """Per-layer soft router over the tiers (Gumbel-softmax, Jang et al. 2017)."""

    PLACE = "model.router."

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
    hub_exponent: float = 0.0
    """Above 0: pull the sorted mean routing shares towards Zipf's law k^-a (squared distance) in place of balance."""
    trc_window: int = 0
    """Temporal routing consistency: causal mean of the router's logits over this many tokens; 0 is off."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, hidden=1, trc_window=0, balance_weight=0.0)
        require_within(self, temperature_start=(1e-6, 1e6), temperature_end=(1e-6, 1e6), hub_exponent=(0.0, 100.0))
        require_within(self, temperature_decay_frac=(0.0, 1.0))


TIER_NAMES = ("conv", "expert", "peer", "attention", "sink")


@dataclass(frozen=True, kw_only=True, slots=True)
class TierConfig:
    """Parallel paths that the router mixes in place of the MLP, cheapest idea first."""

    PLACE = "model.tiers."

    names: tuple[str, ...] = ("conv", "expert", "attention", "sink")
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
    input_density: float = 1.0
    """Below 1: tiers see softplus of their input with only this share of its largest entries kept."""

    def __post_init__(self) -> None:
        require_finite(self)
        unknown = [n for n in self.names if n not in TIER_NAMES]
        if unknown or not self.names or len(set(self.names)) != len(self.names):
            raise HRSError(
                f"tiers.names must be distinct names out of {', '.join(TIER_NAMES)}, got {shown(self.names)}"
            )
        require_at_least(self, conv_kernel=1, n_experts=1, expert_hidden=1)
        require_within(self, n_experts=(1, 2**16), input_density=(0.0, 1.0))
        if self.sink_rescale and "sink" not in self.names:
            raise HRSError("tiers.sink_rescale needs the sink tier in tiers.names")


EngramKind = Literal["none", "window", "recurrence", "running", "memory", "retrieved", "replace", "prefix"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngramConfig:
    """Summaries of hidden states that later blocks may read."""

    PLACE = "model.engram."

    kind: EngramKind = "none"
    """``window``: extra keys and values, visible once their window is complete. ``recurrence``: those, and the engrams
    of the text before the training window in the same document. ``running``: the mean of all states so far, added
    through a gate. ``memory``: cross-attention to slots learned from other sequences. ``retrieved``: cross-attention to
    slots that each window is given, see ``training.retrieval``. ``replace``: windows are mixed with the engrams of the
    window before. ``prefix``: the original's prepended summaries, visible to every token (they leak the future; only
    for ``*_legacy`` presets)."""
    as_original: bool = False
    """Keep the original's defects, leaks included: see the class that builds each kind."""
    window: int = 128
    """Tokens summarised by one group of engrams."""
    per_window: int = 4
    """Engram vectors per window."""
    extract_after: int = 1
    """Index of the block whose output is summarised, negative from the end; blocks after it read the engrams."""
    recon_weight: float = 0.1
    """Weight of 1 - cos(window mean, mean engram)."""
    dropout: float = 0.1
    """Probability that a training micro-batch runs without engrams; of ``retrieved``, that a window does."""
    history_windows: int = 4
    """``recurrence``: windows of earlier text that are summarised for the first token on."""
    remember_gate: bool = False
    """``window``, ``prefix``: a learned gate decides how much of each window's engrams is kept."""
    gate_entropy_weight: float = 0.01
    """Weight of minus the gates' mean binary entropy (``replace``, ``remember_gate``): above 0 keeps them undecided."""
    synapse: bool = False
    """``window``, ``prefix``: engrams set a temperature per head in the attention that reads them."""
    synapse_hidden: int = 64
    """Hidden width of the synapse's two networks."""
    slots: int = 32
    """``memory``: vectors that are remembered. ``retrieved``: vectors that a window is given in training."""
    slot_updates: int = 500
    """``memory``: times per training run that slots take in what was seen."""
    slot_decay: float = 0.99
    """``memory``: share of a slot that an update keeps."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, window=1, per_window=1, history_windows=1, synapse_hidden=1, slots=1, slot_updates=1)
        require_at_least(self, recon_weight=0.0)
        require_within(self, dropout=(0.0, 1.0), slot_decay=(0.0, 1.0), extract_after=(-1000, 999))
        if self.kind == "retrieved" and self.as_original:
            raise HRSError("engram.as_original has no meaning for engram.kind=retrieved, which is new: leave it out")
        for name in ("remember_gate", "synapse"):
            if getattr(self, name) and self.kind not in ("window", "prefix"):
                raise HRSError(f"engram.{name} needs engram.kind=window (or prefix), got {self.kind}")

    def extraction_block(self, n_layers: int) -> int:
        """``extract_after`` as an index from 0."""
        return self.extract_after + n_layers if self.extract_after < 0 else self.extract_after


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerConfig:
    """Parameter-efficient expert retrieval: a layer of single-neuron experts found by product keys (He 2024)."""

    PLACE = "model.peer."

    mode: Literal["hrs", "paper"] = "hrs"
    """``hrs``: experts as wide as a head, sigmoid, both sides scored with the whole query, heads concatenated.
    ``paper``: experts as wide as the model, GELU, normalised queries split in two, heads summed."""
    sub_keys: int = 512
    """Keys per side; there are ``sub_keys ** 2`` experts."""
    n_heads: int = 8
    """Independent retrievals per token."""
    top_k: int = 16
    """Experts per head and token."""
    gated: bool = True
    """Scale the branch by a learned scalar that starts at 0.1."""
    idle_norm: bool = False
    """Allocate the LayerNorm that the original kept and never used when PEER is a block's only feed-forward."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, n_heads=1, top_k=1)
        require_within(self, sub_keys=(2, 2**16))
        if self.top_k > self.sub_keys:
            raise HRSError(f"peer.top_k {self.top_k} must not exceed peer.sub_keys {self.sub_keys}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """How queries and keys are compared, and how they know where they are."""

    PLACE = "model.attention."

    kernel: Literal["dot", "exponential", "mlp", "random_projection", "l1", "sin_product", "soft_rank"] = "dot"
    """Score of a query and a key before the softmax."""
    positions: Literal["rotary", "learned", "alibi"] = "rotary"
    """``rotary`` (Su et al. 2021), ``learned`` embeddings, or ``alibi`` (Press et al. 2022)."""
    features: int = 32
    """Width that ``mlp`` and ``random_projection`` project queries and keys to."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, features=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class CategoryConfig:
    """A head that names the topic of a whole window from the mean of its final states."""

    PLACE = "model.category."

    enabled: bool = False
    """Whether the head exists."""
    weight: float = 0.1
    """Weight of its cross-entropy."""
    n_classes: int = 50
    """Topics: those of the corpus if it is labelled, else clusters of its documents."""
    labels: Literal["exact", "estimated"] = "exact"
    """``exact``: by the document a token belongs to. ``estimated``: by the original's token counts per line, which
    drift, so that labels belong to other articles."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, weight=0.0, n_classes=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class TestTimeMemoryConfig:
    """A second predictor that learns the text while it reads it, mixed with the model's own."""

    PLACE = "model.test_time_memory."

    __test__ = False  # not a test, whatever its name begins with

    enabled: bool = False
    """Whether it exists."""
    chunk: int = 16
    """Tokens read before the memory is updated with them."""
    key_width: int = 64
    """Width of the memory's keys."""
    router_hidden: int = 128
    """Hidden width of the network that mixes the two predictions."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, chunk=1, key_width=1, router_hidden=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalityConfig:
    """Second head: InfoNCE between nearby positions on the output of every block (van den Oord et al. 2018)."""

    PLACE = "model.locality."

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
        require_finite(self)
        require_at_least(self, weight=0.0, window=2, n_anchors=1, n_negatives=1, temperature=1e-6)
