"""Memories of other documents that a model reads by cross-attention, and how they are found."""

from dataclasses import dataclass
from typing import Literal

from hrs.config.checks import require_at_least, require_finite
from hrs.errors import HRSError


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalConfig:
    """Retrieval in the loop of training, for models with ``engram.kind=retrieved`` (after Borgeaud et al. 2022).

    A finished run, the base, encodes the training text in chunks. Keys of chunks find neighbours, values of neighbours
    are the slots that a window reads, and the base's weights are those that training starts from.
    """

    PLACE = "training.retrieval."

    base: str = ""
    """Key of the base's run; empty is off."""
    fingerprint: str = ""
    """16 hex digits of the base's weights, as :func:`hrs.retrieval.bank.weights_fingerprint` gives them: the same run
    trained on another machine may have others."""
    memory: Literal["right", "shuffled", "none"] = "right"
    """What training shows each window. ``shuffled``: what belongs to another window. ``none``: nothing. The two are
    controls: they learn for as many steps from the same weights."""
    chunk_tokens: int = 32
    """Tokens per chunk. The neighbours of a window are sought with the last whole chunk in front of it; a window with
    less of its document before it has no memory."""
    span: int = 4
    """Chunks that a key covers: its own and those before it, as far as they are of its document."""
    keys: Literal["engrams", "words"] = "engrams"
    """What makes chunks neighbours. ``engrams``: mean hidden states of the base. ``words``: the rare tokens they share,
    without any model; how far engrams fall behind it tells how good they are at finding."""
    neighbours: int = 4
    """Chunks of other documents that a window reads; ``engram.slots`` is shared between them in equal parts."""
    values: Literal["tokens", "states", "means"] = "tokens"
    """What the slots of a neighbour are, taken from the chunk and the one after it in its document. ``tokens``: its
    most surprising different tokens, each as the state in front of it and its embedding. ``states``: the states at
    those tokens. ``means``: mean states of equal parts."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, chunk_tokens=2, neighbours=1, span=1)
        if bool(self.base) != bool(self.fingerprint):
            raise HRSError(
                "training.retrieval.base and training.retrieval.fingerprint belong together: give the key of a "
                "finished run and the fingerprint of its weights, or neither"
            )
