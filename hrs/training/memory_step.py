"""The peak memory of one training step, on real or on fake tensors: the same code measures and predicts."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from hrs.config import ModelConfig, TrainingConfig
from hrs.models import build_model
from hrs.models.base import LanguageModel, WindowContext
from hrs.training.activations import checkpoint_activations
from hrs.training.lazy_adamw import lazy_parameters
from hrs.training.loss import CPU_CHUNKING, GPU_CHUNKING
from hrs.training.memory_imitation import ImitateCuda
from hrs.training.memory_sparse import carry_sparse_gradients, empty_gradient, parts
from hrs.training.memory_trace import Peak, StorageCounter, peak
from hrs.training.optimizer import build_optimizer, clip_gradients, gradient_norm
from hrs.training.step import Stepper


def measure_step(
    counter: StorageCounter,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accumulate_gradients: Callable[[], object],
    clip_norm: float,
) -> Peak:
    """The peak of one training step inside ``counter``, on real or fake tensors, from before the model's gradients to
    after its update. The optimiser's state exists before the step begins, as in every step but the first."""
    counter.see([*model.parameters(), *model.buffers()])
    tables = {id(p) for p in lazy_parameters(optimizer)}
    for parameter in model.parameters():
        parameter.grad = empty_gradient(parameter, lazy=id(parameter) in tables)
    optimizer.step()
    optimizer.zero_grad()
    accumulate_gradients()
    if clip_norm:
        clip_gradients(optimizer, clip_norm, gradient_norm(optimizer))
    optimizer.step()
    category = {counter.serial(value): "optimizer" for state in optimizer.state.values() for value in state.values()}
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    category |= {counter.serial(part): "gradients" for gradient in gradients for part in parts(gradient)}
    category |= {counter.serial(p): "parameters" for p in model.parameters()}
    return peak(counter.events, category, "activations")


def training_step_peak(
    counter: StorageCounter,
    model_config: ModelConfig,
    training: TrainingConfig,
    micro_batch: int,
    n_micro_batches: int,
    *,
    activation_checkpointing: bool = False,
    imitate_cuda: bool = False,
) -> Peak:
    """Build a model on the CPU and measure one of its training steps inside ``counter``.

    Two micro-batches stand for any larger number: the third finds what the second found, except for sparse gradients,
    see :mod:`hrs.training.memory_sparse`. ``imitate_cuda`` is for fake
    tensors.
    """
    imitation = ImitateCuda() if imitate_cuda else None
    model = build_model(model_config).train()
    if imitation is not None:
        imitation.cover(model)
    if activation_checkpointing:
        checkpoint_activations(model)
    optimizer = build_optimizer(model, training.optimizer)
    carry_sparse_gradients(optimizer, n_micro_batches)
    chunking = GPU_CHUNKING if imitate_cuda else CPU_CHUNKING
    stepper = Stepper(model, optimizer, training, torch.device("cpu"), micro_batch, chunking=chunking)
    windows = torch.zeros(micro_batch * min(2, n_micro_batches), model_config.max_seq_len + 1, dtype=torch.int64)
    context = context_of(model, len(windows))

    def accumulate_gradients() -> None:
        with imitation or nullcontext():
            # Not stepper.step: it reads the loss, and a fake tensor has no value.
            stepper.accumulate(windows, context)

    return measure_step(counter, model, optimizer, accumulate_gradients, training.optimizer.clip_norm)


def context_of(model: LanguageModel, batch: int) -> WindowContext | None:
    """Everything the model wants to be told of ``batch`` windows, in its shape; None if it wants nothing."""
    n_history = model.history_tokens
    history = torch.zeros(batch, n_history, dtype=torch.int64) if n_history else None
    category = torch.zeros(batch, dtype=torch.int64) if model.n_categories else None
    memory = torch.ones(batch, model.memory_slots, model.d_model) if model.takes_memory else None
    nothing = history is None and category is None and memory is None
    return None if nothing else WindowContext(history, category, memory)
