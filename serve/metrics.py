"""What a replica counts, and one page of it for all replicas.

A scrape reaches whichever replica the proxy chooses. So each replica keeps a copy of its figures in a folder they
share, and any of them answers for all, told apart by the label ``replica``.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hrs import strict_json

STALE_SECONDS = 30.0
"""A copy that is older is of a replica that is gone."""
_PUBLISH_SECONDS = 2.0
_WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The figures of one replica."""

    def __init__(self, replica: str = "0") -> None:
        self.replica = replica
        self.registry = CollectorRegistry()
        to = self.registry
        self.requests = Counter("hrs_requests", "Requests answered", ["route", "status"], registry=to)
        self.in_flight = Gauge("hrs_requests_in_flight", "Requests being answered", registry=to)
        self.seconds = Histogram(
            "hrs_request_seconds", "Time until the last byte", ["route"], buckets=_WAITS, registry=to
        )
        self.first_token = Histogram(
            "hrs_time_to_first_token_seconds",
            "From arrival to the first token",
            buckets=_WAITS,
            registry=to,
        )
        self.tokens = Counter("hrs_tokens", "Tokens read and written", ["kind"], registry=to)
        self.active_slots = Gauge("hrs_active_slots", "Texts being continued", registry=to)
        self.slots = Gauge("hrs_slots", "Texts that can be continued at the same time", registry=to)
        self.queue_length = Gauge("hrs_queue_length", "Texts waiting for a slot", registry=to)
        self.retrievals = Counter("hrs_retrieval_events", "Times that memories were looked up", registry=to)
        self.memories = Counter("hrs_memories_written", "Memories written", registry=to)
        self.cancelled = Counter("hrs_cancelled", "Texts given up before they were finished", registry=to)
        self.errors = Counter("hrs_errors", "Requests refused or failed", ["status"], registry=to)
        for kind in ("prompt", "completion"):
            self.tokens.labels(kind)

    def count_refusal(self, status: int) -> None:
        """Count a request that was refused, or failed, before any route knew of it."""
        self.requests.labels("front", str(status)).inc()
        self.errors.labels(str(status)).inc()

    def snapshot(self) -> list[dict[str, Any]]:
        """All families as plain values."""
        return [
            {
                "name": family.name,
                "help": family.documentation,
                "type": family.type,
                "samples": [[s.name, s.labels | {"replica": self.replica}, s.value] for s in family.samples],
            }
            for family in self.registry.collect()
        ]

    def publish(self, folder: Path) -> None:
        """Leave a copy for the other replicas."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.replica}.json"
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(strict_json.dumps(self.snapshot()), encoding="utf-8")
        part.replace(path)

    def page(self, folder: Path | None) -> bytes:
        """Prometheus' text of this replica as it is now and of the others as they were last seen."""
        copies = [self.snapshot()]
        if folder is not None:
            copies += _others(folder, self.replica)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Merged(copies))
        return generate_latest(registry)


def keep_published(metrics: Metrics, folder: Path) -> Callable[[], None]:
    """Leave a copy of ``metrics`` in ``folder`` again and again, and return the function that ends that."""
    ended = threading.Event()

    def publish() -> None:
        while not ended.wait(_PUBLISH_SECONDS):
            with contextlib.suppress(OSError):  # a full disk must not end a process that still answers
                metrics.publish(folder)

    threading.Thread(target=publish, name="figures", daemon=True).start()
    return ended.set


def _others(folder: Path, replica: str) -> list[list[dict[str, Any]]]:
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            age = time.time() - path.stat().st_mtime
            if age > STALE_SECONDS:
                path.unlink(missing_ok=True)
            elif path.stem != replica:
                found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):  # another replica tidies the same folder
            continue
    return found


class _Merged(Collector):
    """Families of several replicas, each family once: a page that names one twice is not valid."""

    def __init__(self, copies: list[list[dict[str, Any]]]) -> None:
        self._copies = copies

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for family in (family for copy in self._copies for family in copy):
            metric = families.setdefault(family["name"], Metric(family["name"], family["help"], family["type"]))
            for name, labels, value in family["samples"]:
                if not name.endswith("_created"):
                    metric.add_sample(name, labels, value)
        return families.values()
