"""Engrams: a text as the mean of the hidden states that a model has while it reads the text alone."""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrs.errors import HRSError
from hrs.models import LanguageModel


def model_fingerprint(model: LanguageModel) -> str:
    """16 hex digits of all weights and persistent buffers: their names, shapes, types and values, on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(plain.view(torch.uint8).numpy()))
    return digest.hexdigest()[:16]


@torch.no_grad()
def engrams(
    model: LanguageModel, segments: Sequence[Sequence[int]], *, block: int | None = None, batch_size: int = 16
) -> NDArray[np.float32]:
    """[N, d], mean over positions of the hidden states of each segment, read in evaluation mode.

    Only segments of one length are read together: nothing is padded, so no segment's engram depends on the others, but
    for the rounding of a batch.

    Args:
        model: on any device; its mode is restored.
        segments: token ids of each, 1 to ``max_seq_len`` of them.
        block: the residual stream after this block, counted from the end if negative (-2 in the original HRS); None
            for the final normalised states.
        batch_size: segments read at once.

    Raises:
        HRSError: for a segment that is empty, too long or has unknown ids, or a block that the model does not have.
    """
    index = _block_index(model, block)
    _require_readable(model, segments)
    if batch_size < 1:
        raise HRSError(f"batch_size must be 1 or more, got {batch_size}")
    device = next(model.parameters()).device
    by_length: dict[int, list[int]] = {}
    for number, segment in enumerate(segments):
        by_length.setdefault(len(segment), []).append(number)
    means = np.empty((len(segments), model.d_model), dtype=np.float32)
    was_training = model.training
    if was_training:
        model.eval()
    try:
        for rows in by_length.values():
            for start in range(0, len(rows), batch_size):
                chosen = rows[start : start + batch_size]
                ids = torch.tensor([list(segments[row]) for row in chosen], device=device)
                means[chosen] = _states(model, ids, index).double().mean(dim=1).cpu().numpy()
    finally:
        if was_training:
            model.train()
    return means


def _states(model: LanguageModel, ids: Tensor, block: int | None) -> Tensor:
    """[B, T, d]"""
    if block is None:
        return model.encode(ids).hidden[..., : model.d_model]
    with _output_of(model.blocks[block]) as outputs:
        model.encode(ids)
    return outputs[-1][:, -ids.shape[1] :]  # engrams that are a prefix stand in front of the tokens


@contextmanager
def _output_of(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What the module returns to this thread: another may decode with the same model meanwhile."""
    outputs: list[Tensor] = []
    thread = threading.get_ident()

    def record(module: torch.nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(record)
    try:
        yield outputs
    finally:
        handle.remove()


def _block_index(model: LanguageModel, block: int | None) -> int | None:
    n = len(model.blocks)
    if block is None:
        return None
    if not -n <= block < n:
        raise HRSError(f"block {block} is none of the model's {n}: give {-n} to {n - 1}, or None for the final states")
    return block % n


def _require_readable(model: LanguageModel, segments: Sequence[Sequence[int]]) -> None:
    for number, segment in enumerate(segments):
        if not 1 <= len(segment) <= model.max_seq_len:
            raise HRSError(
                f"segment {number} has {len(segment)} tokens and the model reads 1 to {model.max_seq_len} at once: "
                "cut the text into segments of that length"
            )
        if not 0 <= min(segment) <= max(segment) < model.vocab_size:
            raise HRSError(f"segment {number} has an id outside the model's vocabulary of {model.vocab_size}")
