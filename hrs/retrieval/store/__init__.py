"""Where engrams are kept: texts with their keys on the disk, found again exactly, safe against crashes and each other.

What a caller needs is here. Inside, :mod:`.layout` and :mod:`.log` say what the files are, :mod:`.view` what one
process has read of them, :mod:`.rewrite` how a log becomes segments, and :mod:`.search` and :mod:`.exact` what is near.
"""

from hrs.retrieval.store.engram_store import EngramStore
from hrs.retrieval.store.parts import Memory, NewMemory
from hrs.retrieval.store.search import Filter, Hit
from hrs.retrieval.store.transform import Normalisation, Transform, fit_transform

__all__ = ["EngramStore", "Filter", "Hit", "Memory", "NewMemory", "Normalisation", "Transform", "fit_transform"]
