"""What a forward pass tells besides its loss: rank of the states, and work done."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hrs.models.base import LanguageModel, WindowContext


def effective_rank(states: Tensor) -> float:
    """exp of the entropy of the normalised singular values of uncentred states [n, d] (Roy & Vetterli 2007).

    Between 1 and min(n, d); 0 for states that are all zero.
    """
    values = torch.linalg.svdvals(states.double())
    if not (total := values.sum()):
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


@contextmanager
def block_outputs(model: LanguageModel) -> Iterator[list[Tensor]]:
    """A list that each pass inside the context fills anew with every block's residual stream [B, T, d], in order."""
    outputs: list[Tensor] = []

    def start(module: nn.Module, args: Any) -> None:
        outputs.clear()

    def record(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [model.blocks[0].register_forward_pre_hook(start)]
    handles += [block.register_forward_hook(record) for block in model.blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def flops_per_token(model: LanguageModel, tokens: Tensor, context: WindowContext | None = None) -> float:
    """Operations that a forward pass over tokens [B, T] really runs, those on their history included, over B * T.

    Counted from the matrix products and convolutions dispatched, so work that a model computes and then discards (the
    masked half of attention, experts not chosen) counts.
    """
    # The fused CPU attention kernel has no formula in the counter; the plain one is made of products that do.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, context)
    return counter.get_total_flops() / tokens.numel()
