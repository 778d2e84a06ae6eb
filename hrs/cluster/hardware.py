"""What a machine or a Ray cluster offers to trials."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from hrs.gpu import probe_gpus

PROBE_SECONDS = 120.0
"""Longest wait for a node to say which cards it has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Cores and cards."""

    cpus: int
    card_bytes: tuple[int, ...] = ()
    """Memory of each card; empty without one. Plans pack for the smallest."""

    @classmethod
    def of_this_machine(cls) -> "Hardware":
        """The cores this process may use and the cards torch sees."""
        return cls(cpus=len(os.sched_getaffinity(0)), card_bytes=_visible_cards())

    @classmethod
    def of_cluster(cls, resources: Mapping[str, float]) -> "Hardware":
        """What a connected Ray cluster has; asks every node with GPUs for the memory of its cards.

        Ray's GPU resource is a ticket that knows no bytes, and a node may hand out tickets for cards that torch
        cannot use: such a node counts as having none.
        """
        cpus = max(1, int(resources.get("CPU", 1)))
        if not resources.get("GPU"):
            return cls(cpus=cpus)
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        probe = ray.remote(num_cpus=0)(_visible_cards)
        nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU")]
        strategies = [NodeAffinitySchedulingStrategy(node_id=node, soft=False) for node in nodes]
        answers = ray.get([probe.options(scheduling_strategy=s).remote() for s in strategies], timeout=PROBE_SECONDS)
        return cls(cpus=cpus, card_bytes=tuple(card for cards in answers for card in cards))

    def __str__(self) -> str:
        if not self.card_bytes:
            return f"{self.cpus} CPU cores, no card"
        cards = "1 card" if len(self.card_bytes) == 1 else f"{len(self.card_bytes)} cards"
        return f"{self.cpus} CPU cores, {cards} of {min(self.card_bytes) / 2**30:.0f} GiB"


def _visible_cards() -> tuple[int, ...]:
    return tuple(gpu.total_bytes for gpu in probe_gpus())
