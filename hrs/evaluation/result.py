"""The numbers of one trained model on one split, and their two files."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hrs import strict_json
from hrs.errors import HRSError
from hrs.files import write_whole

_NUMBERS, _DOCUMENTS = "evaluation.json", "documents.arrow"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluation:
    """What :func:`hrs.evaluation.evaluate` measured. Losses are in nats unless they say bits."""

    nats_per_token: float
    """Mean over all targets, end-of-text ones included."""
    perplexity: float | None
    """exp of that: comparable between models of one tokenizer only. None if it is larger than any float64."""
    bits_per_byte: float
    """Loss of the text alone (no end-of-text targets) over its UTF-8 bytes: comparable between tokenizers."""
    word_perplexity: float | None
    """exp(loss of the text alone / words between white space). None if it is larger than any float64, as in a language
    that puts no spaces between words."""
    n_tokens: int
    """Targets scored: every token of the split but the first, each once."""
    loss_by_position: NDArray[np.float64]
    """[T], mean over all windows of the loss at each position of the window."""
    flops_per_token: float
    """Operations of a forward pass over one window, counted as they run, over its tokens; a multiply-add is two."""
    effective_rank: list[float]
    """Per block: of its raw outputs, see :func:`hrs.evaluation.diagnostics.effective_rank`."""
    routing_entropy: list[float]
    """Per block, nats, mean over all windows; empty without a router."""
    tier_share: list[list[float]]
    """Per block and tier: mean routing weight over all windows; empty without a router."""
    bits_per_byte_shuffled: float | None = None
    """Bits per byte when every window reads the summaries (engrams) of another window: as low as the true one where
    their content is not used. None without summaries."""
    expert_coverage: list[float] = field(default_factory=list)
    """Per block: share of the experts that any token of any window retrieved; empty without PEER."""
    expert_unevenness: list[float] = field(default_factory=list)
    """Per block: Kullback-Leibler divergence in nats of the experts' retrieval weights from uniform ones, between 0 and
    the logarithm of their number; empty without PEER."""
    dead_experts: list[int] = field(default_factory=list)
    """Per block: experts that no token retrieved; empty without PEER."""
    effective_rank_projected: list[float] = field(default_factory=list)
    """Per block: the effective rank after the locality projection, which is how the original measured all models but
    its baseline; empty without a locality head."""
    category_accuracy: float | None = None
    """Share of held-out windows whose topic the categorisation head names; None without one."""
    category_majority: float | None = None
    """What always naming the commonest topic of the training text would reach on these windows."""
    category_probe: float | None = None
    """What logistic regression on the mean final states of training windows reaches on them."""
    documents: pa.Table
    """One row per document: document, title, topic, nats (all its targets), text_nats (without its end-of-text),
    tokens (targets), bytes, words."""

    def metrics(self) -> dict[str, float]:
        """Single numbers by short names, without those that are None; lists over blocks become their mean."""
        names = ("nats_per_token", "bits_per_byte", "flops_per_token")
        metrics = {name: float(getattr(self, name)) for name in names}
        metrics["effective_rank"] = float(np.mean(self.effective_rank))
        by_block = (
            "effective_rank_projected",
            "routing_entropy",
            "expert_coverage",
            "expert_unevenness",
            "dead_experts",
        )
        metrics |= {name: float(np.mean(getattr(self, name))) for name in by_block if getattr(self, name)}
        optional = (
            "perplexity",
            "word_perplexity",
            "bits_per_byte_shuffled",
            "category_accuracy",
            "category_majority",
            "category_probe",
        )
        metrics |= {name: getattr(self, name) for name in optional if getattr(self, name) is not None}
        for index, share in enumerate(np.mean(self.tier_share, axis=0) if self.tier_share else []):
            metrics[f"tier_share_{index}"] = float(share)
        return metrics

    def save(self, directory: Path) -> None:
        """Write ``evaluation.json`` and ``documents.arrow``. The former comes last: where it stands, both are whole."""
        directory.mkdir(parents=True, exist_ok=True)
        numbers = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "documents"}
        numbers["loss_by_position"] = self.loss_by_position.tolist()
        table = pa.BufferOutputStream()
        with pa.ipc.new_file(table, self.documents.schema) as writer:
            writer.write_table(self.documents)
        write_whole(directory / _DOCUMENTS, table.getvalue().to_pybytes())
        write_whole(directory / _NUMBERS, strict_json.dumps(numbers, indent=1))

    @classmethod
    def load(cls, directory: Path) -> "Evaluation":
        """Read what :meth:`save` wrote, now or before it knew of experts, projections and topics.

        Raises:
            HRSError: naming the file that is missing or unreadable.
        """
        file = directory / _NUMBERS
        try:
            numbers: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            file = directory / _DOCUMENTS
            documents = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
            file = directory / _NUMBERS
            numbers["loss_by_position"] = np.asarray(numbers["loss_by_position"], dtype=np.float64)
            return cls(**numbers, documents=documents)
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise HRSError(f"evaluation {file} cannot be read ({error}): evaluate the run again") from error
