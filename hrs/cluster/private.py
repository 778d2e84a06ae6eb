"""The one way in which this project starts a Ray of its own: closed to everybody else, and gone without a trace.

Whoever reaches a Ray can run any code as its user: through the job agent, the dashboard, the GCS, or the pickled
requests that replicas of Ray Serve read. Ray's servers listen on all interfaces by default, whatever
``--node-ip-address`` says. A private Ray therefore listens on the loopback interface, and demands a random token from
everybody who connects. Replicas of Ray Serve still listen on all interfaces, and are protected by the token alone.
"""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hrs.errors import HRSError
from hrs.tracking.owner import claim_folder

ROOT = Path(__file__).resolve().parents[2]
"""The folder above the ``hrs`` that is imported: the repository, or its uploaded copy."""
_OF_GROUPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
"""Signals that terminals, ``timeout`` and service managers send to all processes of a group."""


def private_environment() -> dict[str, str]:
    """Return the variables that a private Ray, its workers and its clients need, with a new random token.

    The token reaches other processes through the environment only, never through a command line or a file.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Ray's switch for machines that shall form no cluster: the node's address is then 127.0.0.1, on which the GCS,
        # the raylet, the workers and the agents listen. --node-ip-address=127.0.0.1 would be replaced instead.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


def private_folder() -> Path:
    """Make a folder for a Ray's files that only this user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="hrs-", dir="/tmp"))  # unix sockets allow a path of 107 bytes
    claim_folder(folder)
    return folder


def ray_folder(folder: Path) -> Path:
    """Return the place in a :func:`private_folder` for Ray, which lets everybody into the folder that it is given."""
    return folder / "ray"


def start_private_ray(*, shielded: bool = False, **options: Any) -> Callable[[], None]:
    """Start a Ray that only this process and its workers can use, with its files in a folder that only this user reads.

    An environment that disables authentication is overruled, also if Ray has been imported with it. Should this process
    be killed, :mod:`hrs.cluster.reaper` ends its Ray and removes the folder.

    Args:
        shielded: keep SIGINT, SIGTERM and SIGHUP from Ray's processes and all that they start, so that a signal to the
            process group or to every process of a service reaches this process only, which then stops its Ray in order.
        options: of ``ray.init``; ``num_cpus`` and ``num_gpus`` above all.

    Returns:
        The function that ends this Ray, removes its folder and restores the environment.

    Raises:
        HRSError: if it does not start.
    """
    variables = private_environment()
    # Workers must import the code that this process imports, wherever it was started from.
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    folder = private_folder()
    reaper = subprocess.Popen(
        [sys.executable, "-I", str(Path(__file__).with_name("reaper.py")), str(folder)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )

    import ray
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    # Ray reads its variables when it is imported; this reads them again if that was before this call.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    ray_constants.ENABLE_RAY_CLUSTER = False

    def stop() -> None:
        if shielded:
            _end_by_kill()
        ray.shutdown()
        reaper.communicate()  # the end of its input is its signal
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    defaults: dict[str, Any] = {
        "address": "local",
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "_temp_dir": str(ray_folder(folder)),
    }
    try:
        with _signals_kept_from_children() if shielded else contextlib.nullcontext():
            ray.init(**defaults | options)
    except BaseException as error:
        stop()
        if not isinstance(error, Exception):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise HRSError(f"Ray cannot be started on this machine: {reason[:300]}") from error
    return stop


@contextlib.contextmanager
def _signals_kept_from_children() -> Iterator[None]:
    """Block the signals that groups of processes get, in this thread and in the processes that it starts meanwhile.

    A process inherits the signals that its parent's thread blocks, Ray's processes unblock none, and those that they
    start inherit them too. To this process they are delivered as before, by a thread that does not block them.
    """
    done = threading.Event()
    receiver = threading.Thread(target=done.wait, name="signals", daemon=True)
    receiver.start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_GROUPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        done.set()


def _end_by_kill() -> None:
    """Make ``ray.shutdown`` end Ray's processes by SIGKILL: they block SIGTERM, which it would wait for in vain."""
    from ray._private import worker

    node: Any = worker._global_node
    if node is not None:
        for started in (info.process for infos in node.all_processes.values() for info in infos):
            started.terminate = started.kill
