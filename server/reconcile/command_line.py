"""`restage reconcile` on the command line."""

import sys

import click

_DAY_SECONDS = 24 * 3600.0


@click.command()
@click.option("--dry-run", "is_dry", is_flag=True, help="Change nothing; say what would be done.")
@click.option("--bytes", "reads_bytes", is_flag=True, help="Read every result and compare its sha256, too.")
@click.option(
    "--grace-seconds",
    type=click.FloatRange(0, 365 * _DAY_SECONDS),
    default=_DAY_SECONDS,
    show_default=True,
    help="An object that nothing names is thrown away only if it is older.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document for each finding, and one at the end.")
def reconcile(is_dry: bool, reads_bytes: bool, grace_seconds: float, as_json: bool) -> None:
    """Compare the ledger in Redis with the store, both ways, and repair what can be repaired.

    Jobs that are open in the ledger and that the store marks as done, since Redis was set back to an older copy, are
    finished as they were. Queued jobs whose photo is gone fail as input_missing. Succeeded jobs that the store does not
    mark get their mark. Objects that no record names go to the trash, and from there, after retention.orphans_seconds,
    out of the store.

    Objects of another ledger are such that no record names, so each redis.key_prefix needs buckets of its own. While
    the same Redis holds another ledger, nothing is thrown away.

    Results that are gone or have other bytes are told and left; so are jobs that the store knows and the ledger does
    not.

    It may run while API and workers do. After Redis was set back, run it before API and workers start: fences are
    handed out again, and a worker writes over the result that was there.

    Exit status: 0 when nothing is wrong, or nothing any more; 1 when something was found and left, or in a dry run
    anything at all; 3 when the two could not be compared to the end.
    """
    # What this brings is not needed to tell what commands there are.
    from server.reconcile.command import Wanted, reconcile  # noqa: PLC0415
    from server.settings import load_settings  # noqa: PLC0415

    sys.exit(reconcile(load_settings(), Wanted(is_dry, reads_bytes, grace_seconds, as_json)))
