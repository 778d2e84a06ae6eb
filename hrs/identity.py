"""A run is its content: the key of a run hashes its config, its data and the code that can change its numbers."""

import ast
import functools
import hashlib
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from hrs.config import DataConfig, ExperimentConfig, canonical_json

_PACKAGE = Path(__file__).parent
_ROOMS_THAT_MATTER = ("data", "nn", "models", "manifold", "training", "evaluation")
# Some releases of CPython (3.11.7 is one) count the depth of all threads' ast.parse in one number: a garbage collection
# that switches threads inside one ends it with a SystemError (python/cpython#106905).
_one_parse_at_a_time = threading.Lock()


def code_fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over the syntax trees of Python files: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with _one_parse_at_a_time:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [s for s in body if not _is_docstring(s)]  # type: ignore[attr-defined]
        digest.update(path.name.encode() + ast.unparse(tree).encode())
    return digest.hexdigest()


def _is_docstring(statement: ast.AST) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


@functools.cache
def code_version() -> str:
    """Fingerprint of everything that can change a run's numbers, 12 hex digits."""
    return code_fingerprint(p for room in _ROOMS_THAT_MATTER for p in (_PACKAGE / room).rglob("*.py"))[:12]


def run_key(config: ExperimentConfig, data_fingerprint: str) -> str:
    """16 hex digits naming the run of ``config`` on that data with this code, on any machine.

    The fingerprint stands for the text and its tokenizer: where the text lies is no part of the key.
    """
    text = "\n".join((canonical_json(replace(config, data=DataConfig())), data_fingerprint, code_version()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
