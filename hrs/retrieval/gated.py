"""Gated retrieval of one model, measured from its gate to its report: what jobs/gated_retrieval.py does in a worker.

The gate is set on validation text, the memories are the segments of the training text, and another split is walked
over, see :mod:`hrs.retrieval.bits`.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import hrs.generation
from hrs import strict_json
from hrs.data.documents import require_split
from hrs.data.store import TokenStore
from hrs.errors import HRSError
from hrs.identity import code_fingerprint, code_version
from hrs.models.base import LanguageModel
from hrs.retrieval.bits import RetrievalReport, Walked, follow_retrieval
from hrs.retrieval.calibration import (
    QUANTILE,
    RELEASE_QUANTILE,
    calibrate_entropies,
    firings,
    token_entropies,
)
from hrs.retrieval.entropy import GateSettings
from hrs.retrieval.populate import Filled, Population, populated_once
from hrs.retrieval.retriever import RetrievalOptions, Retriever
from hrs.retrieval.segments import default_cut
from hrs.retrieval.store import EngramStore

S = TypeVar("S")
R = TypeVar("R")

_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedPlan:
    """What is measured of a model in one mode."""

    options: RetrievalOptions
    """Without a gate: every model gets its own."""
    split: str = "test"
    """That is walked over."""
    documents: int | None = None
    """Only the first so many that have text; None for all."""
    quantile: float = QUANTILE
    """Of the rolling entropy of validation text, for the gate."""
    threshold_bits: float | None = None
    """A fixed threshold instead, without a release, as in the original."""

    def __post_init__(self) -> None:
        require_split(self.split)
        if not 0 <= self.quantile <= 1:
            raise HRSError(f"the quantile of a gate must lie between 0 and 1, got {self.quantile:g}")
        if self.documents is not None and self.documents < 1:
            raise HRSError(f"retrieval is measured on 1 document or more, got {self.documents}")

    def key(self, model: str, data: str, slots: str) -> str:
        """16 hex digits of all that a result follows from: the plan, the fingerprints of model and data, what tells how
        slots are made, and the code."""
        rooms = (Path(__file__).parent, Path(hrs.generation.__file__).parent)
        code = code_fingerprint(file for room in rooms for file in room.rglob("*.py"))
        content = strict_json.dumps(
            [dataclasses.asdict(self), model, data, slots, code, code_version()], sort_keys=True
        )
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class SetGate:
    """The gate of one model."""

    settings: GateSettings
    share_fired: float
    """Share of the validation tokens on which it fires, without retrieval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedResult:
    """What was measured of one model in one mode."""

    gate: SetGate
    n_memories: int
    seconds: float
    """That the walks took."""
    report: RetrievalReport

    def to_json(self) -> str:
        return strict_json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "GatedResult":
        """What :meth:`to_json` wrote.

        Raises:
            HRSError: if it is something else.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            gate = values["gate"]
            values["gate"] = SetGate(settings=GateSettings(**gate["settings"]), share_fired=gate["share_fired"])
            return cls(**values | {"report": RetrievalReport.from_json(strict_json.dumps(values["report"]))})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise HRSError(f"this is no result of gated retrieval ({error}): measure it again") from error

    def metrics(self) -> dict[str, float]:
        """Single numbers by short names."""
        report = self.report
        names = ("right_minus_off", "shuffled_minus_off", "right_minus_shuffled")
        found: dict[str, float] = {name: getattr(report, name).value for name in names}
        for control, condition in report.conditions.items():
            found[f"bits_per_byte/{control}"] = condition.bits_per_byte.value
            found[f"share_injected/{control}"] = condition.share_injected
            found[f"fired_per_1000/{control}"] = 1000 * condition.n_events / report.n_tokens
            if condition.similarity is not None:
                found[f"similarity/{control}"] = condition.similarity
        return found


def set_gate(model: LanguageModel, tokens: TokenStore, plan: GatedPlan) -> SetGate:
    """The gate of a model, from its entropies on validation text.

    Raises:
        HRSError: if no validation document has the tokens of one window.
    """
    text = tokens.validation
    bits = token_entropies(model, text)
    if plan.threshold_bits is None:
        release = min(RELEASE_QUANTILE, plan.quantile)
        calibration = calibrate_entropies(
            bits, text.document_starts, "", quantile=plan.quantile, release_quantile=release
        )
        return SetGate(settings=calibration.settings, share_fired=calibration.share_fired)
    settings = GateSettings(threshold_bits=plan.threshold_bits)
    n_tokens = int(text.document_starts[-1] - text.document_starts[0])
    return SetGate(settings=settings, share_fired=len(firings(bits, text.document_starts, settings)) / n_tokens)


def training_memories(model: LanguageModel, tokens: TokenStore, root: Path) -> Generator[str, None, EngramStore]:
    """The segments of the training text, each read alone as a query is; below ``root``, filled once for each model.
    Yields lines to print."""
    pace, population = _Pace(), Population(cut=default_cut(model, "isolated"))

    def line(state: Filled) -> str | None:
        told = pace.lets_through(state.done == state.total and state.stage != "done")
        return f"{state.stage} {state.done:,} of {state.total:,} segments" if told else None

    return (yield from relay(populated_once(model, tokens, population, root), line))


def measure_gated(
    retriever: Retriever, tokens: TokenStore, plan: GatedPlan, gate: SetGate, n_memories: int
) -> Generator[str, None, GatedResult]:
    """Walk over the plan's split with the right memories, with another text's and with none. Yields lines to print.

    Raises:
        HRSError: see :func:`hrs.retrieval.bits.retrieval_bits`.
    """
    pace, began = _Pace(), time.monotonic()
    options = dataclasses.replace(plan.options, gate=gate.settings)

    def line(state: Walked) -> str | None:
        told = pace.lets_through(state.done == state.total)
        return f"{state.control}: {state.done} of {state.total} documents" if told else None

    walking = follow_retrieval(retriever, tokens.split(plan.split), options, documents=plan.documents)
    report = yield from relay(walking, line)
    return GatedResult(gate=gate, n_memories=n_memories, seconds=time.monotonic() - began, report=report)


def relay(states: Generator[S, None, R], line: Callable[[S], str | None]) -> Generator[str, None, R]:
    """What ``line`` makes of each of some states, if anything; returns what they return."""
    while True:
        try:
            told = line(next(states))
        except StopIteration as end:
            returned: R = end.value
            return returned
        if told is not None:
            yield told


class _Pace:
    """Lets a line through every ten seconds, and the last one of its kind."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lets_through(self, is_last: bool) -> bool:
        now = time.monotonic()
        if not is_last and now - self._last < _SECONDS_BETWEEN_LINES:
            return False
        self._last = now
        return True
