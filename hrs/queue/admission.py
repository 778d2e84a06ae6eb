"""Which stages start now and where: by memory that is free, in the order of the queue, without starving large ones.

Stages are offered in the order in which they may be claimed. One that fits goes to the GPU that computes least for
others, and among those to the one that it fills best. A GPU that computes all the time gets no further tenant: it would
only slow down those that it has. The first stage that fits nowhere gets a reservation on the GPU where its memory is
expected to be free first; later ones start only if they do not put that off (EASY backfilling, Lifka 1995).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hrs.queue.records import Resources, StageSpec

FOREVER = float("inf")

_SATURATED = 0.99
"""A GPU that computes for this share of the time or more counts as busy all the time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU, as far as stages are placed on it."""

    name: str
    """Unique on its host, for example ``cuda:0``."""
    bytes: int
    """Memory for stages: what other programs do not use."""
    kind: str = ""
    """GPUs of one kind are equally fast."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """One machine."""

    name: str
    cpus: float
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """Resources of one process that are taken."""

    host: str
    gpu: str
    """Empty for work on the CPU."""
    cpus: float
    gpu_bytes: int
    busy_frac: float = 0.25
    ends_minutes: float = FOREVER
    """When it is expected to end; :data:`FOREVER` if nothing is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A stage that can start, and where each of its processes goes."""

    stage: StageSpec
    places: tuple[tuple[str, str], ...]
    """(host, GPU) of each process; the GPU is empty for work on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What an admission decided."""

    placements: tuple[Placement, ...]
    impossible: tuple[StageSpec, ...]
    """Stages that do not fit even if nothing else runs."""
    held_back: str = ""
    """Key of the stage for which memory is kept free; empty if none has to be."""


@dataclass(kw_only=True, slots=True)
class _Slot:
    """A GPU, or the CPU of a host, with what is free of it."""

    host: str
    gpu: str
    free_bytes: int
    whole_bytes: int
    tenants: list[Tenant]

    @property
    def load(self) -> float:
        """Share of the GPU's time that its tenants need together; may exceed 1."""
        return sum(tenant.busy_frac for tenant in self.tenants)


def admit(
    candidates: Iterable[StageSpec],
    hosts: Sequence[Host],
    tenants: Sequence[Tenant],
    now_minutes: float = 0.0,
    *,
    limit: int = 10**9,
) -> Decision:
    """Decide which of the ``candidates`` start, given what runs.

    Args:
        candidates: in the order in which they should start.
        now_minutes: on the clock of :attr:`Tenant.ends_minutes`.
        limit: most stages to start.
    """
    state = _State(hosts, tenants, now_minutes)
    placements: list[Placement] = []
    impossible: list[StageSpec] = []
    held_back = ""
    for stage in candidates:
        if len(placements) == limit:
            break
        if not fits_somewhere(stage.resources, hosts):
            impossible.append(stage)
            continue
        places = state.place(stage.resources)
        if places is not None:
            placements.append(Placement(stage=stage, places=places))
        elif not held_back:
            held_back = stage.key
            state.reserve(stage.resources)
    return Decision(placements=tuple(placements), impossible=tuple(impossible), held_back=held_back)


def fits_somewhere(resources: Resources, hosts: Sequence[Host]) -> bool:
    """Return whether a stage could run if nothing else did."""
    return _State(hosts, (), 0.0).place(resources) is not None


class _State:
    def __init__(self, hosts: Sequence[Host], tenants: Sequence[Tenant], now: float) -> None:
        self._now = now
        self._cpus = {host.name: host.cpus for host in hosts}
        self._slots: list[_Slot] = []
        for host in hosts:
            for gpu in (Gpu(name="", bytes=0), *host.gpus):
                self._slots.append(
                    _Slot(host=host.name, gpu=gpu.name, free_bytes=gpu.bytes, whole_bytes=gpu.bytes, tenants=[])
                )
        self._reserved: tuple[_Slot, float, Resources] | None = None
        for tenant in tenants:
            self._take(tenant)

    def _take(self, tenant: Tenant) -> None:
        if tenant.host in self._cpus:  # else a machine that is not ours to fill
            self._cpus[tenant.host] -= tenant.cpus
        for slot in self._slots:
            if (slot.host, slot.gpu) == (tenant.host, tenant.gpu):
                slot.free_bytes -= tenant.gpu_bytes
                slot.tenants.append(tenant)

    def _give_back(self, tenant: Tenant) -> None:
        self._cpus[tenant.host] += tenant.cpus
        for slot in self._slots:
            if (slot.host, slot.gpu) == (tenant.host, tenant.gpu):
                slot.free_bytes += tenant.gpu_bytes
                slot.tenants.remove(tenant)

    def place(self, resources: Resources) -> tuple[tuple[str, str], ...] | None:
        """Take what a stage needs, for all its processes or for none."""
        taken: list[Tenant] = []
        for _ in range(resources.workers):
            slot = self._best(resources)
            if slot is None:
                for tenant in taken:
                    self._give_back(tenant)
                return None
            ends = self._now + resources.minutes if resources.minutes else FOREVER
            tenant = Tenant(
                host=slot.host, gpu=slot.gpu, cpus=resources.cpus, gpu_bytes=resources.gpu_bytes,
                busy_frac=resources.busy_frac, ends_minutes=ends,
            )  # fmt: skip
            self._take(tenant)
            taken.append(tenant)
        return tuple((tenant.host, tenant.gpu) for tenant in taken)

    def _best(self, resources: Resources) -> _Slot | None:
        fitting = [slot for slot in self._slots if self._fits(slot, resources)]
        return min(fitting, key=lambda slot: (slot.load, slot.free_bytes), default=None)

    def _fits(self, slot: _Slot, resources: Resources) -> bool:
        return (
            bool(slot.gpu) == bool(resources.gpu_bytes)
            and slot.free_bytes >= resources.gpu_bytes
            and (not slot.gpu or slot.load < _SATURATED)
            and self._cpus[slot.host] >= resources.cpus - 1e-9
            and self._leaves_the_reservation(slot, resources)
        )

    def reserve(self, resources: Resources) -> None:
        """Keep the GPU free on which the memory for ``resources`` is expected first."""
        if not resources.gpu_bytes:
            return
        options = [
            (_free_at(slot, resources.gpu_bytes), index)
            for index, slot in enumerate(self._slots)
            if slot.gpu and slot.whole_bytes >= resources.gpu_bytes
        ]
        when, index = min(options)
        self._reserved = (self._slots[index], when, resources)

    def _leaves_the_reservation(self, slot: _Slot, resources: Resources) -> bool:
        if self._reserved is None or slot is not self._reserved[0]:
            return True
        _, when, wanted = self._reserved
        if resources.minutes and self._now + resources.minutes <= when < FOREVER:
            return True
        staying = [tenant for tenant in slot.tenants if tenant.ends_minutes > when]
        free_then = slot.whole_bytes - sum(tenant.gpu_bytes for tenant in staying)
        load_then = sum(tenant.busy_frac for tenant in staying)
        return free_then - resources.gpu_bytes >= wanted.gpu_bytes and load_then + resources.busy_frac < _SATURATED


def _free_at(slot: _Slot, n_bytes: int) -> float:
    """Return when a GPU will have ``n_bytes`` and time for one more tenant, as far as is known."""
    free, load = slot.free_bytes, slot.load
    if free >= n_bytes and load < _SATURATED:
        return 0.0  # its cores are what is missing
    for tenant in sorted(slot.tenants, key=lambda tenant: tenant.ends_minutes):
        free, load = free + tenant.gpu_bytes, load - tenant.busy_frac
        if free >= n_bytes and load < _SATURATED:
            return tenant.ends_minutes
    return FOREVER
