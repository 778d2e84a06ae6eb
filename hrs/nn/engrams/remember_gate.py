"""How much of a window's engrams to keep, and the entropy that keeps such gates undecided."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RememberGate(nn.Module):
    """A network 4 -> 32 -> 1 with GELU on four numbers about each window; its sigmoid scales the window's engrams.

    It starts as the constant sigmoid(2) = 0.88. The original set the weights of *both* layers to 0, so that neither
    ever got a gradient: its gate was one number for all windows, for good. Here only the second layer starts at 0.
    """

    HIDDEN = 32
    INITIAL_BIAS = 2.0

    def __init__(self, *, as_original: bool) -> None:
        super().__init__()
        self.as_original = as_original
        self.hidden = nn.Linear(4, self.HIDDEN)
        self.output = nn.Linear(self.HIDDEN, 1)

    def initialise(self) -> None:
        """Must run after the model's general initialisation, which would overwrite it."""
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.output.bias, self.INITIAL_BIAS)
        if self.as_original:
            nn.init.zeros_(self.hidden.weight)

    def forward(self, surprise: Tensor, means: Tensor, engrams: Tensor) -> Tensor:
        """Logits of the gates, [B, m].

        Args:
            surprise: a number for each window, [B, m] or [m].
            means: mean hidden states [B, m, d].
            engrams: [B, m, K, d].
        """
        centres = engrams.mean(dim=2)  # [B, m, d]
        scale = means.shape[-1] ** -0.5
        features = torch.stack(
            (
                surprise.expand(means.shape[:2]),
                F.cosine_similarity(means, centres, dim=-1),
                scale * means.norm(dim=-1),
                scale * centres.norm(dim=-1),
            ),
            dim=-1,
        )  # [B, m, 4]
        logits = self.output(F.gelu(self.hidden(features))).squeeze(-1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def standardised(losses: Tensor) -> Tensor:
    """Losses of windows [m] less their mean, over their standard deviation; 0 if they are all alike."""
    spread = losses.std(correction=1 if len(losses) > 1 else 0)
    return (losses - losses.mean()) / spread.clamp_min(1e-6)


def gate_entropy(logits: Tensor) -> Tensor:
    """Mean binary entropy of gates sigmoid(logits) in nats, a scalar between 0 and ln 2; 0 if there are no gates."""
    # -g ln g - (1 - g) ln (1 - g) with ln(1 - g) = -softplus(z): exact for decided gates, gradient finite.
    entropies = F.softplus(logits) - logits * logits.sigmoid()
    return entropies.sum() / max(entropies.numel(), 1)
