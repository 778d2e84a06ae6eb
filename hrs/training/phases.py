"""Phases of training: which parameter groups learn, how fast, and what is drawn anew when a phase begins.

Resting parameters (multiplier 0, or frozen) lose ``requires_grad``: they get no gradient, so they are neither
decayed, nor moved by old momentum, nor part of the clipping norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hrs.config import PhaseConfig
from hrs.errors import HRSError
from hrs.models import LanguageModel

ROLES = (
    "backbone", "locality_head", "router", "conv", "expert", "attention_tier", "sink", "engram", "test_time_memory",
    "loss_scales", "hops",
)  # fmt: skip
"""Groups a phase may name whether or not this model has them: one table of multipliers serves every ablation."""

REINITIALISED_STD = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One phase of a run of known length: steps ``start <= step < end``."""

    index: int
    config: PhaseConfig
    start: int
    end: int

    @property
    def multipliers(self) -> dict[str, float]:
        return dict(self.config.multipliers)


def phases_of(configs: Sequence[PhaseConfig], steps: int) -> list[Phase]:
    """The phases of a run of ``steps`` steps; one without multipliers if none are configured."""
    configs = configs or (PhaseConfig(name="training", frac=1.0),)
    done, start, phases = 0.0, 0, []
    for index, config in enumerate(configs):
        done += config.frac
        end = round(done * steps) if index < len(configs) - 1 else steps
        phases.append(Phase(index=index, config=config, start=start, end=end))
        start = end
    return phases


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase that ``step`` belongs to. A phase too short to hold a step is passed over."""
    return next(phase for phase in phases if phase.start <= step < phase.end)


def check_phases(phases: Sequence[Phase], model: LanguageModel) -> None:
    """Raises HRSError if a phase names a group or parameter that does not exist, or in which nothing would learn."""
    groups = model.parameter_groups()
    names = [name for name, _ in model.named_parameters()]
    for phase in phases:
        where = f"phase '{phase.config.name}'"
        if unknown := sorted(set(phase.multipliers) - set(ROLES) - set(groups)):
            raise HRSError(f"{where}: unknown group {', '.join(unknown)}; this model has {', '.join(groups)}")
        for prefix in (*phase.config.freeze, *phase.config.reinitialise):
            if not any(name.startswith(prefix) for name in names):
                raise HRSError(f"{where}: no parameter of this model begins with '{prefix}'; remove it from the phase")
        if not _learning(phase, model):
            raise HRSError(f"{where}: every multiplier is 0 or frozen; let at least one group learn")


def enter_phase(phase: Phase, step: int, model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    """Set what learns; at the phase's first step also draw the parameters anew that the phase names.

    The draws come from the global CPU generator, whose state is in every checkpoint, on any device. A parameter drawn
    anew forgets its moments.
    """
    learning = _learning(phase, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
        if step == phase.start and name.startswith(phase.config.reinitialise):
            with torch.no_grad():
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, REINITIALISED_STD))
            optimizer.state.pop(parameter, None)


def _learning(phase: Phase, model: LanguageModel) -> set[str]:
    """Names of the parameters that learn in ``phase``."""
    multipliers = phase.multipliers
    resting = {
        id(parameter)
        for role, parameters in model.parameter_groups().items()
        if multipliers.get(role, 1.0) == 0.0
        for parameter in parameters
    }
    return {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in resting and not name.startswith(phase.config.freeze)
    }
