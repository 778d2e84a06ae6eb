"""A memory of the training text as a whole: slots that training fills and every text reads by cross-attention."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.nn.engrams.base import EngramMechanism, EngramState

_ROWS_PER_SLOT = 16
"""Window means that are kept for one update of the slots, per slot."""
_DEAD_BELOW = 0.25
"""A slot is dead when its share of the observations is below this part of an equal share."""


class Observations(nn.Module):
    """What passes showed. It stays pending until their step has made an update, and is then kept for the slots.

    Pending observations are no part of a checkpoint, kept ones are: a resumed run updates its slots with the same.
    """

    pending: Tensor
    n_pending: Tensor
    kept: Tensor
    n_kept: Tensor

    def __init__(self, n_rows: int, d_model: int) -> None:
        super().__init__()
        for name, persistent in (("pending", False), ("kept", True)):
            self.register_buffer(name, torch.zeros(n_rows, d_model), persistent=persistent)
            self.register_buffer(f"n_{name}", torch.zeros((), dtype=torch.int64), persistent=persistent)

    @torch.no_grad()
    def add(self, hidden: Tensor) -> None:
        """One pass in training mode, hidden states [B, T, d]. In place and of fixed shapes, for it is in the graph."""
        rows = self.rows(hidden.detach()).to(self.pending.dtype)  # [n, d]
        if len(rows):
            self.merge(rows, self.n_pending.new_full((), len(rows)), self.pending, self.n_pending)

    def keep(self) -> None:
        """Pending observations count."""
        self.merge(self.pending, self.n_pending, self.kept, self.n_kept)
        self.drop()

    def drop(self) -> None:
        """Pending observations never were."""
        self.pending.zero_()
        self.n_pending.zero_()

    def drop_unless(self, taken: Tensor) -> None:
        """Drop pending observations if ``taken``, a boolean scalar, is False; does not wait for its value."""
        self.pending.copy_(torch.where(taken, self.pending, 0.0))
        self.n_pending.mul_(taken)

    def clear(self) -> None:
        """Kept observations are used up."""
        self.kept.zero_()
        self.n_kept.zero_()

    def rows(self, hidden: Tensor) -> Tensor:
        """The observations [n, d] that a pass over hidden states [B, T, d] makes."""
        raise NotImplementedError

    def merge(self, rows: Tensor, n: Tensor, into: Tensor, n_into: Tensor) -> None:
        """Add ``n`` observations that ``rows`` holds to the ``n_into`` that ``into`` holds, in place."""
        raise NotImplementedError


class WindowMeans(Observations):
    """The means of the first complete windows since the slots were last updated, as many as there are rows."""

    def __init__(self, n_rows: int, d_model: int, window: int) -> None:
        super().__init__(n_rows, d_model)
        self.window = window

    def rows(self, hidden: Tensor) -> Tensor:
        m = hidden.shape[1] // self.window
        return hidden[:, : m * self.window].unflatten(1, (m, self.window)).mean(dim=2).flatten(0, 1)  # [B m, d]

    def merge(self, rows: Tensor, n: Tensor, into: Tensor, n_into: Tensor) -> None:
        source = torch.arange(len(into), device=into.device) - n_into  # [R], the new row that belongs here
        new = (source >= 0) & (source < n)
        into.copy_(torch.where(new[:, None], rows[source.clamp(0, len(rows) - 1)], into))
        n_into.copy_((n_into + n).clamp_max(len(into)))


class PassMeans(Observations):
    """The sum of the means of whole passes, all sequences and positions alike."""

    def __init__(self, d_model: int) -> None:
        super().__init__(1, d_model)

    def rows(self, hidden: Tensor) -> Tensor:
        return hidden.mean(dim=(0, 1))[None]  # [1, d]

    def merge(self, rows: Tensor, n: Tensor, into: Tensor, n_into: Tensor) -> None:
        into += rows
        n_into += n


class MemoryEngrams(EngramMechanism):
    """``memory``: slots [S, d] that blocks read by cross-attention, filled from other sequences of the training text.

    The slots are centres of an online k-means over the means of windows at block ``extract_after``. Distinct means
    fill them; every update then assigns each mean seen to the slot with the closest direction and moves a slot to
    ``slot_decay`` of itself and the rest the mean of what it was assigned (the moving average of van den Oord et al.
    2017). A slot that nearly nothing is assigned to becomes one of the means seen. Direction, not distance, because
    the slots are read through a LayerNorm, and because the norm of hidden states grows in training: by distance the
    slots that moved first would take everything.

    With ``as_original`` all slots are one and the same moving average of the mean of everything. Cross-attention to
    equal slots does not depend on the query, so it adds one constant vector to every token of every text, and neither
    Wq nor Wk ever gets a gradient. See also :class:`hrs.nn.cross_attention.CrossAttention`.

    Slots change after optimiser steps only, ``slot_updates`` times in a run at equal distances, the first time after
    the first step. Within a pass they are constants, so nothing of a text can reach its own predictions through them.
    """

    slots: Tensor
    usage: Tensor
    filled: Tensor
    last_update: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        n, d = config.engram.slots, config.d_model
        self.seen: Observations = (
            PassMeans(d) if config.engram.as_original else WindowMeans(_ROWS_PER_SLOT * n, d, config.engram.window)
        )
        self.register_buffer("slots", torch.zeros(n, d))  # all zero: the blocks skip them
        self.register_buffer("usage", torch.full((n,), 1 / n))  # share of observations, averaged like the slots
        self.register_buffer("filled", torch.tensor(False))
        self.register_buffer("last_update", torch.tensor(-1))
        self._update = 0
        self._last_update: int | None = -1
        """What ``last_update`` holds, so that nothing waits for a GPU to tell it; None if that is not known."""

    def start(self, positions: Tensor, cache: object, recalled: Tensor | None = None) -> EngramState:
        state = super().start(positions, cache, recalled)
        dropped = self.dropped(positions.device)
        state.inputs.slots = self.slots if dropped is None else self.slots.masked_fill(dropped, 0.0)
        return state

    def leave(self, index: int, x: Tensor, state: EngramState) -> Tensor:
        if self.training and index == self.extract_after:
            self.seen.add(x)
        return x

    def set_progress(self, fraction: float) -> None:
        # The margin is for fractions such as 0.29 * 100, which is just below 29.
        self._update = math.floor(fraction * self.config.slot_updates + 1e-6)

    def drop_observations(self) -> None:
        self.seen.drop()

    def drop_observations_unless(self, taken: Tensor) -> None:
        self.seen.drop_unless(taken)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._last_update = None

    @torch.no_grad()
    def keep_observations(self) -> None:
        self.seen.keep()
        if self._last_update is None or self.last_update.device.type == "cpu":
            self._last_update = int(self.last_update)
        if self._update <= self._last_update:
            return
        rows = self.seen.kept[: int(self.seen.n_kept)]
        if self._move_all(rows) if self.config.as_original else self._move_nearest(rows):
            self.seen.clear()
            self.last_update.fill_(self._update)
            self._last_update = self._update

    def _move_all(self, rows: Tensor) -> bool:
        """Original: every slot takes in the mean of all that was seen. False if that was nothing."""
        if len(rows) == 0:
            return False
        mean = self.seen.kept[0] / self.seen.n_kept
        decay = self.config.slot_decay if self.filled else 0.0
        self.slots.mul_(decay).add_(mean, alpha=1 - decay)
        self.filled.fill_(True)
        return True

    def _move_nearest(self, rows: Tensor) -> bool:
        """One step of k-means on window means [n, d]. False if there are too few for that, and more must be seen."""
        n_slots, decay = len(self.slots), self.config.slot_decay
        distinct = rows.unique(dim=0)
        if len(distinct) < (1 if self.filled else n_slots):
            return False
        if not self.filled:
            self._replace(range(n_slots), distinct)
            self.filled.fill_(True)
            return True
        nearest = (rows @ F.normalize(self.slots, dim=-1).T).argmax(dim=-1)  # [n]
        members = F.one_hot(nearest, n_slots).to(rows.dtype)  # [n, S]
        counts = members.sum(dim=0)
        means = members.T @ rows / counts.clamp_min(1)[:, None]  # [S, d]
        weight = (1 - decay) * (counts > 0).to(rows.dtype)
        self.slots.lerp_(means, weight[:, None])
        self.usage.lerp_(counts / len(rows), 1 - decay)
        dead = (self.usage < _DEAD_BELOW / n_slots).nonzero()[:, 0].tolist()
        self._replace(dead[: len(distinct)], distinct)
        return True

    def _replace(self, chosen: range | list[int], distinct: Tensor) -> None:
        """Put vectors that stand at equal distances in ``distinct`` [u, d], which is sorted, into the chosen slots."""
        n = len(chosen)
        for i, slot in enumerate(chosen):
            self.slots[slot] = distinct[(2 * i + 1) * len(distinct) // (2 * n)]
            self.usage[slot] = 1 / len(self.slots)
