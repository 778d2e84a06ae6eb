"""The one interface of every language model: audit, evaluation, export, retrieval and serving know only this."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hrs.nn.cache import SlotTable


@dataclass(slots=True)
class ModelOutput:
    """What one pass returns. B batch, T tokens, V vocabulary, d width."""

    hidden: Tensor
    """[B, T, k], ready for :meth:`LanguageModel.unembed`; its first d columns are the normalised residual stream."""
    logits: Tensor | None = None
    """[B, T, V]; position t scores token t + 1. None from :meth:`LanguageModel.encode`."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Auxiliary losses by name, scalar, already weighted: training adds them to the cross-entropy. Empty in eval
    mode."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached diagnostics by name: ``tier_share`` [n_layers, n_tiers] (mean routing weights) and
    ``routing_entropy`` [n_layers] (nats) where there is a router; in eval mode also ``expert_usage``
    [n_layers, n_experts], the retrieval weight each expert got in this pass, where there is PEER. The manifold-guided
    network tells how its hops route: ``geo_support``, ``geo_null``, ``geo_share``, ``neighbour_coverage``,
    ``prior_cosine`` and ``prior_ahead``, each [n_layers]."""
    category_logits: Tensor | None = None
    """[B, C], scores of the window's topic where there is a categorisation head."""


@dataclass(slots=True)
class WindowContext:
    """What a model may be told of windows besides their tokens."""

    history: Tensor | None = None
    """[B, history_tokens] ids that stand in front of each window in its document, the last one next to the window;
    -1 where there are none. None is a window without history."""
    category: Tensor | None = None
    """[B] int64, the topic of each window, -1 if it has none. Read by a training loss only, never by a prediction."""
    memory: Tensor | None = None
    """[B, S, d] vectors from other texts, the same for all positions of a window; a zero vector is an absent one. None
    is no memory, which is the same as absent ones alone."""

    def rows(self, chosen: slice) -> "WindowContext":
        """The same for a part of the batch."""
        return self.map(lambda tensor: tensor[chosen])

    def to(self, device: torch.device) -> "WindowContext":
        """The same on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> "WindowContext":
        """Apply ``function`` to every tensor that is there."""
        found = (None if t is None else function(t) for t in (self.history, self.category, self.memory))
        return WindowContext(*found)


class Unembedding(NamedTuple):
    """A linear output layer: logits are softcap * tanh(z / softcap), or z without a cap, with z = h weight^T + bias."""

    weight: Tensor
    """[V, d]"""
    bias: Tensor | None = None
    """[V]"""
    softcap: float = 0.0
    """0 is none."""


class Cache:
    """State of incremental decoding for one batch of sequences."""

    length: int = 0
    """Tokens decoded so far."""
    memory: Tensor | None = None
    """[B, S, d], the present :attr:`WindowContext.memory`; may be replaced between calls."""


class SlotCache(Cache, ABC):
    """State of incremental decoding of sequences of different lengths, one in each slot.

    Slots 0 .. n - 1 are in use, and each call of :meth:`LanguageModel.decode` adds one token [n, 1] to every one.
    """

    def __init__(self, table: SlotTable) -> None:
        self.table = table
        self.staged = False
        """True between :meth:`stage` and the next step."""

    def stage(self, positions: Tensor, end: int | None = None) -> None:
        """Say where the tokens of the next call of :meth:`LanguageModel.decode` stand, for static shapes.

        Args:
            positions: [n, 1] int64 on the device: the lengths of the slots in use, and 0 for further rows, whose tokens
                are computed and mean nothing.
            end: positions that attention looks at, more than any length; None for as few as possible.
        """
        self.table.begin(positions, end=end)
        self.staged = True

    def begin(self, n_tokens: int, device: torch.device) -> Tensor:
        """Start a step of ``n_tokens`` rows; returns their positions [n, 1].

        Raises:
            ValueError: if there are not as many sequences.
        """
        if not self.staged:
            if n_tokens != len(self.lengths):
                raise ValueError(
                    f"there are {len(self.lengths)} slots in use, so the batch size must not be {n_tokens}"
                )
            self.table.begin(torch.tensor(self.lengths, device=device).unsqueeze(1))
        self.staged = False
        return self.table.positions

    @property
    def lengths(self) -> list[int]:
        """Tokens in each slot in use."""
        return self.table.lengths

    @property
    @abstractmethod
    def is_plain(self) -> bool:
        """True if the next step does nothing but what nearly every step does: no window or chunk becomes complete."""

    @abstractmethod
    def snapshot(self) -> Callable[[], None]:
        """Return a function that puts back what steps from now on change, apart from the lengths."""

    @abstractmethod
    def join(self, cache: Cache) -> None:
        """Copy the sequences of a cache of ``new_cache`` that has read at least one token into the next slots."""

    @abstractmethod
    def leave(self, slot: int) -> None:
        """Empty a slot; the last one in use moves into it."""

    @abstractmethod
    def set_memory(self, slot: int, memory: Tensor | None) -> None:
        """What one slot reads as :attr:`Cache.memory` from its next token on, [S, d]."""


class LanguageModel(nn.Module, ABC):
    """A causal language model over token ids."""

    vocab_size: int
    max_seq_len: int
    d_model: int
    history_tokens: int = 0
    """Tokens of :attr:`WindowContext.history` this model can use; 0 for none."""
    n_categories: int = 0
    """Topics its categorisation head tells apart; 0 without one."""
    takes_memory: bool = False
    """Whether it reads :attr:`WindowContext.memory`."""
    memory_slots: int = 0
    """Vectors of memory that its training gives each window; it reads any number."""
    summarises: bool = False
    """Whether it reads summaries of its own text, for which :meth:`reading_others` can put in another text's."""
    computes_in: torch.dtype | None = None
    """Coarsest type in which it computes something whatever the type of its weights; None if it follows the weights."""
    batches_ragged: bool = False
    """Whether it decodes sequences of different lengths side by side: whether it has :meth:`new_slots`."""
    blocks: nn.ModuleList
    """The layers in order; each returns its residual stream [B, T, d] (alone, or first of a tuple)."""

    @property
    @abstractmethod
    def input_embedding(self) -> nn.Module:
        """The module that turns token ids [B, T] into vectors [B, T, d]."""

    @abstractmethod
    def encode(self, tokens: Tensor, context: WindowContext | None = None) -> ModelOutput:
        """Everything but the logits, for token ids [B, T], T <= max_seq_len.

        Raises:
            ValueError: if T exceeds ``max_seq_len``.
        """

    @abstractmethod
    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states [..., k]. Applied to chunks of positions where V is large."""

    def unembedding(self) -> Unembedding | None:
        """Return what :meth:`unembed` computes if it is linear, so that a loss can be computed without its logits.

        Default: None, for output layers that only :meth:`unembed` knows.
        """
        return None

    @abstractmethod
    def new_cache(self, batch_size: int, history: Tensor | None = None, memory: Tensor | None = None) -> Cache:
        """An empty cache for ``batch_size`` sequences with what :class:`WindowContext` says of them."""

    def new_slots(self, n: int) -> SlotCache:
        """Room for up to ``n`` sequences of different lengths that decode together; only if :attr:`batches_ragged`."""
        raise NotImplementedError(f"{type(self).__name__} decodes sequences of equal length only")

    @abstractmethod
    def decode(self, tokens: Tensor, cache: Cache) -> ModelOutput:
        """Continue by token ids [B, n], n >= 1: logits [B, n, V] as :meth:`forward` would give at those positions.

        Updates ``cache`` in place. Evaluation mode only. With slots for a cache n is 1, and rows differ in position.

        Raises:
            ValueError: if the sequence would exceed ``max_seq_len``.
        """

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """A partition of all parameters by the role that phases address, for example ``backbone`` or ``router``."""

    def forward(self, tokens: Tensor, context: WindowContext | None = None) -> ModelOutput:
        """Hidden states, logits and losses of token ids [B, T]."""
        output = self.encode(tokens, context)
        output.logits = self.unembed(output.hidden)
        return output

    def set_progress(self, fraction: float) -> None:
        """Tell the model which share of training is done, before each step, for what anneals. Default: nothing does."""

    @contextmanager
    def reading_others(self) -> Iterator[None]:
        """Within it every sequence of a batch reads the summaries of its neighbour's text in place of its own, the
        control of what their content is worth. Not for decoding. Default: there are none, and nothing changes."""
        yield

    def project(self, states: Tensor) -> Tensor | None:
        """States [..., d] as the locality head sees them; None without one."""
        return None

    def keep_observations(self) -> None:
        """The passes in training mode since the last such call made an update: what they showed may be remembered in
        buffers. Called once after each optimiser step. Default: nothing is remembered."""

    def drop_observations(self) -> None:
        """Those passes came to nothing (out of memory, a loss that is not finite): forget what they showed."""

    def drop_observations_unless(self, taken: Tensor) -> None:
        """Call :meth:`drop_observations` if ``taken``, a boolean scalar, is False; :meth:`keep_observations` follows.

        Default: wait for the value of ``taken``, unless there is nothing to drop. Models that observe override it so
        that a GPU need not be waited for.
        """
        if type(self).drop_observations is not LanguageModel.drop_observations and not bool(taken):
            self.drop_observations()

    @torch.no_grad()
    def count_parameters(self) -> int:
        """Distinct scalars; a tied tensor counts once."""
        return sum(p.numel() for p in self.parameters())
