"""What the store itself knows of a finished job: a small object beside its result, for a ledger that was set back."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from server.jobs import Job, JobInput, JobOutput

# A few kilobytes by nature: the sizes, the seed and at most a handful of photos.
MAX_MARKER_BYTES = 65_536
_NAME = "done.json"
_KEY = re.compile(rf"([\w-]{{1,64}})/{re.escape(_NAME)}", re.ASCII)

_Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Milliseconds = Annotated[int, Field(ge=0, lt=2**53)]


class BadMarker(Exception):
    """Raised when an object is not a marker that a worker of ours could have written for its job."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class MarkedOutput(_Part):
    """The stored result, as `JobOutput`."""

    key: str = Field(max_length=200)
    sha256: _Sha256
    content_type: Literal["image/webp", "image/png", "image/jpeg"]
    height: int = Field(ge=1, le=1_000_000)
    width: int = Field(ge=1, le=1_000_000)
    size_bytes: int = Field(ge=1, lt=2**53)


class MarkedInput(_Part):
    """One photo, as `JobInput`."""

    upload_id: _Id
    key: str = Field(min_length=1, max_length=200)
    etag: str = Field(max_length=200)
    sha256: _Sha256 | None
    content_type: str = Field(max_length=100)
    size_bytes: int = Field(ge=0, lt=2**53)
    height: int = Field(ge=1, le=1_000_000)
    width: int = Field(ge=1, le=1_000_000)


class Marker(_Part):
    """A job's end as the ledger recorded it. Prompts, names and labels are not in it."""

    version: Literal[1] = 1
    job_id: _Id
    batch_id: _Id
    index: int = Field(ge=0, le=100_000)
    owner: str = Field(min_length=1, max_length=500)
    fence: int = Field(ge=1, lt=2**53)
    attempts: int = Field(ge=1, lt=2**53)
    worker: str | None = Field(max_length=500)
    started_at_ms: _Milliseconds
    finished_at_ms: _Milliseconds
    output: MarkedOutput
    inputs: list[MarkedInput] = Field(min_length=1, max_length=100)
    params: dict[str, JsonValue]
    timings: dict[str, float]
    weights_sha256: str | None = Field(max_length=200)
    optimizations: dict[str, JsonValue]

    @model_validator(mode="after")
    def _check_output(self) -> Self:
        if not re.fullmatch(rf"{re.escape(self.job_id)}/{self.fence}/output\.(webp|png|jpg)", self.output.key):
            raise ValueError("the result's key is not that of the job and its fence")
        return self

    @classmethod
    def of(
        cls,
        job: Job,
        *,
        finished_at_ms: int,
        output: JobOutput,
        inputs: tuple[JobInput, ...],
        params: dict[str, Any],
        timings: dict[str, float],
        weights_sha256: str | None,
        optimizations: dict[str, Any],
    ) -> "Marker":
        """Describe the end of a job that was committed so.

        Raises:
            BadMarker: a marker cannot say that.
        """
        try:
            return cls.model_validate(
                {
                    "job_id": job.id,
                    "batch_id": job.batch_id,
                    "index": job.index,
                    "owner": job.owner,
                    "fence": job.fence,
                    "attempts": job.attempts,
                    "worker": job.worker,
                    "started_at_ms": job.started_at_ms or finished_at_ms,
                    "finished_at_ms": finished_at_ms,
                    "output": vars(output),
                    "inputs": [vars(one) for one in inputs],
                    "params": params,
                    "timings": {phase: float(seconds) for phase, seconds in timings.items()},
                    "weights_sha256": weights_sha256,
                    "optimizations": optimizations,
                }
            )
        except ValidationError as error:
            raise BadMarker(_explain(error)) from error

    def encode(self) -> bytes:
        """Write it as it is stored.

        Raises:
            BadMarker: it would be larger than a marker may be.
        """
        data = self.model_dump_json().encode()
        if len(data) > MAX_MARKER_BYTES:
            raise BadMarker(f"it would have {len(data)} bytes; at most {MAX_MARKER_BYTES} are read")
        return data


def marker_key(job_id: str) -> str:
    """Return the key of a job's marker in the outputs bucket; `lua/expiry.lua` knows it too."""
    return f"{job_id}/{_NAME}"


def marked_job(key: str) -> str | None:
    """Return the id of the job whose marker would stand under `key`, or None."""
    match = _KEY.fullmatch(key)
    return match and match[1]


def decode_marker(job_id: str, data: bytes) -> Marker:
    """Read a marker that was found under a job's key; whoever may write into the store may have written it.

    Raises:
        BadMarker: it is half-written, forged in its form, or another job's.
    """
    if len(data) > MAX_MARKER_BYTES:
        raise BadMarker(f"it has more than {MAX_MARKER_BYTES} bytes")
    try:
        marker = Marker.model_validate_json(data)
    except ValidationError as error:
        raise BadMarker(_explain(error)) from error
    if marker.job_id != job_id:
        raise BadMarker("it is another job's")
    return marker


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]
