"""Training as a generator: it yields progress, resumes by itself, and ends when the last checkpoint is on disk.

A run killed at any step and started again ends with the weights it would have had, bit for bit on the CPU: batches are
a function of (seed, step), noise comes from the global generators, and their states are in every checkpoint.
"""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrs.config import AveragingConfig, ExperimentConfig
from hrs.data import TokenStore
from hrs.data.categories import token_labels
from hrs.data.windows import TrainingWindows, history, window_categories, window_memory
from hrs.errors import HRSError
from hrs.gpu import explained, gpu_of, move
from hrs.models import build_model
from hrs.models.base import WindowContext
from hrs.models.geometry import TokenGeometry
from hrs.training.activations import checkpoint_activations
from hrs.training.averaging import Averages
from hrs.training.batches import Batch, Batches
from hrs.training.checkpoint import config_as_json, keep_tokenizer, read_latest, restore
from hrs.training.checkpoint_writer import CheckpointSchedule, CheckpointWriter
from hrs.training.interval import IntervalMeans
from hrs.training.memory import fit_micro_batch
from hrs.training.optimizer import build_optimizer, set_rates
from hrs.training.phases import Phase, enter_phase, phase_at, phases_of
from hrs.training.progress import MemoryMeter, Progress, TrainingSummary
from hrs.training.randomness import get_rng, set_rng
from hrs.training.requirements import require_trainable
from hrs.training.retrieval import TrainingMemories, start_from
from hrs.training.runtime import DEFAULT_RUNTIME, Runtime, half_type
from hrs.training.schedule import lr
from hrs.training.sharing import Workers, checksums
from hrs.training.step import REMEDY, Stepper, largest_divisor
from hrs.training.validation import Validation

MAX_SKIPPED_IN_A_ROW = 10
STEPS_BETWEEN_CHECKS = 10
"""Where a GPU is not waited for at every step."""

_log = logging.getLogger(__name__)


def train(
    config: ExperimentConfig,
    store: TokenStore,
    directory: Path,
    runtime: Runtime = DEFAULT_RUNTIME,
    geometry: TokenGeometry | None = None,
    workers: Workers | None = None,
    memories: TrainingMemories | None = None,
) -> Iterator[Progress]:
    """Train ``config`` on ``store`` in ``directory``, from its last checkpoint if it has one.

    Yields every ``runtime.log_every`` steps, at every validation, and at the last step. A run that is complete yields
    nothing. What the consumer draws from torch's global generators between reports does not reach the run.

    A thread writes the checkpoints. Whatever ends the generator waits for the one in flight; closing it at a report
    also writes one of that step, unless ``runtime.checkpoint_every`` names the steps or there are several workers.

    Args:
        geometry: what a manifold-guided network reads. Only a new run of that family needs it: checkpoints hold it.
        workers: this process's place among ``training.sharing.workers`` that all call this with the same arguments.
            Only the first of them yields, validates and writes. Without it this process does the work of all.
        memories: what ``training.retrieval`` names: the memories of windows, and the weights that a new run starts
            from. Needed if its base is set, else not wanted.

    Raises:
        HRSError: if the micro-batch does not divide the batch, the model does not fit the memory, the loss is not
            finite ten steps in a row, the disk is full, the directory holds another run, a geometry is missing,
            memories are missing or those of another base, or the workers come apart (another one ended, or other
            weights).
    """
    run = _Run(config, store, Path(directory), runtime, geometry, workers, memories)
    try:
        while run.step < config.training.steps:
            with explained(run.device, "training needs more memory than its forward passes", REMEDY):
                progress = run.advance()
            if progress is not None:
                rng = get_rng(run.device)
                try:
                    yield progress
                except GeneratorExit:
                    set_rng(rng, run.device)
                    run.save_before_closing()
                    raise
                set_rng(rng, run.device)
            run.save_if_due()
        if run.first:
            run.write_summary()
    finally:
        run.close()


class _Run:
    """State of one run in this process."""

    def __init__(
        self,
        config: ExperimentConfig,
        store: TokenStore,
        directory: Path,
        runtime: Runtime,
        geometry: TokenGeometry | None,
        workers: Workers | None,
        memories: TrainingMemories | None,
    ) -> None:
        training, model = config.training, config.model
        require_trainable(config, store, directory, runtime, geometry, workers, memories)
        torch.set_num_threads(runtime.threads)
        torch.manual_seed(config.seed)
        self.config, self.store, self.directory, self.runtime = config, store, directory, runtime
        self.workers, self.first = workers, workers is None or workers.first
        self.device = runtime.torch_device()
        half_type(training.precision, self.device)  # refuses what the device cannot compute, before anything is built
        gpu = gpu_of(self.device)
        if gpu is not None:
            gpu.release_cached_memory()  # a warm process has trained other runs
            gpu.reset_peak()
        self.memory = MemoryMeter(self.device)
        self.windows = TrainingWindows(store.train.tokens, model.max_seq_len, training.batch_sequences, config.seed)
        self.memories = memories
        self.validation = Validation(store.validation, config, memories) if training.validations else None
        n = training.validations
        self.validation_steps = {round((i + 1) * training.steps / n) for i in range(n)}
        self.model = move(build_model(model, geometry), self.device).train()
        if memories is not None:
            start_from(memories.base_weights, self.model)
        self.labels = token_labels(store, "train", model.category) if self.model.n_categories else None
        self.optimizer = build_optimizer(self.model, training.optimizer)
        self.phases = phases_of(training.phases, training.steps)
        if runtime.activation_checkpointing:
            checkpoint_activations(self.model)
        averaging = training.averaging if self.first else AveragingConfig()
        with explained(self.device, f"{len(averaging.decays)} averages of the weights are too much", REMEDY):
            self.averages = Averages(averaging, self.model, training.steps)
        with explained(self.device, "the state of the optimizer is too much", REMEDY):
            state = self._restored_state()
        if self.first:
            self.tokenizer_digest = keep_tokenizer(self.directory, store.tokenizer, state.get("tokenizer"))
        self.step: int = state["step"]
        self.seconds: float = state["seconds"]
        self.step_seconds: float = state["step_seconds"]
        self.skipped: int = state["skipped_steps"]
        self.skipped_in_a_row: int = state["skipped_in_a_row"]
        self.peak_memory_bytes: int = state["peak_memory_bytes"]
        self.check_every = runtime.check_every or (STEPS_BETWEEN_CHECKS if self.device.type == "cuda" else None)
        self.unchecked: list[Tensor] = []
        self.interval = IntervalMeans(state["interval"])
        self.interval_steps, self.interval_seconds = 0, 0.0
        self.phase: Phase | None = None
        self.stepper = Stepper(
            self.model,
            self.optimizer,
            training,
            self.device,
            self._micro_batch(state),
            compiled=runtime.compiles(self.device, lazy_experts=training.optimizer.expert_updates == "lazy"),
            compile_may_fail=runtime.compile is None,
            workers=workers,
        )
        if self.stepper.loss_scale is not None and state.get("loss_scale"):
            self.stepper.loss_scale.restore(state["loss_scale"])
        self.writer = CheckpointWriter(
            self.directory, self.model, self.optimizer, self.device, self.averages, gpu_of(self.device)
        )
        self.batches = Batches(self._prepare, training.steps, self.device, gpu_of(self.device))
        self.schedule = CheckpointSchedule(runtime, training.steps)
        self.saved_step = self.step
        self._require_equal_workers("at the start")

    # ---- one step ----------------------------------------------------------------------------------------------------

    def advance(self) -> Progress | None:
        """Do one step, and validate or report if it is time."""
        began = time.perf_counter()
        updated = self._learn()
        self.step += 1
        self.averages.follow(self.step, updated=updated)
        elapsed = time.perf_counter() - began
        self.seconds += elapsed
        self.step_seconds += elapsed
        self.interval_steps += 1
        self.interval_seconds += elapsed
        last = self.step == self.config.training.steps
        progress = None
        if self.first and (last or self.step % self.runtime.log_every == 0 or self.step in self.validation_steps):
            progress = self._report()
        if last:
            self.averages.finish(self.step)
        self.seconds += time.perf_counter() - began - elapsed
        return progress

    def _learn(self) -> bool | Tensor:
        """Do one optimiser step; False if it was skipped. A tensor if only the device knows yet."""
        training, step = self.config.training, self.step
        phase = phase_at(self.phases, step)
        if phase is not self.phase:
            enter_phase(phase, step, self.model, self.optimizer)
            self.phase = phase
        self.model.set_progress(step / training.steps)
        self.lr = lr(training.schedule, step, training.steps)
        set_rates(self.optimizer, self.lr, phase.multipliers)
        if self.check_every is None:
            diagnostics = self.stepper.step(*self.batches.of(step))
            if self.first and diagnostics is not None:
                self.interval.add(diagnostics)
            scaled_too_much = self.stepper.overflowed is not None and bool(self.stepper.overflowed)
            self._count(step, taken=diagnostics is not None, excused=scaled_too_much)
            return diagnostics is not None
        diagnostics, taken = self.stepper.step_without_waiting(*self.batches.of(step))
        if self.first:
            self.interval.add(diagnostics, taken)
        excused = self.stepper.overflowed
        self.unchecked.append(torch.stack([taken, torch.zeros_like(taken) if excused is None else excused]))
        if len(self.unchecked) >= self.check_every:
            self._check(step + 1)
        return taken

    def _check(self, steps: int) -> None:
        """Wait for the device and count the steps, up to ``steps`` in all, that it has not told about."""
        flags = torch.stack(self.unchecked).tolist() if self.unchecked else []
        self.unchecked.clear()
        for step, (taken, excused) in enumerate(flags, steps - len(flags)):
            self._count(step, taken=taken, excused=excused)

    def _count(self, step: int, *, taken: bool, excused: bool) -> None:
        """Count a step; one that the loss scale skipped, ``excused``, is no sign of divergence."""
        self.skipped += not taken
        if excused:
            return
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise HRSError(
                f"loss or gradient was not finite {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {step}: lower "
                "training.schedule.peak_lr; the weights before these steps are in the last checkpoint"
            )

    def _prepare(self, step: int) -> Batch:
        """The windows of a step, and what the model wants to be told of them besides their tokens, on the CPU."""
        tokens = torch.from_numpy(self.windows.batch(step))
        n_history = self.model.history_tokens
        if not n_history and self.labels is None and self.memories is None:
            return tokens, None
        starts, context = self.windows.starts(step), WindowContext()
        if n_history:
            context.history = torch.from_numpy(history(self.store.train, starts, n_history))
        if self.labels is not None:
            window = self.config.model.max_seq_len
            context.category = torch.from_numpy(window_categories(self.labels, starts, window))
        if self.memories is not None:
            shown = self.config.training.retrieval.memory
            memory = window_memory(self.memories, shown, "train", starts, np.roll(starts, 1))
            context.memory = None if memory is None else torch.from_numpy(memory)
        return tokens, context

    def _report(self) -> Progress:
        assert self.phase is not None
        self._check(self.step)
        if not self.schedule.by_time:
            self.writer.wait()  # checkpoints at steps that were asked for are there when a report says so
        steps = self.config.training.steps
        metrics = {}
        for name, values in self.interval.take().items():
            metrics.update(self._named(name, values))
        if self.step in self.validation_steps:
            metrics["validation_loss"] = self._validation_loss()
            metrics |= self.averages.validate(self._validation_loss, self.step)
        speed = self.interval_steps * self.config.tokens_per_step / self.interval_seconds
        self.interval_steps, self.interval_seconds = 0, 0.0
        self.peak_memory_bytes = max(self.peak_memory_bytes, self.memory.peak_bytes())
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

    def _validation_loss(self) -> float:
        assert self.validation is not None
        return self.validation.loss(self.model, self.device, self.stepper.micro_batch)

    def _named(self, name: str, values: list[float]) -> dict[str, float]:
        """A diagnostic as scalars; the elements of ``tier_share`` carry the names of their tiers."""
        if len(values) == 1:
            return {name: values[0]}
        labels = self.config.model.tiers.names if name == "tier_share" else range(len(values))
        return {f"{name}_{label}": value for label, value in zip(labels, values, strict=True)}

    # ---- what survives -----------------------------------------------------------------------------------------------

    def save_if_due(self) -> None:
        """Begin a checkpoint if one is due; after the last step, wait until it is on the disk."""
        self.writer.raise_if_failed()
        last = self.step == self.config.training.steps
        due = self.schedule.due(self.step, self.writer.checkpoint_bytes)
        if self.schedule.by_time and not last:
            due = due and not self.writer.busy
            if self.workers is not None:
                due = self.workers.agree(due)
        if not due:
            return
        self._require_equal_workers(f"after step {self.step}")
        if not self.first:
            return
        began = time.perf_counter()
        self._save()
        if last:
            self.writer.wait()
        self.seconds += time.perf_counter() - began

    def save_before_closing(self) -> None:
        """Write a checkpoint of a run that the consumer leaves at a report, unless its steps were asked for."""
        if self.schedule.by_time and self.workers is None and self.step > self.saved_step:
            try:
                self._save()
            except HRSError as error:
                _log.warning("%s", error)

    def close(self) -> None:
        """End the threads. A failure of the checkpoint in flight is logged, since the run ends for another reason."""
        self.batches.close()
        del self.batches  # it refers to this run, whose model would live on in a warm worker
        try:
            self.writer.wait()
        except HRSError as error:
            _log.warning("%s", error)

    def _save(self) -> None:
        self._check(self.step)
        state = {
            "config": config_as_json(self.config),
            "data": self.store.fingerprint,
            "tokenizer": self.tokenizer_digest,
            "step": self.step,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "skipped_steps": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "peak_memory_bytes": self.peak_memory_bytes,
            "micro_batch": self.stepper.micro_batch,
            "loss_scale": self.stepper.loss_scale and self.stepper.loss_scale.state(),
            "interval": self.interval.state(),
            "kept": self.averages.kept and self.averages.kept.facts(),
        }
        self.writer.begin(state)
        self.saved_step = self.step
        self.schedule.taken()

    def _require_equal_workers(self, when: str) -> None:
        if self.workers is not None:
            self.workers.require_equal({"step": self.step} | checksums(self.model), when)

    def _restored_state(self) -> dict[str, Any]:
        """Counters of the last checkpoint, its tensors put back; those of a new run if there is none."""
        checkpoint = read_latest(self.directory)
        if checkpoint is None:
            self.averages.follow(0, updated=False)
            names = ("step", "seconds", "step_seconds", "skipped_steps", "skipped_in_a_row", "peak_memory_bytes")
            return dict.fromkeys(names, 0) | {"micro_batch": None, "interval": None}
        state = checkpoint.state
        same = {"data": None}  # where the text lies may differ: the fingerprint tells what it is
        before, now = state["config"] | same, config_as_json(self.config) | same
        if (before, state["data"]) != (now, self.store.fingerprint):
            raise HRSError(f"{self.directory} holds a run of another config or other data: use another directory")
        restore(checkpoint, self.model, self.optimizer, self.device, self.averages)
        return state

    def _micro_batch(self, state: dict[str, Any]) -> int:
        """Return what the user asked for; else the smaller of what an earlier session used and what is predicted to
        fit."""
        sharing, asked = self.config.training.sharing, self.runtime.micro_batch
        batch = self.config.training.batch_sequences // sharing.workers
        if asked is not None:
            if batch % asked:
                part = f" of each of {sharing.workers} workers" if sharing.workers > 1 else ""
                raise HRSError(f"micro_batch {asked} must divide batch {batch}{part}")
            return asked
        found, limit = state["micro_batch"], self.runtime.micro_batch_limit
        if found is None and limit is None and self.runtime.memory_limit_bytes is not None:
            return fit_micro_batch(self.config, self.runtime.memory_limit_bytes, self.runtime).micro_batch
        # An earlier session may have run out of memory where the plan says that it fits.
        return largest_divisor(batch, min(n for n in (batch, found, limit) if n is not None))

    def write_summary(self) -> None:
        """Write ``training.json``."""
        kept = self.averages.kept
        TrainingSummary(
            seconds=self.seconds,
            tokens_per_second=self.step * self.config.tokens_per_step / self.step_seconds,
            peak_memory_bytes=self.peak_memory_bytes,
            skipped_steps=self.skipped,
            micro_batch=self.stepper.micro_batch,
            kept_step=kept.step if kept else None,
            kept_decay=kept.decay if kept else None,
        ).save(self.directory)
