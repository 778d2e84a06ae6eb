"""The checks of the causality audit. Each takes a :class:`Probe` and returns one :class:`AuditTest`.

All run in float64. Where two passes have equal shapes, the same sums are taken in the same order and an honest model
agrees with itself to the last bit, so equality is exact: a tolerance of 1e-4 has let real leaks through. Where shapes
differ, matrix products may sum in another order, and the bound is relative to the largest logit.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from hrs.evaluation.audit_culprit import Culprit, Region, find_culprit
from hrs.evaluation.audit_probe import (
    MAGNIFICATIONS,
    AuditTest,
    Inputs,
    Pass,
    Probe,
    logits_of,
    moved_positions,
    training_logits,
    variants,
)
from hrs.models.base import LanguageModel

PREFIX_BOUND = 1e-12
"""Largest logit difference between passes of different length, relative to the largest logit."""
DECODE_BOUND = 1e-9
"""The same for cached decoding, which may order its sums and rotations otherwise."""
_ROUNDINGS = 128
"""The same in units of the rounding of a model that computes something in a coarser type than float64."""


def repeatability(probe: Probe) -> AuditTest:
    """The same tokens twice give bit-identical logits: otherwise every other failure may be noise or kept state."""
    first, second = logits_of(probe.model, probe.base), logits_of(probe.model, probe.base)
    positions = moved_positions(first, second)
    detail = f"Two passes over the same tokens {'differ' if positions else 'are bit-identical'}."
    return AuditTest(name="repeatability", passed=not positions, detail=detail, positions=positions)


def suffix_flip(probe: Probe) -> AuditTest:
    """Logits before a changed suffix are bit-identical, with weights as they are and magnified, and after training."""
    return _suffix_flip("suffix_flip", probe, lambda cut: logits_of)


def suffix_flip_training(probe: Probe) -> AuditTest:
    """The same under training mode's own mathematics, dropout off, the noise equal in both passes.

    Every cut has a seed of its own: a model may drop the leaking part at random.
    """
    passes = {cut: training_logits(probe.seed + cut) for cut in probe.few_cuts}
    return _suffix_flip("suffix_flip_training", replace(probe, frugal=True), passes.__getitem__)


def _suffix_flip(name: str, probe: Probe, pass_of: Callable[[int], Pass]) -> AuditTest:
    tried, overflowed = [], []
    for variant, model in variants(probe):
        tried.append(variant)
        bases: dict[Pass, Tensor] = {}
        moved: dict[int, tuple[int, ...]] = {}
        largest = 0.0
        for cut in probe.cuts if model is probe.model else probe.few_cuts:
            run = pass_of(cut)
            if run not in bases:
                bases = {run: run(model, probe.base)}  # one at a time: logits are large
            base, flipped = bases[run][:, :cut], run(model, probe.flipped(cut))[:, :cut]
            if not (base.isfinite().all() and flipped.isfinite().all()):
                # Overflow of the weights as they are is a defect; of a hundredfold of them, only the end of the scale.
                if model is probe.model:
                    return AuditTest(name=name, passed=False, detail="The logits are not finite.")
                overflowed.append(tried.pop())
                break
            if positions := moved_positions(base, flipped):
                moved[cut] = positions
                largest = max(largest, float((base - flipped).abs().max()))
        if moved:
            cut = max(moved, key=lambda c: len(moved[c]))
            culprit = find_culprit(model, pass_of(cut), probe.base, probe.flipped(cut), _region(probe, positions=cut))
            detail = (
                f"Changing the tokens from position {cut} on moves {len(moved[cut])} of {cut} earlier positions, "
                f"logits by up to {largest:.1e}, with weights {variant}{_carrier(culprit)}."
            )
            positions = tuple(sorted(set().union(*moved.values())))
            return AuditTest(name=name, passed=False, detail=detail, positions=positions, module=_module(culprit))
    skipped = f"; skipped {', '.join(overflowed)}, where logits overflow" if overflowed else ""
    detail = (
        f"{len(probe.cuts)} changed suffixes leave all earlier logits bit-identical, "
        f"weights {', '.join(tried)}{skipped}."
    )
    return AuditTest(name=name, passed=True, detail=detail)


def batch_independence(probe: Probe) -> AuditTest:
    """A row's logits are bit-identical whatever the other row holds, and whatever stands before it."""
    other = probe.other_row()
    for variant, model in variants(probe, MAGNIFICATIONS[:1]):
        base, changed = logits_of(model, probe.base), logits_of(model, other)
        if model is not probe.model and not (base.isfinite().all() and changed.isfinite().all()):
            continue
        if positions := moved_positions(base[:1], changed[:1]):
            culprit = find_culprit(model, logits_of, probe.base, other, _region(probe, rows=1))
            detail = (
                f"Changing the other row of the batch moves {len(positions)} of {probe.n_tokens} positions, "
                f"with weights {variant}{_carrier(culprit)}."
            )
            module = _module(culprit)
            return AuditTest(name="batch_independence", passed=False, detail=detail, positions=positions, module=module)
    detail = "Changing the other row of the batch leaves a row bit-identical."
    return AuditTest(name="batch_independence", passed=True, detail=detail)


def category_blindness(probe: Probe) -> AuditTest:
    """Logits are bit-identical whatever topic a window is said to have: the topic is a label of later tokens too."""
    other = probe.other_topics()
    for variant, model in variants(probe, MAGNIFICATIONS[:1]):
        for mode, run in (("evaluation", logits_of), ("training", training_logits(probe.seed))):
            base, changed = run(model, probe.base), run(model, other)
            if model is not probe.model and not (base.isfinite().all() and changed.isfinite().all()):
                continue
            if positions := moved_positions(base, changed):
                culprit = find_culprit(model, run, probe.base, other, _region(probe))
                detail = (
                    f"Changing the topic in {mode} mode moves {len(positions)} of {probe.n_tokens} positions, "
                    f"with weights {variant}{_carrier(culprit)}."
                )
                module = _module(culprit)
                return AuditTest(
                    name="category_blindness", passed=False, detail=detail, positions=positions, module=module
                )
    detail = "Changing the topic of the windows leaves all logits bit-identical."
    return AuditTest(name="category_blindness", passed=True, detail=detail)


def prefix_consistency(probe: Probe) -> AuditTest:
    """A prefix alone gives the logits it gives inside the whole, within :data:`PREFIX_BOUND`.

    Only with weights as they are: magnified ones saturate the softmaxes, and rounding then decides ties.
    """
    whole = logits_of(probe.in_use, probe.base)
    scale = float(whole.abs().max()) or 1.0
    worst = 0.0
    moved: set[int] = set()
    for cut in probe.cuts:
        prefix = logits_of(probe.in_use, probe.base.prefix(cut))
        moved.update(moved_positions(prefix, whole[:, :cut], PREFIX_BOUND * scale))
        worst = max(worst, float((prefix - whole[:, :cut]).abs().max()) / scale)
    detail = (
        f"{len(probe.cuts)} prefixes alone give logits within {worst:.1e} of the whole, relative to the largest; "
        f"{PREFIX_BOUND:.0e} is allowed."
    )
    return AuditTest(name="prefix_consistency", passed=not moved, detail=detail, positions=tuple(sorted(moved)))


def gradient(probe: Probe) -> AuditTest:
    """No logit has a gradient, exactly, with respect to the embedding of a later token."""
    embeddings: list[Tensor] = []
    history = probe.base.history

    def capture(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if history is not None and args and _is_history(args[0], history):
            return output  # all of it lies before every logit
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    handle = probe.in_use.input_embedding.register_forward_hook(capture)
    with torch.enable_grad():
        logits = probe.in_use(probe.base.tokens, probe.base.context).logits
    handle.remove()
    if not embeddings:
        detail = "The model did not call its input_embedding, so nothing can be said about gradients."
        return AuditTest(name="gradient", passed=False, detail=detail)
    seen: dict[int, list[int]] = {}
    for cut in probe.few_cuts if logits.requires_grad else []:
        # Random weights, because a sum over the vocabulary can cancel.
        cotangent = torch.randn(logits[:, :cut].shape, generator=torch.Generator().manual_seed(cut), dtype=logits.dtype)
        gradients = torch.autograd.grad(
            logits[:, :cut], embeddings, cotangent.to(logits.device), retain_graph=True, allow_unused=True
        )
        for g in gradients:
            if g is not None and (later := (~(g[:, cut:] == 0)).any(-1).any(0).nonzero().flatten().tolist()):
                seen[cut] = [cut + i for i in later]
    if not seen:
        cuts = ", ".join(map(str, probe.few_cuts))
        detail = f"Logits before positions {cuts} have exactly no gradient from the embeddings at or after them."
        return AuditTest(name="gradient", passed=True, detail=detail)
    cut = max(seen, key=lambda c: len(seen[c]))
    detail = f"Logits before position {cut} have a gradient from {len(seen[cut])} embeddings at or after it."
    return AuditTest(name="gradient", passed=False, detail=detail, positions=tuple(sorted(set().union(*seen.values()))))


def _is_history(ids: Tensor, history: Tensor) -> bool:
    """Whether ids are those of the history, in whatever shape; what stands for unknown ones is the model's business."""
    known = (history >= 0).flatten()
    return ids.numel() == history.numel() and torch.equal(ids.flatten()[known], history.flatten()[known])


def cached_decode(probe: Probe) -> AuditTest:
    """Decoding with a cache, by single tokens and by uneven chunks, gives the logits of the whole pass."""
    whole = logits_of(probe.in_use, probe.base)
    scale = float(whole.abs().max()) or 1.0
    coarse = probe.in_use.computes_in
    bound = DECODE_BOUND if coarse is None else _ROUNDINGS * torch.finfo(coarse).eps
    worst = 0.0
    moved: set[int] = set()
    for size in (1, max(2, probe.n_tokens // 5 + 1)):
        try:
            decoded = _decode(probe.in_use, probe.base, size)
        except Exception as error:  # whatever it is, decoding does not work, and the other checks still have to run
            detail = f"Decoding by chunks of {size} raises {type(error).__name__}: {error}"
            return AuditTest(name="cached_decode", passed=False, detail=detail)
        moved.update(moved_positions(decoded, whole, bound * scale))
        worst = max(worst, float((decoded - whole).abs().max()) / scale)
    detail = (
        f"Decoding with a cache gives logits within {worst:.1e} of the whole pass, relative to the largest; "
        f"{bound:.0e} is allowed."
    )
    return AuditTest(name="cached_decode", passed=not moved, detail=detail, positions=tuple(sorted(moved)))


@torch.no_grad()
def _decode(model: LanguageModel, inputs: Inputs, size: int) -> Tensor:
    # A model that reads no memory need not know of any.
    told = {} if inputs.memory is None else {"memory": inputs.memory}
    cache = model.new_cache(len(inputs.tokens), inputs.history, **told)
    decoded = []
    for chunk in inputs.tokens.split(size, dim=1):
        logits = model.decode(chunk, cache).logits
        assert logits is not None and logits.shape[:2] == chunk.shape, "decode must give logits for each of its tokens"
        decoded.append(logits)
    return torch.cat(decoded, dim=1)


def _region(probe: Probe, *, rows: int = 2, positions: int | None = None) -> Region:
    protected = probe.n_tokens if positions is None else positions
    return Region(n_rows=2, n_positions=probe.n_tokens, protected_rows=rows, protected_positions=protected)


def _carrier(culprit: Culprit | None) -> str:
    if culprit is None or culprit.carrier is None:
        return ""
    return f", carried by {culprit.carrier}" + (f", which {culprit.producer} made" if culprit.producer else "")


def _module(culprit: Culprit | None) -> str | None:
    return culprit.module if culprit else None
