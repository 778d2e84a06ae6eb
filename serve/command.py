"""``hrs serve``: a Ray and an endpoint of one's own on this machine, until Ctrl-C or SIGTERM."""

import asyncio
import math
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial

import uvloop

from hrs.cluster.private import start_private_ray
from hrs.export.opening import open_model
from hrs.storage import open_storage
from serve.access import Hosts, Keys
from serve.address import bind, host_and_port, require_address
from serve.bodies import Bodies
from serve.endpoint import Wishes, run_endpoint
from serve.front import Front
from serve.metrics import Metrics, keep_published
from serve.opening import make_private, memory_folder, print_warning, resolve
from serve.placement import place_replicas, visible_devices
from serve.settings import Settings, most_texts, read_api_keys
from serve.spaces import Spaces
from serve.topic_state import TopicState, keep_fit, topic_state

_RAY_SERVE = {
    # Messages of replies come by gRPC straight from the replica, and not as objects of Ray.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # The routes share the replica's event loop, so no message of a stream changes threads. They may, for they wait for
    # the engine's thread and the disk without blocking the loop that also answers Serve's health checks.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
"""Defaults of Ray Serve in the private Ray."""

_CLOSED = {
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    # A thread of Serve's that asks for something after the end would start another Ray otherwise.
    "RAY_ENABLE_AUTO_CONNECT": "0",
}
"""What would let replicas listen on all interfaces, past the front, or leave a Ray behind."""

_CAUSAL = {
    True: "yes, its audit passed",
    False: "NO, its audit failed",
    None: "unknown, no audit was run (hrs audit does it)",
}


def serve_model(settings: Settings, host: str, port: int, *, allow_anonymous: bool = False) -> None:
    """Serve until a signal comes, then finish what runs, refuse what is new, and leave nothing behind.

    Args:
        allow_anonymous: let other machines use the endpoint without a key, if ``host`` is one that they reach.

    Raises:
        HRSError: if the model or its memories cannot be opened, the address cannot be listened on or needs a key, the
            replicas do not fit the GPUs, or none comes up, or none can any more.
    """
    keys = read_api_keys(settings)
    warning = require_address(host, port, keys=bool(keys), allow_anonymous=allow_anonymous)
    with bind(host, port) as bound:  # nobody else gets the port meanwhile, and nobody is kept waiting before it listens
        storage = open_storage(settings.storage)
        path = resolve(settings.model, storage)
        # A mistake is told at once, and not from a replica's log.
        opened = open_model(path, storage.tokens)
        folder = memory_folder(storage, opened)
        make_private(folder)
        topics = topic_state(opened, path, settings, storage, folder)
        keep_fit(topics, folder)
        spaces = Spaces(opened.model, opened.tokenizer, folder, settings, topics)
        for space in Keys(keys).spaces():
            spaces.of(space).topics()
        placement = place_replicas(settings, opened)
        settings = settings.model_copy(
            update={
                "model": str(path),
                "storage": str(storage.root),
                "name": settings.name or opened.config.preset,
                "gpus_per_replica": placement.share,
            }
        )
        if placement.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices(placement, os.environ.get("CUDA_VISIBLE_DEVICES"))
        causal = opened.causal
        del opened, spaces
        if warning is not None:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        metrics = Metrics("front")
        front = partial(
            Front,
            keys=Keys(keys),
            hosts=Hosts(host, settings.allowed_hosts),
            bodies=Bodies(settings.max_body_bytes, settings.body_seconds),
            metrics=metrics,
            most_texts=most_texts(settings),
            origins=settings.allowed_origins,
        )
        settings = settings.model_copy(update={"allowed_origins": []})  # the front answers browsers
        stop_publishing = keep_published(metrics, folder / "replicas")
        try:
            _serve(settings, bound, host_and_port(host, port), causal, topics, front, n_gpus=len(placement.gpus))
        except (KeyboardInterrupt, SystemExit):  # Ray makes the latter of a SIGTERM while it starts
            print("stopped:   by a signal, before it was up", file=sys.stderr, flush=True)
            raise SystemExit(130) from None
        finally:
            stop_publishing()


def _serve(
    settings: Settings,
    bound: socket.socket,
    where: str,
    causal: bool | None,
    topics: TopicState,
    front: Callable[..., Front],
    *,
    n_gpus: int,
) -> None:
    for name, value in _RAY_SERVE.items():
        os.environ.setdefault(name, value)
    os.environ.update(_CLOSED)
    more = f", up to {settings.max_replicas} with the load" if settings.max_replicas > settings.min_replicas else ""
    print(f"starting:  {_count(settings.min_replicas)} of {settings.name}{more}, on {where}", flush=True)
    _interrupt_on_signals()
    # Before anything imports Ray, which reads its variables then.
    stop = start_private_ray(
        shielded=True,
        num_cpus=math.ceil(settings.max_replicas * settings.cpus_per_replica) + 1,
        num_gpus=n_gpus,
        object_store_memory=150 * 2**20,
    )
    try:
        _interrupt_on_signals()  # again: Ray has taken SIGTERM for itself
        from serve.replicas import Replicas, start_replicas, watch

        entry = front(Replicas(start_replicas(settings)))

        def announce(what: str) -> None:
            if what == "stopping":
                print("stopping:  new requests are refused, running replies are finished", flush=True)
                return
            print(f"model:     {settings.name} ({settings.model})", flush=True)
            print_warning(causal)
            print(f"causal:    {_CAUSAL[causal]}", flush=True)
            print(f"topics:    {topics.line()}", flush=True)
            print(f"endpoint:  http://{where}/v1   (API description: http://{where}/docs)", flush=True)
            print("stop:      Ctrl-C or SIGTERM finishes the running replies, a second one cuts them off", flush=True)

        async def run() -> None:
            wishes = Wishes()
            wishes.listen()
            await run_endpoint(
                entry,
                bound,
                watch=lambda: watch(entry),
                wishes=wishes,
                grace_seconds=settings.grace_seconds,
                announce=announce,
            )

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run())
    finally:
        stop()


def _interrupt_on_signals() -> None:
    """Let every signal that ends the endpoint end its start, too, as Ctrl-C does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


def _count(n: int) -> str:
    return "1 replica" if n == 1 else f"{n} replicas"
