"""``hrs serve``: a Ray and an endpoint of one's own on this machine, until Ctrl-C or SIGTERM."""

import logging
import math
import os
import shutil
import signal
import socket
import tempfile
import threading
from types import FrameType

from hrs.errors import HRSError
from hrs.export.opening import open_model
from hrs.gpu import gpu_count
from hrs.storage import open_storage
from serve.draining import drain
from serve.opening import print_warning, resolve
from serve.settings import Settings, read_api_keys

_OWN_RAY = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.1",
    # Serve kills a proxy that does not start within 5 s, and a busy machine needs longer.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy.middlewares",
    # The routes share the replica's event loop, so no message of a stream changes threads. They may, for they wait for
    # the engine's thread and the disk without blocking the loop that also answers Serve's health checks.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
"""Environment of a Ray that is used by nobody else."""

_CAUSAL = {
    True: "yes, its audit passed",
    False: "NO, its audit failed",
    None: "unknown, no audit was run (hrs audit does it)",
}


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
            "gpus_per_replica": min(1.0, gpu_count() / settings.max_replicas),
        }
    )
    causal = opened.causal
    del opened
    _serve(settings, host, port, causal)


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


def _serve(settings: Settings, host: str, port: int, causal: bool | None) -> None:
    for name, value in _OWN_RAY.items():
        os.environ.setdefault(name, value)
    import ray
    from ray import serve as ray_serve
    from ray.exceptions import RayError

    from serve.app import build

    _require_free(host, port)
    more = f", up to {settings.max_replicas} with the load" if settings.max_replicas > settings.min_replicas else ""
    print(f"starting:  {_count(settings.min_replicas)} of {settings.name}{more}, on {host}:{port}", flush=True)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
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
        try:
            ray_serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
            replicas = ray_serve.run(build(settings), name="hrs", route_prefix="/", logging_config=quiet)
        except (RuntimeError, TimeoutError, RayError) as error:
            raise HRSError(f"the endpoint did not come up: {_last_line(error)}") from error
        signals = _Signals()
        print(f"model:     {settings.name} ({settings.model})", flush=True)
        print_warning(causal)
        print(f"causal:    {_CAUSAL[causal]}", flush=True)
        print(f"endpoint:  http://{host}:{port}/v1   (API description: http://{host}:{port}/docs)", flush=True)
        print("stop:      Ctrl-C or SIGTERM finishes the running replies, a second one cuts them off", flush=True)
        signals.stop.wait()
        print("stopping:  new requests are refused, running replies are finished", flush=True)
        drain(replicas, settings.grace_seconds, signals.cut_off)
    finally:
        # Serve's own shutdown would take the routes away before the socket, and answer 404 meanwhile.
        if ray.is_initialized():
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _count(n: int) -> str:
    return "1 replica" if n == 1 else f"{n} replicas"


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise HRSError(f"{host}:{port} cannot be listened on ({error.strerror}): give another --port") from error


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
