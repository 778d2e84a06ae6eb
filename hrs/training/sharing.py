"""One run learned by several processes: each takes a part of every batch, and they exchange gradients.

All of them step alike on the same gradients, so their weights stay equal without ever being sent. Gradients travel in
buckets, each as soon as the backward pass has made all of its gradients (Li et al. 2020, PyTorch Distributed). Within
``join`` a process is one of the workers:

    with join(store, rank, size, device) as workers:
        for progress in train(config, tokens, directory, runtime, workers=workers): ...

Without, ``train`` computes the parts one after another and has the same result. Messages between workers are neither
encrypted nor authenticated: use a network that only you can reach.
"""

import hashlib
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hrs import strict_json
from hrs.config import SharingConfig
from hrs.errors import HRSError
from hrs.training.lazy_adamw import coalesced

BUCKET_ELEMENTS = 2**23
"""Most gradients in a bucket. A tensor that has more is sent after the backward pass, in place: a copy of it would take
too much memory."""
PATIENCE_SECONDS = 1800.0
"""Longest wait for another worker. The first one validates and writes checkpoints while the others wait."""

_Message = TypeVar("_Message")


class LostContact(HRSError):
    """Another worker ended or does not answer: the cause is to be found there."""


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

    def share_buffers(self, model: nn.Module) -> None:
        """Give every worker the first one's persistent buffers that changed since the last call.

        They hold what a model remembers of its passes, and a resumed run has nothing else. No worker waits for a GPU:
        what changed is told between hosts, and the buffers follow from device to device.
        """
        state = model.state_dict(keep_vars=True)
        buffers = {name: t for name, t in state.items() if not isinstance(t, nn.Parameter)}
        if not buffers:
            return
        versions = {name: (t.data_ptr(), t._version) for name, t in buffers.items()}
        changed = torch.tensor([versions[name] != self._seen.get(name) for name in buffers], dtype=torch.uint8)
        self._seen = versions
        with _contact(), torch.no_grad():
            dist.broadcast(changed, src=0)
            for buffer, new in zip(buffers.values(), changed.tolist(), strict=True):
                if new:
                    content = buffer.contiguous().reshape(-1).view(torch.uint8)  # gloo sends no booleans
                    dist.broadcast(content, src=0)
                    if not self.first and content.data_ptr() != buffer.data_ptr():
                        buffer.copy_(content.view(buffer.dtype).view(buffer.shape))

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

    def _gather(self, message: _Message) -> list[_Message]:
        """Everyone's message, by rank."""
        messages: list[Any] = [None] * self.size
        with _contact():
            dist.all_gather_object(messages, message)
        return messages


class GradientExchange:
    """Replace gradients by their means over the workers, as far as possible while the backward pass goes on.

    Which gradients make up a bucket depends only on which parameters have a dense gradient on any worker in this step,
    so that a resumed run adds in the same order. During the backward pass that set is taken to be the one of the step
    before, and the buckets are sent in the order in which the first worker filled them then. Where that, or a bucket
    that was sent, proves wrong (a phase began, a worker ran out of memory and repeated its passes), all workers notice
    it after the pass and send everything again.

    Every method must be called by all workers.
    """

    def __init__(self, workers: Workers, parameters: Sequence[nn.Parameter], unshared: Collection[int] = ()) -> None:
        """Of ``parameters``, the same on every worker, those with an id in ``unshared`` get the first worker's gradient
        instead of the mean."""
        self._workers, self._parameters = workers, list(parameters)
        self._own = [id(parameter) in unshared for parameter in self._parameters]
        self._buckets: list[list[int]] = []
        self._order: list[int] = []
        self._bucket_of: dict[int, int] = {}
        self._had_gradient: set[int] = set()
        self._missing: list[set[int]] = []
        self._arrivals: list[int] = []
        self._sent: dict[int, tuple[Tensor, dist.Work]] = {}
        self._stale = False
        self._listening = False
        self._hooked: set[int] = set()

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Send buckets as they are filled within this block, which holds the last backward pass of a step."""
        for index, parameter in enumerate(self._parameters):
            if parameter.requires_grad and index not in self._hooked:
                parameter.register_post_accumulate_grad_hook(_hook(weakref.WeakMethod(self._arrived), index))
                self._hooked.add(index)
        self._stale = bool(self._sent)  # by an attempt at this step that ran out of memory
        self._arrivals = []
        self._missing = [self._had_gradient.intersection(bucket) for bucket in self._buckets]
        self._listening = True
        try:
            yield
        finally:
            self._listening = False

    def finish(self, values: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """Complete the exchange of a step.

        A parameter has a gradient afterwards if it had one on any worker (on the first, if unshared); for the mean it
        is 0 where there was none. All workers hold the same bits.

        Args:
            values: detached, by name, each scalar or [k], any number per name.

        Returns:
            The mean over workers of the mean of each name's values: float64 [k] on the device of the values.
        """
        for number in self._order[len(self._sent) :]:
            self._send(number)
        layout, means = _means(values)
        told = self._tell([_rows(parameter.grad) for parameter in self._parameters], layout)
        n = len(self._parameters)
        everyones = list(zip(*(word[:n] for word in told), strict=True))
        rows = [list(counts[:1] if own else counts) for counts, own in zip(everyones, self._own, strict=True)]
        dense = [index for index, counts in enumerate(rows) if max(counts) == 0]
        buckets, large = self._compose(dense)
        if buckets != self._buckets or any(word[-2] for word in told):
            self._wait()
            self._buckets = buckets
            self._bucket_of = {index: number for number, bucket in enumerate(buckets) for index in bucket}
            for number in range(len(buckets)):
                self._send(number)
        arrivals = told[0][n : 2 * n]
        self._order = sorted(range(len(buckets)), key=lambda number: max(arrivals[index] for index in buckets[number]))
        self._had_gradient = {index for index in dense if self._parameters[index].grad is not None}
        for number, flat in self._wait().items():
            self._put_back(flat, self._buckets[number])
        for index in large:
            self._exchange_in_place(index)
        for index, counts in enumerate(rows):
            if max(counts) > 0:
                n_rows = [max(n - 1, 0) for n in counts] + [0] * (self._workers.size - len(counts))
                self._exchange_rows(self._parameters[index], n_rows, divisor=len(counts))
            elif max(counts) < 0:
                self._parameters[index].grad = None
        self._stale = False
        return self._exchange_means(values, means, same_layout=all(word[-1] == layout for word in told))

    # ---- buckets -----------------------------------------------------------------------------------------------------

    def _compose(self, dense: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        """The buckets for these parameters, and those that are too large for one."""
        buckets: list[list[int]] = []
        large = [index for index in dense if self._parameters[index].numel() > BUCKET_ELEMENTS]
        for own in (False, True):
            elements, dtype = 0, None
            for index in reversed([i for i in dense if self._own[i] == own and i not in large]):
                parameter = self._parameters[index]
                if dtype != parameter.dtype or elements + parameter.numel() > BUCKET_ELEMENTS:
                    buckets.append([])
                    elements, dtype = 0, parameter.dtype
                buckets[-1].append(index)
                elements += parameter.numel()
        return buckets, large

    def _arrived(self, index: int) -> None:
        """A gradient was added to: send what is complete, in the same order on every worker."""
        if not self._listening:
            return
        self._arrivals.append(index)
        number = self._bucket_of.get(index)
        if number is None:
            return
        if number in self._sent:
            self._stale = True
        self._missing[number].discard(index)
        for following in self._order[len(self._sent) :]:
            if self._missing[following]:
                break
            self._send(following)

    def _send(self, number: int) -> None:
        pieces = []
        for parameter in (self._parameters[index] for index in self._buckets[number]):
            gradient = parameter.grad
            if gradient is None or gradient.is_sparse:
                gradient = torch.zeros_like(parameter)
            pieces.append(gradient.reshape(-1))
        flat = torch.cat(pieces)
        with _contact():
            if self._own[self._buckets[number][0]]:
                work = dist.broadcast(flat, src=0, async_op=True)
            else:
                work = dist.all_reduce(flat, async_op=True)
        self._sent[number] = flat, work

    def _wait(self) -> dict[int, Tensor]:
        """What was sent, by bucket, when it has arrived from everyone."""
        sent, self._sent = self._sent, {}
        with _contact():
            for _, work in sent.values():
                work.wait()
        return {number: flat for number, (flat, _) in sent.items()}

    def _put_back(self, flat: Tensor, bucket: Sequence[int]) -> None:
        if not self._own[bucket[0]]:
            flat.div_(self._workers.size)
        parameters = [self._parameters[index] for index in bucket]
        for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(piece.view(parameter.shape))

    # ---- the others --------------------------------------------------------------------------------------------------

    def _exchange_in_place(self, index: int) -> None:
        parameter = self._parameters[index]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad.contiguous()
        with _contact():
            if self._own[index]:
                dist.broadcast(gradient, src=0)
            else:
                dist.all_reduce(gradient)
                gradient.div_(self._workers.size)
        parameter.grad.copy_(gradient)

    def _exchange_rows(self, parameter: nn.Parameter, counts: Sequence[int], divisor: int) -> None:
        """The sum of everyone's first ``counts`` rows of a sparse gradient [rows, width], over ``divisor``."""
        longest, width, mine = max(counts), parameter.shape[1], counts[self._workers.rank]
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

    # ---- messages ----------------------------------------------------------------------------------------------------

    def _tell(self, rows: Sequence[int], layout: int) -> list[list[int]]:
        """Tell all workers, between hosts, which gradients are here, in which order they came, whether something was
        sent too early, and the layout of the values; what each of them told, by rank."""
        places = [len(rows)] * len(rows)  # last, if it did not come
        for place, index in enumerate(self._arrivals):
            places[index] = place
        self._arrivals = []
        mine = torch.tensor([*rows, *places, self._stale, layout], dtype=torch.int64)
        everyones = [torch.empty_like(mine) for _ in range(self._workers.size)]
        with _contact():
            dist.all_gather(everyones, mine)
        return torch.stack(everyones).tolist()

    def _exchange_means(
        self, values: Mapping[str, Sequence[Tensor]], means: Tensor, *, same_layout: bool
    ) -> dict[str, Tensor]:
        """Means over the workers that have the name; without waiting for a GPU if all have the same."""
        mine = dict(zip(values, means.split([items[0].numel() for items in values.values()]), strict=True))
        if same_layout:
            with _contact():
                dist.all_reduce(means)
            means.div_(self._workers.size)  # in place, so that its parts in `mine` are the means of all
            return mine
        words = self._workers._gather({name: mean.tolist() for name, mean in mine.items()})
        return {
            name: torch.tensor([w[name] for w in words if name in w], dtype=torch.float64).mean(0).to(means.device)
            for name in dict.fromkeys(name for word in words for name in word)
        }


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


def _hook(arrived: weakref.WeakMethod[Callable[[int], None]], index: int) -> Callable[[Tensor], None]:
    """Weak, or the parameters and the exchange would refer to each other: a warm worker would keep the model."""

    def hook(_: Tensor) -> None:
        function = arrived()
        if function is not None:
            function(index)

    return hook


def _rows(gradient: Tensor | None) -> int:
    """-1 without a gradient, 0 for a dense one, one more than the number of its rows for a sparse one."""
    if gradient is None or not gradient.is_sparse:
        return -1 if gradient is None else 0
    return coalesced(gradient).indices().shape[1] + 1


def _means(values: Mapping[str, Sequence[Tensor]]) -> tuple[int, Tensor]:
    """A number for the names and sizes of ``values``, and the mean of each name's values, one after another."""
    means = [torch.stack([item.reshape(-1) for item in items]).double().mean(dim=0) for items in values.values()]
    layout = strict_json.dumps([(name, len(mean)) for name, mean in zip(values, means, strict=True)])
    digest = hashlib.sha256(layout.encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True), torch.cat(means)
