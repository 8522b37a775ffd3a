"""The calls with which benchmarks send photos; none is made again, so that nothing but the first try is measured."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from bench_photos import CONTENT_TYPE, Photo
from bench_servers import BenchFailed

_PARALLEL_TRANSFERS = 16
_TIMEOUT_SECONDS = 60


@asynccontextmanager
async def open_client(url: str) -> AsyncGenerator[httpx.AsyncClient]:
    """Open a client of the API at `url` that keeps its connections, to the store as well."""
    limits = httpx.Limits(max_keepalive_connections=_PARALLEL_TRANSFERS + 1)
    # Whatever proxy the environment names is for other machines.
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=_TIMEOUT_SECONDS, trust_env=False) as client:
        yield client


async def accept(client: httpx.AsyncClient, photos: Sequence[Photo]) -> dict[str, Any]:
    """Ask for forms, send the photos to the store, 16 at once, and submit them as one batch.

    Returns:
        The batch; every photo was accepted.

    Raises:
        BenchFailed: one was not, or is in the store already.
    """
    forms: list[dict[str, Any]] = (await _call(client, "/v1/uploads", {"files": [*map(announcement, photos)]}))[
        "uploads"
    ]
    transfers = asyncio.Semaphore(_PARALLEL_TRANSFERS)

    async def send(photo: Photo, form: dict[str, Any]) -> dict[str, str]:
        async with transfers:
            await _send(client, photo, form)
        return {"upload_id": form["upload_id"], "name": photo.path.name}

    items = await asyncio.gather(*(send(photo, form) for photo, form in zip(photos, forms, strict=True)))
    return (await _call(client, "/v1/batches", {"items": items}))["batch"]


def announcement(photo: Photo) -> dict[str, str | int]:
    """Tell what `POST /v1/uploads` wants to know of a photo."""
    return {
        "filename": photo.path.name,
        "content_type": CONTENT_TYPE,
        "size_bytes": photo.size_bytes,
        "sha256": photo.sha256,
    }


async def _call(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post(path, json=body)
    # 207 says that some were refused.
    if response.status_code != 201:
        raise BenchFailed(f"{path} answers {response.status_code}: {response.text[:500]}")
    return response.json()


async def _send(client: httpx.AsyncClient, photo: Photo, form: dict[str, Any]) -> None:
    if form.get("exists"):
        raise BenchFailed(f"{photo.path.name} is in the store already, so nothing would be measured")
    response = await client.post(form["url"], data=form["fields"], files={"file": photo.path.read_bytes()})
    if not response.is_success:
        raise BenchFailed(f"the store answers {response.status_code}: {response.text[:500]}")
