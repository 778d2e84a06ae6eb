"""Memories of windows, for a model that is trained with retrieval in the loop."""

from hrs.retrieval.bank.base import weights_fingerprint
from hrs.retrieval.bank.memory_bank import SPARE, MemoryBank, open_bank

__all__ = ["SPARE", "MemoryBank", "open_bank", "weights_fingerprint"]
