"""Signs the URLs that results are downloaded with."""

from datetime import datetime
from pathlib import PurePosixPath

from server.api.services import Services
from server.jobs import Job, JobOutput


class OutputSigner:
    """Signs on this machine: the store is not asked, so a batch of any size costs no call."""

    def __init__(self, services: Services) -> None:
        self._store = services.store
        self._ttl_seconds = services.settings.limits.output_url_ttl_seconds

    def __call__(self, job: Job, output: JobOutput) -> tuple[str, datetime]:
        """Return a URL for a job's result, and when it stops working."""
        return self._store.output_url(
            output.key,
            filename=download_name(job, output),
            content_type=output.content_type,
            ttl_seconds=self._ttl_seconds,
        )


def download_name(job: Job, output: JobOutput) -> str:
    """Name a result for people: its place in the batch, the photo's own name, the result's format."""
    stem = PurePosixPath((job.name or job.id).replace("\\", "/")).stem or job.id
    return f"{job.index + 1:03d}-{stem}{PurePosixPath(output.key).suffix}"
