"""The frozen geometry of tokens that a manifold-guided network reads."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TokenGeometry:
    """Coordinates of every token id and its nearest tokens. V vocabulary, N coordinates, K neighbours."""

    coordinates: Tensor
    """[V, N] float32."""
    neighbours: Tensor
    """[V, K] int64 token ids, nearest first by cosine of the coordinates; -1 for none."""
