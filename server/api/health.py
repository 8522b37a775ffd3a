"""`/health`: whether the process lives, and whether a batch would be served."""

import asyncio
from collections.abc import Awaitable
from typing import Literal

import anyio.to_thread
from litestar import Response, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from pydantic import Field

from server.api.services import Services
from server.api.views import View
from server.errors import DependencyError, StoreUnavailable
from server.ledger.status import ModelStatus

_STORE_TIMEOUT_SECONDS = 5


class Health(View):
    """What the process needs, and which models would be served now."""

    status: Literal["ok", "degraded", "unavailable"]
    dependencies: dict[str, str]
    models: dict[str, int] = Field(description="Live workers by model; models without one are left out.")


class Alive(View):
    """The process answers."""

    status: Literal["ok"]


@get("/health/live", tags=["Operations"], summary="Is the process alive?", sync_to_thread=False)
def live() -> Alive:
    """Answer; nothing is asked of Redis or the store."""
    return Alive(status="ok")


@get(
    "/health/ready",
    tags=["Operations"],
    summary="Would a batch be served?",
    response_description="Redis and the store answer",
    responses={503: ResponseSpec(Health, description="Redis or the store does not answer", generate_examples=False)},
)
async def ready(services: NamedDependency[Services]) -> Response[Health]:
    """Ask Redis and the store.

    200 when both answer: `ok` when a worker serves at least one model, else `degraded`. 503 when one does not.
    """
    statuses: dict[str, ModelStatus] = {}

    async def ask_redis() -> None:
        statuses.update(await services.ledger.model_statuses(services.registry.ids))

    redis, store = await asyncio.gather(_outcome(ask_redis()), _outcome(_ask_store(services)))
    models = {model_id: status.workers for model_id, status in statuses.items() if status.workers}
    if redis != "ok" or store != "ok":
        health = Health(status="unavailable", dependencies={"redis": redis, "store": store}, models=models)
        return Response(health, status_code=503, headers={"Retry-After": str(DependencyError.retry_after_seconds)})
    status = "ok" if models else "degraded"
    return Response(Health(status=status, dependencies={"redis": redis, "store": store}, models=models))


async def _ask_store(services: Services) -> None:
    try:
        async with asyncio.timeout(_STORE_TIMEOUT_SECONDS):
            await anyio.to_thread.run_sync(services.store.check, limiter=services.store_threads, abandon_on_cancel=True)
    except TimeoutError as error:
        raise StoreUnavailable(f"the store did not answer within {_STORE_TIMEOUT_SECONDS} s") from error


async def _outcome(question: Awaitable[None]) -> str:
    try:
        await question
    except DependencyError as error:
        return error.detail
    return "ok"
