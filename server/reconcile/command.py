"""Runs a comparison of ledger and store from beginning to end, and tells what came of it."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta

import anyio
import anyio.to_thread
import click

from server.errors import ConfigError, DependencyError, ServerError
from server.ledger.api_scripts import connect
from server.ledger.reconciling import LedgerReconciler
from server.reconcile.comparison import Comparison
from server.reconcile.findings import MEANINGS, Finding, Kind, Outcome, Tally
from server.reconcile.jobs import compare_jobs
from server.reconcile.outputs import compare_outputs
from server.reconcile.uploads import compare_uploads
from server.settings import Settings
from server.store import Store

_EXIT_LEFT = 1
EXIT_NOT_COMPARED = 3
_MOST_EXAMPLES = 10
_VERBS: dict[Outcome, str] = {"repaired": "repaired", "would_repair": "would be repaired", "left": "left as they are"}


@dataclass(frozen=True)
class Wanted:
    """What was asked for on the command line."""

    is_dry: bool
    reads_bytes: bool
    grace_seconds: float
    as_json: bool


def reconcile(settings: Settings, wanted: Wanted) -> int:
    """Compare, repair unless it is a dry run, print what was found; returns the exit status."""
    tally = Tally()
    printer = _JsonPrinter() if wanted.as_json else _TextPrinter()
    trouble: ServerError | None = None
    try:
        asyncio.run(_compare(settings, wanted, tally, printer))
    except (DependencyError, ConfigError) as error:
        trouble = error
    printer.end(tally, wanted, trouble)
    if trouble:
        return EXIT_NOT_COMPARED
    return _EXIT_LEFT if tally.num_left else 0


async def _compare(settings: Settings, wanted: Wanted, tally: Tally, printer: "_Printer") -> None:
    ledger = LedgerReconciler(connect(settings.redis), key_prefix=settings.redis.key_prefix)
    store = Store(settings.store)
    try:
        await ledger.require_schema()
        await anyio.to_thread.run_sync(store.check)
        comparison = Comparison(
            ledger,
            store,
            anyio.CapacityLimiter(settings.store.pool_size),
            tally,
            is_dry=wanted.is_dry,
            reads_bytes=wanted.reads_bytes,
            grace=timedelta(seconds=wanted.grace_seconds),
            trash_seconds=settings.retention.orphans_seconds,
            why_kept=await _find_why_kept(ledger),
        )
        async with aclosing(_all_findings(comparison)) as findings:
            async for finding in findings:
                tally.add(finding)
                printer.tell(finding)
    finally:
        await ledger.close()
        store.close()


async def _find_why_kept(ledger: LedgerReconciler) -> str | None:
    if not await ledger.has_batches():
        return "the ledger knows no batch at all, so nothing is thrown away"
    if others := await ledger.other_ledgers():
        return f"it may be of the ledger under {others[0]!r} in the same Redis, so nothing is thrown away"
    return None


async def _all_findings(comparison: Comparison) -> AsyncGenerator[Finding]:
    # What is marked as done first: such a job needs no photo any more.
    for compare in (compare_outputs, compare_jobs, compare_uploads):
        async for finding in compare(comparison):
            yield finding


class _Printer:
    def tell(self, finding: Finding) -> None:
        raise NotImplementedError

    def end(self, tally: Tally, wanted: Wanted, trouble: ServerError | None) -> None:
        raise NotImplementedError


class _JsonPrinter(_Printer):
    """A line for each finding, as it comes, and one for the whole at the end."""

    def tell(self, finding: Finding) -> None:
        click.echo(json.dumps(finding.as_json()))

    def end(self, tally: Tally, wanted: Wanted, trouble: ServerError | None) -> None:
        counts: dict[str, dict[str, int]] = defaultdict(dict)
        for (kind, outcome), count in tally.found.items():
            counts[kind][outcome] = count
        summary = {
            "dry_run": wanted.is_dry,
            "is_complete": trouble is None,
            "error": str(trouble) if trouble else None,
            "compared": {"jobs": tally.num_jobs, "outputs": tally.num_outputs, "uploads": tally.num_uploads},
            "too_young": tally.num_young,
            "repaired": tally.num_repaired,
            "left": tally.num_left,
            "found": counts,
        }
        click.echo(json.dumps({"summary": summary}))


class _TextPrinter(_Printer):
    """Counts by kind, each with its first few."""

    def __init__(self) -> None:
        self._examples: dict[tuple[Kind, Outcome], list[str]] = defaultdict(list)

    def tell(self, finding: Finding) -> None:
        examples = self._examples[finding.kind, finding.outcome]
        if len(examples) < _MOST_EXAMPLES:
            examples.append(str(finding))

    def end(self, tally: Tally, wanted: Wanted, trouble: ServerError | None) -> None:
        compared = f"{tally.num_jobs} jobs, {tally.num_outputs} objects of outputs, {tally.num_uploads} uploads"
        click.echo(f"compared: {compared}{' (dry run: nothing is changed)' if wanted.is_dry else ''}")
        for kind, meaning in MEANINGS.items():
            for outcome, verb in _VERBS.items():
                if count := tally.found[kind, outcome]:
                    click.echo(f"{count:>7}  {meaning}: {verb}")
                    for example in self._examples[kind, outcome]:
                        click.echo(f"           {example}")
                    if count > _MOST_EXAMPLES:
                        click.echo(f"           … and {count - _MOST_EXAMPLES} more; --json tells all")
        if tally.num_young:
            grace = f"{wanted.grace_seconds:g} s"
            click.echo(f"{tally.num_young:>7}  objects that no record names are younger than {grace}: left alone")
        if trouble:
            click.echo(f"restage: broken off: {trouble}", err=True)
        elif not tally.found:
            click.echo("ledger and store agree")
