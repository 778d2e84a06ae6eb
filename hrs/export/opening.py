"""Models from wherever they lie: a run's directory, one of its checkpoints, or an artifact."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from hrs.config import ExperimentConfig
from hrs.data import open_tokens
from hrs.evaluation import AuditReport
from hrs.export.artifact import load_artifact
from hrs.models import LanguageModel
from hrs.training import load_model


@dataclass(frozen=True, slots=True, eq=False)
class OpenedModel:
    """All that it takes to generate text."""

    model: LanguageModel
    """On the CPU, in eval mode."""
    config: ExperimentConfig
    tokenizer: Tokenizer
    causal: bool | None
    """What its audit said; None if there was none."""


def load(path: Path) -> tuple[LanguageModel, ExperimentConfig]:
    """The model of a run directory, of one of its checkpoints, or of an artifact: on the CPU, in eval mode.

    Raises:
        HRSError: if there is none, or it cannot be used.
    """
    if Path(path).is_file():
        artifact = load_artifact(Path(path))
        return artifact.model, artifact.config
    return load_model(Path(path))


def open_model(path: Path, tokens: Path) -> OpenedModel:
    """The same with its tokenizer: an artifact brings its own, a checkpoint's lies with its data below ``tokens``.

    Raises:
        HRSError: if there is no model, or it cannot be used, or the data of a checkpoint is not at hand.
    """
    if path.is_file():
        artifact = load_artifact(path)
        return OpenedModel(artifact.model, artifact.config, artifact.tokenizer, artifact.header["source"]["causal"])
    model, config = load_model(path)
    return OpenedModel(model, config, open_tokens(config.data, tokens).tokenizer, verdict(path))


def verdict(checkpoint: Path) -> bool | None:
    """What the audit of the checkpoint's run said; None if there was none."""
    for directory in (checkpoint, checkpoint.absolute().parent.parent):
        if (path := directory / "audit.json").is_file():
            return AuditReport.from_json(path.read_text(encoding="utf-8")).causal
    return None
