"""The Hugging Face Hub, or a mirror of it: what a repository holds, and one file of it, taken up where it was cut off.

The hub's own function for downloads begins a file anew in each process, and these files have gigabytes; so this calls
what lies below it, with a part file of our own.
"""

import errno
import hashlib
import io
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers

from pipelines.errors import WeightsError
from pipelines.manifest import FileRecord, OnBytes

_LIST_TIMEOUT_SECONDS = 60
_MAX_FAILURES = 5
_PAUSE_SECONDS = 1.0
_BLOCK_BYTES = 1 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub announces it.

    Attributes:
        path: in its repository.
        digest: of its content: SHA-256 for what is in LFS, as all large files are; else the digest that git gives a
            file, which is a SHA-1.
    """

    path: str
    size_bytes: int
    digest: str

    def match(self, file: Path, on_bytes: OnBytes | None = None) -> FileRecord | None:
        """Compare a local file with this one; reads all of it unless the sizes differ already.

        Returns:
            What the file is, if it is this one.

        Raises:
            OSError: it cannot be read.
        """
        if not file.is_file() or file.stat().st_size != self.size_bytes:
            return None
        sha256 = hashlib.sha256()
        git = hashlib.sha1(b"blob %d\0" % self.size_bytes, usedforsecurity=False)
        has_sha256 = _SHA256.fullmatch(self.digest) is not None
        with file.open("rb") as content:
            while block := content.read(_BLOCK_BYTES):
                sha256.update(block)
                if not has_sha256:
                    git.update(block)
                if on_bytes is not None:
                    on_bytes(len(block))
        found = sha256.hexdigest() if has_sha256 else git.hexdigest()
        return FileRecord(self.size_bytes, sha256.hexdigest()) if found == self.digest else None


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit; `commit` has 40 hexadecimal digits, `files` goes by path."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile]


class Hub:
    """A hub, and who asks it.

    Args:
        endpoint: such as `https://huggingface.co`.
        token: of the account that asks; None asks without one. Never logged.
    """

    def __init__(self, endpoint: str, token: str | None = None) -> None:
        self.endpoint = endpoint.rstrip("/")
        # False, not None: a token that lies somewhere in the home is not meant for any mirror that is named here.
        self._token: str | bool = token or False

    def list_files(self, repo: str, revision: str) -> Listing:
        """Ask what a branch, tag or commit holds.

        Raises:
            WeightsError: there is no such thing, it is not to be had, or the hub cannot be reached.
        """
        api = HfApi(endpoint=self.endpoint, token=self._token)
        with self._explained(repo, revision):
            try:
                info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_LIST_TIMEOUT_SECONDS)
                commit, files = str(info.sha), [_read_sibling(sibling) for sibling in info.siblings or ()]
            except HFValidationError as error:
                raise WeightsError(f"{repo} cannot be the name of a repository on a hub") from error
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                if isinstance(error, HfHubHTTPError):
                    raise
                raise WeightsError(f"{self.endpoint} does not answer as a hub does") from error
        if not _COMMIT.fullmatch(commit) or not files:
            raise WeightsError(f"{self.endpoint} does not answer as a hub does: it gives {repo} no commit, or no files")
        return Listing(repo, commit, {file.path: file for file in files})

    def download(self, listing: Listing, file: RemoteFile, part: Path, on_bytes: OnBytes) -> FileRecord:
        """Download a file, or what of it is not in `part` yet.

        A connection that is cut is taken up again, as long as anything arrives in between.

        Args:
            listing: what `file` is of.
            file: which one.
            part: where to; what arrived stays there, whatever happens.
            on_bytes: called with the number of bytes that arrived since the last call; negative where the hub began
                anew.

        Returns:
            What arrived, which is what was announced.

        Raises:
            WeightsError: it is not to be had, something else arrived, or the disk is full.
        """
        if file.size_bytes > constants.MAX_HTTP_DOWNLOAD_SIZE:
            raise WeightsError(
                f"{file.path} of {listing.repo} has over 50 GB, which the hub does not give in one piece"
            )
        if part.exists() and part.stat().st_size > file.size_bytes:
            part.unlink()
        with self._explained(listing.repo, listing.commit, file.path):
            try:
                self._download_patiently(listing, file, part, on_bytes)
            finally:
                if file.size_bytes > 0 and part.exists() and part.stat().st_size == 0:
                    part.unlink()  # not worth going on with
        record = file.match(part)
        if record is None:
            part.unlink()
            raise WeightsError(
                f"what arrived of {file.path} is not what {self.endpoint} announced, and was thrown away; "
                "the same command fetches it again"
            )
        return record

    def _download_patiently(self, listing: Listing, file: RemoteFile, part: Path, on_bytes: OnBytes) -> None:
        num_failures = 0
        while True:
            before_bytes = part.stat().st_size if part.exists() else 0
            try:
                with _Part(part, file, on_bytes) as out:
                    http_get(
                        hf_hub_url(listing.repo, file.path, revision=listing.commit, endpoint=self.endpoint),
                        out,
                        resume_size=before_bytes,
                        # Compressed, a file could not be taken up in its middle.
                        headers={**build_hf_headers(token=self._token), "Accept-Encoding": "identity"},
                        expected_size=file.size_bytes,
                    )
            # http_get itself is patient with most, but not with a connection that is reset, nor with a hub in trouble.
            except (httpx2.NetworkError, HfHubHTTPError) as error:
                is_refusal = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
                num_failures = 1 if part.stat().st_size > before_bytes else num_failures + 1
                if is_refusal or isinstance(error, httpx2.ConnectError) or num_failures >= _MAX_FAILURES:
                    raise
                time.sleep(_PAUSE_SECONDS * num_failures)
            else:
                return

    @contextmanager
    def _explained(self, repo: str, revision: str, path: str | None = None) -> Iterator[None]:
        """Turn what the hub's client raises into one line; without URLs, which may be signed."""
        what = f"{path} of {repo}" if path else repo
        try:
            yield
        except GatedRepoError as error:
            page = f"{self.endpoint}/{repo}"
            who = "the account of the token has not done so" if self._token else "give its token by --token-file FILE"
            raise WeightsError(
                f"{repo} is gated: its licence must be accepted on {page} by the account that fetches; {who}"
            ) from error
        except RevisionNotFoundError as error:
            raise WeightsError(f"{repo} has no revision {revision}; look on {self.endpoint}/{repo}") from error
        except RemoteEntryNotFoundError as error:
            raise WeightsError(f"{repo} has no file {path} at {revision}") from error
        except RepositoryNotFoundError as error:
            private = "or this token may not see it" if self._token else "or it is private and needs --token-file FILE"
            raise WeightsError(f"{self.endpoint} has no repository {repo}, {private}") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            advice = "; is the token still valid, and may it read this repository?" if status in {401, 403} else ""
            raise WeightsError(f"{self.endpoint} answers {status} for {what}{advice}") from error
        except OfflineModeIsEnabled as error:
            raise WeightsError("HF_HUB_OFFLINE forbids the network to this process") from error
        except httpx2.HTTPError as error:
            raise WeightsError(
                f"{self.endpoint} cannot be reached, or broke off ({type(error).__name__}); what arrived stays, "
                "and the same command goes on with it"
            ) from error
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise WeightsError(f"the disk is full; make room, and the same command goes on with {what}") from error
            reason = error.strerror or "another number of bytes arrived than was announced"
            raise WeightsError(f"{what} cannot be fetched: {reason}; the same command goes on with it") from error


def _read_sibling(sibling: RepoSibling) -> RemoteFile:
    lfs = sibling.lfs
    size_bytes, digest = (lfs.size, lfs.sha256) if lfs else (sibling.size, sibling.blob_id)
    expected = _SHA256 if lfs else _COMMIT
    if not isinstance(size_bytes, int) or size_bytes < 0 or not digest or not expected.fullmatch(digest):
        raise ValueError(sibling.rfilename)
    return RemoteFile(sibling.rfilename, size_bytes, digest)


class _Part(io.BufferedWriter):
    """A file that grows at its end, and tells how; refuses to grow beyond what was announced."""

    def __init__(self, path: Path, file: RemoteFile, on_bytes: OnBytes) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._file = file
        self._on_bytes = on_bytes

    def write(self, data: bytes) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]  # all that http_get gives
        if self.tell() + len(data) > self._file.size_bytes:
            raise WeightsError(f"more arrives of {self._file.path} than the {self._file.size_bytes} bytes announced")
        written = super().write(data)
        self._on_bytes(written)
        return written

    def truncate(self, pos: int | None = None) -> int:
        self.flush()
        before_bytes = os.fstat(self.fileno()).st_size
        size_bytes = super().truncate(pos)
        self._on_bytes(size_bytes - before_bytes)
        return size_bytes
