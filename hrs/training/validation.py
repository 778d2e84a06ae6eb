"""Validation loss during training: the same windows for every model, and no trace left in the run's random state."""

import numpy as np
import torch
from torch import Tensor

from hrs.config import ExperimentConfig
from hrs.data import TokenSplit
from hrs.data.windows import WindowMemories, evaluation_windows, history, strangers, window_memory
from hrs.gpu import with_batch_that_fits
from hrs.models.base import LanguageModel, WindowContext
from hrs.training.loss import IGNORED, chunking_for, cross_entropy
from hrs.training.randomness import get_rng, set_rng
from hrs.training.runtime import autocast


class Validation:
    """Mean cross-entropy in nats per token over a split, or over windows spread evenly through it.

    Windows do not overlap, so early positions have little context: comparable between steps and models, but higher
    than the final evaluation.
    """

    def __init__(self, split: TokenSplit, config: ExperimentConfig, memories: WindowMemories | None = None) -> None:
        window = config.model.max_seq_len
        windows = list(evaluation_windows(len(split), window, window))
        wanted = config.training.validation_windows
        if 0 < wanted < len(windows):
            windows = [windows[i * len(windows) // wanted] for i in range(wanted)]
        self._split = split
        self._windows = windows
        self._most = max(1, len(windows))  # windows at a time, as far as the memory is known to hold
        self._length = min(window + 1, len(split))
        self._precision = config.training.precision
        self._memories, self._shown = memories, config.training.retrieval.memory
        self._seekers = strangers(np.array([start for start, _ in windows]))

    def loss(self, model: LanguageModel, device: torch.device, batch: int) -> float:
        """Return nats per token, ``batch`` windows at a time or as many as the memory holds. Leaves ``model`` in
        training mode.

        Raises:
            HRSError: if not even one window at a time fits the memory.
        """
        rng = get_rng(device)
        model.eval()
        try:
            result, self._most = with_batch_that_fits(
                lambda n_windows: self._mean(model, device, n_windows), min(batch, self._most), device, "validation"
            )
        finally:
            model.train()
        set_rng(rng, device)
        return result

    @torch.no_grad()
    def _mean(self, model: LanguageModel, device: torch.device, batch: int) -> float:
        nats, scored = 0.0, 0
        for first in range(0, len(self._windows), batch):
            windows = self._windows[first : first + batch]
            tokens, targets = self._read(windows)
            context = self._context(first, windows, model.history_tokens, device)
            with autocast(self._precision, device):
                hidden = model.encode(tokens.to(device), context).hidden
                mean = cross_entropy(
                    model.unembed,
                    hidden,
                    targets.to(device),
                    vocab_size=model.vocab_size,
                    unembedding=model.unembedding(),
                    chunking=chunking_for(device),
                )
            nats += mean.item() * targets.numel()  # ignored targets add nothing, but are in the mean's denominator
            scored += int((targets != IGNORED).sum())
        return nats / scored

    def _read(self, windows: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Inputs and targets [len(windows), T]; targets that an earlier window scores are marked."""
        positions = np.array([start for start, _ in windows])[:, None] + np.arange(self._length)  # [B, T + 1]
        tokens = self._split.tokens[positions].astype(np.int64)
        targets = tokens[:, 1:].copy()
        targets[positions[:, 1:] < np.array([scored for _, scored in windows])[:, None]] = IGNORED
        return torch.from_numpy(tokens[:, :-1]), torch.from_numpy(targets)

    def _context(
        self, first: int, windows: list[tuple[int, int]], n_history: int, device: torch.device
    ) -> WindowContext | None:
        if not n_history and self._memories is None:
            return None
        starts, context = np.array([start for start, _ in windows]), WindowContext()
        if n_history:
            context.history = torch.from_numpy(history(self._split, starts, n_history))
        if self._memories is not None:
            seekers = self._seekers[first : first + len(windows)]
            memory = window_memory(self._memories, self._shown, "validation", starts, seekers)
            context.memory = None if memory is None else torch.from_numpy(memory)
        return context.to(device)
