"""Layers of the manifold-guided network, which reads a frozen geometry of tokens. Nothing here sees the future.

Shapes in all of these files: B batch, n tokens of this pass, S those and all before them (S = n but in decoding),
D width, N coordinates, K neighbours, V vocabulary.
"""

from hrs.nn.manifold.hop import Hop, HopCache, HopStatistics, SharedLayers
from hrs.nn.manifold.window import TokenWindow, WindowReader, per_token

__all__ = ["Hop", "HopCache", "HopStatistics", "SharedLayers", "TokenWindow", "WindowReader", "per_token"]
