"""Geometries of tokens, each built once for a whole cluster before anything trains on it.

Counting is cut into shards of the text, one Ray task each; what follows (forces, physics, spectrum) happens in the
actor that asked for the counts. The jobs of one cluster share the actor, which is named after the manifold's key. Two
clusters on one storage, and processes without Ray, are kept apart by :func:`hrs.manifold.build.open_manifold`'s lock.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hrs import strict_json
from hrs.cluster.preflight import connect
from hrs.config import DataConfig, ExperimentConfig, GeometryConfig
from hrs.data import TokenStore, open_tokens
from hrs.errors import HRSError
from hrs.files import write_whole
from hrs.manifold.build import manifold_key, open_manifold
from hrs.manifold.controls import controlled
from hrs.manifold.manifold import Manifold
from hrs.manifold.statistics import Counts, count_store, merged
from hrs.models.geometry import TokenGeometry
from hrs.storage import Storage, open_storage

TOKENS_PER_SHARD = 2**20
"""Fewer are counted sooner than a worker starts."""
ATTEMPTS = 2
"""An actor ends with the job that started it: another job that waits for it then starts its own."""
POLL_SECONDS = 0.5
LINE_SECONDS = 5.0
"""Between two lines of progress of one stage."""
STAGES = "stages.json"
"""Beside a manifold that an actor built: ``seconds`` and the last note of each stage."""
_NAMESPACE = "hrs"
"""Of the actors' names: without one, every job has its own."""


def reads_manifold(config: ExperimentConfig) -> bool:
    """Whether the experiment's model reads a geometry that is computed from the text."""
    return config.model.family == "manifold" and config.model.manifold.source != "none"


def geometry_of(config: ExperimentConfig, store: TokenStore, storage: Storage) -> TokenGeometry | None:
    """What the experiment's model reads; None if it is of a family that reads no geometry.

    A manifold that is not in the storage yet is built in this process.

    Raises:
        HRSError: if it cannot be built.
    """
    if config.model.family != "manifold":
        return None
    geometry = config.model.manifold.geometry
    if not reads_manifold(config):
        return TokenGeometry(
            torch.zeros(store.vocab_size, geometry.n_coordinates),
            torch.full((store.vocab_size, geometry.neighbours), -1),
        )
    manifold = open_manifold(geometry, store, storage.manifolds)
    return controlled(manifold.geometry(), config.model.manifold.source, config.seed)


def build_manifolds(
    configs: Sequence[ExperimentConfig], storage: Storage, on_progress: Callable[[str], None]
) -> dict[str, str]:
    """Build what the experiments read and the storage lacks; digests by key. Without a lack there is no need for Ray.

    Args:
        on_progress: gets a line every few seconds and whenever a stage ends.

    Raises:
        HRSError: if Ray cannot be reached, or a manifold cannot be built, or its builder dies again and again.
    """
    digests: dict[str, str] = {}
    wanted = dict.fromkeys((c.data, c.model.manifold.geometry) for c in configs if reads_manifold(c))
    for data, geometry in wanted:
        store = open_tokens(data, storage.tokens)
        key = manifold_key(geometry, store.fingerprint)
        task = (data, store.fingerprint, geometry)
        digests[key] = cached_digest(key, storage) or _build(key, task, storage, on_progress)
    return digests


def cached_digest(key: str, storage: Storage) -> str | None:
    """The digest of a manifold that lies whole in the storage, else None."""
    folder = storage.manifolds / key
    if not folder.exists():
        return None
    try:
        return Manifold.load(folder).digest
    except HRSError:
        return None  # damaged: whoever opens it builds it again


# ---- in the driver ---------------------------------------------------------------------------------------------------


Task = tuple[DataConfig, str, GeometryConfig]
"""What a builder is told: data, fingerprint of their token store, geometry."""


def _build(key: str, task: Task, storage: Storage, on_progress: Callable[[str], None]) -> str:
    connect(storage)
    import ray

    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(2 * POLL_SECONDS)  # until the cluster knows of the death and gives the name away again
        try:
            return _follow(key, task, storage, on_progress)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayActorError as error:
            # A sentence, not the error: its frames hold the dead actor, and while they do its name is not free.
            reason = next((line for line in str(error).splitlines() if line.startswith("The actor")), str(error))
            if (digest := cached_digest(key, storage)) is not None:
                return digest
    raise HRSError(
        f"the process that builds manifold {key} died {ATTEMPTS} times ({' '.join(reason.split())[:200]}): if memory "
        "was short, set model.manifold.geometry.partners to 32 or choose a smaller vocabulary"
    )


def _follow(key: str, task: Task, storage: Storage, on_progress: Callable[[str], None]) -> str:
    """Start the actor or join the one that another job started, show how far it is, and return the digest."""
    import ray

    options: dict[str, Any] = {"num_cpus": 0, "concurrency_groups": {"watch": 1}}  # reports come while it builds
    named = {"name": f"manifold-{key}", "namespace": _NAMESPACE, "get_if_exists": True}
    actor: Any = ray.remote(**options)(ManifoldBuilder).options(**named).remote(*task, str(storage.root))
    digest, lines = actor.build.remote(), ProgressLines(key)
    while True:
        ended, _ = ray.wait([digest], timeout=POLL_SECONDS)
        reports = ray.get(actor.reports.options(concurrency_group="watch").remote())
        for line in lines.fresh(reports, time.monotonic()):
            on_progress(line)
        if ended:
            return str(ray.get(digest))


class ProgressLines:
    """Turns the latest report of each stage into lines worth printing: one every few seconds and one at its end."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._shown: dict[str, tuple[float, str]] = {}
        self._printed_at: dict[str, float] = {}

    def fresh(self, reports: Mapping[str, tuple[float, str]], now: float) -> Iterator[str]:
        """Lines to print at a monotonic time in seconds; ``reports`` holds (share done, note) by stage."""
        latest = next(reversed(list(reports)), None)
        for stage, (done, note) in reports.items():
            has_ended = done >= 1 or stage != latest  # a simulation that comes to rest never reports all of its steps
            is_due = has_ended or now - self._printed_at.get(stage, -math.inf) >= LINE_SECONDS
            if is_due and self._shown.get(stage) != (done, note):
                self._shown[stage], self._printed_at[stage] = (done, note), now
                yield f"manifold {self._key[:8]}  {stage:<12} {done:>4.0%}  {note}".rstrip()


# ---- on the cluster --------------------------------------------------------------------------------------------------


class ManifoldBuilder:
    """Ray actor that builds one manifold and tells whoever asks how far it is.

    It reserves no core, as it waits while tasks count, each on a core of its own: two builders that held one each would
    wait for each other's on a small cluster.
    """

    def __init__(self, data: DataConfig, fingerprint: str, geometry: GeometryConfig, storage_root: str) -> None:
        self._data, self._fingerprint, self._geometry = data, fingerprint, geometry
        self._storage = open_storage(storage_root)
        self._reports: dict[str, tuple[float, str]] = {}
        self._ended_at: dict[str, float] = {}  # monotonic seconds of the latest report

    def build(self) -> str:
        """The manifold's digest; a second call finds it in the storage.

        Raises:
            HRSError: see :func:`hrs.manifold.build.open_manifold`; or if a counting task dies.
        """
        store, root = open_tokens(self._data, self._storage.tokens, self._fingerprint), self._storage.manifolds
        started = time.monotonic()
        manifold = open_manifold(self._geometry, store, root, count=self._count, report=self._report)
        if self._ended_at:  # it was built here and now
            folder = root / manifold_key(self._geometry, store.fingerprint)
            ends = [started, *self._ended_at.values()]
            seconds = dict(zip(self._ended_at, (b - a for a, b in itertools.pairwise(ends)), strict=True))
            notes = {stage: note for stage, (_, note) in self._reports.items()}
            write_whole(folder / STAGES, strict_json.dumps({"seconds": seconds, "notes": notes}, indent=1))
            self._ended_at.clear()
        return manifold.digest

    def reports(self) -> dict[str, tuple[float, str]]:
        """The latest report of each stage so far: share done and a note."""
        return dict(self._reports)

    def _report(self, stage: str, done: float, note: str) -> None:
        self._reports[stage], self._ended_at[stage] = (done, note), time.monotonic()

    def _count(self, store: TokenStore, across_documents: bool) -> Counts:
        import ray

        n_shards = max(1, min(_cores(ray.cluster_resources()), -(-len(store.train) // TOKENS_PER_SHARD)))
        counts = count_sharded(self._data, self._storage, across_documents, n_shards, self._report, store.fingerprint)
        # The rest comes out the same with any number of threads: take the cores that nobody holds.
        torch.set_num_threads(min(_cores(ray.available_resources()), len(os.sched_getaffinity(0))))
        return counts


def _cores(resources: Mapping[str, float]) -> int:
    return max(1, int(resources.get("CPU", 0)))


def count_sharded(
    data: DataConfig,
    storage: Storage,
    across_documents: bool,
    n_shards: int,
    report: Callable[[str, float, str], None],
    fingerprint: str | None = None,
) -> Counts:
    """Counts of the training split, equal to the last bit to those of one process, by ``n_shards`` Ray tasks.

    Args:
        fingerprint: of the token store; tasks then open it without a look at the corpus.

    Raises:
        HRSError: if a task cannot read the text, or dies more often than Ray tries it again.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=2)(_count_one)
    text = (data, str(storage.tokens), fingerprint)
    waiting = [task.remote(*text, across_documents, (i, n_shards)) for i in range(n_shards)]

    def arriving(refs: list[Any]) -> Iterator[Counts]:
        while refs:
            (ready,), refs = ray.wait(refs)
            yield ray.get(ready)
            report("counts", 1 - len(refs) / n_shards, f"{n_shards - len(refs)} of {n_shards} shards")

    report("counts", 0.0, f"{n_shards} shards")
    try:
        return merged(arriving(waiting))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:200]
        raise HRSError(
            f"a worker that counts tokens died ({reason}): give the cluster more memory, or fewer cores"
        ) from error


def _count_one(
    data: DataConfig, tokens_root: str, fingerprint: str | None, across_documents: bool, shard: tuple[int, int]
) -> Counts:
    store = open_tokens(data, Path(tokens_root), fingerprint)
    return count_store(store, across_documents=across_documents, shard=shard)
