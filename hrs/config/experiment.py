"""Data, training and evaluation: with the model, everything that decides a run's numbers."""

import math
from dataclasses import dataclass, field
from typing import Literal

from hrs.config.checks import LARGEST_SEED, require_at_least, require_finite, require_within
from hrs.config.model import ModelConfig
from hrs.config.retrieval import RetrievalConfig
from hrs.errors import HRSError, shown


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which text, cut into which tokens."""

    PLACE = "data."

    corpus: str = "wiki-mini"
    """``wiki-mini``, ``bbc``, ``wikitext-103``, ``hf:NAME[:CONFIG]``, ``text:``, ``jsonl:`` or ``parquet:PATH``."""
    tokenizer: str = "gpt2"
    """``gpt2`` or ``bpe:N`` (byte-level BPE of N ids, trained on the training split)."""
    deduplicate: Literal["none", "exact", "near"] = "none"
    """Which training documents are left out because validation or test text holds them: none, those with the same text
    (up to case, white space and Unicode forms), or also those that share four fifths of their runs of five words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over the run, as shares of all steps, so that one schedule fits every scale."""

    PLACE = "training.schedule."

    shape: Literal["cosine", "wsd", "cosine_hold_linear"] = "cosine"
    """``cosine`` to the floor; ``wsd``: warm-up, stable, linear decay; ``cosine_hold_linear``: the warm-up times
    a cosine from step 0 to the floor, hold, linear to zero."""
    peak_lr: float = 3e-4
    """Highest learning rate."""
    warmup_frac: float = 0.02
    """Share of linear warm-up from zero."""
    floor_frac: float = 0.0
    """Lowest learning rate as a share of the peak."""
    decay_frac: float = 0.2
    """Share of the final linear decay (``wsd``, ``cosine_hold_linear``)."""
    hold_frac: float = 0.2
    """Share held at the floor before the final decay (``cosine_hold_linear``)."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, peak_lr=0.0)
        require_within(self, warmup_frac=(0, 1), floor_frac=(0, 1), decay_frac=(0, 1), hold_frac=(0, 1))
        tail = {"cosine": 0.0, "wsd": self.decay_frac, "cosine_hold_linear": self.decay_frac + self.hold_frac}
        if self.warmup_frac + tail[self.shape] > 1:
            raise HRSError("schedule: warmup_frac, hold_frac and decay_frac together must not exceed 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseConfig:
    """A stretch of training with its own learning-rate multiplier per parameter group."""

    PLACE = "training.phases: "

    name: str
    """Shown in logs and plots."""
    frac: float
    """Share of all steps. The fractions of all phases sum to 1."""
    multipliers: tuple[tuple[str, float], ...] = ()
    """(group, multiplier) pairs; groups that are not named keep 1."""
    freeze: tuple[str, ...] = ()
    """Parameter-name prefixes that do not learn in this phase."""
    reinitialise: tuple[str, ...] = ()
    """Parameters drawn anew, N(0, 0.02), at the first step of this phase."""

    def __post_init__(self) -> None:
        require_within(self, frac=(0, 1))
        groups = [group for group, _ in self.multipliers]
        if len(set(groups)) != len(groups):
            raise HRSError(f"training.phases: phase {shown(self.name)} gives a group two multipliers")
        if wrong := [(group, value) for group, value in self.multipliers if not 0 <= value < math.inf]:
            raise HRSError(
                f"training.phases: the multiplier of group {shown(wrong[0][0])} must be finite and not negative, "
                f"got {wrong[0][1]}"
            )
        if "" in (*self.freeze, *self.reinitialise):
            raise HRSError(f"training.phases: phase {shown(self.name)} names a parameter without letters")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) and gradient clipping."""

    PLACE = "training.optimizer."

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled decay of matrices."""
    decay_vectors: bool = False
    """Decay biases, norms and scalars too, as the original did."""
    clip_norm: float = 1.0
    """Global gradient norm over the groups that learn; 0 is off."""
    expert_updates: Literal["dense", "lazy"] = "dense"
    """How the tables of retrieved experts learn. ``dense``: all rows at every step. ``lazy``: only the rows that got a
    gradient; a row first catches up on the decay of its moments and weights over the k steps since its last update, but
    not on the movement by old momentum, so it is another optimiser unless every row is hit at every step. Faster and
    smaller where few rows are hit, slower where many are."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_within(self, beta1=(0, 0.999999), beta2=(0, 0.999999))
        require_at_least(self, eps=1e-30, weight_decay=0.0, clip_norm=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class AveragingConfig:
    """Exponential moving averages (EMA) of the weights beside the ones that learn (Polyak & Juditsky 1992)."""

    PLACE = "training.averaging."

    decays: tuple[float, ...] = ()
    """One average for each, updated after every optimiser step; empty is off."""
    start_frac: float = 0.0
    """Share of all steps after which the averages begin, as copies of the weights."""
    keep: Literal["best", "last"] = "best"
    """Which averaged weights the run is evaluated with. ``best``: those of the lowest validation loss of any average
    at any validation. ``last``: the first decay's at the last step."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_within(self, start_frac=(0, 1))
        if wrong := [d for d in self.decays if not 0 < d < 1]:
            raise HRSError(f"training.averaging.decays must lie between 0 and 1, got {wrong[0]:g}")
        if len(set(self.decays)) != len(self.decays):
            raise HRSError("training.averaging.decays must be different from each other")


@dataclass(frozen=True, kw_only=True, slots=True)
class SharingConfig:
    """Several workers that learn from parts of each batch."""

    PLACE = "training.sharing."

    workers: int = 1
    """Processes; each takes an equal part of every batch. The mean of their gradients is the gradient of the batch, so
    without ``unshared`` a run has the same result, up to rounding, for every number of workers."""
    unshared: tuple[str, ...] = ()
    """Parameter groups that learn from the first worker's part only, while all others get the mean."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, workers=1)
        if self.unshared and self.workers == 1:
            raise HRSError("training.sharing.unshared needs training.sharing.workers above 1: there is only one part")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """What the optimiser sees, step by step."""

    PLACE = "training."

    steps: int = 50_000
    """Optimiser steps."""
    batch_sequences: int = 48
    """Windows per step: the effective batch. How it is split into micro-batches is not part of a run's identity."""
    label_smoothing: float = 0.0
    """Share of the target spread over the vocabulary."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast; ``auto`` is fp32 on the CPU, and on a GPU bf16 if it computes that in hardware (compute capability 8.0
    or later), else fp16. fp16 scales the loss, and needs a GPU."""
    validations: int = 10
    """Times the validation loss is taken during training."""
    validation_windows: int = 0
    """Windows of those in-training validations; 0 is the whole split. The final evaluation always takes the whole."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    sharing: SharingConfig = field(default_factory=SharingConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    phases: tuple[PhaseConfig, ...] = ()
    """Empty: one phase in which every multiplier is 1."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, steps=1, batch_sequences=1, validations=0, validation_windows=0)
        require_within(self, label_smoothing=(0, 1))
        if self.batch_sequences % self.sharing.workers:
            raise HRSError(
                f"training.sharing.workers {self.sharing.workers} must divide batch_sequences {self.batch_sequences}"
            )
        if self.phases and abs(sum(p.frac for p in self.phases) - 1) > 1e-6:
            raise HRSError(
                f"training.phases: fractions sum to {sum(p.frac for p in self.phases):g}, they must sum to 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How the final numbers are taken."""

    PLACE = "evaluation."

    stride_frac: float = 0.5
    """Step between evaluation windows as a share of max_seq_len: 0.5 gives every token at least half a context."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_within(self, stride_frac=(1e-6, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentConfig:
    """Everything that decides a run's numbers."""

    preset: str = "dense_baseline"
    scale: str = "tiny"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        require_within(self, seed=(0, LARGEST_SEED))

    @property
    def tokens_per_step(self) -> int:
        return self.training.batch_sequences * self.model.max_seq_len
