"""What every engram mechanism is to the model: it looks on between blocks and gives later ones more to read.

A forward pass (or one piece of incremental decoding) goes::

    state = mechanism.start(positions, cache)
    for index, block in enumerate(blocks):
        x, positions, inputs = mechanism.enter(index, x, state)
        x = mechanism.leave(index, block(x, positions, inputs), state)
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.nn.attention import SlotMemory
from hrs.nn.cache import SlotTable, SlotTensor
from hrs.nn.engrams.observed_loss import ObservedLoss
from hrs.nn.products import Linear


@dataclass(slots=True)
class BlockInputs:
    """What a block reads besides the residual stream. E engrams, n tokens."""

    memory: Tensor | None = None
    """[B, E, d], vectors that the attention takes as further keys and values, normalised by the block."""
    memory_positions: Tensor | None = None
    """[E], position of each for rotation and visibility alike: seen by queries at it and after it."""
    memory_gate: Tensor | None = None
    """[B, E], factor of each after its normalisation."""
    slots: Tensor | None = None
    """[S, d] or [B, S, d], vectors from outside the text for the block's cross-attention; a zero one is absent."""
    synapse_means: Tensor | None = None
    """[B, m, d], means of engrams that set the temperature of heads; row 0 is no engram at all, for no change."""
    synapse_index: Tensor | None = None
    """[n], which of them each token reads; in a step of slots [n, 1], for one token of each row."""
    slot_memory: SlotMemory | None = None
    """What ``memory`` is for all rows alike, for some rows of a step of slots; ``memory_gate`` [M, E] belongs to it."""


@dataclass(slots=True)
class EngramState:
    """One pass of a mechanism."""

    positions: Tensor
    """[n], of the pass's tokens; [B, 1] in a step of slots."""
    cache: Any = None
    """What :meth:`EngramMechanism.new_cache` gave; None in a pass over a whole window."""
    recalled: Tensor | None = None
    """What :meth:`EngramMechanism.recall` gave."""
    inputs: BlockInputs = field(default_factory=BlockInputs)
    """What blocks after the extraction read."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Auxiliary losses, scalar and weighted."""
    carried: Any = None
    """Whatever a mechanism hands on to its later calls in this pass."""


class EngramMechanism(nn.Module):
    """Reads the output of one block, ``extract_after``, and gives blocks something to read.

    The base class does nothing; subclasses say which defects ``as_original`` brings back.
    """

    history_tokens: int = 0
    """Tokens before the window that :meth:`recall` can use."""
    decodes_by_rerunning: bool = False
    """Whether earlier states change with later text, so that decoding must run the whole text every time."""

    from_others: bool = False
    """Whether every sequence gets the engrams of its neighbour in the batch: what is lost is what content is worth."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.engram
        self.d_model = config.d_model
        self.max_seq_len = config.max_seq_len
        self.extract_after = config.engram.extraction_block(config.n_layers)
        self.observed: ObservedLoss | None = None  # of those originals whose gates look at it

    def initialise(self) -> None:
        """Set what the model's general initialisation (N(0, 0.02) for matrices) must not decide. Runs after it."""

    def new_cache(self) -> Any:
        """Memory of incremental decoding."""
        return None

    def new_slots(self, table: SlotTable) -> Any:
        """Memory of incremental decoding of sequences of unequal length; has ``join`` and ``leave`` if not None."""
        return None

    def memory_positions(self) -> Tensor | None:
        """[E], from where on each vector that blocks get as :attr:`BlockInputs.memory` is visible, in their order."""
        return None

    def recall(self, hidden: Tensor, known: Tensor) -> Tensor | None:
        """What to keep of the text before the window, from block ``extract_after``'s output [B, history_tokens, d] on
        it; ``known`` [B, history_tokens] says where there was text."""
        return None

    def start(self, positions: Tensor, cache: Any, recalled: Tensor | None = None) -> EngramState:
        """Begin a pass over tokens at ``positions`` [n]."""
        # Given, not left to the default: torch.compile cannot trace a default_factory that is a class.
        return EngramState(positions=positions, cache=cache, recalled=recalled, inputs=BlockInputs())

    def offer(self, memory: Tensor, state: EngramState) -> None:
        """Give a pass the slots [B, S, d] that its windows were told of from outside."""

    def enter(self, index: int, x: Tensor, state: EngramState) -> tuple[Tensor, Tensor, BlockInputs]:
        """Before block ``index``: its input [B, n, d], their positions, and what else it reads."""
        return x, state.positions, state.inputs

    def leave(self, index: int, x: Tensor, state: EngramState) -> Tensor:
        """After block ``index``: its output, seen, and changed if need be."""
        return x

    @property
    def wants_losses(self) -> bool:
        """Whether :meth:`observe_loss` is to be told what training passes cost."""
        return self.observed is not None

    def observe_loss(self, losses: Tensor) -> None:
        """Note the cross-entropy [n] of a training pass at the first n positions, nats, mean over the batch."""
        if self.observed is not None:
            self.observed.observe(losses)

    def set_progress(self, fraction: float) -> None:
        """See :meth:`hrs.models.base.LanguageModel.set_progress`."""

    def keep_observations(self) -> None:
        """See :meth:`hrs.models.base.LanguageModel.keep_observations`."""
        if self.observed is not None:
            self.observed.keep()

    def drop_observations(self) -> None:
        """See :meth:`hrs.models.base.LanguageModel.drop_observations`."""
        if self.observed is not None:
            self.observed.drop()

    def drop_observations_unless(self, taken: Tensor) -> None:
        """See :meth:`hrs.models.base.LanguageModel.drop_observations_unless`."""
        if self.observed is not None:
            self.observed.drop_unless(taken)

    def theirs(self, engrams: Tensor) -> Tensor:
        """The engrams [B, ...] that each row is to read: its own, or with ``from_others`` those of the row before."""
        return engrams.roll(1, dims=0) if self.from_others else engrams

    def dropped(self, device: torch.device) -> Tensor | None:
        """Whether this micro-batch runs without engrams: a boolean scalar on the device, so that no shape and no graph
        depends on it; None where that cannot happen."""
        if not self.training or self.config.dropout == 0:
            return None
        return torch.rand((), device=device) < self.config.dropout


class EngramEncoder(nn.Module):
    """Mean hidden state of a window to K vectors: d -> 2d -> K d with GELU, each normalised."""

    def __init__(self, d_model: int, per_window: int) -> None:
        super().__init__()
        self.per_window = per_window
        self.hidden = Linear(d_model, 2 * d_model)
        self.output = Linear(2 * d_model, per_window * d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, means: Tensor) -> Tensor:
        """Window means [B, m, d] to engrams [B, m, K, d]."""
        return self.norm(self.output(F.gelu(self.hidden(means))).unflatten(-1, (self.per_window, -1)))


class WindowCache:
    """Hidden states of the window that is still open, and how many windows are complete."""

    def __init__(self) -> None:
        self.pending: Tensor | None = None
        self.n_windows = 0

    def complete(self, hidden: Tensor, window: int) -> tuple[Tensor, int]:
        """The windows [B, m, window, d] that hidden states [B, n, d] complete, and how many there were before."""
        hidden = hidden if self.pending is None else torch.cat((self.pending, hidden), dim=1)
        m, before = hidden.shape[1] // window, self.n_windows
        complete, self.pending = hidden.split((m * window, hidden.shape[1] - m * window), dim=1)
        self.n_windows += m
        return complete.unflatten(1, (m, window)), before


class WindowSlots:
    """:class:`WindowCache` of sequences of unequal length.

    Args:
        table: the sequences.
        window: tokens of a window.
    """

    def __init__(self, table: SlotTable, window: int) -> None:
        self.table = table
        self.window = window
        self.pending = SlotTensor(table, window)

    def join(self, cache: WindowCache, slot: int) -> None:
        """Copy the sequences of a cache into ``slot`` and those after it."""
        assert cache.pending is not None
        self.pending.join(cache.pending, slot)

    def leave(self, slot: int, last: int) -> None:
        """Move what is in slot ``last`` into ``slot``."""
        self.pending.leave(slot, last)

    def tensors(self) -> list[Tensor]:
        """Return all that a step changes."""
        return self.pending.tensors()

    @property
    def places(self) -> Tensor:
        """[n], the place of each row's present token in its window."""
        return self.table.in_step(("place in window", self.window), lambda: self.table.places % self.window)

    def complete(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Add the present tokens' hidden states [n, 1, d].

        Returns:
            The windows [M, window, d] that they complete and the rows [M] these belong to; None if there are none.
        """
        self.pending.set_at(self.places, hidden.squeeze(1))
        complete = self.table.completing(self.window)
        if not complete:
            return None
        rows = self.table.rows[complete] if len(complete) < len(hidden) else self.table.rows
        return self.pending.rows[rows], rows


def reconstruction_loss(means: Tensor, engrams: Tensor) -> Tensor:
    """Mean over windows of 1 - cos(window mean, mean engram), scalar, 0 if there are none. Only engrams learn from it.

    Args:
        means: [B, m, d].
        engrams: [B, m, K, d].
    """
    distance = 1 - F.cosine_similarity(means.detach(), engrams.mean(dim=2), dim=-1)  # [B, m]
    return distance.sum() / max(distance.numel(), 1)
