"""What a training step asks of a GPU, counted on fake tensors: attention without masks, and kernels within a budget."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distinct_models import DISTINCT_HRS
from torch._subclasses.fake_tensor import FakeTensorMode

from hrs.models import build_model
from hrs.presets import experiment
from hrs.training.gpu_time import fuse, trace_training
from hrs.training.memory_imitation import ImitateCuda
from hrs.training.memory_step import context_of
from hrs.training.optimizer import build_optimizer
from hrs.training.step import Stepper

MASKED = {"window", "recurrence", "replace", "memory", "retrieved"}
"""Kinds of engrams whose attention needs a mask: their vectors stand between tokens in visibility, or may be absent."""


class _Calls(ImitateCuda):
    """Collect the shape of the mask of every attention call; None for a call that is causal or complete."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[tuple[int, ...] | None] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else (kwargs or {}).get("attn_mask")
            self.masks.append(None if mask is None else tuple(mask.shape))
        return super().__torch_function__(func, types, args, kwargs)


def masks_of(name: str) -> list[tuple[int, ...] | None]:
    """Return the masks of the attention calls in one training pass of a preset at micro."""
    config = experiment(name, "micro")
    with FakeTensorMode():
        model = build_model(config.model).train()
        calls = _Calls()
        calls.cover(model)
        optimizer = build_optimizer(model, config.training.optimizer)
        stepper = Stepper(model, optimizer, config.training, torch.device("cpu"), 2)
        with calls:
            stepper.accumulate(torch.zeros(2, config.model.max_seq_len + 1, dtype=torch.int64), context_of(model, 2))
    return calls.masks


@pytest.mark.parametrize("name", DISTINCT_HRS)
def test_attention_has_a_mask_only_where_no_causal_flag_describes_it(name: str) -> None:
    """Without a mask the flash kernels run, and no [T, T] tensor is read."""
    masks = [mask for mask in masks_of(name) if mask is not None]
    kind = experiment(name, "micro").model.engram.kind
    assert not masks or kind in MASKED, f"{name} (engrams: {kind}) gives masks {masks}"


def test_masked_attention_is_seen() -> None:
    assert any(mask is not None for mask in masks_of("full_hrs"))
    assert masks_of("dense_baseline") == [None] * experiment("dense_baseline", "micro").model.n_layers


@pytest.mark.parametrize(("name", "budget"), [("dense_baseline", 310), ("v17_peer_only", 1250)])
def test_a_training_step_keeps_its_budget_of_kernels(name: str, budget: int) -> None:
    """An operator more in a layer is four to six more in each pass: noticed before a GPU that waits for launches is."""
    kernels = trace_training(experiment(name, "tiny"), micro_batch=4).kernels
    assert len(kernels) <= budget
    assert len(fuse(kernels)) < 0.75 * len(kernels)
