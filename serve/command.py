"""``hrs serve``: a Ray and an endpoint of one's own on this machine, until Ctrl-C or SIGTERM."""

import logging
import math
import os
import signal
import sys
import threading
from types import FrameType

from hrs.cluster.private import start_private_ray
from hrs.errors import HRSError
from hrs.export.opening import open_model
from hrs.storage import open_storage
from serve.address import host_and_port, require_address
from serve.opening import print_warning, resolve
from serve.placement import place_replicas, visible_devices
from serve.settings import Settings, read_api_keys

_RAY_SERVE = {
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.1",
    # Serve kills a proxy that does not start within 5 s, and a busy machine needs longer.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy.middlewares",
    # The routes share the replica's event loop, so no message of a stream changes threads. They may, for they wait for
    # the engine's thread and the disk without blocking the loop that also answers Serve's health checks.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
"""Defaults of Ray Serve in the private Ray."""

_CLOSED = {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "0", "RAY_SERVE_ENABLE_HA_PROXY": "0"}
"""What would let replicas listen on all interfaces, past the proxy."""

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
        HRSError: if the model cannot be opened, the address cannot be listened on or needs a key, the replicas do not
            fit the GPUs, or they do not come up.
    """
    warning = require_address(host, port, keys=bool(read_api_keys(settings)), allow_anonymous=allow_anonymous)
    storage = open_storage(settings.storage)
    path = resolve(settings.model, storage)
    opened = open_model(path, storage.tokens)  # a mistake is told at once, and not from a replica's log
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
    del opened
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    _serve(settings, host, port, causal, n_gpus=len(placement.gpus))


class _Signals:
    """SIGINT and SIGTERM: the first asks to stop, the second to cut off what runs, a third ends everything at once."""

    def __init__(self) -> None:
        self.stop, self.cut_off = threading.Event(), threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)  # after ray.init, which takes SIGTERM for itself

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.cut_off.is_set():
            raise KeyboardInterrupt
        (self.cut_off if self.stop.is_set() else self.stop).set()


def _serve(settings: Settings, host: str, port: int, causal: bool | None, *, n_gpus: int) -> None:
    for name, value in _RAY_SERVE.items():
        os.environ.setdefault(name, value)
    os.environ.update(_CLOSED)
    more = f", up to {settings.max_replicas} with the load" if settings.max_replicas > settings.min_replicas else ""
    where = host_and_port(host, port)
    print(f"starting:  {_count(settings.min_replicas)} of {settings.name}{more}, on {where}", flush=True)
    # Before anything imports Ray, which reads its variables then.
    stop = start_private_ray(
        num_cpus=math.ceil(settings.max_replicas * settings.cpus_per_replica) + 1,
        num_gpus=n_gpus,
        object_store_memory=150 * 2**20,
    )
    try:
        from ray import serve as ray_serve
        from ray.exceptions import RayError

        from serve.app import build
        from serve.draining import drain

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the import of Serve sets it to INFO
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        try:
            ray_serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
            replicas = ray_serve.run(build(settings), name="hrs", route_prefix="/", logging_config=quiet)
        except (RuntimeError, TimeoutError, RayError) as error:
            raise HRSError(f"the endpoint did not come up: {_last_line(error)}") from error
        signals = _Signals()
        print(f"model:     {settings.name} ({settings.model})", flush=True)
        print_warning(causal)
        print(f"causal:    {_CAUSAL[causal]}", flush=True)
        print(f"endpoint:  http://{where}/v1   (API description: http://{where}/docs)", flush=True)
        print("stop:      Ctrl-C or SIGTERM finishes the running replies, a second one cuts them off", flush=True)
        signals.stop.wait()
        print("stopping:  new requests are refused, running replies are finished", flush=True)
        drain(replicas, settings.grace_seconds, signals.cut_off)
    finally:
        stop()  # Serve's own shutdown would take the routes away before the socket, and answer 404 meanwhile


def _count(n: int) -> str:
    return "1 replica" if n == 1 else f"{n} replicas"


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
