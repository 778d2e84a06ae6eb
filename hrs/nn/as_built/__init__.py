"""The original manifold-guided network's layers, defects included; what they should be is in :mod:`hrs.nn.manifold`.

Shapes: B sequences, S tokens, D width, N coordinates, K neighbours. Known defects, each named again where it is:

- :mod:`router`: what is forbidden gets the finite score -1e4, so the first row, all forbidden, becomes uniform over the
  whole window, and the first token reads the future.
- :mod:`attention`: scores are clamped to +-50 after the mask, so a head whose scores are all below -50 reads the future
  as well; and columns meant to start as the geometry's principal axes are numerically nothing.
- :mod:`context`: the oldest tokens weigh most.
- :mod:`transport`: not a rotation of one direction into another but -1 on their plane.
- :mod:`hop`: a hop's embedding stays in the residual stream.
"""

from hrs.nn.as_built.attention import ManifoldAttention
from hrs.nn.as_built.context import TokenContext, read_tokens
from hrs.nn.as_built.hop import Hop, SharedLayers

__all__ = ["Hop", "ManifoldAttention", "SharedLayers", "TokenContext", "read_tokens"]
