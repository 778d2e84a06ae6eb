"""What a machine or a Ray cluster offers to trials: cores, and GPUs by kind, with the memory that is free now.

    Hardware.of_this_machine()                    # asks a process that ends: planning never opens CUDA
    Hardware.of_cluster(connect(storage))         # asks every node with GPUs, and the autoscaler's configuration
    Hardware(cpus=8, nodes=parse_gpus("2x24:A10G"))   # a machine that is not at hand

A plan may exchange the GPUs of one *pool* for one another. Ray chooses the node of a trial by the label selector that
:meth:`Hardware.selector` returns, but not the GPU within a node: a node with GPUs of several kinds is planned by the
smallest free memory among them. To use such a machine fully, start a Ray node for each kind, each with its own
``CUDA_VISIBLE_DEVICES``.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from hrs.errors import HRSError, shown
from hrs.files import absolute_path
from hrs.gpu import GpuProperties, probe_gpus

PROBE_SECONDS = 180.0
"""Longest wait for a node to say which GPUs it has: a new worker imports torch twice."""

CLUSTER_CONFIG = "HRS_CLUSTER_CONFIG"
"""Environment variable with the path of the launcher file that Ray's autoscaler follows."""
GPU_GIB = "gpu_gib"
"""Custom resource of a node type in the launcher file: memory of one GPU in GiB, as sold."""

MOST_GPUS = 10_000
MOST_GIB = 100_000
USABLE_FRAC = 0.9
"""Share of the memory as sold that a GPU offers: the driver, ECC and rounding (24 GB are 22.1 GiB) take the rest."""
CPUS_PER_GPU = 8
"""Cores that a described machine is taken to have for each GPU; common clouds give at least as many."""
EQUAL_FRAC = 0.9
"""GPUs of one kind are in one pool if the fullest one has at least this share of the free memory of the emptiest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuNode:
    """One machine with GPUs."""

    gpus: tuple[GpuProperties, ...]
    cpus: int
    address: str = ""
    """Of a node of a cluster; empty for this machine."""
    node_id: str = ""
    """Ray's; empty for a node that is not part of a cluster yet."""
    announced: bool = False
    """True if it is not alive: an autoscaler starts it when trials wait for it."""

    @property
    def limit_bytes(self) -> int:
        """Free memory on every GPU of the node."""
        return min(gpu.free_bytes for gpu in self.gpus)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The different kinds of its GPUs."""
        return tuple(sorted({gpu.kind for gpu in self.gpus}))


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuPool:
    """Nodes whose GPUs a plan may exchange for one another."""

    nodes: tuple[GpuNode, ...]

    @property
    def count(self) -> int:
        """Number of GPUs."""
        return sum(len(node.gpus) for node in self.nodes)

    @property
    def cpus(self) -> int:
        """Cores of the nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def limit_bytes(self) -> int:
        """Free memory on every GPU of the pool."""
        return min(node.limit_bytes for node in self.nodes)

    @property
    def gpus(self) -> tuple[GpuProperties, ...]:
        """All GPUs."""
        return tuple(gpu for node in self.nodes for gpu in node.gpus)

    @property
    def kind(self) -> str:
        """Name and memory of its GPUs, or of each kind where a node has several."""
        return " + ".join(self.nodes[0].kinds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Cores and GPUs."""

    cpus: int
    nodes: tuple[GpuNode, ...] = ()
    """Those with GPUs."""

    @classmethod
    def of_this_machine(cls) -> "Hardware":
        """Return the cores this process may use and the GPUs it sees.

        Raises:
            HRSError: if there is a GPU that torch cannot use, or one that does not answer.
        """
        cpus, gpus = len(os.sched_getaffinity(0)), probe_gpus()
        return cls(cpus=cpus, nodes=(GpuNode(gpus=gpus, cpus=cpus),) if gpus else ())

    @classmethod
    def of_cluster(cls, resources: Mapping[str, float], announced: Sequence[GpuNode] = ()) -> "Hardware":
        """Return what a connected Ray cluster has and what its autoscaler will bring.

        Args:
            resources: of the cluster, by Ray's names.
            announced: nodes that the autoscaler will bring; by default those of the file that
                :data:`CLUSTER_CONFIG` names.

        Raises:
            HRSError: if a node has a GPU that torch cannot use or that does not answer, or the autoscaler's
                configuration does not tell how much memory its GPUs have.
        """
        alive = _ask_nodes() if resources.get("GPU") else ()
        announced = announced or _announced_by_file(alive)
        cpus = int(resources.get("CPU", 0)) + sum(node.cpus for node in announced)
        return cls(cpus=max(1, cpus), nodes=(*alive, *announced))

    @property
    def pools(self) -> tuple[GpuPool, ...]:
        """Nodes grouped by the kind of their GPUs and by free memory, the most memory first."""
        pools: list[list[GpuNode]] = []
        for node in sorted(self.nodes, key=lambda node: -node.limit_bytes):
            for pool in pools:
                if node.kinds == pool[0].kinds and node.limit_bytes >= EQUAL_FRAC * pool[0].limit_bytes:
                    pool.append(node)
                    break
            else:
                pools.append([node])
        return tuple(GpuPool(nodes=tuple(pool)) for pool in pools)

    def selector(self, pool: GpuPool) -> str:
        """Return Ray's selector over the label ``ray.io/node-id`` for nodes of ``pool``; empty if any node will do.

        Nodes that are not alive yet have no id, so their pool is chosen by excluding all other nodes.
        """
        if len(self.pools) == 1:
            return ""
        if not any(node.announced for node in pool.nodes):
            return f"in({','.join(node.node_id for node in pool.nodes)})"
        others = [node.node_id for node in self.nodes if node not in pool.nodes and node.node_id]
        return f"!in({','.join(others)})" if others else ""

    def gpu_lines(self) -> list[str]:
        """Return one line for each GPU, or for each kind of those that are not there yet."""
        lines = []
        for node in self.nodes:
            if not node.announced:
                where = f"{node.address} " if node.address else ""
                lines += [
                    f"{where}GPU {gpu.index}: {gpu.name}, {gpu.total_bytes / 2**30:.0f} GiB, "
                    f"{gpu.free_bytes / 2**30:.1f} GiB free"
                    for gpu in node.gpus
                ]
        awaited = [gpu for node in self.nodes if node.announced for gpu in node.gpus]
        for kind in dict.fromkeys(gpu.kind for gpu in awaited):
            lines.append(f"{sum(gpu.kind == kind for gpu in awaited)} x {kind}, not running yet")
        return lines

    def __str__(self) -> str:
        count = sum(len(node.gpus) for node in self.nodes)
        gpus = "no GPU" if not count else "1 GPU" if count == 1 else f"{count} GPUs"
        return f"{self.cpus} CPU core{'s' if self.cpus > 1 else ''}, {gpus}"


# ---- alive -----------------------------------------------------------------------------------------------------------


def _ask_nodes() -> tuple[GpuNode, ...]:
    """Ask every node of the connected cluster for its GPUs.

    Ray's GPU resource is a number without bytes, and ``ray start --num-gpus`` may promise GPUs that do not exist: such
    a node counts as having none.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = ray.remote(num_cpus=0, max_retries=0)(probe_gpus)  # opens CUDA in a process that ends, not in Ray's worker
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    answers = [
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in nodes
    ]
    found = []
    for node, answer in zip(nodes, answers, strict=True):
        address, resources = node["NodeManagerAddress"], node["Resources"]
        try:
            gpus = ray.get(answer, timeout=PROBE_SECONDS)
        except ray.exceptions.RayTaskError as error:
            raise HRSError(f"node {address}: {error.cause}") from error
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise HRSError(
                f"node {address} did not say which GPUs it has ({reason}): check it with `ray status`"
            ) from error
        if gpus:
            gpus, cpus = gpus[: int(resources["GPU"])], int(resources.get("CPU", 0))
            found.append(GpuNode(gpus=gpus, cpus=cpus, address=address, node_id=node["NodeID"]))
    return tuple(found)


def offers_gpus(resources: Mapping[str, float]) -> bool:
    """Return True if a connected Ray cluster has GPUs or its autoscaler will bring some; asks no node."""
    return with_announced(resources)["GPU"] > 0


def with_announced(resources: Mapping[str, float]) -> dict[str, float]:
    """Return cores and GPUs of a connected Ray cluster, those that its autoscaler may bring included."""
    announced = _announced_by_file(())
    return {
        "CPU": resources.get("CPU", 0.0) + sum(node.cpus for node in announced),
        "GPU": resources.get("GPU", 0.0) + sum(len(node.gpus) for node in announced),
    }


# ---- announced -------------------------------------------------------------------------------------------------------


def announced_nodes(config: Mapping[str, Any], alive: Sequence[GpuNode] = ()) -> tuple[GpuNode, ...]:
    """Return the nodes with GPUs that an autoscaler may start beside those that are alive.

    Args:
        config: a launcher file of Ray (``ray_cluster.yaml``) as a mapping.

    Raises:
        HRSError: if a node type has GPUs but does not say how much memory they have.
    """
    announced: list[GpuNode] = []
    for name, node_type in (config.get("available_node_types") or {}).items():
        resources = node_type.get("resources") or {}
        count = int(resources.get("GPU") or 0)
        most = int(node_type.get("max_workers", config.get("max_workers", 0)))
        if not count or not most:
            continue
        accelerators = [
            key.removeprefix("accelerator_type:") for key in resources if key.startswith("accelerator_type:")
        ]
        if GPU_GIB not in resources:
            raise HRSError(
                f"the autoscaler's node type '{name}' has GPUs of unknown memory: add `{GPU_GIB}: 24` (GiB of one GPU) "
                "to its resources in the launcher file, and run `ray up` again"
            )
        node = described_node(
            count, float(resources[GPU_GIB]), (accelerators or [name])[0], cpus=int(resources.get("CPU") or 0)
        )
        if living := [other for other in alive if _alike(other, node)]:
            free = node.limit_bytes  # a living node's GPUs have their exact name and memory, but may be in use
            known = tuple(replace(gpu, free_bytes=min(free, gpu.total_bytes)) for gpu in living[0].gpus)
            node = replace(node, gpus=known)
        announced += [node] * max(0, most - len(living))
    return tuple(announced[: int(config.get("max_workers", len(announced)))])


def _alike(alive: GpuNode, announced: GpuNode) -> bool:
    """Return True if a living node may be of the announced type: as many GPUs, with the memory it promises."""
    return len(alive.gpus) == len(announced.gpus) and all(
        announced.gpus[0].free_bytes <= gpu.total_bytes <= announced.gpus[0].total_bytes for gpu in alive.gpus
    )


def described_node(count: int, gib: float, name: str, cpus: int) -> GpuNode:
    """Return a node that is not there, with ``count`` GPUs of ``gib`` GiB as sold."""
    total = int(gib * 2**30)
    gpus = tuple(
        GpuProperties(index=index, name=name, total_bytes=total, free_bytes=int(USABLE_FRAC * total), capability=(0, 0))
        for index in range(count)
    )
    return GpuNode(gpus=gpus, cpus=cpus, announced=True)


def parse_gpus(text: str) -> tuple[GpuNode, ...]:
    """Parse a description of GPUs: ``COUNTxGIB[:NAME]``, comma-separated, such as ``4x24:A10G,1x8``.

    Every item is a node of its own, with :data:`CPUS_PER_GPU` cores for each GPU.

    Raises:
        HRSError: if it is none.
    """
    nodes = []
    for item in text.split(","):
        found = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9}(?:\.[0-9]{1,9})?)(?::(.{1,100}))?", item.strip())
        if not found or not 1 <= int(found[1]) <= MOST_GPUS or not 0.1 <= float(found[2]) <= MOST_GIB:
            raise HRSError(
                f"{shown(item)} describes no GPUs: write COUNTxGIB or COUNTxGIB:NAME, such as 4x24:A10G, with at most "
                f"{MOST_GPUS:,} GPUs of {MOST_GIB:,} GiB"
            )
        count = int(found[1])
        nodes.append(described_node(count, float(found[2]), found[3] or "GPU", count * CPUS_PER_GPU))
    return tuple(nodes)


def _announced_by_file(alive: Sequence[GpuNode]) -> tuple[GpuNode, ...]:
    path = os.environ.get(CLUSTER_CONFIG)
    return announced_nodes(_read_yaml(path), alive) if path else ()


def _read_yaml(path: str) -> Mapping[str, Any]:
    try:
        return yaml.safe_load(absolute_path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise HRSError(
            f"{CLUSTER_CONFIG} is {path}, which cannot be read ({type(error).__name__}): name the launcher file that "
            "the head was started with, or unset it"
        ) from error
