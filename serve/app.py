"""The Ray Serve application: replicas that each hold the model and answer HTTP themselves.

Ingress and model are one deployment. A request then passes one process boundary, that of the front of ``hrs serve`` or
of Serve's proxy; with an ingress of its own, every token of every stream would pass two.
"""

import contextlib
import os
from collections.abc import AsyncGenerator

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve import Application
from starlette.types import Message, Scope

from hrs.errors import HRSError
from serve.answering import answer
from serve.api import make_api
from serve.opening import open_backend
from serve.settings import MOST_OTHERS, Settings, most_texts, require_absolute


@ray_serve.deployment(name="hrs")
@ray_serve.ingress()
class Replica:
    """One model in one process, with its HTTP application."""

    def __init__(self, settings: Settings) -> None:
        self._backend = open_backend(settings, replica=ray_serve.get_replica_context().replica_id.unique_id)
        self._api = make_api(self._backend)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
        """Answer a request of the front of ``hrs serve``, which sends the messages on to the client."""
        async with contextlib.aclosing(answer(self._api, scope, body)) as messages:
            async for together in messages:
                yield together

    def check_health(self) -> None:
        """Raises if the engine has stopped; Serve then starts another replica."""
        if not self._backend.alive:
            raise RuntimeError("the engine has stopped")

    def process_id(self) -> int:
        return os.getpid()

    def __del__(self) -> None:
        if (backend := getattr(self, "_backend", None)) is not None:
            backend.close()


def build(settings: Settings) -> Application:
    """What ``hrs serve`` runs, and ``serve deploy`` with the ``args`` of its file.

    Raises:
        HRSError: if a GPU is asked for and none is reserved, or a path is relative.
    """
    require_absolute(settings)
    if settings.device == "cuda" and not settings.gpus_per_replica:
        raise HRSError("device is cuda and gpus_per_replica is 0: who reserves no GPU uses the CPU, so reserve a share")
    n_gpus = settings.gpus_per_replica if settings.reserves_gpu else 0
    deployment = Replica.options(  # type: ignore[attr-defined]
        # The replica itself refuses what has no room, and says so as OpenAI does; what comes beyond that, from clients
        # that do not wait for their refusal, is refused by whoever passes requests on to it, and does not queue there.
        max_ongoing_requests=2 * most_texts(settings) + 3 * MOST_OTHERS,
        max_queued_requests=MOST_OTHERS,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_ongoing_requests or settings.slots,
            "upscale_delay_s": settings.upscale_delay_seconds,
            "downscale_delay_s": settings.downscale_delay_seconds,
        },
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": n_gpus},
        graceful_shutdown_timeout_s=settings.grace_seconds,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=1,
    )
    return deployment.bind(settings)
