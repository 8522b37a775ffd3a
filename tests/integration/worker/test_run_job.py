"""The stage threads in this process, on a real ledger and store: files of results, and what is late or must wait."""

import hashlib
import io

import pytest
from PIL import ExifTags, Image

from server.embedded import EmbeddedStore, EmbeddedValkey
from server.jobs import JobStatus, OutputSpec
from server.store import Store
from tests.integration.worker.runner_kit import RunnerKit


@pytest.fixture
def open_runner(workers, decoders):
    """Give a function that makes a runner on a store."""
    opened = []

    def make(store):
        opened.append(RunnerKit(workers, store, decoders))
        return opened[-1]

    yield make
    for kit in opened:
        kit.pool.shutdown()
        assert kit.bugs == []


def test_result_of_a_lost_job_is_deleted(open_runner, workers):
    """A commit that comes too late changes nothing, and the object that it would have named is removed."""
    kit = open_runner(workers.store)
    in_hand = kit.claim()
    kit.stage(in_hand)
    kit.lose(in_hand)

    kit.finish(in_hand)

    job = workers.read(in_hand.job.id)
    assert (job.status, job.output) == (JobStatus.QUEUED, None)
    assert workers.outputs(job.id) == []


def test_result_of_a_cancelled_job_is_deleted(open_runner, workers):
    """A cancel that was acknowledged before the commit wins over it."""
    kit = open_runner(workers.store)
    in_hand = kit.claim()
    kit.stage(in_hand)
    workers.wait(workers.api.cancel("ana", [in_hand.job.id]))

    kit.finish(in_hand)

    job = workers.read(in_hand.job.id)
    assert (job.status, job.output) == (JobStatus.CANCELLED, None)
    assert workers.outputs(job.id) == []


def test_flag_ends_the_work_before_anything_is_stored(open_runner, workers):
    """A job known to be lost is left alone; one known to be cancelled is settled, and neither reaches the store."""
    kit = open_runner(workers.store)
    lost, cancelled = kit.claim(), kit.claim()
    workers.wait(workers.api.cancel("ana", [cancelled.job.id]))
    lost.lost, cancelled.cancelled = True, True
    for in_hand in (lost, cancelled):
        kit.runner.begin(in_hand, kit.staged.put)
    assert kit.hand.wait_empty(60)

    assert kit.staged.empty()
    assert workers.read(lost.job.id).status is JobStatus.RUNNING
    assert workers.read(cancelled.job.id).status is JobStatus.CANCELLED


def test_worker_waits_for_a_store_that_is_away(open_runner, workers, tmp_path):
    """Photo and result wait for the store to come back; the job's only attempt succeeds."""
    server = EmbeddedStore(tmp_path / "store")
    server.start()
    try:
        server.wait_ready()
        settings = workers.settings.store.model_copy(update={"endpoint": server.endpoint})
        keys = {"access_key": server.access_key, "secret_key": server.secret_key}
        store = Store(type(settings).model_validate(settings.model_dump() | keys | {"read_timeout_seconds": 2}))
        store.ensure_buckets()
        kit = open_runner(store)
        workers.store = store
        in_hand = kit.claim()
        kit.stage(in_hand)
        server.kill()
        kit.runner.finish(in_hand, Image.new("RGB", (in_hand.params["width"], in_hand.params["height"])))
        assert not kit.hand.wait_empty(1.5)

        server.start()
        server.wait_ready()
        assert kit.hand.wait_empty(60)

        job = workers.read(in_hand.job.id)
        assert (job.status, job.attempts) == (JobStatus.SUCCEEDED, 1)
        assert workers.outputs(job.id) == [job.output.key]
        store.close()
    finally:
        server.kill()


def test_job_that_met_a_store_away_for_good_costs_nothing(open_runner, workers):
    """When waiting has been long enough the job goes back to the queue without an error on its account."""
    dead = workers.settings.store.model_copy(update={"endpoint": "127.0.0.1:1"})
    kit = open_runner(Store(dead))
    kit.runner._settings = kit.runner._settings.model_copy(update={"job_timeout_seconds": 0.3})
    in_hand = kit.claim()
    kit.runner.begin(in_hand, kit.staged.put)
    assert kit.hand.wait_empty(60)

    job = workers.read(in_hand.job.id)
    assert (job.status, job.attempts, job.error) == (JobStatus.QUEUED, 1, None)
    assert workers.field(job.id, "errors") == "0"


def test_error_during_an_outage_of_redis_is_counted_once_and_tried_again(new_workers, decoders, tmp_path):
    """What went wrong while Redis was away is told when it is back, and a job's pause outlives a second outage."""
    server = EmbeddedValkey(tmp_path / "valkey")
    server.start()
    try:
        server.wait_ready()
        workers = new_workers(server.url, RESTAGE__WORKER__RETRY_BASE_SECONDS="1.5")
        kit = RunnerKit(workers, workers.store, decoders)
        in_hand = kit.claim()
        kit.stage(in_hand)
        server.kill()
        kit.runner.fail(in_hand, RuntimeError("nobody reckons with it"))
        assert not kit.hand.wait_empty(0.5)
        server.start()
        server.wait_ready()
        assert kit.hand.wait_empty(60)
        job = workers.until("the job", lambda: workers.read(in_hand.job.id))
        assert (job.status, job.attempts, job.error and job.error.code) == (JobStatus.QUEUED, 1, "internal_error")
        assert workers.field(job.id, "errors") == "1"

        server.kill()
        server.start()
        server.wait_ready()
        again = workers.until("the next try", lambda: kit.ledger.claim([job.model], num_held=0))
        assert (again.id, again.attempts, again.error) == (job.id, 2, None)
        assert workers.field(job.id, "errors") == "1"
        kit.pool.shutdown()
        assert kit.bugs == []
    finally:
        server.kill()


def sideways_photo(workers):
    """A photo stored lying, 96 x 192, that its EXIF turns to 192 x 96; it also says where it was taken."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    place = exif.get_ifd(ExifTags.IFD.GPSInfo)
    place[ExifTags.GPS.GPSLatitude] = (48.0, 8.0, 13.5)
    place[ExifTags.GPS.GPSDateStamp] = "2024:05:17"
    return workers.picture(96, 192, file_format="JPEG", exif=exif)


def stored(workers, job_id):
    """Return a job, its result's bytes, and the content type that the store has for it."""
    job = workers.read(job_id)
    assert job.output is not None, job
    with workers.store._client.get_object("restage-outputs", job.output.key) as response:
        return job, response.read(), response.headers["Content-Type"]


@pytest.mark.parametrize(
    ("image_format", "content_type", "suffix"),
    [("webp", "image/webp", "webp"), ("png", "image/png", "png"), ("jpeg", "image/jpeg", "jpg")],
)
def test_result_is_written_as_asked(open_runner, workers, image_format, content_type, suffix):
    """Each format has its type, its suffix and both sizes; the sides are those of the upright photo."""
    kit = open_runner(workers.store)
    for size, expected in (("model", (96, 176)), ("input", (96, 192))):
        in_hand = kit.claim(data=sideways_photo(workers), output=OutputSpec(format=image_format, size=size))
        kit.stage(in_hand)
        kit.finish(in_hand)

        job, data, stored_type = stored(workers, in_hand.job.id)
        assert job.output.key == f"{job.id}/1/output.{suffix}"
        assert (job.output.content_type, stored_type) == (content_type, content_type)
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size) == (image_format.upper(), expected)
        assert (job.output.width, job.output.height) == expected
        assert b"2024:05:17" not in data


def test_result_says_how_it_was_made(open_runner, workers):
    """The file holds the job's record as it was run: with the photo's true sides and its true sha256."""
    from pipelines.provenance import read_record

    kit = open_runner(workers.store)
    record = {
        "prompt": 'a "bright" & <calm> 居間',
        "negative_prompt": "clutter",
        "loras": ({"id": "oak", "scale": 1.0},),
    }
    photo = sideways_photo(workers)
    in_hand = kit.claim(data=photo, output=OutputSpec(format="jpeg"), **record)
    kit.stage(in_hand)
    in_hand.weights_sha256 = "a" * 64
    in_hand.optimizations = {"quantization": "int8"}
    kit.finish(in_hand)

    job, data, _ = stored(workers, in_hand.job.id)
    assert job.weights_sha256 == "a" * 64
    assert job.optimizations == {"quantization": "int8"}
    assert (job.params["height"], job.params["width"]) == (176, 96)
    assert read_record(data) == {
        "job_id": job.id,
        "model": workers.FLUX,
        "model_version": workers.registry.get(workers.FLUX).version,
        "weights_sha256": "a" * 64,
        "optimizations": {"quantization": "int8"},
        "prompt": record["prompt"],
        "negative_prompt": "clutter",
        "params": job.params,
        "loras": [{"id": "oak", "scale": 1.0}],
        "input_sha256": [hashlib.sha256(photo).hexdigest()],
    }


@pytest.mark.parametrize("image_format", ["webp", "png", "jpeg"])
def test_result_without_metadata_holds_pixels_alone(open_runner, workers, image_format):
    """With `metadata` false nothing in the file says who made it or from what."""
    from pipelines.photos import encode_photo

    kit = open_runner(workers.store)
    in_hand = kit.claim(data=sideways_photo(workers), output=OutputSpec(format=image_format, metadata=False))
    kit.stage(in_hand)
    kit.finish(in_hand)

    _, data, _ = stored(workers, in_hand.job.id)
    with Image.open(io.BytesIO(data)) as image:
        assert {"xmp", "exif", "XML:com.adobe.xmp"}.isdisjoint(image.info)
    assert data == encode_photo(Image.new("RGB", (96, 176)), image_format)


def test_prompts_too_long_for_a_jpeg_cost_the_job_nothing(open_runner, workers):
    """A record that a JPEG cannot hold loses its longest part, and the job succeeds."""
    from pipelines.provenance import read_record

    kit = open_runner(workers.store)
    in_hand = kit.claim(output=OutputSpec(format="jpeg"), prompt="&" * 100_000)
    kit.stage(in_hand)
    kit.finish(in_hand)

    job, data, _ = stored(workers, in_hand.job.id)
    assert job.status is JobStatus.SUCCEEDED
    found = read_record(data) or {}
    assert (found["left_out"], found["params"]["seed"]) == (["prompt"], 7)


def test_result_with_a_side_too_long_for_its_format_fails_by_name(open_runner, workers):
    """A WEBP ends at 16383 pixels a side: the job fails at once with a way out, and leaves no object."""
    kit = open_runner(workers.store)
    longest, too_long = (
        kit.claim(data=workers.picture(400, width), output=OutputSpec(format="webp", size="input"))
        for width in (16383, 16384)
    )
    for in_hand in (longest, too_long):
        kit.stage(in_hand)
        kit.runner.finish(in_hand, Image.new("RGB", (in_hand.params["width"], in_hand.params["height"])))
    assert kit.hand.wait_empty(60)

    fits = workers.read(longest.job.id)
    assert (fits.output.width, fits.output.height) == (16383, 400)
    failed = workers.read(too_long.job.id)
    assert (failed.status, failed.error.code, failed.attempts) == (JobStatus.FAILED, "invalid_input", 1)
    assert "at most 16383 pixels a side" in failed.error.detail
    assert "png" in failed.error.detail
    assert workers.outputs(failed.id) == []
