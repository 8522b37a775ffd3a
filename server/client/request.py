"""What one run of `restage submit` is asked for, and what became of each photo."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.client.photos import size_of


@dataclass
class PhotoResult:
    """What became of one photo. `status` is that of its job, or `refused`; `index` is its place among those given."""

    index: int
    photo: Path
    status: str = "queued"
    model: str | None = None
    seconds: float | None = None
    file: Path | None = None
    error: str | None = None

    @property
    def is_done(self) -> bool:
        """Whether the result lies on this machine: in `file`, which may be an archive."""
        return self.status == "succeeded" and self.file is not None

    def refuse(self, reason: str) -> None:
        """Note that no job will be made of it."""
        self.status, self.error = "refused", reason


@dataclass(frozen=True)
class BatchRequest:
    """What to do with the photos. `overrides` holds settings of single photos by their index, over `defaults`."""

    photos: Sequence[Path]
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    overrides: Mapping[int, Mapping[str, Any]] = field(default_factory=dict[int, Mapping[str, Any]])
    label: str | None = None

    def body(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Write the body of a submission."""
        body: dict[str, Any] = {"defaults": dict(self.defaults), "items": list(items)}
        if self.label is not None:
            body["label"] = self.label
        return body

    def fingerprint(self, url: str) -> str:
        """Return a digest that is the same for the same request to the same server, from whatever folder it is made.

        Of the photos it knows path and size, so that none has to be read for it. Where the results go is no part of it.

        Raises:
            BadPhotos: a photo has gone.
        """
        photos = [[str(path.absolute()), size_of(path)] for path in self.photos]
        known = [url.rstrip("/"), photos, self.defaults, sorted(self.overrides.items()), self.label]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
