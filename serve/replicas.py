"""The replicas as the front sees them: requests go to one through Serve's handle, and their state is watched."""

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from ray import serve as ray_serve
from ray._private import worker
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.types import Message, Scope

from hrs.errors import HRSError
from serve.app import build
from serve.errors import ApiError
from serve.front import Front, died
from serve.settings import Settings

APPLICATION, DEPLOYMENT = "hrs", "hrs"
_POLL_SECONDS = 1.0
_LOST_SECONDS = 30.0
"""After which Ray is given up that does not say how the replicas are."""
_FAILED = "REPLICA_STARTUP_FAILED"


def start_replicas(settings: Settings) -> DeploymentHandle:
    """Deploy the application without Serve's HTTP proxy, and return once a replica runs.

    Raises:
        HRSError: if none comes up, with the replica's own reason.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the import of Serve sets it to INFO
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    try:
        ray_serve.start(proxy_location="Disabled", logging_config=quiet)
        return ray_serve.run(build(settings), name=APPLICATION, route_prefix="/", logging_config=quiet)
    except (RuntimeError, TimeoutError, RayError) as error:
        reason = None
        with contextlib.suppress(RayError, RayServeException):
            reason = read_state().failure
        raise HRSError(f"the endpoint did not come up: {reason or own_sentence(str(error))}") from error


class Replicas:
    """Passes requests on to the replicas of a deployment, see :data:`serve.front.Forward`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle.options(method_name="answer", stream=True)

    async def __call__(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
        """Yield a replica's messages.

        Raises:
            ApiError: 429 if no replica has room, 500 if the replica ends before its answer does.
        """
        response: DeploymentResponseGenerator[list[Message]] = self._handle.remote(scope, body)  # type: ignore[assignment]
        ended = False
        try:
            async for messages in response:
                yield messages
            ended = True
        except BackPressureError as error:
            ended = True
            raise ApiError(
                429, "there are too many requests: try again shortly", code="queue_full", retry_after=1
            ) from error
        except (RayError, RayServeException) as error:
            ended = True
            raise died() from error
        finally:
            if not ended:
                response.cancel()


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What Serve says of the replicas."""

    n_running: int
    failure: str | None
    """Why replicas do not start, if they are not tried any more."""


def read_state() -> State:
    """Ask Serve how the replicas are. Blocks.

    Raises:
        RayError: if Ray does not answer.
    """
    application = ray_serve.status().applications.get(APPLICATION)
    if application is None or (deployment := application.deployments.get(DEPLOYMENT)) is None:
        return State(n_running=0, failure=None)
    failed = str(getattr(deployment.status_trigger, "value", deployment.status_trigger)) == _FAILED
    return State(
        n_running=deployment.replica_states.get("RUNNING", 0),  # type: ignore[call-overload]
        failure=own_sentence(deployment.message) if failed else None,
    )


def own_sentence(message: str) -> str:
    """Return what a replica said last, out of the traceback in Serve's message: its error without the error's type."""
    lines = [line.strip() for line in message.strip().splitlines()] or [""]
    errors = [match for line in lines if (match := re.fullmatch(r"(?:[\w.]*\.)?(\w*(?:Error|Exception)): (.+)", line))]
    if not errors:
        return lines[-1]
    kind, sentence = errors[-1].groups()
    return sentence if kind == HRSError.__name__ else f"{kind}: {sentence}"


def require_ray() -> None:
    """Raise HRSError if a process of this Ray has ended, without which it ends this one within a minute."""
    node: Any = worker._global_node
    ended = [] if node is None else sorted({kind for kind, _ in node.dead_processes()})
    if ended:
        raise HRSError(f"{' and '.join(ended)} of Ray ended unexpectedly, was it killed? Start the endpoint again")


async def watch(front: Front) -> None:
    """Tell the front how many replicas run, until none can any more.

    Raises:
        HRSError: if no replica runs and none can be started, with the replica's own reason; or if Ray has ended.
    """
    loop = asyncio.get_running_loop()
    heard = loop.time()
    while True:
        require_ray()
        try:
            state = await asyncio.to_thread(read_state)
        except (RayError, RayServeException, RuntimeError, TimeoutError) as error:
            if loop.time() - heard > _LOST_SECONDS:
                raise HRSError(f"Ray does not answer any more: {own_sentence(str(error))}") from error
        else:
            heard = loop.time()
            front.set_replicas(state.n_running)
            if state.failure is not None and not state.n_running:
                raise HRSError(f"no process of the model can be started: {state.failure}")
        await asyncio.sleep(_POLL_SECONDS)
