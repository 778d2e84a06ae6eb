"""Segment recurrence: engrams of the text before the window, besides those of the window itself."""

import torch
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.errors import HRSError
from hrs.nn.cache import SlotTable
from hrs.nn.engrams.base import EngramState, WindowCache, WindowSlots
from hrs.nn.engrams.window import WindowEngrams


class RecurrenceCache(WindowCache):
    """A window cache that knows whether the blocks already keep the history."""

    def __init__(self) -> None:
        super().__init__()
        self.has_history = False


class RecurrenceEngrams(WindowEngrams):
    """``recurrence``: the engrams of ``window``, and those of the ``history_windows`` before the training window.

    What is new is text that attention cannot reach. As in Transformer-XL (Dai et al. 2019) no gradient enters the
    hidden states of the history; here the encoder does learn to encode for later reading, and the blocks above learn
    to read.

    Engrams of the history stand at position 0, where every token sees them. A learned embedding of their window's
    age, newest last, tells them apart, for they have no position of their own. A window that is not text from its
    first to its last token counts as unknown: its gate is 0, which makes its keys and values 0, so it only takes a
    share of the attention that says nothing. A text without history has unknown windows alone.

    ``dropout`` is drawn for the window's engrams and for the history separately, so blocks learn to read either
    alone. A dropped history is an unknown one.

    Raises:
        HRSError: if ``engram.as_original`` is set: there is no original.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        engram = config.engram
        if engram.as_original:
            raise HRSError("engram.as_original has no meaning for engram.kind=recurrence, which is new: leave it out")
        self.history_tokens = engram.history_windows * engram.window
        self.n_history = engram.history_windows * engram.per_window
        self.age_embedding = nn.Parameter(torch.empty(engram.history_windows, config.d_model))

    def initialise(self) -> None:
        super().initialise()
        nn.init.normal_(self.age_embedding, std=0.02)

    def new_cache(self) -> RecurrenceCache:
        return RecurrenceCache()

    def new_slots(self, table: SlotTable) -> WindowSlots:
        return WindowSlots(table, self.config.window)  # the blocks keep the history already

    def recall(self, hidden: Tensor, known: Tensor) -> Tensor:
        """Engrams of the history, with a gate: [B, H K, d + 1], the last column 1 where the window was known, else 0.

        Gradients reach the encoder and the embeddings, never ``hidden``.

        Args:
            hidden: output of block ``extract_after`` on the history [B, H window, d].
            known: [B, H window], where there was text.
        """
        shape = (self.config.history_windows, self.config.window)
        means = hidden.detach().unflatten(1, shape).mean(dim=2)  # [B, H, d]
        engrams = self.theirs(self.encoder(means)) + self.type_embedding + self.age_embedding[:, None]  # [B, H, K, d]
        gate = known.unflatten(1, shape).all(dim=2)[:, :, None, None].expand(-1, -1, engrams.shape[2], -1)
        return torch.cat((engrams, gate.to(engrams.dtype)), dim=-1).flatten(1, 2)  # [B, H K, d + 1]

    def leave(self, index: int, x: Tensor, state: EngramState) -> Tensor:
        x = super().leave(index, x, state)
        if isinstance(state.cache, WindowSlots):
            return x
        if index == self.extract_after and (state.cache is None or not state.cache.has_history):
            self._add_history(x, state)
            if state.cache is not None:
                state.cache.has_history = True
        return x

    def _add_history(self, x: Tensor, state: EngramState) -> None:
        """Put the history in front of the engrams that the blocks read; once, for a cache keeps it."""
        inputs, recalled = state.inputs, state.recalled
        if recalled is None:
            n_engrams = self.config.history_windows * self.config.per_window
            recalled = x.new_zeros(len(x), n_engrams, self.d_model + 1)
        memory, gate = recalled[..., :-1], recalled[..., -1]
        if (dropped := self.dropped(x.device)) is not None:
            gate = gate.masked_fill(dropped, 0.0)
        positions = state.positions.new_zeros(memory.shape[1])
        if inputs.memory is not None and inputs.memory_positions is not None:
            ours = inputs.memory_gate
            ours = gate.new_ones(inputs.memory.shape[:2]) if ours is None else ours
            memory, gate = torch.cat((memory, inputs.memory), dim=1), torch.cat((gate, ours), dim=1)
            positions = torch.cat((positions, inputs.memory_positions))
        inputs.memory, inputs.memory_positions, inputs.memory_gate = memory, positions, gate
