"""Stopping an endpoint so that every client is told: refuse, finish, cut off, and only then close the socket."""

import logging
import threading
import time
from typing import Any

import ray
from ray import serve as ray_serve
from ray.exceptions import GetTimeoutError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

_POLL_SECONDS = 0.2
_LAST_WORDS_SECONDS = 5.0
"""For telling clients that their replies were cut off."""
_ANSWER_SECONDS = 10.0

_log = logging.getLogger("serve")


def drain(replicas: DeploymentHandle, seconds: float, cut_off: threading.Event) -> None:
    """Refuse what is new, wait until the running replies are with their clients, and close the socket.

    The replicas that run are told directly. Deploying the application again with another setting would replace them
    all, and keep new requests waiting for the replacement.

    Args:
        seconds: that replies have to finish; then they are cut off, and their clients are told.
        cut_off: when set, they are cut off at once.
    """
    proxies = _proxies()
    ray.wait(
        [proxy.update_draining.remote(True) for proxy in proxies], num_returns=len(proxies), timeout=_ANSWER_SECONDS
    )
    if not _wait_until_sent(replicas, proxies, seconds, cut_off):
        _tell(replicas, "cut_off")
        _wait_until_sent(replicas, proxies, _LAST_WORDS_SECONDS, threading.Event())
    for proxy in proxies:
        ray.kill(proxy)  # before the replicas: from here on connections are refused, not answered by nobody


def _proxies() -> list[Any]:
    return [ray.get_actor(f"SERVE_PROXY_ACTOR-{node}", namespace="serve") for node in ray_serve.status().proxies]


def _wait_until_sent(replicas: DeploymentHandle, proxies: list[Any], seconds: float, cut_off: threading.Event) -> bool:
    """Whether the proxies have passed on all that was asked of them: a client may read more slowly than replicas write.

    Serve drains the proxies of nodes that leave, and kills that of the last one. So they are asked as Serve would.
    """
    end = time.monotonic() + seconds
    while True:
        _tell(replicas, "drain")  # each time anew: a replica that has just come up knows nothing of it
        drained = [_drained(proxy) for proxy in proxies]
        if all(drained):
            cut_off.wait(_POLL_SECONDS)  # the last bytes are in the proxy's buffer
            return True
        if cut_off.wait(min(_POLL_SECONDS, max(end - time.monotonic(), 0))) or time.monotonic() >= end:
            return False


def _drained(proxy: Any) -> bool:
    try:
        return bool(ray.get(proxy.is_drained.remote(), timeout=_ANSWER_SECONDS))
    except GetTimeoutError:
        return False
    except RayError:  # a proxy that is gone has nothing left to pass on
        return True


def _tell(replicas: DeploymentHandle, what: str) -> None:
    try:
        replicas.broadcast(what).results(timeout_s=_ANSWER_SECONDS)
    except (RayError, RayServeException, TimeoutError) as error:
        _log.info("not every replica could be told to %s: %s", what, error)
