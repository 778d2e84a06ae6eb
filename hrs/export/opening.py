"""Models from wherever they lie (a run, one of its checkpoints, an artifact, a folder of the transformers library), and
the text that is theirs.

A model reads only the ids that it learned: its tokenizer is the run's own or the artifact's, and its tokens are those
that it was trained on, whatever became of the corpus. Every command opens models and text here.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from hrs.config import ExperimentConfig
from hrs.data import TokenStore, open_tokens, open_tokens_in, stored_tokens
from hrs.data.tokenization import adopt_tokenizer, build_tokenizer
from hrs.errors import HRSError
from hrs.evaluation import AuditReport
from hrs.export.artifact import load_artifact
from hrs.models import LanguageModel
from hrs.models.pretrained import PretrainedModel, is_pretrained, load_pretrained
from hrs.presets import experiment
from hrs.training import TrainedModel, load_model, load_trained

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class OpenedModel:
    """All that it takes to generate text."""

    model: LanguageModel
    """On the CPU, in eval mode."""
    config: ExperimentConfig
    tokenizer: Tokenizer
    causal: bool | None
    """What its audit said; None if there was none."""
    data_fingerprint: str = ""
    """Of the tokens that it was trained on; empty if that is not known."""


def load(path: Path) -> tuple[LanguageModel, ExperimentConfig]:
    """The model of a run directory, of one of its checkpoints, or of an artifact: on the CPU, in eval mode.

    Raises:
        HRSError: if there is none, or it cannot be used.
    """
    if Path(path).is_file():
        artifact = load_artifact(Path(path))
        return artifact.model, artifact.config
    if is_pretrained(path):
        model = load_pretrained(path)
        return model, _described(model, path)
    return load_model(Path(path))


def _described(model: PretrainedModel, folder: Path) -> ExperimentConfig:
    """A config that tells the sizes of a model that was trained elsewhere; no model is built from it."""
    base = experiment("dense_baseline", "micro")
    sizes = replace(
        base.model, vocab_size=model.vocab_size, d_model=model.d_model, n_layers=len(model.blocks), n_heads=1,
        max_seq_len=model.max_seq_len,
    )  # fmt: skip
    return replace(base, preset=folder.absolute().name, scale="pretrained", model=sizes)


def open_model(path: Path, tokens: Path) -> OpenedModel:
    """A model with its tokenizer: that of the artifact or of the run. A run of an earlier version that kept none has
    that of its tokens below ``tokens``.

    Raises:
        HRSError: if there is no model, it cannot be used, or its tokenizer is lost.
    """
    if path.is_file():
        artifact = load_artifact(path)
        data, causal = artifact.header["data"]["fingerprint"], artifact.header["source"]["causal"]
        return OpenedModel(artifact.model, artifact.config, artifact.tokenizer, causal, data)
    if is_pretrained(path):
        model, config = load(path)
        return OpenedModel(model, config, adopt_tokenizer(path), causal=None)
    trained = load_trained(path)
    tokenizer = trained.tokenizer or _tokenizer_of_tokens(trained, tokens)
    return OpenedModel(trained.model, trained.config, tokenizer, verdict(path), trained.data_fingerprint)


def _tokenizer_of_tokens(trained: TrainedModel, tokens: Path) -> Tokenizer:
    if trained.config.data.tokenizer == "gpt2":  # the same for every text
        return build_tokenizer("gpt2", iter(()))
    return open_tokens(trained.config.data, tokens, trained.data_fingerprint or None).tokenizer


def open_text(opened: OpenedModel, tokens: Path, corpus: str | None = None) -> TokenStore:
    """The tokens that a model was trained on, or those of another corpus in the model's own tokenizer.

    Args:
        tokens: folder of the token stores. Text that is not there is built, if the corpus still gives what the model
            was trained on.
        corpus: other text, on purpose.

    Raises:
        HRSError: if the corpus has changed and the tokens are lost, or if they have another tokenizer than the model.
    """
    if corpus is not None:
        return open_tokens_in(opened.tokenizer, corpus, tokens)
    if isinstance(opened.model, PretrainedModel):
        raise HRSError(f"{opened.config.preset} was trained elsewhere, on unknown text: name the text with --corpus")
    data = opened.config.data
    store = open_tokens(data, tokens, opened.data_fingerprint or None)
    if store.tokenizer.to_str() != opened.tokenizer.to_str():
        raise HRSError(
            f"{data.tokenizer} of corpus {data.corpus} is another tokenizer than this model's, which reads only the "
            "ids that it learned: `hrs evaluate --corpus` reads text with the model's own tokenizer"
        )
    return store


def stored_text(opened: OpenedModel, tokens: Path) -> TokenStore | None:
    """The same if it lies below ``tokens``: nothing is built, and no corpus is looked at. None if it does not."""
    if not opened.data_fingerprint or stored_tokens(tokens, opened.data_fingerprint) is None:
        return None
    return open_text(opened, tokens)


def verdict(checkpoint: Path) -> bool | None:
    """What the audit of the checkpoint's run said; None if there was none."""
    for directory in (checkpoint, checkpoint.absolute().parent.parent):
        if (path := directory / "audit.json").is_file():
            try:
                return AuditReport.load(path).causal
            except HRSError as error:
                _log.warning("%s, and until then counts as none", error)
                return None
    return None
