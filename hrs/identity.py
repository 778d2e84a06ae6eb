"""A run is its content: the key of a run hashes its config, its data and the code that can change its numbers."""

import ast
import functools
import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from hrs.closure import code_of, parse_code
from hrs.config import ExperimentConfig, canonical_json

_FUNCTIONS_OF_A_RUN = (
    "hrs.data.store:open_tokens", "hrs.manifold.build:open_manifold", "hrs.training.loop:train",
    "hrs.evaluation.perplexity:evaluate", "hrs.evaluation.audit:audit",
)  # fmt: skip
"""What a run's numbers come from; see :mod:`hrs.closure` for what counts of it."""


def code_fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over the syntax trees of Python files: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + ast.unparse(parse_code(path)).encode())
    return digest.hexdigest()


@functools.cache
def code_version() -> str:
    """Fingerprint of everything that can change a run's numbers, 12 hex digits."""
    return hashlib.sha256("\n".join(map(code_of, _FUNCTIONS_OF_A_RUN)).encode()).hexdigest()[:12]


def run_key(config: ExperimentConfig, data_fingerprint: str) -> str:
    """16 hex digits naming the run of ``config`` on that data with this code, on any machine.

    The fingerprint stands for the text: where it lies is no part of the key.
    """
    anywhere = replace(config, data=replace(config.data, corpus=""))
    text = "\n".join((canonical_json(anywhere), data_fingerprint, code_version()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
