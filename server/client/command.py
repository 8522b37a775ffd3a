"""`restage submit` and `restage models` from checked arguments to exit status."""

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from server.client.batch import BatchRequest, BatchRun, PhotoResult
from server.client.errors import ClientError
from server.client.http import RestageClient
from server.client.progress import BatchProgress, make_table, open_console

EXIT_DONE, EXIT_SOME_FAILED, EXIT_INTERRUPTED = 0, 1, 130


def submit_photos(url: str, request: BatchRequest, out_dir: Path | None, *, as_json: bool) -> int:
    """Take a batch through, showing how far it is, and report what became of each photo.

    Args:
        url: of the server.
        request: photos and settings.
        out_dir: where results are put; None returns as soon as the batch is accepted.
        as_json: one JSON document on standard output in place of a table.

    Returns:
        Exit status.

    Raises:
        ClientError: nothing could be submitted.
    """
    runs: list[BatchRun] = []
    try:
        with BatchProgress(open_console(stderr=True)) as progress:
            asyncio.run(_run(url, request, out_dir, progress, runs))
    except KeyboardInterrupt:
        click.echo(_explain_interruption(url, runs), err=True)
        return EXIT_INTERRUPTED
    except ClientError as error:
        if not runs or runs[0].batch_id is None:
            raise
        raise ClientError(
            f"{error}\n  batch {runs[0].batch_id} was accepted and goes on; it was not waited for"
        ) from error
    run = runs[0]
    click.echo(json.dumps(_as_document(run), indent=2)) if as_json else _print_report(run, waited=out_dir is not None)
    refused = any(result.status == "refused" for result in run.results)
    done = all(result.is_done for result in run.results) if out_dir is not None else not refused
    return EXIT_DONE if done else EXIT_SOME_FAILED


async def _run(
    url: str, request: BatchRequest, out_dir: Path | None, progress: BatchProgress, runs: list[BatchRun]
) -> None:
    async with RestageClient(url, os.environ.get("RESTAGE_API_KEY"), on_wait=progress.note) as client:
        await _check_model(client, request.defaults.get("model"), progress)
        run = BatchRun(client, request, progress)
        runs.append(run)
        await run.submit()
        if out_dir is not None:
            await run.finish(out_dir)


async def _check_model(client: RestageClient, model_id: str | None, progress: BatchProgress) -> None:
    """Ask for the models before photos are sent: a wrong address, key or model shows at once."""
    models = {model["id"]: model for model in await client.list_models()}
    if model_id is None:
        return
    if model_id not in models:
        raise ClientError(f"the server has no model '{model_id}'; it has {', '.join(sorted(models))}")
    if not models[model_id]["ready"]:
        progress.note(f"{model_id} is not ready, the batch will wait: {models[model_id]['not_ready_reason']}")


def _explain_interruption(url: str, runs: Sequence[BatchRun]) -> str:
    if not runs or runs[0].batch_id is None:
        return "interrupted before the server accepted the batch"
    batch_id = runs[0].batch_id
    return f"interrupted; batch {batch_id} goes on without you: GET {url.rstrip('/')}/v1/batches/{batch_id} shows it"


def _print_report(run: BatchRun, *, waited: bool) -> None:
    console = open_console()
    console.print(make_table(run.results))
    if run.batch_id is None:
        console.print("nothing was accepted")
    elif waited:
        num_done = sum(result.is_done for result in run.results)
        console.print(f"batch {run.batch_id}: {num_done} of {len(run.results)} done")
    else:
        console.print(f"batch {run.batch_id} was accepted and goes on")


def _as_document(run: BatchRun) -> dict[str, Any]:
    return {"batch": run.batch, "results": [_as_entry(result) for result in run.results]}


def _as_entry(result: PhotoResult) -> dict[str, Any]:
    return {
        "index": result.index,
        "photo": str(result.photo),
        "status": result.status,
        "model": result.model,
        "seconds": result.seconds,
        "file": None if result.file is None else str(result.file),
        "error": result.error,
    }


def print_models(url: str) -> None:
    """Print the models that a server offers, and why one is not ready.

    Raises:
        ClientError: the server cannot be asked.
    """
    table = Table("model", "ready", "licence", header_style="bold")
    table.add_column("resident on, or why it is not ready", overflow="fold")
    for model in asyncio.run(_list_models(url)):
        where = ", ".join(model["resident_on"]) if model["ready"] else model["not_ready_reason"]
        ready = Text("yes", style="green") if model["ready"] else Text("no", style="yellow")
        table.add_row(Text(model["id"]), ready, Text(model["license"] or ""), Text(where or ""))
    open_console().print(table)


async def _list_models(url: str) -> list[dict[str, Any]]:
    async with RestageClient(url, os.environ.get("RESTAGE_API_KEY")) as client:
        return await client.list_models()
