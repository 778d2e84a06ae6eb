"""Names the module through which a leak enters.

Two inputs agree on a protected region (all positions before s, or one row of the batch) and the model's outputs do
not. Every submodule is watched during both passes; the culprit is the first to finish, hence the deepest, whose
output differs inside the region although what came in agrees there.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hrs.evaluation.audit_probe import Inputs, Pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """The leading rows and positions of a batch, which must not depend on the rest of it."""

    n_rows: int
    n_positions: int
    protected_rows: int
    protected_positions: int

    def split(self, tensor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What lies inside the region, and what has no place in it: either may be None.

        Activations are [B, T, ...], [B * T, ...] or, split into heads, [B, H, T, hd]. One of [B, E + T, d] is read
        as E extra rows in front of the T positions, as models with prepended summaries have it.
        """
        if tensor.ndim and tensor.shape[0] == self.n_rows * self.n_positions:
            tensor = tensor.unflatten(0, (self.n_rows, self.n_positions))
        if tensor.ndim < 2 or tensor.shape[0] != self.n_rows:
            return None, tensor
        row = tensor[: self.protected_rows]
        if self.protected_positions == self.n_positions:
            return row, None  # the region is all of the row, whatever its other dimensions mean
        if tensor.shape[1] == self.n_positions:
            return row[:, : self.protected_positions], None
        if tensor.ndim == 4 and tensor.shape[2] == self.n_positions:
            return row[:, :, : self.protected_positions], None
        if tensor.ndim == 3 and tensor.shape[1] > self.n_positions:
            n_extra = tensor.shape[1] - self.n_positions
            return row[:, n_extra:][:, : self.protected_positions], row[:, :n_extra]
        return None, row


@dataclass(frozen=True, kw_only=True, slots=True)
class Culprit:
    """Where the protected region first changed."""

    module: str
    """Dotted name; empty when it happened in the model's own forward, outside every submodule."""
    carrier: str | None = None
    """The input that changed though no position of the region did, for example ``argument engrams``."""
    producer: str | None = None
    """The module whose output that input was, if it came from one."""


@dataclass(slots=True)
class _Call:
    """One call of one module: tensors by name, copied, because a later in-place operation must not reach them."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    input_ids: dict[str, int]
    output_ids: set[int]
    kept: list[Tensor] = field(repr=False)
    """The live tensors, held so that no later one takes their identity."""


def find_culprit(model: nn.Module, run: Pass, first: Inputs, second: Inputs, region: Region) -> Culprit | None:
    """The module at which two passes part inside ``region``; None if none does.

    Args:
        model: left as it is; each pass runs on a copy, so that state kept between passes cannot matter.
        run: one pass of a model.
        first, second: inputs that agree inside the region.
        region: with B and T of these inputs.
    """
    before, after = _watch(model, run, first), _watch(model, run, second)
    summaries: list[tuple[str, _Call]] = []  # modules whose output is of no position at all, and changed
    for (name, nth), call in after.items():
        reference = before.get((name, nth))
        if reference is None:
            continue
        inside, outside = _changes(reference.inputs, call.inputs, region)
        moved, summary = _changes(reference.outputs, call.outputs, region)
        if moved and not inside:
            carrier = outside[0] if outside else None
            return Culprit(module=name, carrier=carrier, producer=_producer(name, call, carrier, summaries))
        if summary and all(region.split(t)[0] is None for t in call.outputs.values()):
            summaries.append((name, call))
    return None


def _producer(module: str, call: _Call, carrier: str | None, summaries: list[tuple[str, _Call]]) -> str | None:
    """Which of ``summaries`` became the carrier: the one that is that very tensor, else the last from elsewhere.

    The carrier need not be anyone's output: summaries are concatenated or shifted on their way.
    """
    if carrier is None:
        return None
    elsewhere = [(name, made) for name, made in summaries if not name.startswith(f"{module}.")]
    exact = [name for name, made in elsewhere if call.input_ids[carrier] in made.output_ids]
    names = exact or [name for name, _ in elsewhere]
    return names[-1] if names else None


def _watch(model: nn.Module, run: Pass, inputs: Inputs) -> dict[tuple[str, int], _Call]:
    """All calls of all modules by (name, how many calls of it came before), in the order in which they finished."""
    model = copy.deepcopy(model)
    calls: dict[tuple[str, int], _Call] = {}
    seen: Counter[str] = Counter()

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            given = dict(_tensors(args, "input")) | dict(_tensors(kwargs, "argument"))
            made = dict(_tensors(output, "output"))
            calls[name, seen[name]] = _Call(
                inputs={key: t.detach().clone() for key, t in given.items()},
                outputs={key: t.detach().clone() for key, t in made.items()},
                input_ids={key: id(t) for key, t in given.items()},
                output_ids={id(t) for t in made.values()},
                kept=[*given.values(), *made.values()],
            )
            seen[name] += 1

        return hook

    handles = [m.register_forward_hook(watch(name), with_kwargs=True) for name, m in model.named_modules()]
    run(model, inputs)
    for handle in handles:
        handle.remove()
    return calls


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside tuples, lists, mappings and dataclasses, with a name for people."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name} {i}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name} {key}")
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from _tensors(getattr(value, f.name), f"{name} {f.name}")


def _changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor], region: Region) -> tuple[list[str], list[str]]:
    """Names of the tensors that changed inside the region, and of those that changed outside of any position."""
    inside, outside = [], []
    for name in before.keys() & after.keys():
        (a_in, a_out), (b_in, b_out) = region.split(before[name]), region.split(after[name])
        if a_in is not None and b_in is not None and not torch.equal(a_in, b_in):
            inside.append(name)
        if a_out is not None and b_out is not None and not torch.equal(a_out, b_out):
            outside.append(name)
    return sorted(inside), sorted(outside)
