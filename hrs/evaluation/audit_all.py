"""The audit of presets: does each one see the future exactly if it is said to?"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hrs.config import ModelConfig
from hrs.evaluation.audit import AuditReport, audit
from hrs.models import LanguageModel, build_model
from hrs.presets import PRESETS, Preset, experiment


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the audit found of one preset."""

    preset: Preset
    report: AuditReport

    @property
    def as_expected(self) -> bool:
        return self.report.causal != self.preset.leaks

    def __str__(self) -> str:
        failing = ", ".join(test.name for test in self.report.tests if not test.passed)
        found = f"NOT CAUSAL ({failing})" if failing else "causal"
        expected = "as expected" if self.as_expected else f"expected {'a leak' if self.preset.leaks else 'none'}"
        return f"{self.preset.name:<{max(map(len, PRESETS))}}  {found}, {expected}"


def audit_presets(
    presets: Iterable[Preset], scale: str = "micro", seed: int = 0, overrides: Mapping[str, Any] | None = None
) -> Iterator[Verdict]:
    """Audit presets one after the other. Those that differ in training only share a model, and its audit.

    Raises:
        HRSError: for an unknown scale or unknown fields.
    """
    reports: dict[ModelConfig, AuditReport] = {}
    for preset in presets:
        model = experiment(preset.name, scale, seed, overrides).model
        if model not in reports:
            reports[model] = audit(new_model(model, seed), seed=seed)
        yield Verdict(preset=preset, report=reports[model])


def new_model(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """A freshly initialised model in evaluation mode. The audit itself makes a copy that has seen training passes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(config).eval()
