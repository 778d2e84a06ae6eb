"""What training cost so far at each position, for the gates of the original that looked at it."""

import torch
from torch import Tensor, nn


class ObservedLoss(nn.Module):
    """Moving average of the training cross-entropy at each position of a window, mean over the batch.

    The original kept one average per row of the batch, but which text stands in a row is chance: they estimate the same
    number. As in the original it starts at 0, and is the same whatever text is being read.
    """

    DECAY = 0.99
    average: Tensor
    pending: Tensor
    counts: Tensor

    def __init__(self, max_seq_len: int) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(max_seq_len))
        # What passes showed since the last update: sum, and number of passes.
        self.register_buffer("pending", torch.zeros(max_seq_len), persistent=False)
        self.register_buffer("counts", torch.zeros(max_seq_len), persistent=False)

    @torch.no_grad()
    def observe(self, losses: Tensor) -> None:
        """Note the cross-entropy [n] of one pass at the first n positions, nats."""
        self.pending[: len(losses)] += losses
        self.counts[: len(losses)] += 1

    @torch.no_grad()
    def keep(self) -> None:
        """Take what was noted into the average."""
        mean = self.pending / self.counts.clamp_min(1)
        updated = self.DECAY * self.average + (1 - self.DECAY) * mean
        self.average.copy_(torch.where(self.counts > 0, updated, self.average))
        self.drop()

    def drop(self) -> None:
        """Forget what was noted."""
        self.pending.zero_()
        self.counts.zero_()

    def drop_unless(self, taken: Tensor) -> None:
        """Forget what was noted if ``taken``, a boolean scalar, is False; does not wait for its value."""
        for noted in (self.pending, self.counts):
            noted.copy_(torch.where(taken, noted, 0.0))

    def window_means(self, n_windows: int, window: int) -> Tensor:
        """Average over each of the first windows, [n_windows], without positions at which no loss was ever seen: the
        last of a training window has its target outside."""
        rows = self.average[: n_windows * window].unflatten(0, (n_windows, window))
        return rows.sum(dim=1) / (rows > 0).sum(dim=1).clamp_min(1)

    def nothing_yet(self) -> Tensor:
        """Whether no loss was ever taken in: a boolean scalar on the device."""
        return (self.average == 0).all()
