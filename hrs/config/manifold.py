"""The manifold-guided network and the frozen geometry of tokens it reads."""

from dataclasses import dataclass, field
from typing import Literal

from hrs.config.checks import LARGEST_SEED, require_at_least, require_finite, require_within


@dataclass(frozen=True, kw_only=True, slots=True)
class GeometryConfig:
    """How coordinates of tokens are computed from the training text, before any learning."""

    PLACE = "model.manifold.geometry."

    definition: Literal["clean", "as_built"] = "clean"
    """``as_built``: with the original's couplings, windows across documents and sampled energies."""
    dimensions: int = 300
    """Of the space in which the simulated tokens move."""
    steps: int = 1000
    """Most steps of the simulation. ``clean`` ends earlier when its energy rests, ``as_built`` takes them all."""
    partners: int = 32
    """Only this many strongest partners of each token pull it, and a sample pushes it, which large vocabularies need.
    0: every pair of tokens is looked at, V^2 numbers."""
    modes: int = 256
    """Spectral coordinates."""
    directional: int = 32
    """Coordinates from the difference of left and right neighbours."""
    syntactic: int = 32
    """Coordinates from the previous and the next token."""
    neighbours: int = 12
    """Nearest tokens by cosine that each token knows."""
    seed: int = 12372
    """Of starting positions and samples. Not the run's: all seeds of a study share one geometry."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, dimensions=2, steps=1, partners=0, modes=1, directional=0, syntactic=0, neighbours=1)
        require_within(self, seed=(0, LARGEST_SEED))

    @property
    def n_coordinates(self) -> int:
        return self.modes + self.directional + self.syntactic


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifoldConfig:
    """What the manifold-guided network has besides its sizes; its hops are ``n_layers``."""

    PLACE = "model.manifold."

    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    source: Literal["corpus", "permuted", "random", "none"] = "corpus"
    """``permuted``: the corpus's, each token with another token's coordinates. ``random``: Gaussian with the same
    spectrum. ``none``: all coordinates zero and no neighbours. Both draw from the run's seed."""
    as_built: bool = False
    """The original's network, which sees the future: an empty row of its router becomes uniform over the window."""
    recency: float = 4.0
    """Tokens over which the weight of the past falls by e in the direction of the context."""
    confidence_tokens: int = 16
    """Tokens after which the context counts fully."""
    temperature: float = 5.0
    """Factor on routing scores; where it is learned, its start."""
    transport_share: float = 0.2
    """Most of a state that is replaced by its parallel transport."""
    softcap: float = 30.0
    """Logits are bounded by softcap * tanh(logits / softcap); 0 is off."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, recency=1e-6, confidence_tokens=1, temperature=0.0, softcap=0.0)
        require_within(self, transport_share=(0.0, 1.0))
