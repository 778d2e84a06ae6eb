"""The locality head: nearby positions should have similar projections (InfoNCE, van den Oord et al. 2018)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import LocalityConfig
from hrs.nn.products import Linear


def info_nce(anchors: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Scalar loss: tell each anchor's positive from negatives shared by all anchors of its sequence.

    Args:
        anchors, positives: [B, A, d].
        negatives: [B, N, d].
        temperature: divides the cosine similarities.
    """
    anchors, positives, negatives = (F.normalize(v, dim=-1) for v in (anchors, positives, negatives))
    positive = (anchors * positives).sum(dim=-1, keepdim=True)  # [B, A, 1]
    logits = torch.cat((positive, anchors @ negatives.transpose(1, 2)), dim=-1) / temperature  # [B, A, 1 + N]
    return (logits.logsumexp(dim=-1) - logits[..., 0]).mean()


class LocalityHead(nn.Module):
    """One linear projection, shared by all blocks, on which :func:`info_nce` is taken."""

    def __init__(self, config: LocalityConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.projection = Linear(d_model, d_model, bias=False)

    def sample(self, n_tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of anchors [A], of their positives [A] (possibly the anchor itself), and of negatives [N].

        The distance that anchors keep from both ends shrinks if the sequence is too short for it.
        """
        config = self.config
        margin = min(config.window, (n_tokens - 1) // 2)
        reach = margin // 2
        anchors = torch.randint(margin, n_tokens - margin, (config.n_anchors,), device=device)
        positives = anchors + torch.randint(-reach, reach + 1, (config.n_anchors,), device=device)
        return anchors, positives, torch.randint(n_tokens, (config.n_negatives,), device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Unweighted scalar loss of one block's output [B, T, d], at freshly drawn positions."""
        positions = self.sample(x.shape[1], x.device)
        projected = self.projection(x[:, torch.cat(positions)])  # [B, 2 A + N, d]
        anchors, positives, negatives = projected.split([len(p) for p in positions], dim=1)
        return info_nce(anchors, positives, negatives, self.config.temperature)
