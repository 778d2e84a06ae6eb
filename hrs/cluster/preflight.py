"""The circumstances that waste an evening on a cluster, each turned into one sentence before any work starts."""

import atexit
import contextlib
import logging
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from hrs.cluster.private import ROOT, start_private_ray
from hrs.errors import HRSError
from hrs.files import absolute_path
from hrs.identity import code_version
from hrs.storage import Storage

FREE_BYTES = 2**30
"""Least free space worth starting with; the plan adds what its own checkpoints need."""
NODE_SECONDS = 120.0
"""Longest wait for every node's first worker."""


def preflight(storage: Storage, free_bytes: int = FREE_BYTES) -> None:
    """Check what can be checked without Ray: the code that runs, the token, the disk.

    Raises:
        HRSError: naming the first thing that is wrong and what to do about it.
    """
    if "RAY_ADDRESS" in os.environ:
        _require_repository(Path.cwd())
    _require_token()
    storage.require_free(free_bytes)


def connect(storage: Storage | None = None) -> dict[str, float]:
    """Join the cluster this process belongs to, or start one that lives as long as this process; its resources by name.

    Ray reads its variables when it is imported, so this comes before ``import ray``. Calling it again changes nothing.

    In a submitted job that is the job's cluster. Everywhere else Ray would attach to whatever cluster it finds first,
    possibly someone else's; a private one is started instead. With ``storage``, every node of a larger cluster is
    asked whether it sees that folder and runs the same code.

    Raises:
        HRSError: if the cluster cannot be reached, refuses the token, runs another Python or Ray, or a node differs.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        pass
    elif "RAY_ADDRESS" not in os.environ:
        atexit.register(start_private_ray())  # runs before Ray's own exit handler, registered when Ray was imported
    elif os.environ["RAY_ADDRESS"].startswith("http"):
        raise HRSError(
            f"RAY_ADDRESS is {os.environ['RAY_ADDRESS']}, which is a dashboard: put that into RAY_API_SERVER_ADDRESS "
            "and leave RAY_ADDRESS to the job"
        )
    else:
        _require_listener(os.environ["RAY_ADDRESS"])
        _init()
    import ray

    if storage is not None and len(_alive_nodes()) > 1:
        require_equal_nodes(storage)
    return {name: float(amount) for name, amount in ray.cluster_resources().items()}


# ---- connection ------------------------------------------------------------------------------------------------------


def _init() -> None:
    import ray

    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and its own, one cause each
        raise explain(error) from error


def _require_listener(address: str) -> None:
    """Ray ends the whole process, with a page of C++ log, if nobody listens at the head's address."""
    host, _, port = address.rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise explain(error) from error


def explain(error: Exception) -> HRSError:
    """One sentence for why Ray could not be reached, from what it raised."""
    text = " ".join(str(error).split())
    address = os.environ.get("RAY_ADDRESS", "of this process")
    if "Version mismatch" in text:
        return HRSError(
            f"the Ray cluster {address} runs another Python or Ray than this process ({text}): "
            "install the same constraints.txt on every node and start the head from that environment"
        )
    # A wrong token shows only in the C++ log; what is raised is a failure to connect to a head that does listen.
    if type(error).__name__ == "AuthenticationError" or "token" in text.lower() or "Failed to connect to Ray" in text:
        return HRSError(
            f"the Ray cluster {address} refuses this process, most likely its token: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to a copy of the head's ~/.ray/auth_token on every machine, or RAY_AUTH_MODE=disabled "
            "on every machine of a network that only you can reach"
        )
    return HRSError(
        f"the Ray cluster {address} cannot be reached ({text[:200]}): check that its head runs and that the address is "
        "right, or unset RAY_ADDRESS to use this machine alone"
    )


# ---- checks ----------------------------------------------------------------------------------------------------------


def _require_repository(working_dir: Path) -> None:
    """Workers import ``hrs`` from the job's working directory; another copy here would mix two versions."""
    if not (working_dir / "hrs" / "storage.py").exists():
        raise HRSError(
            f"the job's working directory {working_dir} does not hold the repository: submit from the repository's "
            "root with `ray job submit --working-dir . -- python jobs/...`"
        )
    if working_dir.resolve() != ROOT:
        raise HRSError(
            f"hrs was imported from {ROOT} and not from the job's working directory {working_dir}: "
            "run the job file of that directory, or put it first on PYTHONPATH"
        )


def _require_token() -> None:
    """Ray's own message for a missing token comes late and from a different place for each command."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = absolute_path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token")
    if not path.exists():
        raise HRSError(
            f"RAY_AUTH_MODE is token but there is no token at {path}: copy the head's ~/.ray/auth_token there, "
            "or make one with `ray get-auth-token --generate`"
        )


def require_equal_nodes(storage: Storage) -> None:
    """Ask every node of the connected cluster whether it sees ``storage`` and would run the same code.

    Raises:
        HRSError: naming the first node that does not.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    with tempfile.NamedTemporaryFile(dir=storage.root, prefix=".seen-") as marker:
        answers = {
            node["NodeManagerAddress"]: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(marker.name)
            for node in _alive_nodes()
        }
        for address, answer in answers.items():
            try:
                sees_storage, code = ray.get(answer, timeout=NODE_SECONDS)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                raise HRSError(
                    f"node {address} cannot run this code ({reason}): install the project there as on the head"
                ) from error
            if not sees_storage:
                raise HRSError(
                    f"node {address} does not see the storage {storage.root}: mount one shared folder at the same path "
                    "on every node and set HRS_STORAGE to it"
                )
            if code != code_version():
                raise HRSError(
                    f"node {address} runs other code ({code}) than this job ({code_version()}): submit with "
                    "`--working-dir .` so that every node gets the same copy"
                )


def _look(marker: str) -> tuple[bool, str]:
    """On a node: whether the marker file is there, and the version of the code a worker imports."""
    with contextlib.suppress(OSError):
        os.listdir(Path(marker).parent)  # a network folder's cached listing may hide a new file
    return Path(marker).exists(), code_version()


def _alive_nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]
