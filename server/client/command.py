"""`restage submit` and `restage models` from checked arguments to exit status."""

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from server.client.batch import BatchRun
from server.client.errors import ClientError, ServerUnreachable
from server.client.http import RestageClient
from server.client.journal import Journal, open_journal
from server.client.photos import plain
from server.client.progress import BatchProgress, make_table, open_console
from server.client.request import BatchRequest, PhotoResult

EXIT_DONE, EXIT_SOME_FAILED, EXIT_INTERRUPTED = 0, 1, 130
_NO_UPLOAD = "0" * 32


@dataclass(frozen=True)
class Fetching:
    """Where results go, and whether as one archive."""

    out_dir: Path
    as_archive: bool = False


def submit_photos(url: str, request: BatchRequest, fetching: Fetching | None, *, anew: bool, as_json: bool) -> int:
    """Take a batch through, showing how far it is, and report what became of each photo.

    Args:
        url: of the server.
        request: photos and settings.
        fetching: None returns as soon as the batch is accepted.
        anew: do not go on with an earlier run of the same request.
        as_json: one JSON document on standard output in place of a table.

    Returns:
        Exit status.

    Raises:
        ClientError: it did not come to an end.
    """
    runs: list[BatchRun] = []
    try:
        with (
            BatchProgress(open_console(stderr=True)) as progress,
            open_journal(request, url, note=progress.note, anew=anew) as journal,
        ):
            asyncio.run(_run(url, request, fetching, progress, journal, runs))
    except KeyboardInterrupt:
        click.echo(f"interrupted; {_tell_what_is_left(runs)}", err=True)
        return EXIT_INTERRUPTED
    except ServerUnreachable as error:
        if not runs:
            raise
        raise ServerUnreachable(f"{error}\n  {_tell_what_is_left(runs)}") from error
    (run,) = runs
    click.echo(json.dumps(_as_document(run), indent=2)) if as_json else _print_report(run, waited=fetching is not None)
    refused = any(result.status == "refused" for result in run.results)
    done = all(result.is_done for result in run.results) if fetching is not None else not refused
    return EXIT_DONE if done else EXIT_SOME_FAILED


async def _run(
    url: str,
    request: BatchRequest,
    fetching: Fetching | None,
    progress: BatchProgress,
    journal: Journal,
    runs: list[BatchRun],
) -> None:
    async with RestageClient(url, os.environ.get("RESTAGE_API_KEY"), on_wait=progress.note) as client:
        if journal.record.submitted is None:
            await _check_model(client, request.defaults.get("model"), progress)
            # A slip in the settings shows before photos are sent, not after.
            await client.check_settings(request.body([{"upload_id": _NO_UPLOAD}]))
        run = BatchRun(client, request, progress, journal)
        runs.append(run)
        await run.submit()
        if fetching is not None:
            await run.finish(fetching.out_dir, as_archive=fetching.as_archive)


async def _check_model(client: RestageClient, model_id: str | None, progress: BatchProgress) -> None:
    """Ask for the models before photos are sent: a wrong address, key or model shows at once."""
    models = {model["id"]: model for model in await client.list_models()}
    if model_id is None:
        return
    if model_id not in models:
        raise ClientError(f"the server has no model '{model_id}'; it has {', '.join(sorted(models))}")
    if not models[model_id]["ready"]:
        progress.note(f"{model_id} is not ready, the batch will wait: {models[model_id]['not_ready_reason']}")


def _tell_what_is_left(runs: Sequence[BatchRun]) -> str:
    if not runs:
        return "nothing was submitted"
    run = runs[0]
    if run.batch_id is not None:
        return f"batch {run.batch_id} goes on without you; the same command again goes on with it"
    return (
        f"{run.num_arrived} of {len(run.results)} photos arrived, and no batch is known to be accepted; "
        "the same command again goes on from here"
    )


def _print_report(run: BatchRun, *, waited: bool) -> None:
    console = open_console()
    console.print(make_table(run.results))
    if run.batch is None:
        console.print("nothing was accepted")
        return
    if not waited:
        state = "has finished" if run.batch["status"] == "finished" else "was accepted and goes on"
        console.print(f"batch {run.batch_id} {state}; the same command without --no-wait fetches the results")
        return
    num_done = sum(result.is_done for result in run.results)
    console.print(f"batch {run.batch_id}: {num_done} of {len(run.results)} done")
    if run.archive is not None:
        console.print(Text(f"the results are in {plain(run.archive)}"))
    if run.num_to_fetch:
        console.print(f"{run.num_to_fetch} could not be fetched; the same command again fetches the rest")


def _as_document(run: BatchRun) -> dict[str, Any]:
    archive = None if run.archive is None else str(run.archive)
    return {"batch": run.batch, "archive": archive, "results": [_as_entry(result) for result in run.results]}


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
    table = Table("model", "version", "ready", "licence", header_style="bold")
    table.add_column("resident on, or why it is not ready", overflow="fold")
    notes: list[str] = []
    for model in asyncio.run(_list_models(url)):
        where = ", ".join(model["resident_on"]) if model["ready"] else model["not_ready_reason"]
        ready = Text("yes", style="green") if model["ready"] else Text("no", style="yellow")
        version = f"{model['version']}, retired" if model.get("retired") else model["version"]
        table.add_row(Text(model["id"]), Text(version), ready, Text(model["license"] or ""), Text(where or ""))
        notes += _notes_on(model)
    console = open_console()
    console.print(table)
    for note in notes:
        console.print(Text(note))


def _notes_on(model: dict[str, Any]) -> list[str]:
    """Say what does not fit into a row: what the licence forbids, and which LoRAs there are."""
    notes = [f"{model['id']}: {model['license_note']}"] if model.get("license_note") else []
    notes += [
        f"{model['id']} --lora {lora['id']}={lora['scale'][0]:g}…{lora['scale'][1]:g}: {lora['name']}"
        for lora in model.get("loras", [])
    ]
    return notes


async def _list_models(url: str) -> list[dict[str, Any]]:
    async with RestageClient(url, os.environ.get("RESTAGE_API_KEY")) as client:
        return await client.list_models()
