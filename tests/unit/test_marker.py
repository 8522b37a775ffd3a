"""A marker says what the ledger recorded, and nothing else passes for one."""

import json
from dataclasses import replace

import pytest

from server.jobs import Job, JobInput, JobOutput, JobStatus
from server.ledger.scripts import script_text
from server.marker import MAX_MARKER_BYTES, BadMarker, Marker, decode_marker, marked_job, marker_key

ENDED_MS = 1_700_000_001_000
PHOTO = JobInput("u1", "u1", "e1", "a" * 64, "image/png", 1000, 768, 1024)
OUTPUT = JobOutput("j1/2/output.webp", "b" * 64, "image/webp", 768, 1024, 500)
JOB = Job(
    id="j1",
    batch_id="b1",
    index=3,
    owner="ana müller",
    model="qwen",
    model_version="1",
    prompt="a secret wish",
    inputs=(PHOTO,),
    status=JobStatus.RUNNING,
    attempts=3,
    fence=2,
    worker="gpu-7",
    started_at_ms=ENDED_MS - 1000,
)


def make(job=JOB, **changes):
    said = {
        "finished_at_ms": ENDED_MS,
        "output": OUTPUT,
        "inputs": (PHOTO,),
        "params": {"seed": 7, "guidance_scale": 2.5, "aspect_ratio": None},
        "timings": {"fetch": 0.2, "run": 3},
        "weights_sha256": None,
        "optimizations": {},
    }
    return Marker.of(job, **(said | changes))


def forged(**changes):
    """Write a marker in which something is not as a worker would write it."""
    return json.dumps(json.loads(make().encode()) | changes).encode()


def test_a_marker_comes_back_as_it_was_written():
    """All that the ledger recorded of the job's end is in it; what was wished for is not."""
    data = make().encode()
    assert decode_marker("j1", data) == make()
    assert make().params["guidance_scale"] == 2.5
    assert b"secret" not in data


def test_a_marker_has_one_place():
    """Its key leads to its job and back, no result has such a key, and the scripts know it."""
    assert marked_job(marker_key("j1")) == "j1"
    for key in ("j1/2/output.webp", "j1/done.json/x", "x/j1/done.json", "/done.json", "j1/2/done.json", "done.json"):
        assert marked_job(key) is None
    assert '"outputs/" .. job_id .. "/done.json"' in script_text("finish_marked")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "JSON"),
        (make().encode()[:-1], "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b"[" * 60_000, "JSON"),
        (forged(padding="x" * MAX_MARKER_BYTES), "bytes"),
        (forged(more=1), "more"),
        (forged(version=2), "version"),
        (forged(fence="2"), "fence"),
        (forged(fence=True), "fence"),
        (forged(fence=0), "fence"),
        (forged(fence=3), "key"),
        (forged(fence=2**60), "fence"),
        (forged(finished_at_ms=-1), "finished_at_ms"),
        (forged(owner=""), "owner"),
        (forged(job_id="../j1"), "job_id"),
        (forged(inputs=[]), "inputs"),
        (forged(timings={"run": "NaN"}), "timings"),
        (forged(output=vars(replace(OUTPUT, key="j2/2/output.webp"))), "key"),
        (forged(output=vars(replace(OUTPUT, key="j1/2/output.html"))), "key"),
        (forged(output=vars(replace(OUTPUT, content_type="text/html"))), "content_type"),
        (forged(output=vars(replace(OUTPUT, sha256="B" * 64))), "sha256"),
        (forged(output=None), "output"),
    ],
    ids=range(24),
)
def test_anything_else_is_refused(data, words):
    """What is half-written, forged, too large or of another kind is told, and never used."""
    with pytest.raises(BadMarker, match=words):
        decode_marker("j1", data)


def test_a_marker_of_another_job_is_refused():
    """A copy under another job's key finishes nothing."""
    with pytest.raises(BadMarker, match="another job"):
        decode_marker("j2", make().encode())


def test_what_a_marker_cannot_say_is_not_written():
    """A worker that would write what nobody reads is told so."""
    with pytest.raises(BadMarker, match="at most"):
        make(params={"note": "x" * MAX_MARKER_BYTES}).encode()
    with pytest.raises(BadMarker, match="key"):
        make(replace(JOB, fence=9))
