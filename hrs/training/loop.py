"""Training as a generator: it yields progress, resumes by itself, and ends when the last checkpoint is on disk.

A run killed at any step and started again ends with the weights it would have had, bit for bit on the CPU: batches are
a function of (seed, step), noise comes from the global generators, and their states are in every checkpoint.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from hrs.config import ExperimentConfig
from hrs.data import TokenStore
from hrs.data.categories import token_labels
from hrs.data.windows import TrainingWindows, history, window_categories
from hrs.errors import HRSError
from hrs.models import build_model
from hrs.models.base import WindowContext
from hrs.training.activations import checkpoint_activations
from hrs.training.checkpoint import config_as_json, read_latest, restore, save_checkpoint
from hrs.training.interval import IntervalMeans
from hrs.training.memory import fit_micro_batch
from hrs.training.optimizer import build_optimizer, set_rates
from hrs.training.phases import Phase, check_phases, enter_phase, phase_at, phases_of
from hrs.training.randomness import get_rng, set_rng
from hrs.training.runtime import DEFAULT_RUNTIME, Runtime
from hrs.training.schedule import lr
from hrs.training.step import Stepper
from hrs.training.validation import Validation

MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run stands after ``step`` of ``steps`` optimiser steps."""

    step: int
    steps: int
    loss: float
    """Mean training cross-entropy since the last report, in nats, without auxiliary terms; NaN if all was skipped."""
    metrics: dict[str, float]
    """``train_loss``, auxiliary losses by name, ``lr``, ``grad_norm`` (before clipping), ``phase`` (index),
    ``tier_share_<name>``, ``tokens_per_second``, ``skipped_steps``, and ``validation_loss`` when taken just now."""
    tokens_per_second: float
    """Since the last report, without validations and checkpoints."""
    seconds_left: float
    """At the run's mean speed, with validations and checkpoints."""
    phase: str
    """Name of the phase of the last step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSummary:
    """What a finished run cost; ``training.json`` in the run directory."""

    seconds: float
    """Over all sessions of the run, with validations and checkpoints, without steps that a crash undid."""
    tokens_per_second: float
    """Of the optimiser steps alone."""
    peak_memory_bytes: int
    """CUDA: the most its allocator had in use. CPU: the largest resident size of the whole process seen at a report,
    which in a process that did other work before includes what that left."""
    skipped_steps: int
    """Steps without an update, because the loss or the gradient was not finite."""
    micro_batch: int
    """Windows per forward pass at the end: smaller than asked for if memory ran out."""


def train(
    config: ExperimentConfig, store: TokenStore, directory: Path, runtime: Runtime = DEFAULT_RUNTIME
) -> Iterator[Progress]:
    """Train ``config`` on ``store`` in ``directory``, from its last checkpoint if it has one.

    Yields every ``runtime.log_every`` steps, at every validation, and at the last step. A run that is complete yields
    nothing. What the consumer draws from torch's global generators between reports does not reach the run.

    Raises:
        HRSError: if the micro-batch does not divide the batch, the model does not fit the memory, the loss is not
            finite ten steps in a row, the disk is full, or the directory holds another run.
    """
    run = _Run(config, store, Path(directory), runtime)
    while run.step < config.training.steps:
        progress = run.advance()
        if progress is not None:
            rng = get_rng(run.device)
            yield progress
            set_rng(rng, run.device)
        run.save_if_due()
    run.write_summary()


class _Run:
    """State of one run in this process."""

    def __init__(self, config: ExperimentConfig, store: TokenStore, directory: Path, runtime: Runtime) -> None:
        training, model = config.training, config.model
        if store.vocab_size != model.vocab_size:
            raise HRSError(
                f"the token store has {store.vocab_size} ids and the model {model.vocab_size}: "
                f"open the store of this experiment's data, tokenizer {config.data.tokenizer}"
            )
        if runtime.compile and training.optimizer.expert_updates == "lazy":
            raise HRSError(
                "a compiled model has no sparse gradients, which training.optimizer.expert_updates=lazy needs: "
                "use expert_updates=dense, or do not compile"
            )
        torch.set_num_threads(runtime.threads)
        torch.manual_seed(config.seed)
        self.config, self.store, self.directory, self.runtime = config, store, directory, runtime
        self.device = runtime.torch_device()
        self.windows = TrainingWindows(store.train.tokens, model.max_seq_len, training.batch_sequences, config.seed)
        self.validation = Validation(store.validation, config) if training.validations else None
        n = training.validations
        self.validation_steps = {round((i + 1) * training.steps / n) for i in range(n)}
        self.model = build_model(model).to(self.device).train()
        self.labels = token_labels(store, "train", model.category) if self.model.n_categories else None
        self.optimizer = build_optimizer(self.model, training.optimizer)
        self.phases = phases_of(training.phases, training.steps)
        check_phases(self.phases, self.model)
        if runtime.activation_checkpointing:
            checkpoint_activations(self.model)

        state = self._restored_state()
        self.step: int = state["step"]
        self.seconds: float = state["seconds"]
        self.step_seconds: float = state["step_seconds"]
        self.skipped: int = state["skipped_steps"]
        self.skipped_in_a_row: int = state["skipped_in_a_row"]
        self.peak_memory_bytes: int = state["peak_memory_bytes"]
        self.interval = IntervalMeans(state["interval"])
        self.interval_steps, self.interval_seconds = 0, 0.0
        self.phase: Phase | None = None
        self.stepper = Stepper(
            self.model, self.optimizer, training, self.device, self._micro_batch(state), compiled=runtime.compile
        )

    # ---- one step ----------------------------------------------------------------------------------------------------

    def advance(self) -> Progress | None:
        """Do one step, and validate or report if it is time."""
        began = time.perf_counter()
        self._learn()
        self.step += 1
        elapsed = time.perf_counter() - began
        self.seconds += elapsed
        self.step_seconds += elapsed
        self.interval_steps += 1
        self.interval_seconds += elapsed
        last = self.step == self.config.training.steps
        progress = None
        if last or self.step % self.runtime.log_every == 0 or self.step in self.validation_steps:
            progress = self._report()
        self.seconds += time.perf_counter() - began - elapsed
        return progress

    def _learn(self) -> None:
        training, step = self.config.training, self.step
        phase = phase_at(self.phases, step)
        if phase is not self.phase:
            enter_phase(phase, step, self.model, self.optimizer)
            self.phase = phase
        self.model.set_progress(step / training.steps)
        self.lr = lr(training.schedule, step, training.steps)
        set_rates(self.optimizer, self.lr, phase.multipliers)
        tokens = torch.from_numpy(self.windows.batch(step)).to(self.device, non_blocking=True)
        diagnostics = self.stepper.step(tokens, self._context(step))
        if diagnostics is not None:
            self.skipped_in_a_row = 0
            self.interval.add(diagnostics)
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise HRSError(
                f"loss or gradient was not finite {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {step}: lower "
                "training.schedule.peak_lr; the weights before these steps are in the last checkpoint"
            )

    def _context(self, step: int) -> WindowContext | None:
        """What the model wants to be told of the windows of a step besides their tokens; None if nothing."""
        n_history = self.model.history_tokens
        if not n_history and self.labels is None:
            return None
        starts, context = self.windows.starts(step), WindowContext()
        if n_history:
            context.history = torch.from_numpy(history(self.store.train, starts, n_history))
        if self.labels is not None:
            window = self.config.model.max_seq_len
            context.category = torch.from_numpy(window_categories(self.labels, starts, window))
        return context.to(self.device)

    def _report(self) -> Progress:
        assert self.phase is not None
        steps = self.config.training.steps
        metrics = {}
        for name, values in self.interval.take().items():
            metrics.update(self._named(name, values))
        if self.step in self.validation_steps and self.validation:
            metrics["validation_loss"] = self.validation.loss(self.model, self.device, self.stepper.micro_batch)
        speed = self.interval_steps * self.config.tokens_per_step / self.interval_seconds
        self.interval_steps, self.interval_seconds = 0, 0.0
        self.peak_memory_bytes = max(self.peak_memory_bytes, _memory_bytes(self.device))
        metrics |= {
            "lr": self.lr,
            "phase": float(self.phase.index),
            "tokens_per_second": speed,
            "skipped_steps": float(self.skipped),
        }
        return Progress(
            step=self.step,
            steps=steps,
            loss=metrics.get("train_loss", float("nan")),
            metrics=metrics,
            tokens_per_second=speed,
            seconds_left=(steps - self.step) * self.seconds / self.step,
            phase=self.phase.config.name,
        )

    def _named(self, name: str, values: list[float]) -> dict[str, float]:
        """A diagnostic as scalars; the elements of ``tier_share`` carry the names of their tiers."""
        if len(values) == 1:
            return {name: values[0]}
        labels = self.config.model.tiers.names if name == "tier_share" else range(len(values))
        return {f"{name}_{label}": value for label, value in zip(labels, values, strict=True)}

    # ---- what survives -----------------------------------------------------------------------------------------------

    def save_if_due(self) -> None:
        """Write a checkpoint at its step, and at the last one."""
        if self.step != self.config.training.steps and self.step % self.runtime.checkpoint_every:
            return
        began = time.perf_counter()
        state = {
            "config": config_as_json(self.config),
            "data": self.store.fingerprint,
            "step": self.step,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "skipped_steps": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "peak_memory_bytes": self.peak_memory_bytes,
            "micro_batch": self.stepper.micro_batch,
            "interval": self.interval.state(),
        }
        save_checkpoint(self.directory, self.model, self.optimizer, state, self.device)
        self.seconds += time.perf_counter() - began

    def _restored_state(self) -> dict[str, Any]:
        """Counters of the last checkpoint, its tensors put back; those of a new run if there is none."""
        checkpoint = read_latest(self.directory)
        if checkpoint is None:
            names = ("step", "seconds", "step_seconds", "skipped_steps", "skipped_in_a_row", "peak_memory_bytes")
            return dict.fromkeys(names, 0) | {"micro_batch": None, "interval": None}
        state = checkpoint.state
        if (state["config"], state["data"]) != (config_as_json(self.config), self.store.fingerprint):
            raise HRSError(f"{self.directory} holds a run of another config or other data: use another directory")
        restore(checkpoint, self.model, self.optimizer, self.device)
        return state

    def _micro_batch(self, state: dict[str, Any]) -> int:
        """What the user asked for; else what an earlier session found to fit; else what is predicted to fit."""
        batch, asked = self.config.training.batch_sequences, self.runtime.micro_batch
        if asked is not None:
            if batch % asked:
                raise HRSError(f"micro_batch {asked} must divide batch {batch}")
            return asked
        if state["micro_batch"] is not None:
            return int(state["micro_batch"])
        if self.runtime.memory_limit_bytes is not None:
            return fit_micro_batch(self.config, self.runtime.memory_limit_bytes, self.runtime).micro_batch
        return batch

    def write_summary(self) -> None:
        """Write ``training.json``."""
        summary = TrainingSummary(
            seconds=self.seconds,
            tokens_per_second=self.step * self.config.tokens_per_step / self.step_seconds,
            peak_memory_bytes=self.peak_memory_bytes,
            skipped_steps=self.skipped,
            micro_batch=self.stepper.micro_batch,
        )
        partial = self.directory / ".training.json.partial"
        partial.write_text(json.dumps(asdict(summary), indent=1), encoding="utf-8")
        os.replace(partial, self.directory / "training.json")


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
