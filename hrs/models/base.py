"""The one interface of every language model: audit, evaluation, export, retrieval and serving know only this."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class ModelOutput:
    """What one pass returns. B batch, T tokens, V vocabulary, d width."""

    hidden: Tensor
    """[B, T, d], normalised, ready for :meth:`LanguageModel.unembed`."""
    logits: Tensor | None = None
    """[B, T, V]; position t scores token t + 1. None from :meth:`LanguageModel.encode`."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Auxiliary losses by name, scalar, already weighted: training adds them to the cross-entropy. Empty in eval
    mode."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached diagnostics by name: ``tier_share`` [n_layers, n_tiers] (mean routing weights) and
    ``routing_entropy`` [n_layers] (nats) where there is a router."""


class Cache:
    """State of incremental decoding for one batch of sequences."""

    length: int = 0
    """Tokens decoded so far."""


class LanguageModel(nn.Module, ABC):
    """A causal language model over token ids."""

    vocab_size: int
    max_seq_len: int
    blocks: nn.ModuleList
    """The layers in order; each returns its residual stream [B, T, d] (alone, or first of a tuple)."""

    @property
    @abstractmethod
    def input_embedding(self) -> nn.Module:
        """The module that turns token ids [B, T] into vectors [B, T, d]."""

    @abstractmethod
    def encode(self, tokens: Tensor) -> ModelOutput:
        """Everything but the logits, for token ids [B, T], T <= max_seq_len.

        Raises:
            ValueError: if T exceeds ``max_seq_len``.
        """

    @abstractmethod
    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states [..., d]. Applied to chunks of positions where V is large."""

    @abstractmethod
    def new_cache(self, batch_size: int) -> Cache:
        """An empty cache for ``batch_size`` sequences."""

    @abstractmethod
    def decode(self, tokens: Tensor, cache: Cache) -> ModelOutput:
        """Continue by token ids [B, n], n >= 1: logits [B, n, V] as :meth:`forward` would give at those positions.

        Updates ``cache`` in place. Evaluation mode only.

        Raises:
            ValueError: if the sequence would exceed ``max_seq_len``.
        """

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """A partition of all parameters by the role that phases address, for example ``backbone`` or ``router``."""

    def forward(self, tokens: Tensor) -> ModelOutput:
        """Hidden states, logits and losses of token ids [B, T]."""
        output = self.encode(tokens)
        output.logits = self.unembed(output.hidden)
        return output

    def set_progress(self, fraction: float) -> None:
        """Tell the model which share of training is done, for quantities that anneal. Default: nothing does."""

    @torch.no_grad()
    def count_parameters(self) -> int:
        """Distinct scalars; a tied tensor counts once."""
        return sum(p.numel() for p in self.parameters())
