"""One run trained by several workers: an actor for each, together in one placement group.

Each trains on its part of every batch (:mod:`hrs.training.sharing`); the first one reports and writes. What is lost
with a worker is the work since the last checkpoint: all others are ended, and the same call goes on from there.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch.distributed as dist

from hrs.cluster.hardware import with_announced
from hrs.config import ExperimentConfig
from hrs.data import open_tokens
from hrs.errors import HRSError
from hrs.models.geometry import TokenGeometry
from hrs.training import Progress, Runtime, train
from hrs.training.runtime import DEFAULT_RUNTIME
from hrs.training.sharing import LostContact, join

PLACEMENT_SECONDS = 600.0
"""Longest wait for cores and GPUs that others hold."""
BLAME_SECONDS = 10.0
"""After a worker lost contact: longest wait for the cause, the end of another one, to show."""


def train_with_workers(
    config: ExperimentConfig,
    tokens: Path,
    directory: Path,
    runtime: Runtime = DEFAULT_RUNTIME,
    geometry: TokenGeometry | None = None,
    *,
    gpus: int = 0,
    fingerprint: str | None = None,
) -> Iterator[Progress]:
    """Train ``config`` with its ``training.sharing.workers`` on the connected Ray; yields as ``train`` does.

    Leaving the generator early ends the workers. ``directory`` and ``tokens`` must be seen by every node, and the
    workers' messages are neither encrypted nor authenticated: see :mod:`hrs.training.sharing`.

    Args:
        tokens: folder of the token stores; the one of ``config.data`` is opened there.
        runtime: of each worker; each reserves ``runtime.threads`` cores. Without ``gpus`` the device is the CPU.
        gpus: whole GPUs that each worker reserves.
        fingerprint: of the token store; workers then open it without a look at the corpus, which may be out of reach.

    Raises:
        HRSError: if the cluster has no room for all workers, one of them died (the sentence says which), or training
            raised it in one.
    """
    import ray

    n = config.training.sharing.workers
    placement = _reserve(n, runtime.threads, gpus)
    workers: list[Any] = []
    try:
        workers = [_start(placement, rank, runtime.threads, gpus) for rank in range(n)]
        order = ray.put((config, tokens, fingerprint, directory, runtime.reserving(gpus), geometry))
        waiting: dict[Any, int] = {}
        try:
            meeting = ray.get(workers[0].invite.remote())
        except ray.exceptions.RayError as error:
            _fail(error, 0, waiting, n)
        waiting |= {worker.begin.remote(rank, n, meeting, order): rank for rank, worker in enumerate(workers)}
        while waiting:
            (ready, *_), _ = ray.wait(list(waiting))
            rank = waiting.pop(ready)
            try:
                progress, ended = ray.get(ready)
            except ray.exceptions.RayError as error:
                _fail(error, rank, waiting, n)
            if progress is not None:
                yield progress
            if not ended:
                waiting[workers[rank].advance.remote()] = rank
    finally:
        for worker in workers:
            ray.kill(worker)
        ray.util.remove_placement_group(placement)


def reserved_runtime() -> Runtime:
    """Return how to compute in this process: on the GPU that Ray reserved for it, else on the CPU.

    Ray does not hide the GPUs of a node from workers that reserve none. Outside of Ray the first GPU is used, if any.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return Runtime()
    return Runtime(device="auto" if ray.get_gpu_ids() else "cpu")


class Worker:
    """The actor: one worker's training, a report at a time."""

    def __init__(self) -> None:
        self._store: dist.TCPStore | None = None
        self._reports: Iterator[Progress] = iter(())

    def invite(self) -> tuple[str, int]:
        """Open the store at which the workers meet, on the first one's node; its host and port."""
        import ray

        self._store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        return ray.util.get_node_ip_address(), self._store.port

    def begin(
        self,
        rank: int,
        size: int,
        meeting: tuple[str, int],
        order: tuple[ExperimentConfig, Path, str | None, Path, Runtime, TokenGeometry | None],
    ) -> tuple[Progress | None, bool]:
        """Train until the first report; what :meth:`advance` gives."""
        self._reports = self._train(rank, size, meeting, *order)
        return self.advance()

    def advance(self) -> tuple[Progress | None, bool]:
        """Train until the next report: it, or None, and whether training has ended."""
        progress = next(self._reports, None)
        return progress, progress is None

    def _train(
        self,
        rank: int,
        size: int,
        meeting: tuple[str, int],
        config: ExperimentConfig,
        tokens: Path,
        fingerprint: str | None,
        directory: Path,
        runtime: Runtime,
        geometry: TokenGeometry | None,
    ) -> Iterator[Progress]:
        _choose_interface()
        store = self._store or dist.TCPStore(*meeting)
        with join(store, rank, size, runtime.torch_device()) as workers:
            text = open_tokens(config.data, tokens, fingerprint)
            yield from train(config, text, directory, runtime, geometry, workers)


def _choose_interface() -> None:
    """Gloo takes the address that the host's name stands for, which on many machines is the loopback."""
    import ray

    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


# ---- in the driver ---------------------------------------------------------------------------------------------------


def _reserve(n: int, threads: int, gpus: int) -> Any:
    """Return a placement group with a bundle for each worker, as close together as there is room."""
    import ray

    total, bundle = (
        with_announced(ray.cluster_resources()),
        {"CPU": float(threads)} | ({"GPU": float(gpus)} if gpus else {}),
    )
    for name, amount in bundle.items():
        if n * amount > total.get(name, 0.0):
            what = {"CPU": "cores", "GPU": "GPUs"}[name]
            raise HRSError(
                f"{n} workers need {n * amount:.0f} {what} and the cluster has {total.get(name, 0.0):.0f}: add nodes, "
                "or run it as an ordinary trial, which computes the workers' parts one after another"
            )
    placement = ray.util.placement_group([bundle] * n, strategy="PACK")
    if not placement.wait(PLACEMENT_SECONDS):
        ray.util.remove_placement_group(placement)
        raise HRSError(
            f"no room for {n} workers within {PLACEMENT_SECONDS / 60:.0f} minutes: wait until other trials end, or "
            "look at `ray status` for what holds the cores and GPUs"
        )
    return placement


def _start(placement: Any, rank: int, threads: int, gpus: int) -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(placement_group=placement, placement_group_bundle_index=rank)
    actor = ray.remote(num_cpus=threads, num_gpus=gpus, max_restarts=0, scheduling_strategy=strategy)(Worker)
    return actor.remote()


def _fail(error: Exception, rank: int, waiting: dict[Any, int], n: int) -> NoReturn:
    """Raise the cause: a worker that lost contact is a consequence of what befell another one."""
    import ray

    deadline = time.monotonic() + BLAME_SECONDS
    while isinstance(getattr(error, "cause", None), LostContact) and waiting:
        ready, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        other = waiting.pop(ready[0])
        try:
            ray.get(ready[0])
        except ray.exceptions.RayError as theirs:
            error, rank = theirs, other
    cause = getattr(error, "cause", None)
    if isinstance(cause, HRSError):
        raise HRSError(f"worker {rank} of {n}: {cause}") from error
    if isinstance(error, ray.exceptions.RayTaskError) and cause is not None:
        raise cause from error
    raise HRSError(
        f"worker {rank} of {n} died (killed, out of memory, or with its node) and the others were ended: the same "
        "command goes on from the last checkpoint"
    ) from error
