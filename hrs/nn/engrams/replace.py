"""Tokens mixed with a reconstruction of them that engrams give."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.nn.cache import SlotTable, SlotTensor
from hrs.nn.engrams.base import BlockInputs, EngramEncoder, EngramMechanism, EngramState, WindowCache, WindowSlots
from hrs.nn.engrams.observed_loss import ObservedLoss
from hrs.nn.engrams.remember_gate import gate_entropy
from hrs.nn.products import Linear


class Upsampler(nn.Module):
    """K engrams of a window to one vector for each of its tokens: repeated, placed, refined, normalised."""

    def __init__(self, d_model: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.positions = nn.Parameter(torch.empty(window, d_model))
        self.hidden = Linear(d_model, d_model)
        self.output = Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, engrams: Tensor) -> Tensor:
        """[B, m, K, d] to [B, m, W, d]."""
        source = torch.arange(self.window, device=engrams.device) * engrams.shape[2] // self.window
        x = engrams[:, :, source] + self.positions
        return self.norm(x + self.output(F.gelu(self.hidden(x))))


class ReplaceCache(WindowCache):
    """The open window, and what the last complete one holds for the tokens after it."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors: Tensor | None = None
        self.gates: Tensor | None = None

    def shift(self, vectors: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [B, m, W, d] and gates [B, m] of newly complete windows, with those of the last window before them in
        front: row j is for the tokens of the j-th window from the open one on. Before the first window all is 0."""
        if self.vectors is None or self.gates is None:
            vectors, gates = F.pad(vectors, (0, 0, 0, 0, 1, 0)), F.pad(gates, (1, 0))
        else:
            vectors, gates = torch.cat((self.vectors, vectors), dim=1), torch.cat((self.gates, gates), dim=1)
        self.vectors, self.gates = vectors[:, -1:], gates[:, -1:]
        return vectors, gates


class ReplaceSlots(WindowSlots):
    """:class:`ReplaceCache` of sequences of unequal length."""

    def __init__(self, table: SlotTable, window: int) -> None:
        super().__init__(table, window)
        self.vectors = SlotTensor(table, window)
        self.gates = SlotTensor(table)

    def join(self, cache: WindowCache, slot: int) -> None:
        super().join(cache, slot)
        assert isinstance(cache, ReplaceCache) and cache.vectors is not None and cache.gates is not None
        self.vectors.join(cache.vectors.squeeze(1), slot)
        self.gates.join(cache.gates, slot)

    def leave(self, slot: int, last: int) -> None:
        super().leave(slot, last)
        self.vectors.leave(slot, last)
        self.gates.leave(slot, last)

    def tensors(self) -> list[Tensor]:
        return super().tensors() + self.vectors.tensors() + self.gates.tensors()


class ReplaceEngrams(EngramMechanism):
    """``replace``: before every block after ``extract_after``, x <- g u + (1 - g) x with u the engrams of one window
    made as long as a window again, and g a gate for the whole window.

    Here the tokens of window w get the engrams of window w - 1, all of it past for each of them; those of the first
    window stay as they are. The gate opens for engrams that tell their window well: sigmoid(alpha (theta - distance)),
    distance 1 - cos(window mean, mean engram). The loss at these tokens, which the original's gate looked at, does not
    exist when text is generated.

    ``as_original`` gives tokens the engrams of their *own* window, so that the first ones see what the last ones say.
    The gate is sigmoid(alpha (loss - theta)) of the average training loss at the window's positions
    (:class:`ObservedLoss`), closed as long as there is none, and its entropy is made small, not large. Unfinished
    windows stay as they are.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        d, engram = config.d_model, config.engram
        self.encoder = EngramEncoder(d, engram.per_window)
        self.upsampler = Upsampler(d, engram.window)
        self.type_embedding = nn.Parameter(torch.empty(d))
        self.theta = nn.Parameter(torch.tensor(3.0 if engram.as_original else 0.0))
        self.alpha = nn.Parameter(torch.tensor(1.0))
        self.observed = ObservedLoss(config.max_seq_len) if engram.as_original else None
        self.decodes_by_rerunning = engram.as_original

    def initialise(self) -> None:
        nn.init.normal_(self.type_embedding, std=0.02)
        nn.init.normal_(self.upsampler.positions, std=0.02)

    def new_cache(self) -> ReplaceCache:
        return ReplaceCache()

    def new_slots(self, table: SlotTable) -> ReplaceSlots:
        return ReplaceSlots(table, self.config.window)

    def enter(self, index: int, x: Tensor, state: EngramState) -> tuple[Tensor, Tensor, BlockInputs]:
        if index > self.extract_after:
            vectors, gates = state.carried  # [B, n, d], [B or 1, n, 1]
            x = gates * vectors + (1 - gates) * x
        return x, state.positions, BlockInputs()

    def leave(self, index: int, x: Tensor, state: EngramState) -> Tensor:
        if index == self.extract_after:
            self._extract(x, state)
        return x

    def _extract(self, hidden: Tensor, state: EngramState) -> None:
        if isinstance(state.cache, ReplaceSlots):
            self._extract_step(hidden, state.cache, state)
            return
        cache = state.cache if state.cache is not None else ReplaceCache()
        n_open = 0 if cache.pending is None else cache.pending.shape[1]
        windows, _ = cache.complete(hidden, self.config.window)
        means = windows.mean(dim=2)  # [B, m, d]
        engrams = self.encoder(means)  # [B, m, K, d]
        distances = 1 - F.cosine_similarity(means.detach(), engrams.mean(dim=2), dim=-1)  # [B, m]
        logits, closed = self._decide(distances)
        gates, entropy = logits.sigmoid(), gate_entropy(logits)
        if closed is not None:
            gates, entropy = gates.masked_fill(closed, 0.0), entropy.masked_fill(closed, 0.0)
        recon = distances.sum() / max(distances.numel(), 1)
        if (dropped := self.dropped(hidden.device)) is not None:
            gates = gates.masked_fill(dropped, 0.0)
            entropy, recon = entropy.masked_fill(dropped, 0.0), recon.masked_fill(dropped, 0.0)
        sign = 1 if self.config.as_original else -1
        state.losses["recon"] = self.config.recon_weight * recon
        state.losses["gate_entropy"] = sign * self.config.gate_entropy_weight * entropy

        vectors = self.upsampler(self.theirs(engrams)) + self.type_embedding  # [B, m, W, d]
        if not self.config.as_original:
            vectors, gates = cache.shift(vectors, gates)  # one window later
        vectors, gates = vectors.flatten(1, 2), gates.repeat_interleave(self.config.window, dim=1).unsqueeze(-1)
        n = hidden.shape[1]
        if (missing := n_open + n - vectors.shape[1]) > 0:  # an unfinished window, left as it is
            vectors, gates = F.pad(vectors, (0, 0, 0, missing)), F.pad(gates, (0, 0, 0, missing))
        state.carried = vectors[:, n_open : n_open + n], gates[:, n_open : n_open + n]

    def _extract_step(self, hidden: Tensor, slots: ReplaceSlots, state: EngramState) -> None:
        """Take in one token of each slot, hidden states [n, 1, d]: it reads the window before the one that it is in."""
        vectors = slots.vectors.rows[slots.table.rows, slots.places].unsqueeze(1)  # [n, 1, d]
        state.carried = vectors, slots.gates.rows.clone().unsqueeze(-1)  # [n, 1, 1]
        windows = slots.complete(hidden)
        if windows is None:
            return
        means, rows = windows[0].mean(dim=1, keepdim=True), windows[1]  # [M, 1, d]
        engrams = self.encoder(means)  # [M, 1, K, d]
        distances = 1 - F.cosine_similarity(means, engrams.mean(dim=2), dim=-1)  # [M, 1]
        slots.gates.rows[rows] = self._decide(distances)[0].sigmoid()
        slots.vectors.rows[rows] = self.upsampler(engrams).squeeze(1) + self.type_embedding

    def _decide(self, distances: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the gates [B or 1, m] for reconstruction distances [B, m]; and whether they are closed anyway."""
        if self.observed is None:
            return self.alpha * (self.theta - distances), None
        losses = self.observed.window_means(distances.shape[1], self.config.window)
        return (self.alpha * (losses - self.theta)).unsqueeze(0), self.observed.nothing_yet()
