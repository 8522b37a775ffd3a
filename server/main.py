"""The API process: the only place where its parts are made and put together."""

import asyncio
import signal
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
import anyio.to_thread
import structlog
import uvicorn
from litestar import Litestar, Request, Router
from litestar.datastructures import CacheControlHeader
from litestar.di import Provide

from server.api.archive import download_archive
from server.api.auth import provide_principal, require_key
from server.api.batches import cancel_batch, delete_batch, list_batches, read_batch, retry_batch, submit_batch
from server.api.bodies import StrictModels, StrictRequest
from server.api.docs import docs_file, start_script
from server.api.errors import exception_handlers
from server.api.events import follow_batch
from server.api.health import live, ready
from server.api.jobs import cancel_job, list_jobs, read_job, redirect_to_output, retry_job, retry_jobs
from server.api.methods import tell_methods
from server.api.models import list_models, list_presets, read_model
from server.api.openapi import describe_api
from server.api.query_names import refuse_unknown_names
from server.api.request_context import RequestContext
from server.api.services import Services
from server.api.uploads import create_uploads
from server.api.views import record_of_batch
from server.api.workers import list_workers
from server.changes import Changes
from server.errors import ConfigError
from server.janitor import Janitor
from server.keys import KeyStore
from server.ledger.api_side import ApiLedger, connect
from server.logs import configure_logging
from server.periodic import end_tasks
from server.prompts import Prompts
from server.registry import Registry, load_registry
from server.settings import ServerSettings, Settings
from server.store import Store
from server.submit.accept import Submitter
from server.submit.files import FileUploads
from server.submit.look import PhotoLook
from server.submit.resolve import Resolver
from server.sweeper import Sweeper
from server.webhooks.sender import WebhookSender
from server.webhooks.signing import WebhookSecrets

_SHUTDOWN_TIMEOUT_SECONDS = 3
# A client that submits waits for the store; most give up on a call after half a minute.
LONGEST_LOOK_SECONDS = 10.0
_log = structlog.stdlib.get_logger()


def create_app(settings: Settings) -> Litestar:
    """Build the application. Nothing is connected before it is started.

    Raises:
        ConfigError: the registry, the prompts or the keys cannot be used.
    """
    registry = load_registry(settings)
    prompts = Prompts.load(settings.config_dir)
    keys = KeyStore(settings.auth.keys_file) if settings.auth.mode == "keys" else None

    @asynccontextmanager
    async def run(app: Litestar) -> AsyncGenerator[None]:
        async with _open_services(settings, registry, prompts, keys) as services:
            app.state.services = services
            yield

    app = Litestar(
        [_create_v1_router(), live, ready, start_script, docs_file],
        lifespan=[run],
        request_class=StrictRequest,
        request_max_body_size=settings.limits.max_body_bytes,
        exception_handlers=exception_handlers(),
        before_send=[tell_methods],
        plugins=[StrictModels(max_items=settings.limits.max_batch_items)],
        dependencies={"services": Provide(_provide_services, sync_to_thread=False)},
        openapi_config=describe_api(),
        logging_config=None,
    )
    app.asgi_handler = RequestContext(app.asgi_handler)
    return app


def serve(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status of the process.

    Raises:
        ConfigError: the registry, the prompts, the keys or the address cannot be used, or Redis holds the ledger of
            another version.
        DependencyError: Redis or the store is away at the start.
    """
    configure_logging(settings.log)
    app = create_app(settings)
    with _listen(settings.server) as listener:
        asyncio.run(_serve(app, listener))
    return 0


def _listen(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        address = f"{settings.host}:{settings.port}"
        raise ConfigError([f"server.port: {address} cannot be listened on: {error.strerror}"]) from error


async def _serve(app: Litestar, listener: socket.socket) -> None:
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # Open event streams would hold a stopping server for ever.
        timeout_graceful_shutdown=_SHUTDOWN_TIMEOUT_SECONDS,
    )
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = True

    # uvicorn raises a signal anew once it has stopped; these handlers let that end in an orderly exit.
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    host, port = listener.getsockname()[:2]
    # The lifespan is ours, not uvicorn's: what fails at the start reaches the caller as the error that it is.
    try:
        async with app.lifespan():
            _log.info("api.started", host=host, port=port)
            await server.serve(sockets=[listener])
    except BaseExceptionGroup as group:  # Litestar's lifespan wraps whatever passes through it
        raise _find_cause(group) from group
    _log.info("api.stopped")


def _find_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = cast("BaseExceptionGroup[BaseException]", error).exceptions[0]
    return error


@asynccontextmanager
async def _open_services(
    settings: Settings, registry: Registry, prompts: Prompts, keys: KeyStore | None
) -> AsyncGenerator[Services]:
    """Make the clients, see that both servers can be used, and keep the ledger swept meanwhile."""
    ledger = ApiLedger(connect(settings.redis), key_prefix=settings.redis.key_prefix)
    store = Store(settings.store)
    threads = anyio.CapacityLimiter(settings.store.pool_size)
    look = PhotoLook(
        store,
        settings.limits,
        threads=threads,
        timeout_seconds=min(settings.store.read_timeout_seconds, LONGEST_LOOK_SECONDS),
    )
    resolver = Resolver(
        registry,
        prompts,
        default_model=settings.models.default,
        max_prompt_characters=settings.limits.max_prompt_characters,
    )
    uploads = FileUploads(store, ledger, settings, threads=threads)
    submitter = Submitter(settings, resolver=resolver, look=look, uploads=uploads, ledger=ledger)
    try:
        await ledger.check_schema()
        await anyio.to_thread.run_sync(store.ensure_buckets)
        await anyio.to_thread.run_sync(store.prepare_buckets, settings.retention, settings.limits)
        webhook_secrets = WebhookSecrets(settings.webhooks, keys)
        changes = Changes(ledger, block_seconds=min(1.0, settings.redis.timeout_seconds / 2))
        standing = [
            Sweeper(ledger, settings, registry.ids),
            Janitor(ledger, store, threads=threads, interval_seconds=settings.sweep.interval_seconds),
            WebhookSender(ledger, settings, secrets_of=webhook_secrets.of, view=record_of_batch),
            changes,
        ]
        tasks = [asyncio.create_task(one.run()) for one in standing]
        try:
            yield Services(
                settings, registry, prompts, keys, ledger, store, threads, submitter, changes, webhook_secrets
            )
        finally:
            await end_tasks(tasks)
    finally:
        await ledger.close()
        store.close()


def _create_v1_router() -> Router:
    return Router(
        "/v1",
        route_handlers=[
            create_uploads,
            submit_batch,
            list_batches,
            read_batch,
            follow_batch,
            download_archive,
            cancel_batch,
            retry_batch,
            delete_batch,
            list_jobs,
            read_job,
            redirect_to_output,
            cancel_job,
            retry_job,
            retry_jobs,
            list_models,
            read_model,
            list_presets,
            list_workers,
        ],
        guards=[require_key, refuse_unknown_names],
        dependencies={"principal": Provide(provide_principal, sync_to_thread=False)},
        security=[{"key": []}],
        # Answers hold URLs that work without a key.
        cache_control=CacheControlHeader(no_store=True),
    )


def _provide_services(request: Request[Any, Any, Any]) -> Services:
    return request.app.state.services
