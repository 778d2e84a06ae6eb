"""The one way in which this project starts a Ray of its own: closed to everybody else, and gone without a trace.

Whoever reaches a Ray can run any code as its user: through the job agent, the dashboard, the GCS, or the pickled
requests that replicas of Ray Serve read. Ray's servers listen on all interfaces by default, whatever
``--node-ip-address`` says. A private Ray therefore listens on the loopback interface, and demands a random token from
everybody who connects. Replicas of Ray Serve still listen on all interfaces, and are protected by the token alone.
"""

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hrs.errors import HRSError

ROOT = Path(__file__).resolve().parents[2]
"""The folder above the ``hrs`` that is imported: the repository, or its uploaded copy."""


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
    return Path(tempfile.mkdtemp(prefix="hrs-", dir="/tmp"))  # unix sockets allow a path of 107 bytes


def ray_folder(folder: Path) -> Path:
    """Return the place in a :func:`private_folder` for Ray, which lets everybody into the folder that it is given."""
    return folder / "ray"


def start_private_ray(**options: Any) -> Callable[[], None]:
    """Start a Ray that only this process and its workers can use, with its files in a folder that only this user reads.

    An environment that disables authentication is overruled, also if Ray has been imported with it.

    Args:
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

    import ray
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    # Ray reads its variables when it is imported; this reads them again if that was before this call.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    ray_constants.ENABLE_RAY_CLUSTER = False

    def stop() -> None:
        ray.shutdown()
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
        ray.init(**defaults | options)
    except BaseException as error:
        stop()
        if not isinstance(error, Exception):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise HRSError(f"Ray cannot be started on this machine: {reason[:300]}") from error
    return stop
