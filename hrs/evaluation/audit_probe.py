"""What the causality audit tries a model with: tokens and their changes, magnified weights, passes without chance."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hrs.models.base import LanguageModel, WindowContext

MAGNIFICATIONS = (10, 100)
"""Weights are multiplied by these: a leak behind a small gate grows into view."""
_TRAINING_PASSES = 8
_OPENING = 0.02  # added noise that opens a path which a zero initialisation keeps shut


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What one pass of a model reads."""

    tokens: Tensor
    """[B, T]"""
    context: WindowContext | None
    """All that the model can use besides; None if it uses nothing."""

    @property
    def history(self) -> Tensor | None:
        """[B, history_tokens] in front of the tokens; None for a model without history."""
        return None if self.context is None else self.context.history

    @property
    def memory(self) -> Tensor | None:
        """[B, S, d] slots from other texts; None for a model that reads none."""
        return None if self.context is None else self.context.memory

    def prefix(self, n: int) -> "Inputs":
        """The first ``n`` tokens."""
        return replace(self, tokens=self.tokens[:, :n])


Pass = Callable[[nn.Module, Inputs], Tensor]
"""From a model and what it reads to logits [B, T, V]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditTest:
    """The outcome of one check."""

    name: str
    passed: bool
    detail: str
    """One sentence."""
    positions: tuple[int, ...] = ()
    """Positions whose logits depended on what they must not see; of ``gradient``, the positions that were seen."""
    module: str | None = None
    """Dotted name of the module through which they did; empty for the model's own forward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A float64 model in evaluation mode, and two sequences to try it with."""

    model: LanguageModel
    base: Inputs
    changed: Inputs
    """Different from ``base`` in every token, every topic, all history that there is, and which row has what memory."""
    experienced: LanguageModel | None
    """The model after training passes whose observations it kept, which may open what is shut until then; None for one
    that remembers nothing. Its parameters are the same."""
    seed: int
    frugal: bool = False
    """Make do with ``few_cuts`` for ``cuts``."""

    @property
    def in_use(self) -> LanguageModel:
        """The model with experience if that changes it, so that nothing it reads is empty."""
        return self.model if self.experienced is None else self.experienced

    @property
    def n_tokens(self) -> int:
        """T"""
        return self.base.tokens.shape[1]

    @property
    def few_cuts(self) -> list[int]:
        """Where suffixes begin, for the dearer checks: the ends and the middle."""
        n = self.n_tokens
        return sorted({1, n // 2, n - 1})

    @property
    def cuts(self) -> list[int]:
        """Those, their neighbours, the quarters, and three at random."""
        if self.frugal:
            return self.few_cuts
        n = self.n_tokens
        drawn = torch.randint(1, n, (3,), generator=torch.Generator().manual_seed(self.seed)).tolist()
        more = {2, n // 4, n // 2 - 1, n // 2 + 1, 3 * n // 4, n - 2}
        return sorted(c for c in {*self.few_cuts, *more, *drawn} if 0 < c < n)

    def flipped(self, cut: int) -> Inputs:
        """The base with every token from ``cut`` on changed."""
        tokens = torch.cat([self.base.tokens[:, :cut], self.changed.tokens[:, cut:]], dim=1)
        return replace(self.base, tokens=tokens)

    def other_row(self) -> Inputs:
        """The base with all of its second row changed, history, topic and memory too."""
        tokens = torch.stack([self.base.tokens[0], self.changed.tokens[1]])
        if self.base.context is None or self.changed.context is None:
            return replace(self.base, tokens=tokens)
        rows = (self.base.context.rows(slice(0, 1)), self.changed.context.rows(slice(1, 2)))
        history, category, memory = (
            None if first is None or second is None else torch.cat([first, second])
            for first, second in zip(*((c.history, c.category, c.memory) for c in rows), strict=True)
        )
        return Inputs(tokens=tokens, context=WindowContext(history, category, memory))

    def other_topics(self) -> Inputs:
        """The base with the topics changed."""
        category = None if self.changed.context is None else self.changed.context.category
        return replace(self.base, context=WindowContext(self.base.history, category, self.base.memory))


def draw_probe(model: LanguageModel, seed: int, n_tokens: int) -> Probe:
    """Random sequences of ``n_tokens``, with random history, topics and memory where ``model`` wants any."""
    double = copy.deepcopy(model).double().eval()
    double.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, n_tokens)
    tokens = torch.randint(model.vocab_size, shape, generator=generator)
    shift = torch.randint(1, model.vocab_size, shape, generator=generator)
    device = next(model.parameters()).device
    changed = ((tokens + shift) % model.vocab_size).to(device)
    context = random_context(model, 2, model.vocab_size, generator)
    other = None
    if context is not None:
        history, category = context.history, context.category
        if history is not None:
            shift = torch.randint(1, model.vocab_size, history.shape, generator=generator)
            history = torch.where(history < 0, -1, (history + shift) % model.vocab_size)
        if category is not None:
            category = (category + 1) % model.n_categories
        memory = None if context.memory is None else context.memory.flip(0)  # shuffled: the other row's
        context, other = context.to(device), WindowContext(history, category, memory).to(device)
    return Probe(
        model=double,
        base=Inputs(tokens=tokens.to(device), context=context),
        changed=Inputs(tokens=changed, context=other),
        experienced=_experienced(double, n_tokens, generator),
        seed=seed,
    )


@torch.no_grad()
def _experienced(model: LanguageModel, n_tokens: int, generator: torch.Generator) -> LanguageModel | None:
    """A copy that has kept the observations of a few passes over random tokens; None if no buffer tells."""
    copied, device = copy.deepcopy(model).train(), next(model.parameters()).device
    for _ in range(_TRAINING_PASSES):
        tokens = torch.randint(model.vocab_size, (2, n_tokens), generator=generator).to(device)
        context = random_context(model, 2, model.vocab_size, generator)
        copied.encode(tokens, None if context is None else context.to(device))
        copied.keep_observations()
    before = dict(model.named_buffers())
    same = all(name in before and torch.equal(b, before[name]) for name, b in copied.named_buffers())
    return None if same else copied.eval()


def random_context(model: LanguageModel, batch: int, n_ids: int, generator: torch.Generator) -> WindowContext | None:
    """History, topics and memory drawn at random, as far as ``model`` wants any; on the CPU.

    The older half of every second row's history is unknown, as near the beginning of a document, and half of its
    memory is absent, as where fewer neighbours were found.
    """
    if not model.history_tokens and not model.n_categories and not model.takes_memory:
        return None
    context = WindowContext()
    if model.history_tokens:
        context.history = torch.randint(n_ids, (batch, model.history_tokens), generator=generator)
        context.history[1::2, : model.history_tokens // 2] = -1
    if model.n_categories:
        context.category = torch.randint(model.n_categories, (batch,), generator=generator)
    if model.takes_memory:
        context.memory = torch.randn(batch, model.memory_slots, model.d_model, generator=generator)
        context.memory[1::2, model.memory_slots // 2 :] = 0.0
    return context


# ---- passes ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Logits [B, T, V]."""
    logits: Tensor = model(inputs.tokens, inputs.context).logits
    return logits


def training_logits(seed: int) -> Pass:
    """A pass in training mode whose noise depends on nothing but ``seed``, on a copy, as passes may leave state."""

    def run(model: nn.Module, inputs: Inputs) -> Tensor:
        model = copy.deepcopy(model).train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        torch.manual_seed(seed)
        return logits_of(model, inputs)

    return run


def variants(probe: Probe, magnifications: Sequence[int] = MAGNIFICATIONS) -> Iterator[tuple[str, LanguageModel]]:
    """The model as it is, with experience, and with that magnified; each with a few words for people."""
    yield "x1", probe.model
    if probe.experienced is not None:
        yield "x1 after training passes", probe.experienced
    for factor in magnifications:
        yield (
            f"x{factor}",
            _magnified(probe.in_use, factor, probe.seed),
        )


def _magnified(model: LanguageModel, factor: int, seed: int) -> LanguageModel:
    """A copy with every parameter moved by N(0, 0.02) and multiplied by ``factor``."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise.to(parameter.device), alpha=_OPENING).mul_(factor)
    return model


def moved_positions(first: Tensor, second: Tensor, bound: float = 0.0) -> tuple[int, ...]:
    """Positions at which logits [B, n, V] differ by more than ``bound``. A NaN differs from everything."""
    differs = ~((first - second).abs() <= bound)
    return tuple(differs.any(-1).any(0).nonzero().flatten().tolist())
