"""Leaves beside a result what the store is to know of its job, for a ledger that is set back one day."""

from server.jobs import JobOutput
from server.ledger.worker_side import WorkerLedger
from server.marker import Marker, marker_key
from server.store import Store
from server.worker.hand import JobInHand


def leave_marker(ledger: WorkerLedger, store: Store, in_hand: JobInHand, output: JobOutput) -> None:
    """Write the marker of a job whose `output` was committed just now; nothing where its batch is deleted already.

    Raises:
        DependencyError: Redis or the store is away.
        BadMarker: a marker cannot say what became of the job.
    """
    job = in_hand.job
    finished_at_ms = ledger.finished_at_ms(job.id)
    if finished_at_ms is None:
        return
    marker = Marker.of(
        job,
        finished_at_ms=finished_at_ms,
        output=output,
        inputs=in_hand.inputs,
        params=in_hand.params,
        timings=in_hand.timings,
        weights_sha256=in_hand.weights_sha256,
        optimizations=in_hand.optimizations,
    )
    store.put_marker(marker_key(job.id), marker.encode())
    # Whoever deleted the batch meanwhile has named the marker to the trash, perhaps before it was there.
    if ledger.finished_at_ms(job.id) is None:
        store.delete_output(marker_key(job.id))
