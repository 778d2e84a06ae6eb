"""One run learned by several processes: each takes a part of every batch, and they exchange gradients.

All of them step alike on the same gradients, so their weights stay equal without ever being sent. Within ``join`` a
process is one of the workers:

    with join(store, rank, size, device) as workers:
        for progress in train(config, tokens, directory, runtime, workers=workers): ...

Without, ``train`` computes the parts one after another and has the same result. Messages between workers are neither
encrypted nor authenticated: use a network that only you can reach.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hrs.config import SharingConfig
from hrs.errors import HRSError
from hrs.training.lazy_adamw import coalesced

BUCKET_ELEMENTS = 2**23
"""Gradients sent at a time, unless one tensor has more."""
PATIENCE_SECONDS = 1800.0
"""Longest wait for another worker. The first one validates and writes checkpoints while the others wait."""

_Message = TypeVar("_Message")


class LostContact(HRSError):
    """Another worker ended or does not answer: the cause is to be found there."""


@dataclass(frozen=True, slots=True)
class _Word:
    """What a worker tells the others before gradients are exchanged."""

    gradients: list[int | None]
    """By parameter: None without a gradient, the number of rows of a sparse one, 0 for a dense one."""
    values: dict[str, list[float]]
    """Means over its micro-batches by name."""


class Workers:
    """The processes that learn one run together, seen from number ``rank`` of ``size``.

    Every method must be called by all workers. They raise :class:`LostContact` if one of them does not come.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._seen: dict[str, tuple[int, int]] = {}

    @property
    def first(self) -> bool:
        """Whether this is the worker that reports and writes."""
        return self.rank == 0

    def exchange(
        self, parameters: Sequence[nn.Parameter], unshared: set[int], values: Mapping[str, Sequence[Tensor]]
    ) -> dict[str, Tensor]:
        """Replace every gradient by the mean over the workers, those of parameters with an id in ``unshared`` by the
        first worker's. Sums have one order, so that all workers hold the same bits.

        A parameter has a gradient afterwards if it had one on any worker (on the first, if unshared); for the mean it
        is 0 where there was none.

        Args:
            parameters: the same on every worker, in the same order.
            values: detached, by name, each scalar or [k], any number per name.

        Returns:
            The mean over workers of the mean of each name's values: float64 [k] on the CPU.
        """
        words = self._gather(_Word([_rows(p.grad) for p in parameters], _means(values)))
        dense: list[Tensor] = []
        firsts: list[Tensor] = []
        for index, parameter in enumerate(parameters):
            rows = [word.gradients[index] for word in words]
            own = id(parameter) in unshared
            if own:
                rows = [rows[0], *(None for _ in rows[1:])]
            if all(n is None for n in rows):
                parameter.grad = None
            elif any(rows):
                self._exchange_rows(parameter, [n or 0 for n in rows], 1 if own else self.size)
            else:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                (firsts if own else dense).append(parameter.grad)
        for bucket in _buckets(dense):
            _in_place(bucket, self._average)
        for bucket in _buckets(firsts):
            _in_place(bucket, self._take_first)
        return _mean_of_words([word.values for word in words])

    def share_buffers(self, model: nn.Module) -> None:
        """Give every worker the first one's persistent buffers that changed since the last call.

        They hold what a model remembers of its passes, and a resumed run has nothing else.
        """
        state = model.state_dict(keep_vars=True)
        buffers = {name: t for name, t in state.items() if not isinstance(t, nn.Parameter)}
        if not buffers:
            return
        versions = {name: (t.data_ptr(), t._version) for name, t in buffers.items()}
        changed = [name for name in buffers if versions[name] != self._seen.get(name)] if self.first else []
        self._seen = versions
        message = [{name: buffers[name].cpu() for name in changed}]
        with _contact():
            dist.broadcast_object_list(message, src=0)
        if not self.first:
            with torch.no_grad():
                for name, value in message[0].items():
                    buffers[name].copy_(value)

    def agree(self, decision: bool) -> bool:
        """Return the first worker's ``decision`` on every worker; a message between hosts that no GPU waits for."""
        message = torch.tensor([decision], dtype=torch.uint8)
        with _contact():
            dist.broadcast(message, src=0)
        return bool(message.item())

    def require_equal(self, values: Mapping[str, Any], when: str) -> None:
        """Raises HRSError, on every worker, naming the first of ``values`` that one worker has different."""
        everyones = self._gather(dict(values))
        for rank, theirs in enumerate(everyones):
            for name, value in everyones[0].items():
                if theirs.get(name) != value:
                    raise HRSError(
                        f"{when}, worker {rank} differs from worker 0 in {name}: all workers need the same code, the "
                        "same kind of device and the same run directory; start again from the last checkpoint"
                    )

    # ---- messages ----------------------------------------------------------------------------------------------------

    def _gather(self, message: _Message) -> list[_Message]:
        """Everyone's message, by rank."""
        messages: list[Any] = [None] * self.size
        with _contact():
            dist.all_gather_object(messages, message)
        return messages

    def _average(self, flat: Tensor) -> None:
        with _contact():
            dist.all_reduce(flat)
        flat.div_(self.size)

    def _take_first(self, flat: Tensor) -> None:
        with _contact():
            dist.broadcast(flat, src=0)

    def _exchange_rows(self, parameter: nn.Parameter, counts: Sequence[int], divisor: int) -> None:
        """The sum of everyone's first ``counts`` rows of a sparse gradient [rows, width], over ``divisor``."""
        longest, width, mine = max(counts), parameter.shape[1], counts[self.rank]
        indices = torch.zeros(longest, dtype=torch.int64, device=parameter.device)
        values = parameter.new_zeros(longest, width)
        if mine and parameter.grad is not None:
            gradient = coalesced(parameter.grad)
            indices[:mine], values[:mine] = gradient.indices()[0], gradient.values()
        all_indices = [torch.empty_like(indices) for _ in counts]
        all_values = [torch.empty_like(values) for _ in counts]
        with _contact():
            dist.all_gather(all_indices, indices)
            dist.all_gather(all_values, values)
        rows = torch.cat([t[:n] for t, n in zip(all_indices, counts, strict=True)])
        sums = torch.cat([t[:n] for t, n in zip(all_values, counts, strict=True)]).div_(divisor)
        together = torch.sparse_coo_tensor(rows[None], sums, parameter.shape, check_invariants=False)
        parameter.grad = together.coalesce()


@contextmanager
def join(
    store: dist.Store, rank: int, size: int, device: torch.device, patience_seconds: float = PATIENCE_SECONDS
) -> Iterator[Workers]:
    """Meet the other ``size - 1`` workers at ``store``; leaving the block leaves them.

    Gradients travel by gloo, those of CUDA devices by NCCL. One such block at a time in a process.

    Raises:
        LostContact: if not all come.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _contact():
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=patience_seconds)
        )
    try:
        yield Workers(rank, size)
    finally:
        dist.destroy_process_group()


def unshared_parameters(groups: Mapping[str, Sequence[nn.Parameter]], config: SharingConfig) -> list[nn.Parameter]:
    """The parameters out of a model's ``groups`` that learn from the first part of a batch only.

    Raises:
        HRSError: for a group that the model does not have.
    """
    if unknown := [name for name in config.unshared if name not in groups]:
        raise HRSError(
            f"training.sharing.unshared: unknown group {', '.join(unknown)}; this model has {', '.join(groups)}"
        )
    return [parameter for name in config.unshared for parameter in groups[name]]


def checksums(model: nn.Module) -> dict[str, int]:
    """A number for each tensor of the model's state that changes when any of its bits does, nearly always."""
    state = model.state_dict()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [t.reshape(-1).view(integers[t.element_size()]).sum(dtype=torch.int64).cpu() for t in state.values()]
    return {name: int(value) for name, value in zip(state, sums, strict=True)}


# ---- parts -----------------------------------------------------------------------------------------------------------


@contextmanager
def _contact() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of which all exceptions of torch.distributed are kinds
        raise LostContact(
            f"lost contact with another worker of this run ({str(error).splitlines()[0][:200]}): see what that one "
            "says; the same command goes on from the last checkpoint"
        ) from error


def _rows(gradient: Tensor | None) -> int | None:
    if gradient is None or not gradient.is_sparse:
        return None if gradient is None else 0
    return coalesced(gradient).indices().shape[1]


def _means(values: Mapping[str, Sequence[Tensor]]) -> dict[str, list[float]]:
    """The mean of each name's values, with a single wait for the device."""
    means = [torch.stack([item.reshape(-1) for item in items]).double().mean(dim=0) for items in values.values()]
    numbers = torch.cat(means).tolist()
    found = {}
    for name, mean in zip(values, means, strict=True):
        found[name], numbers = numbers[: len(mean)], numbers[len(mean) :]
    return found


def _mean_of_words(words: Sequence[Mapping[str, list[float]]]) -> dict[str, Tensor]:
    """Means over the workers that have the name."""
    names = dict.fromkeys(name for word in words for name in word)
    return {
        name: torch.tensor([word[name] for word in words if name in word], dtype=torch.float64).mean(dim=0)
        for name in names
    }


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of neighbouring tensors of one type, of at most ``BUCKET_ELEMENTS`` together."""
    bucket: list[Tensor] = []
    elements = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or elements + tensor.numel() > BUCKET_ELEMENTS):
            yield bucket
            bucket, elements = [], 0
        bucket.append(tensor)
        elements += tensor.numel()
    if bucket:
        yield bucket


def _in_place(tensors: Sequence[Tensor], change: Callable[[Tensor], None]) -> None:
    """``change`` the tensors as one vector."""
    flat = tensors[0].view(-1) if len(tensors) == 1 and tensors[0].is_contiguous() else _flat(tensors)
    change(flat)
    for tensor, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        if tensor.data_ptr() != piece.data_ptr():
            tensor.copy_(piece.view_as(tensor))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
