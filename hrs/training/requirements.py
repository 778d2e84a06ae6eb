"""What must fit together before a run begins."""

from pathlib import Path

import torch

from hrs.config import ExperimentConfig
from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.models import build_model
from hrs.models.geometry import TokenGeometry
from hrs.training.checkpoint import latest_checkpoint
from hrs.training.phases import check_phases, phases_of
from hrs.training.retrieval import TrainingMemories
from hrs.training.runtime import Runtime
from hrs.training.sharing import Workers


def require_consistent(config: ExperimentConfig) -> None:
    """Raise HRSError for a config that no text, device or checkpoint makes trainable; needs none of them."""
    retrieval, kind = config.training.retrieval, config.model.engram.kind
    if bool(retrieval.base) != (kind == "retrieved"):
        raise HRSError(
            f"engram.kind={kind} and training.retrieval.base='{retrieval.base}' do not fit: a model that reads "
            "memories needs the run whose engrams find them, and no other model does; jobs/retrieval_study.py sets both"
        )
    if retrieval.memory == "shuffled" and config.training.batch_sequences < 2:
        raise HRSError("training.retrieval.memory=shuffled needs training.batch_sequences of 2 or more windows")
    with torch.device("meta"):
        model = build_model(config.model)  # its parts refuse what their configs cannot judge alone
    check_phases(phases_of(config.training.phases, config.training.steps), model)


def require_trainable(
    config: ExperimentConfig,
    store: TokenStore,
    directory: Path,
    runtime: Runtime,
    geometry: TokenGeometry | None,
    workers: Workers | None,
    memories: TrainingMemories | None = None,
) -> None:
    """Raises HRSError if ``config`` cannot be trained with these; the arguments are those of ``train``."""
    training, model = config.training, config.model
    if workers is not None and workers.size != training.sharing.workers:
        raise HRSError(
            f"{workers.size} workers were started and the config has training.sharing.workers="
            f"{training.sharing.workers}: start as many as it says"
        )
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
    if model.family == "manifold" and geometry is None and latest_checkpoint(directory) is None:
        raise HRSError(
            "a new run of family manifold reads the geometry of its tokens and none was given: "
            "compute it from the training text first and pass it to train()"
        )
    require_consistent(config)
    retrieval = config.training.retrieval
    if retrieval.base and memories is None:
        raise HRSError(
            f"training.retrieval.base={retrieval.base} needs the memories of that run and none were given: build its "
            "bank first and pass it to train(), as jobs/retrieval_study.py does"
        )
    if memories is not None and memories.fingerprint != retrieval.fingerprint:
        raise HRSError(
            f"training.retrieval.fingerprint is {retrieval.fingerprint or 'empty'} and the memories given are those of "
            f"a base with {memories.fingerprint}: give those of the run that the config names"
        )
