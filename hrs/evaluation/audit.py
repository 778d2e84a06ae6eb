"""The causality audit: does any logit depend on a token it is meant to predict, or on another sequence?

It looks at nothing but the model itself, so it holds for models nobody has thought of::

    report = audit(model)
    if not report.causal:
        print(report)
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from hrs import strict_json
from hrs.errors import HRSError
from hrs.evaluation.audit_checks import (
    batch_independence,
    cached_decode,
    category_blindness,
    gradient,
    prefix_consistency,
    repeatability,
    suffix_flip,
    suffix_flip_training,
)
from hrs.evaluation.audit_probe import AuditTest, draw_probe
from hrs.evaluation.audit_training import random_tokens
from hrs.models.base import LanguageModel

LONGEST_PROBE = 512
"""Tokens of the audited sequence, if the model's own limit is not below."""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What every check found."""

    tests: list[AuditTest]

    @property
    def causal(self) -> bool:
        """Whether every check passed: only then is the model's loss a statement about language modelling."""
        return all(test.passed for test in self.tests)

    def to_json(self) -> str:
        return strict_json.dumps({"causal": self.causal, "tests": [asdict(test) for test in self.tests]}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "AuditReport":
        return cls([_test_from(values) for values in json.loads(text)["tests"]])

    @classmethod
    def load(cls, path: Path) -> "AuditReport":
        """Read what was written with :meth:`to_json`.

        Raises:
            HRSError: if the file is missing, cut off or something else.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise HRSError(f"audit {path} is missing or damaged ({error}): hrs audit makes a new one") from error

    def __str__(self) -> str:
        failed = sum(not test.passed for test in self.tests)
        head = "causal" if self.causal else "NOT CAUSAL"
        lines = [f"{head}: {len(self.tests) - failed} of {len(self.tests)} checks passed"]
        for test in self.tests:
            lines.append(f"  {'pass' if test.passed else 'FAIL'}  {test.name}: {test.detail}")
            if test.positions:
                lines.append(f"        positions {_ranges(test.positions)}")
            if test.module is not None:
                lines.append(f"        through {test.module or 'the model itself, outside every submodule'}")
        return "\n".join(lines)


def audit(model: LanguageModel, *, seed: int = 0, random_token_training: bool = False) -> AuditReport:
    """Audit a model through its interface alone; a few seconds for a million parameters on one core.

    A model that can use what stands before a window, learns the topics of windows, or reads memories of other texts,
    gets these at random.
    Works on float64 copies in evaluation mode: the model, its mode and the random generators are left as they were.

    Args:
        seed: of the tokens and the places where they are changed.
        random_token_training: also train a copy, drawn anew, on tokens that cannot be predicted; up to a minute.
    """
    cuda = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(i for i in cuda if i is not None)):
        torch.manual_seed(seed)
        probe = draw_probe(model, seed, min(model.max_seq_len, LONGEST_PROBE))
        tests = [
            repeatability(probe),
            suffix_flip(probe),
            suffix_flip_training(probe),
            prefix_consistency(probe),
            batch_independence(probe),
            gradient(probe),
            cached_decode(probe),
        ]
        if model.n_categories:
            tests.append(category_blindness(probe))
        if random_token_training:
            tests.append(random_tokens(model, seed))
    return AuditReport(tests)


def _test_from(values: Mapping[str, object]) -> AuditTest:
    return AuditTest(**{**values, "positions": tuple(values["positions"])})  # type: ignore[arg-type]


def _ranges(positions: tuple[int, ...]) -> str:
    """``0-4, 7`` for (0, 1, 2, 3, 4, 7)."""
    breaks = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(positions)) if b != a + 1), len(positions)]
    runs = [(positions[i], positions[j - 1]) for i, j in pairwise(breaks)]
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)
