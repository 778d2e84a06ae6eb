"""Engrams: a few vectors that summarise each window of hidden states for the blocks above."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import EngramConfig


class EngramEncoder(nn.Module):
    """Mean hidden state of a window to K vectors: d -> 2d -> K d with GELU, each normalised."""

    def __init__(self, d_model: int, per_window: int) -> None:
        super().__init__()
        self.per_window = per_window
        self.hidden = nn.Linear(d_model, 2 * d_model)
        self.output = nn.Linear(2 * d_model, per_window * d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, means: Tensor) -> Tensor:
        """Window means [B, n, d] to engrams [B, n, K, d]."""
        return self.norm(self.output(F.gelu(self.hidden(means))).unflatten(-1, (self.per_window, -1)))


class EngramCache:
    """Hidden states of the window that is still open, and how many windows are complete."""

    def __init__(self) -> None:
        self.pending: Tensor | None = None
        self.n_windows = 0


class Engrams(nn.Module):
    """Cuts hidden states into windows and encodes every complete one; an incomplete last window has no engrams."""

    def __init__(self, config: EngramConfig, d_model: int) -> None:
        super().__init__()
        self.window = config.window
        self.per_window = config.per_window
        self.encoder = EngramEncoder(d_model, config.per_window)
        self.type_embedding = nn.Parameter(torch.empty(d_model))

    def forward(self, hidden: Tensor, cache: EngramCache | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Summarise the windows that hidden states [B, n, d] complete.

        Returns:
            Engrams [B, m K, d] of m windows; the last position [m K] of each one's window; and per window the
            reconstruction loss 1 - cos(mean hidden state, mean engram), averaged (0 if m = 0).
        """
        before = 0
        if cache is not None:
            before = cache.n_windows
            hidden = hidden if cache.pending is None else torch.cat((cache.pending, hidden), dim=1)
        m = hidden.shape[1] // self.window
        complete, rest = hidden.split((m * self.window, hidden.shape[1] - m * self.window), dim=1)
        if cache is not None:
            cache.pending, cache.n_windows = rest, before + m
        means = complete.unflatten(1, (m, self.window)).mean(dim=2)  # [B, m, d]
        engrams = self.encoder(means)  # [B, m, K, d]
        ends = torch.arange(before + 1, before + m + 1, device=hidden.device) * self.window - 1
        distance = 1 - F.cosine_similarity(means.detach(), engrams.mean(dim=2), dim=-1)  # [B, m]
        reconstruction = distance.sum() / max(distance.numel(), 1)
        return engrams.flatten(1, 2) + self.type_embedding, ends.repeat_interleave(self.per_window), reconstruction
