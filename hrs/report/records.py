"""One run as the report needs it: plain data, wherever it was recorded."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # importing a record must not cost the import of Arrow
    import pyarrow as pa

Status = Literal["finished", "failed", "killed", "stopped", "running", "missing"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """What one run was, how it ended, and every number the report may show.

    A run that never ran is a record too (``status="missing"``), so that a hole in a table can be seen.
    """

    key: str
    """The run key: content hash of config, data and code."""
    preset: str
    scale: str
    seed: int
    status: Status
    """``stopped`` was ended early by a scheduler; ``killed`` by a signal, a cancel or a dead machine."""
    reason: str = ""
    """One line that says why a run did not finish; empty if there is nothing to say."""
    causal: bool | None = None
    """Verdict of the causality audit; None if there was none."""
    audit_failures: tuple[str, ...] = ()
    """One short sentence per failed audit test."""
    parameters: int | None = None
    """Trainable parameters."""
    tokens_per_second: float | None = None
    """Training throughput."""
    peak_memory_bytes: int | None = None
    """Highest memory of training on its device."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Final values: ``bits_per_byte``, ``perplexity``, ``nats_per_token``, ``word_perplexity``, and so on."""
    documents: "pa.Table | None" = None
    """One row per validation document: document, title, topic, nats, text_nats, tokens, bytes, words."""
    loss_by_position: list[float] | None = None
    """Mean nats of the token at each position of the context, [T]."""
    history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Curves by metric name: (step, value) in order of steps."""
    code_version: str = ""
    """Version of the code that made the run (:func:`hrs.identity.code_version`); empty if it never ran."""
    data_fingerprint: str = ""
    """Of the token store that the run was trained on; empty if it never ran."""
    sample: dict[str, Any] = field(default_factory=dict)
    """What a search drew for this run, by name of the field; empty for a run that no search made."""
    config: dict[str, Any] = field(default_factory=dict)
    """The experiment as nested dicts, as :func:`hrs.config.to_dict` gives it."""
    tier_share: list[list[float]] | None = None
    """Mean routing share of each tier, one list per block; None for models without a router."""
