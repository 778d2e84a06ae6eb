"""``hrs serve``: a Ray and an endpoint of one's own on this machine, until Ctrl-C or SIGTERM."""

import logging
import math
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from types import FrameType
from typing import Any

import torch

from hrs.errors import HRSError
from hrs.export.opening import open_model
from hrs.storage import open_storage
from serve.opening import print_warning, resolve
from serve.settings import Settings, read_api_keys

_OWN_RAY = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.1",
}
"""Environment of a Ray that is used by nobody else."""

_POLL_SECONDS = 0.2


def serve_model(settings: Settings, host: str, port: int) -> None:
    """Serve until a signal comes, then finish what runs, refuse what is new, and leave nothing behind.

    Raises:
        HRSError: if the model cannot be opened, the port is taken, or the replicas do not come up.
    """
    storage = open_storage(settings.storage)
    path = resolve(settings.model, storage)
    opened = open_model(path, storage.tokens)  # a mistake is told at once, and not from a replica's log
    read_api_keys(settings)
    settings = settings.model_copy(
        update={
            "model": str(path),
            "storage": str(storage.root),
            "name": settings.name or opened.config.preset,
            "gpus_per_replica": min(1.0, torch.cuda.device_count() / settings.max_replicas),
        }
    )
    causal = opened.causal
    del opened
    _serve(settings, host, port, causal)


def _wait_for_signal() -> None:
    """Until SIGINT or SIGTERM; from then on either means at once."""
    asked = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)  # after ray.init, which takes SIGTERM for itself
    asked.wait()


def _serve(settings: Settings, host: str, port: int, causal: bool | None) -> None:
    for name, value in _OWN_RAY.items():
        os.environ.setdefault(name, value)
    import ray
    from ray import serve as ray_serve

    from serve.app import application

    _require_free(host, port)
    folder = tempfile.mkdtemp(prefix="hrs-", dir="/tmp")  # unix sockets allow a path of 107 bytes
    try:
        ray.init(
            address="local",
            num_cpus=math.ceil(settings.max_replicas * settings.cpus_per_replica) + 1,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=150 * 2**20,
            _temp_dir=folder,
        )
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        ray_serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
        try:
            ray_serve.run(application(settings), name="hrs", route_prefix="/", logging_config=quiet)
        except RuntimeError as error:
            raise HRSError(f"the endpoint did not come up: {_last_line(error)}") from error
        print(f"model:     {settings.name} ({settings.model})", flush=True)
        print_warning(causal)
        if causal:
            print("causal:    yes, its audit passed", flush=True)
        print(f"endpoint:  http://{host}:{port}/v1   (API description: http://{host}:{port}/docs)", flush=True)
        print("stop:      Ctrl-C or SIGTERM finishes the running replies, a second one cuts them off", flush=True)
        _wait_for_signal()
        print("stopping:  new requests are refused, running replies are finished", flush=True)
        ray_serve.run(application(settings, draining=True), name="hrs", route_prefix="/", logging_config=quiet)
        _wait_until_sent(settings.grace_seconds)
        ray_serve.delete("hrs")
    finally:
        if ray.is_initialized():
            ray_serve.shutdown()
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_sent(seconds: float) -> None:
    """Until the proxy has passed on what the replicas wrote: a client may read more slowly than they write.

    Serve drains the proxies of nodes that leave, and kills that of the last one. So it is asked as Serve would.
    """
    import ray
    from ray import serve as ray_serve

    end = time.monotonic() + seconds
    for node in ray_serve.status().proxies:
        proxy: Any = ray.get_actor(f"SERVE_PROXY_ACTOR-{node}", namespace="serve")
        ray.wait([proxy.update_draining.remote(True)], timeout=10)
        while time.monotonic() < end:
            drained = bool(ray.get([proxy.is_drained.remote()], timeout=10)[0])
            if drained:
                break
            time.sleep(_POLL_SECONDS)
    time.sleep(_POLL_SECONDS)  # the last bytes are in the proxy's buffer


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise HRSError(f"{host}:{port} cannot be listened on ({error.strerror}): give another --port") from error


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
