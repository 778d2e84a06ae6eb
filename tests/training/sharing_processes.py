"""Two processes that do what they are told, as the workers of one run."""

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hrs.config import ExperimentConfig
from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.training import Runtime, sharing, train
from hrs.training.sharing import GradientExchange, Workers, join

PATIENCE_SECONDS = 60.0


class Pair:
    """Two warm processes; ``pair(work, ...)`` runs ``work(workers, ...)`` in both and gives what each returned."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends, self._processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self._ends.append(ours)
            self._processes.append(process)

    def __call__(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for end in self._ends:
            end.send((store.port, work, arguments))
        answers = []
        for end in self._ends:
            assert end.poll(2 * PATIENCE_SECONDS), "a worker hangs"
            answers.append(end.recv())
        for kind, answer in answers:
            assert kind == "value", answer
        return [answer for _, answer in answers]

    def close(self) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(10)


def _serve(rank: int, orders: Connection) -> None:
    torch.set_num_threads(1)
    sharing.BUCKET_ELEMENTS = 1000  # so that a small model has several
    while True:
        try:
            port, work, arguments = orders.recv()
        except EOFError:
            return
        try:
            with join(dist.TCPStore("127.0.0.1", port), rank, 2, torch.device("cpu"), PATIENCE_SECONDS) as workers:
                orders.send(("value", work(workers, *arguments)))
        except Exception:
            orders.send(("error", traceback.format_exc()))


# ---- what they can be told to do -------------------------------------------------------------------------------------


def shared_training(
    workers: Workers,
    config: ExperimentConfig,
    store: TokenStore,
    directory: Path,
    runtime: Runtime,
    trouble: str = "",
) -> tuple[list[tuple[int, dict[str, float]]], str]:
    """Train to the end or to an error; (step, metrics) of every report, and the error's sentence.

    ``trouble`` befalls the second worker: ``poison`` makes its loss NaN at the third pass, ``small card`` gives it
    memory for one window at a time, ``leave`` and ``drift`` make it fail or change a weight at the fourth pass,
    ``late`` makes it send all gradients after its pass, and ``full in backward`` lets memory run out in the fourth
    backward pass, when most gradients are made (``full in backward, late``: both).
    """
    reports, error = [], ""
    with _befall(trouble if not workers.first else ""):
        try:
            for p in train(config, store, directory, runtime, workers=workers):
                reports.append((p.step, p.metrics))
        except HRSError as failure:
            error = str(failure)
    return reports, error


@contextmanager
def _befall(trouble: str) -> Iterator[None]:
    from test_training import LOGITS, _Poison, _SmallCard

    from hrs.training import step

    real, passes, overlap = step.cross_entropy, [0], GradientExchange.during_backward

    def failing(unembed: Any, hidden: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        passes[0] += 1
        if passes[0] == 4 and trouble == "leave":
            raise HRSError("this worker has had enough")
        if passes[0] == 4 and trouble.startswith("full in backward"):
            _run_out_once(next(unembed.__self__.parameters()))  # the tied embedding, whose gradient is the last
        if passes[0] == 4 and trouble == "drift":
            with torch.no_grad():
                next(unembed.__self__.parameters()).view(-1)[3] += 1e-3
        return real(unembed, hidden, *rest, **options)

    if trouble.endswith("late"):
        GradientExchange.during_backward = lambda self: nullcontext()
    if trouble.startswith(("leave", "drift", "full in backward")):
        step.cross_entropy = failing
    if trouble == "poison":
        step.cross_entropy = _Poison({2})
    try:
        with _SmallCard(LOGITS) if trouble == "small card" else nullcontext():
            yield
    finally:
        step.cross_entropy, GradientExchange.during_backward = real, overlap


def _run_out_once(parameter: nn.Parameter) -> None:
    def hook(_: torch.Tensor) -> None:
        handle.remove()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = parameter.register_post_accumulate_grad_hook(hook)


def sent_during_backward(
    workers: Workers, config: ExperimentConfig, store: TokenStore, directory: Path, runtime: Runtime
) -> list[tuple[int, int]]:
    """Train; how many buckets were sent in each step during its backward pass, and after it."""
    counts, send = [], GradientExchange._send

    def counted(self: GradientExchange, number: int) -> None:
        counts[-1][0 if self._listening else 1] += 1
        send(self, number)

    GradientExchange._send = counted
    try:
        steps = train(config, store, directory, runtime, workers=workers)
        while True:
            counts.append([0, 0])
            if next(steps, None) is None:
                return [(during, after) for during, after in counts[:-1]]
    finally:
        GradientExchange._send = send


def exchanged(
    workers: Workers, gradients: list[list[torch.Tensor | None]], unshared: list[int]
) -> tuple[list[torch.Tensor | None], dict[str, list[float]]]:
    """The gradients after an exchange of ``gradients[rank]``, and the means of the values 1 + rank and rank, 0."""
    kinds = [next(own[i] for own in gradients if own[i] is not None) for i in range(len(gradients[0]))]
    parameters = [nn.Parameter(torch.zeros(kind.shape, dtype=kind.dtype)) for kind in kinds]
    for parameter, gradient in zip(parameters, gradients[workers.rank], strict=True):
        parameter.grad = gradient
    values = {
        "both": [torch.tensor(1.0 + workers.rank)],
        "several": [torch.tensor([workers.rank, 0.0]), torch.tensor([1.0, 0.0])][: 2 - workers.rank],
    } | ({} if workers.first else {"second": [torch.tensor(5.0)]})
    means = GradientExchange(workers, parameters, {id(parameters[i]) for i in unshared}).finish(values)
    return [p.grad for p in parameters], {name: mean.tolist() for name, mean in means.items()}
