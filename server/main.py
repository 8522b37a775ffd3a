"""The API process: the only place where its parts are made and put together."""

import asyncio
import math
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
from server.api.connections import allow_many_files, bounded_connections
from server.api.crowding import LargeBodies, OpenStreams, refuse_when_crowded
from server.api.docs import docs_file, start_script
from server.api.ending import SignallessServer, ended_by_signals
from server.api.errors import exception_handlers
from server.api.events import follow_batch
from server.api.health import live, ready
from server.api.jobs import cancel_job, list_jobs, read_job, redirect_to_output, retry_job, retry_jobs
from server.api.key_limits import limit_requests
from server.api.methods import tell_methods
from server.api.models import list_models, list_presets, read_model
from server.api.openapi import describe_api
from server.api.query_names import refuse_unknown_names
from server.api.request_context import RequestContext
from server.api.services import Services
from server.api.stopping import StoppableRequests, Stopping
from server.api.uploads import create_uploads
from server.api.views import record_of_batch
from server.api.workers import list_workers
from server.changes import Changes
from server.errors import ConfigError
from server.janitor import Janitor
from server.keys import KeyStore
from server.ledger.api_side import ApiLedger, connect
from server.ledger.redis_checks import check_redis
from server.logs import configure_logging
from server.periodic import end_tasks
from server.prompts import Prompts
from server.registry import Registry, load_registry
from server.settings import ServerSettings, Settings, is_loopback
from server.store import Store
from server.submit.accept import Submitter
from server.submit.files import FileUploads
from server.submit.look import PhotoLook
from server.submit.resolve import Resolver
from server.sweeper import Sweeper
from server.webhooks.sender import WebhookSender
from server.webhooks.signing import WebhookSecrets

# A client that submits waits for the store; most give up on a call after half a minute.
LONGEST_LOOK_SECONDS = 10.0
# Each up to limits.max_body_bytes, in memory until its request is done.
MOST_LARGE_BODIES = 100
_log = structlog.stdlib.get_logger()


def create_app(settings: Settings) -> Litestar:
    """Build the application. Nothing is connected before it is started.

    Raises:
        ConfigError: the registry, the prompts or the keys cannot be used.
    """
    registry = load_registry(settings)
    prompts = Prompts.load(settings.config_dir)
    keys = KeyStore(settings.auth.keys_file) if settings.auth.mode == "keys" else None
    stopping = Stopping()

    @asynccontextmanager
    async def run(app: Litestar) -> AsyncGenerator[None]:
        async with _open_services(settings, registry, prompts, keys, stopping) as services:
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
    app.state.stopping = stopping
    app.asgi_handler = RequestContext(StoppableRequests(app.asgi_handler, stopping))
    return app


def serve(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status of the process.

    Raises:
        ConfigError: the registry, the prompts, the keys or the address cannot be used, or Redis could lose jobs, or
            holds the ledger of another version.
        DependencyError: Redis or the store is away at the start.
    """
    configure_logging(settings.log)
    allow_many_files()
    app = create_app(settings)
    with _listen(settings) as listener:
        asyncio.run(_serve(app, listener, settings.server))
    return 0


def _listen(settings: Settings) -> socket.socket:
    host, port = settings.server.host, settings.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError([f"server.port: {host}:{port} cannot be listened on: {error.strerror}"]) from error
    # The settings have looked at the name; only now it is known where it leads.
    bound = listener.getsockname()[0]
    if settings.auth.mode == "none" and not is_loopback(bound):
        listener.close()
        problem = f"server.host: {host} is {bound} here, which other machines reach, while auth.mode is none"
        raise ConfigError([f"{problem}; needs a loopback address, or keys"])
    return listener


def _configure(app: Litestar, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=bounded_connections(settings),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # uvicorn's own 5 s would cut connections that proxies keep; ours ends a second that is not whole.
        timeout_keep_alive=math.ceil(settings.header_timeout_seconds),
    )


async def _serve(app: Litestar, listener: socket.socket, settings: ServerSettings) -> None:
    server = SignallessServer(_configure(app, settings))
    host, port = listener.getsockname()[:2]
    # The lifespan is ours, not uvicorn's: what fails at the start reaches the caller as the error that it is.
    with ended_by_signals(server, app.state.stopping, listener):
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
    settings: Settings, registry: Registry, prompts: Prompts, keys: KeyStore | None, stopping: Stopping
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
        await anyio.to_thread.run_sync(check_redis, settings.redis)
        await ledger.check_schema()
        await ledger.expect_models(registry.ids)
        await anyio.to_thread.run_sync(store.ensure_buckets)
        await anyio.to_thread.run_sync(store.prepare_buckets, settings.retention, settings.limits)
        webhook_secrets = WebhookSecrets(settings.webhooks, keys)
        changes = Changes(ledger, block_seconds=min(1.0, settings.redis.timeout_seconds / 2))
        stopping.when_begun(changes.wake_everybody)
        standing = [
            Sweeper(ledger, settings, registry.ids),
            Janitor(ledger, store, threads=threads, interval_seconds=settings.sweep.interval_seconds),
            WebhookSender(ledger, settings, secrets_of=webhook_secrets.of, view=record_of_batch),
            changes,
        ]
        tasks = [asyncio.create_task(one.run()) for one in standing]
        try:
            yield Services(
                settings,
                registry,
                prompts,
                keys,
                ledger,
                store,
                threads,
                submitter,
                changes,
                webhook_secrets,
                OpenStreams(settings.server.max_streams),
                LargeBodies(MOST_LARGE_BODIES),
                stopping,
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
        guards=[refuse_when_crowded, require_key, limit_requests, refuse_unknown_names],
        dependencies={"principal": Provide(provide_principal, sync_to_thread=False)},
        security=[{"key": []}],
        # Answers hold URLs that work without a key.
        cache_control=CacheControlHeader(no_store=True),
    )


def _provide_services(request: Request[Any, Any, Any]) -> Services:
    return request.app.state.services
