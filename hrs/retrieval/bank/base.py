"""The base of a model that reads memories: the run whose weights it began with, and which makes its slots."""

import hashlib
from pathlib import Path

from tokenizers import Tokenizer

from hrs.config import ExperimentConfig
from hrs.errors import HRSError
from hrs.identity import code_fingerprint
from hrs.models import LanguageModel
from hrs.retrieval.engrams import model_fingerprint
from hrs.training import load_trained


def weights_fingerprint(model: LanguageModel) -> str:
    """16 hex digits of a base's weights, and of the code that makes memories with them."""
    code = code_fingerprint(Path(__file__).with_name(name) for name in ("memory_bank.py", "chunks.py", "keys.py"))
    return hashlib.sha256("\n".join((model_fingerprint(model), code)).encode()).hexdigest()[:16]


def base_of(config: ExperimentConfig, base_directory: Path, tokenizer: Tokenizer) -> LanguageModel:
    """The base that ``training.retrieval`` names, on the CPU, in evaluation mode.

    Args:
        config: of a run that reads memories.
        base_directory: of the base's run, or one of its checkpoints.
        tokenizer: of the text that the base will read.

    Raises:
        HRSError: if it cannot be read, has another fingerprint or another shape than the config says, or learned with
            another tokenizer.
    """
    trained = load_trained(base_directory)
    base, base_config = trained.model, trained.config
    if (fingerprint := weights_fingerprint(base)) != (named := config.training.retrieval.fingerprint):
        raise HRSError(
            f"the base in {base_directory} has fingerprint {fingerprint} and training.retrieval.fingerprint says "
            f"{named or 'nothing'}: name the run that the config was made for"
        )
    if (base_config.model.d_model, base_config.model.max_seq_len) != (config.model.d_model, config.model.max_seq_len):
        raise HRSError("the base and the run that reads its memories must have one d_model and one max_seq_len")
    if trained.tokenizer is not None and trained.tokenizer.to_str() != tokenizer.to_str():
        raise HRSError(
            f"the base in {base_directory} learned with another tokenizer than the run that reads its memories, so it "
            "would read other words: train both on one corpus"
        )
    return base


def slots_per_chunk(config: ExperimentConfig) -> int:
    """How many slots each chunk gives of the ``engram.slots`` that a window reads.

    Raises:
        HRSError: if they do not divide, or the chunks are too short for them or too long for the model.
    """
    retrieval, n_slots = config.training.retrieval, config.model.engram.slots
    per_chunk, rest = divmod(n_slots, 2 * retrieval.neighbours)
    if rest or not 0 < per_chunk <= retrieval.chunk_tokens:
        raise HRSError(
            f"engram.slots {n_slots} must be a multiple of 2 * training.retrieval.neighbours = "
            f"{2 * retrieval.neighbours}, and at most chunk_tokens {retrieval.chunk_tokens} times that"
        )
    if retrieval.values == "means" and retrieval.chunk_tokens % per_chunk:
        raise HRSError(f"chunk_tokens {retrieval.chunk_tokens} do not make {per_chunk} equal parts per chunk")
    if retrieval.chunk_tokens > config.model.max_seq_len:
        raise HRSError(
            f"training.retrieval.chunk_tokens {retrieval.chunk_tokens} is longer than max_seq_len "
            f"{config.model.max_seq_len}"
        )
    return per_chunk
