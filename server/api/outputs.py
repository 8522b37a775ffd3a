"""Signs the URLs that results are downloaded with, and names the files that they become."""

import re
import unicodedata
from datetime import datetime
from pathlib import PurePosixPath

from server.api.services import Services
from server.jobs import Job, JobOutput

_MAX_STEM_CHARACTERS = 100
_MAX_STEM_BYTES = 200  # file systems stop at 255 for the whole name
_SUFFIX = re.compile(r"(?<=.)\.[A-Za-z0-9]{1,5}$")  # a name need not be that of a file: "1. OG"
_RESERVED = re.compile(r'[<>:"/\\|?*]')  # by Windows; the slashes also by every zip


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
    """Name a result for people: its place in the batch, the photo's own name, the result's format.

    Returns:
        Such as `001-hall.webp`: a plain file name on every system and in every zip, at most 220 bytes long, that no
        other job of the batch has.
    """
    stem = _SUFFIX.sub("", PurePosixPath((job.name or "").replace("\\", "/")).name)
    return f"{job.index + 1:03d}-{_plain(stem) or job.id}{PurePosixPath(output.key).suffix}"


def _plain(stem: str) -> str:
    """Replace what some system could not write, or would read as something else than a name; may leave nothing."""
    # "C": control characters, those that turn the direction of writing, halves of characters; "Zl", "Zp": line ends.
    seen = "".join("_" if unicodedata.category(each)[0] == "C" or each in "\u2028\u2029" else each for each in stem)
    short = _RESERVED.sub("_", seen)[:_MAX_STEM_CHARACTERS].encode()[:_MAX_STEM_BYTES].decode(errors="ignore")
    return short.strip(" .")
