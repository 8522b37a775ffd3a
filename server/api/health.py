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


class Unavailable(Health):
    """What a process without Redis or the store answers."""

    code: str = Field(description="Of the error, as other routes answer it.")


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
    responses={
        503: ResponseSpec(Unavailable, description="Redis or the store does not answer", generate_examples=False)
    },
)
async def ready(services: NamedDependency[Services]) -> Response[Health]:
    """Ask Redis and the store.

    200 when both answer: `ok` when a worker serves at least one model, else `degraded`. 503 when one does not.
    """
    statuses: dict[str, ModelStatus] = {}

    async def ask_redis() -> None:
        statuses.update(await services.ledger.model_statuses(services.registry.ids))

    redis, store = await asyncio.gather(_trouble(ask_redis()), _trouble(_ask_store(services)))
    dependencies = {"redis": redis.detail if redis else "ok", "store": store.detail if store else "ok"}
    models = {model_id: status.workers for model_id, status in statuses.items() if status.workers}
    if trouble := redis or store:
        health = Unavailable(status="unavailable", dependencies=dependencies, models=models, code=trouble.code)
        return Response(health, status_code=503, headers={"Retry-After": str(trouble.retry_after_seconds)})
    return Response(Health(status="ok" if models else "degraded", dependencies=dependencies, models=models))


async def _ask_store(services: Services) -> None:
    try:
        async with asyncio.timeout(_STORE_TIMEOUT_SECONDS):
            await anyio.to_thread.run_sync(services.store.check, limiter=services.store_threads, abandon_on_cancel=True)
    except TimeoutError as error:
        raise StoreUnavailable(f"the store did not answer within {_STORE_TIMEOUT_SECONDS} s") from error


async def _trouble(question: Awaitable[None]) -> DependencyError | None:
    try:
        await question
    except DependencyError as error:
        return error
    return None
