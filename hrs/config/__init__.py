"""One experiment as frozen dataclasses: typed dotted overrides, canonical JSON, content hash.

A config decides *everything* that may change a number (model, data, training, seed) and nothing else: how a run
is executed (device, micro-batch, threads) lives in :class:`hrs.training.Runtime` and is not hashed.
"""

from hrs.config.codec import canonical_json, content_hash, flatten, from_dict, override, parse_assignments, to_dict
from hrs.config.components import (
    AttentionConfig,
    CategoryConfig,
    EngramConfig,
    LocalityConfig,
    PeerConfig,
    RouterConfig,
    TestTimeMemoryConfig,
    TierConfig,
)
from hrs.config.experiment import (
    AveragingConfig,
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    OptimizerConfig,
    PhaseConfig,
    ScheduleConfig,
    SharingConfig,
    TrainingConfig,
)
from hrs.config.manifold import GeometryConfig, ManifoldConfig
from hrs.config.model import ModelConfig
from hrs.config.retrieval import RetrievalConfig

__all__ = [
    "AttentionConfig", "AveragingConfig", "CategoryConfig", "DataConfig", "EngramConfig", "EvaluationConfig",
    "ExperimentConfig", "GeometryConfig", "LocalityConfig", "ManifoldConfig", "ModelConfig", "OptimizerConfig",
    "PeerConfig", "PhaseConfig", "RetrievalConfig", "RouterConfig", "ScheduleConfig", "SharingConfig",
    "TestTimeMemoryConfig", "TierConfig", "TrainingConfig",
    "canonical_json", "content_hash", "flatten", "from_dict", "override", "parse_assignments", "to_dict",
]  # fmt: skip
