"""Activation checkpointing: keep only the input of every block and recompute the rest (Chen et al. 2016)."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from hrs.models import LanguageModel


def checkpoint_activations(model: LanguageModel) -> None:
    """Make every block of ``model`` recompute itself in the backward pass, with the same noise; names do not change."""
    for block in model.blocks:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapped
