"""What must fit together before a run begins."""

from pathlib import Path

from hrs.config import ExperimentConfig
from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.models.geometry import TokenGeometry
from hrs.training.checkpoint import latest_checkpoint
from hrs.training.runtime import Runtime
from hrs.training.sharing import Workers


def require_trainable(
    config: ExperimentConfig,
    store: TokenStore,
    directory: Path,
    runtime: Runtime,
    geometry: TokenGeometry | None,
    workers: Workers | None,
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
