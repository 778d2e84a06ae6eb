"""Engrams of completed windows as further keys and values, and the original's prefix that shows the future."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.errors import HRSError
from hrs.nn.attention import SlotMemory
from hrs.nn.cache import SlotTable, SlotTensor
from hrs.nn.engrams.base import (
    BlockInputs,
    EngramEncoder,
    EngramMechanism,
    EngramState,
    WindowCache,
    WindowSlots,
    reconstruction_loss,
)
from hrs.nn.engrams.observed_loss import ObservedLoss
from hrs.nn.engrams.remember_gate import RememberGate, gate_entropy, standardised


class SummingCache(WindowCache):
    """A window cache that also knows what the complete windows add up to."""

    def __init__(self) -> None:
        super().__init__()
        self.means: Tensor | None = None
        self.engrams: Tensor | None = None

    def novelty(self, means: Tensor) -> Tensor:
        """1 - cos between the mean [B, m, d] of each new window and the mean of all windows before it, [B, m]; 1 for
        the first window."""
        totals = _totals(self.means, means)
        self.means = totals[:, -1]
        return 1 - F.cosine_similarity(means, totals[:, :-1], dim=-1)  # the cosine does not ask for a mean's 1 / n

    def running_means(self, centres: Tensor, before: int) -> Tensor:
        """Mean over the first ``before``, ``before`` + 1, ... windows [B, m + 1, d] of their mean engrams; those of
        the new windows are ``centres`` [B, m, d]."""
        totals = _totals(self.engrams, centres)
        self.engrams = totals[:, -1]
        counts = torch.arange(before, before + totals.shape[1], device=centres.device).clamp_min(1)
        return totals / counts.unsqueeze(-1)


class SummingSlots(WindowSlots):
    """:class:`SummingCache` of sequences of unequal length."""

    def __init__(self, table: SlotTable, window: int) -> None:
        super().__init__(table, window)
        self.means = SlotTensor(table)
        self.engrams = SlotTensor(table)

    def join(self, cache: WindowCache, slot: int) -> None:
        super().join(cache, slot)
        assert isinstance(cache, SummingCache) and cache.pending is not None
        none = cache.pending.new_zeros(len(cache.pending), cache.pending.shape[2])
        for own, total in ((self.means, cache.means), (self.engrams, cache.engrams)):
            own.join(none if total is None else total, slot)

    def leave(self, slot: int, last: int) -> None:
        super().leave(slot, last)
        self.means.leave(slot, last)
        self.engrams.leave(slot, last)

    def tensors(self) -> list[Tensor]:
        return super().tensors() + self.means.tensors() + self.engrams.tensors()


def _totals(before: Tensor | None, rows: Tensor) -> Tensor:
    """The sum [B, d] before, and after each of the rows [B, m, d]: [B, m + 1, d]."""
    joined = F.pad(rows, (0, 0, 1, 0)) if before is None else torch.cat((before.unsqueeze(1), rows), dim=1)
    return joined.cumsum(dim=1)


class WindowEngrams(EngramMechanism):
    """``window``: every complete window of hidden states becomes K vectors, visible from its last token on.

    An incomplete last window has no engrams.

    ``remember_gate`` scales each window's keys and values by a :class:`RememberGate` that looks at the window and those
    before it: at how new it is, where the original looked at the training loss. The scale comes after the reading
    block's norm. The original scaled in front of it, and a norm takes out whatever scale its input has: its gate had
    next to no effect, open or closed.

    ``synapse`` gives each token the mean of the engrams of all windows that are complete at it, for the blocks'
    :class:`hrs.nn.engrams.synapse.Synapse`.

    Raises:
        HRSError: if ``engram.as_original`` is set: the original's form is ``prefix``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.engram.kind == "window" and config.engram.as_original:
            raise HRSError(
                "engram.as_original has no meaning for engram.kind=window, which mends the original: use kind=prefix"
            )
        self.encoder = EngramEncoder(config.d_model, config.engram.per_window)
        self.type_embedding = nn.Parameter(torch.empty(config.d_model))
        as_original = config.engram.kind == "prefix"
        self.gate = RememberGate(as_original=as_original) if config.engram.remember_gate else None

    def initialise(self) -> None:
        nn.init.normal_(self.type_embedding, std=0.02)
        if self.gate is not None:
            self.gate.initialise()

    n_history: int = 0
    """Engrams of the text in front of the window, which come before the others."""

    def new_cache(self) -> WindowCache:
        return SummingCache()

    def new_slots(self, table: SlotTable) -> WindowSlots:
        return SummingSlots(table, self.config.window)

    def memory_positions(self) -> Tensor:
        window, width = self.config.window, self.config.per_window
        ends = torch.arange(1, self.max_seq_len // window + 1) * window - 1
        return torch.cat((ends.new_zeros(self.n_history), ends.repeat_interleave(width)))

    def enter(self, index: int, x: Tensor, state: EngramState) -> tuple[Tensor, Tensor, BlockInputs]:
        return x, state.positions, state.inputs if index > self.extract_after else BlockInputs()

    def leave(self, index: int, x: Tensor, state: EngramState) -> Tensor:
        if index == self.extract_after:
            self._extract(x, state)
        return x

    def _extract(self, hidden: Tensor, state: EngramState) -> None:
        if isinstance(state.cache, WindowSlots):
            self._extract_step(hidden, state.cache, state)
            return
        cache = state.cache if state.cache is not None else self.new_cache()
        windows, before = cache.complete(hidden, self.config.window)
        means = windows.mean(dim=2)  # [B, m, d]
        engrams = self.encoder(means)  # [B, m, K, d]
        m, width = engrams.shape[1:3]
        ends = torch.arange(before + 1, before + m + 1, device=hidden.device) * self.config.window - 1
        positions = ends.repeat_interleave(width)  # [m K]
        loss = self.config.recon_weight * reconstruction_loss(means, engrams)
        dropped = self.dropped(hidden.device)
        if dropped is not None:
            # One position past the last token is out of every token's sight.
            positions = positions.masked_fill(dropped, self.max_seq_len)
            loss = loss.masked_fill(dropped, 0.0)
        state.losses["recon"] = loss
        if m > 0:
            state.inputs.memory = self.theirs(engrams).flatten(1, 2) + self.type_embedding  # [B, m K, d]
            state.inputs.memory_positions = positions
        self._modulate(means, engrams, before, cache, state)
        if dropped is not None and "gate_entropy" in state.losses:
            state.losses["gate_entropy"] = state.losses["gate_entropy"].masked_fill(dropped, 0.0)
        if dropped is not None and state.inputs.synapse_index is not None:
            state.inputs.synapse_index = state.inputs.synapse_index.masked_fill(dropped, 0)

    def _extract_step(self, hidden: Tensor, slots: WindowSlots, state: EngramState) -> None:
        """Take in one token of each slot, hidden states [n, 1, d]."""
        windows = slots.complete(hidden)
        if windows is not None:
            self._add_windows(*windows, slots, state)
        if self.config.synapse:
            assert isinstance(slots, SummingSlots)
            counts = (state.positions + 1) // self.config.window  # [n, 1], complete windows
            state.inputs.synapse_means = F.pad((slots.engrams.rows / counts.clamp_min(1)).unsqueeze(1), (0, 0, 1, 0))
            state.inputs.synapse_index = counts.clamp_max(1)  # row 0 is no engram at all

    def _add_windows(self, windows: Tensor, rows: Tensor, slots: WindowSlots, state: EngramState) -> None:
        """Make the engrams of windows [M, W, d] that some rows [M] have completed."""
        means = windows.mean(dim=1, keepdim=True)  # [M, 1, d]
        engrams = self.encoder(means)  # [M, 1, K, d]
        width = engrams.shape[2]
        index = slots.table.positions[rows] // self.config.window  # [M, 1], which window
        places = self.n_history + width * index + torch.arange(width, device=index.device)
        state.inputs.slot_memory = SlotMemory(engrams.squeeze(1) + self.type_embedding, rows, places)
        if self.gate is not None:
            assert isinstance(slots, SummingSlots)
            before = slots.means.rows[rows]  # [M, d]
            novelty = 1 - F.cosine_similarity(means, before.unsqueeze(1), dim=-1)  # [M, 1]
            slots.means.rows[rows] = before + means.squeeze(1)
            state.inputs.memory_gate = self.gate(novelty, means, engrams).sigmoid().expand(-1, width)  # [M, K]
        if self.config.synapse:
            assert isinstance(slots, SummingSlots)
            centres = engrams.mean(dim=2).squeeze(1) + self.type_embedding
            slots.engrams.rows[rows] = slots.engrams.rows[rows] + centres

    def _modulate(self, means: Tensor, engrams: Tensor, before: int, cache: WindowCache, state: EngramState) -> None:
        """Set the gates and the synapse's inputs for new windows [B, m, d] and their engrams [B, m, K, d]."""
        if self.gate is not None:
            assert isinstance(cache, SummingCache)
            logits = self.gate(cache.novelty(means), means, engrams)
            state.losses["gate_entropy"] = -self.config.gate_entropy_weight * gate_entropy(logits)
            state.inputs.memory_gate = logits.sigmoid().repeat_interleave(engrams.shape[2], dim=1)  # [B, m K]
        if self.config.synapse:
            assert isinstance(cache, SummingCache)
            rows = cache.running_means(engrams.mean(dim=2) + self.type_embedding, before)  # [B, m + 1, d]
            index = (state.positions + 1) // self.config.window - before  # windows complete at a token, since then
            if before > 0:  # the first row is a mean: put one that is none in front of it
                rows, index = F.pad(rows, (0, 0, 1, 0)), index + 1
            state.inputs.synapse_means = rows
            state.inputs.synapse_index = index


class PrefixEngrams(WindowEngrams):
    """``prefix``: the original's form, which leaks. Engrams of all windows, the unfinished future's too, stand in front
    of the tokens as ordinary positions; the blocks run over both in causal order and the engrams' part is thrown away.

    Always as in the original, whatever ``as_original`` says. ``remember_gate``: every reading block asks the gate anew,
    with its own input's window means and the training loss usual at each window (:class:`ObservedLoss`), compared with
    that of the other windows, later ones included; it scales vectors that a norm then scales back, and the loss makes
    its entropy small, not large. ``synapse``: all tokens get the mean of all engrams.
    """

    decodes_by_rerunning = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.observed = ObservedLoss(config.max_seq_len) if self.gate is not None else None

    def enter(self, index: int, x: Tensor, state: EngramState) -> tuple[Tensor, Tensor, BlockInputs]:
        memory, inputs = state.inputs.memory, BlockInputs()
        if index <= self.extract_after or memory is None:
            return x, state.positions, inputs
        if self.gate is not None:
            memory = memory * self._gates(x, state).unsqueeze(-1)
        joined = torch.cat((memory, x), dim=1)
        positions = torch.arange(joined.shape[1], device=x.device)
        if self.config.synapse:
            inputs.synapse_means, inputs.synapse_index = state.inputs.synapse_means, torch.ones_like(positions)
        return joined, positions, inputs

    def leave(self, index: int, x: Tensor, state: EngramState) -> Tensor:
        x = x[:, -len(state.positions) :]
        return super().leave(index, x, state)

    def _modulate(self, means: Tensor, engrams: Tensor, before: int, cache: WindowCache, state: EngramState) -> None:
        state.carried = engrams
        if engrams.shape[1] > 0:  # without the type embedding, which only the prefix gets
            state.inputs.synapse_means = F.pad(engrams.mean(dim=(1, 2)).unsqueeze(1), (0, 0, 1, 0))  # [B, 2, d]

    def _gates(self, x: Tensor, state: EngramState) -> Tensor:
        """Gates [B, m K] for the engrams, from a block's input; their entropy at the last block becomes the loss."""
        assert self.gate is not None and self.observed is not None
        m, width = state.carried.shape[1:3]
        window = self.config.window
        means = x[:, : m * window].unflatten(1, (m, window)).mean(dim=2)  # [B, m, d]
        logits = self.gate(standardised(self.observed.window_means(m, window)), means, state.carried)
        state.losses["gate_entropy"] = self.config.gate_entropy_weight * gate_entropy(logits)
        return logits.sigmoid().repeat_interleave(width, dim=1)
