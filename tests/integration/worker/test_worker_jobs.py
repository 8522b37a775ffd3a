"""What one healthy worker makes of jobs: pictures, records, refusals, cancels."""

import io
import itertools
import random
import time
from dataclasses import replace

import pytest
from PIL import Image

from server.errors import LedgerUnavailable
from server.jobs import JobStatus, OutputSpec, Priority
from tests.integration.worker.owners_kit import claims, client_of, flood, submit_photos

LONG = {"num_inference_steps": 100, "height": 384, "width": 384}


def run_here(workers, job, data):
    """Run a job's record in this process."""
    import torch

    from pipelines.loading import ModelSpec, load_model
    from pipelines.photos import decode_photo
    from pipelines.running import RunRequest

    entry = workers.registry.get(job.model)
    folder = workers.settings.models.weights_dir / entry.weights
    spec = ModelSpec(entry.id, entry.family, entry.pipeline, folder, entry.dtype, entry.area)
    model = load_model(spec, "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        photo = decode_photo(data, max_pixels=10**8)
        request = RunRequest(job.prompt, job.negative_prompt, job.params, entry.area)
        run = model.start([photo], request, num_threads=1)
        while run.advance():
            pass
        assert run.image is not None
        return run.image
    finally:
        torch.set_num_threads(before)


def test_batch_is_committed_with_its_pixels_and_record(steady):
    """Both models' pictures are those of the recorded parameters, and the record says how they were made."""
    photos = [steady.picture(seed=seed) for seed in range(4)]
    jobs = [
        replace(steady.job(steady.upload(data), (steady.QWEN, steady.FLUX)[index % 2]), index=index)
        for index, data in enumerate(photos)
    ]
    batch_id, *_ = steady.submit(*jobs)

    batch = steady.finished(batch_id)

    assert batch.counts["succeeded"] == 4
    for job, data in zip(batch.jobs, photos, strict=True):
        assert (job.status, job.attempts, job.error) == (JobStatus.SUCCEEDED, 1, None)
        assert job.output is not None
        assert job.output.key == f"{job.id}/1/output.png"
        assert set(job.timings) == {"fetch", "run", "store"}
        assert job.worker == steady.statuses()[0].id
        assert steady.image(job).tobytes() == run_here(steady, job, data).tobytes()
    assert steady.events(batch_id).count("job.succeeded") == 4


def test_orientation_that_the_api_did_not_see_turns_the_picture(steady):
    """A size that followed the photo's sides follows the upright photo, and so does the record."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = steady.picture(96, 192, file_format="JPEG", exif=exif.tobytes())
    photo = steady.upload(data)
    assert (photo.height, photo.width) == (96, 192)
    follows, fixed = steady.job(photo), steady.job(photo, params={"height": 64, "width": 256})
    batch_id, *_ = steady.submit(follows, fixed)

    followed, kept = steady.finished(batch_id).jobs

    assert (followed.inputs[0].height, followed.inputs[0].width) == (192, 96)
    assert (follows.params["height"], follows.params["width"]) == (96, 176)
    assert (followed.params["height"], followed.params["width"]) == (176, 96)
    assert followed.params["seed"] == follows.params["seed"]
    assert steady.image(followed).size == (96, 176)
    assert (kept.params, steady.image(kept).size) == (fixed.params, (256, 64))


def test_output_is_written_as_asked(steady):
    """Format and size of the file are the job's, and an unknown sha256 of the photo is found out."""
    photo = steady.upload(steady.picture(100, 150), sha256=None)
    webp = steady.job(photo, output=OutputSpec(format="webp", quality=50))
    jpeg = steady.job(photo, output=OutputSpec(format="jpeg", size="input"))
    batch_id, *_ = steady.submit(webp, jpeg)

    first, second = steady.finished(batch_id).jobs

    assert first.output.key.endswith("/output.webp")
    assert (first.output.content_type, steady.image(first).format) == ("image/webp", "WEBP")
    assert second.output.key.endswith("/output.jpg")
    assert (second.output.content_type, steady.image(second).format) == ("image/jpeg", "JPEG")
    assert steady.image(second).size == (150, 100)
    assert len(first.inputs[0].sha256) == 64


def test_bad_inputs_fail_at_once_and_by_name(steady):
    """A truncated photo, a missing one, one stored again and one of other bytes each fail with their own code."""
    whole = steady.picture(300, 300, file_format="JPEG")
    truncated = steady.upload(whole[: len(whole) // 2])
    missing = replace(steady.upload(whole), key="never-stored")
    changed = replace(steady.upload(whole), etag="0" * 32)
    other_bytes = steady.upload(whole, sha256="0" * 64)
    good = steady.upload(whole)
    jobs = [steady.job(photo) for photo in (truncated, missing, changed, other_bytes, good)]
    batch_id, *_ = steady.submit(*jobs)

    batch = steady.finished(batch_id)

    codes = [job.error.code if job.error else None for job in batch.jobs]
    assert codes == ["invalid_input", "input_missing", "input_changed", "input_changed", None]
    assert [job.attempts for job in batch.jobs] == [1] * 5
    assert "cut off" in batch.jobs[0].error.detail
    assert batch.counts["failed"] == 4
    assert steady.children[0].is_running


def test_error_of_the_worker_itself_is_tried_again_and_then_fails(steady):
    """A job whose record no code can run is tried `max_errors` times, and the worker goes on."""
    photo = steady.upload(steady.picture())
    broken = steady.job(photo)
    broken = replace(broken, params=broken.params | {"num_inference_steps": 0})
    batch_id, *_ = steady.submit(broken, steady.job(photo))

    first, second = steady.finished(batch_id).jobs

    assert (first.status, first.error.code) == (JobStatus.FAILED, "internal_error")
    assert first.attempts == steady.settings.worker.max_errors
    assert "ZeroDivisionError" in first.error.detail
    assert second.status is JobStatus.SUCCEEDED
    assert "job.crashed" in steady.logs()


def test_cancelled_job_stops_before_its_next_steps(steady):
    """A cancel ends a running job within a step or two, long before the end of its run, and leaves no object."""
    photo = steady.upload(steady.picture())
    batch_id, job_id = steady.submit(steady.job(photo, params=LONG))
    seen = steady.step(job_id, 2)

    assert steady.wait(steady.api.cancel("ana", [job_id])) == ["requested"]
    (job,) = steady.finished(batch_id).jobs

    assert (job.status, job.error, job.output) == (JobStatus.CANCELLED, None, None)
    # Here only that it came soon: test_lane.py looks at every step.
    assert seen.step <= job.step < seen.step + 40 < job.total_steps
    assert steady.outputs(job_id) == []
    assert steady.events(batch_id)[-2:] == ["job.cancelled", "batch.finished"]


def test_job_that_waits_for_the_lane_is_cancelled_at_once(steady):
    """A claimed job that has not begun does not wait for the one before it to be told of its cancel."""
    photo = steady.upload(steady.picture())
    # One after the other: of two that are claimed together, the one whose photo is decoded first goes first.
    first_batch, running = steady.submit(steady.job(photo, params=LONG))
    steady.step(running)
    second_batch, waiting = steady.submit(steady.job(photo, params=LONG))
    steady.until("both claimed", lambda: steady.read(waiting).status is JobStatus.RUNNING)

    steady.wait(steady.api.cancel("ana", [waiting]))
    steady.until("the cancel", lambda: steady.read(waiting).status is JobStatus.CANCELLED)

    assert steady.read(running).status is JobStatus.RUNNING
    steady.wait(steady.api.cancel("ana", [running]))
    assert [steady.finished(one).counts["cancelled"] for one in (first_batch, second_batch)] == [1, 1]


def test_high_priority_overtakes_runs_and_leaves_their_pixels_alone(steady):
    """`high` jobs that come at any step are claimed by a full hand and done first; all pixels are undisturbed runs'."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # noqa: T201
    chance = random.Random(seed)
    data = steady.picture(seed=3)
    photo = steady.upload(data)
    slow_batch, *slow_ids = steady.submit(steady.job(photo, params=LONG))
    steady.step(slow_ids[0])
    next_batch, *next_ids = steady.submit(*(replace(steady.job(photo), index=index) for index in range(2)))
    slow_ids += next_ids
    steady.until("a full hand", lambda: any(steady.read(job_id).status is JobStatus.RUNNING for job_id in next_ids))

    urgent = []
    for model in (steady.QWEN, steady.FLUX, steady.FLUX):
        time.sleep(chance.uniform(0, 0.3))
        quick_batch, _ = steady.submit(steady.job(photo, model, priority=Priority.HIGH))
        urgent += steady.finished(quick_batch).jobs
        states = sorted(steady.read(job_id).status.value for job_id in slow_ids)
        assert states == ["queued", "running", "running"]
    assert steady.finished(next_batch).counts["succeeded"] == 2
    for job in [*urgent, steady.finished(slow_batch).jobs[0]]:
        assert job.status is JobStatus.SUCCEEDED
        assert steady.image(job).tobytes() == run_here(steady, job, data).tobytes()


def test_full_redis_lets_accepted_jobs_end_and_takes_new_ones_later(steady):
    """With no memory left for new work, what runs and what waits is done all the same."""
    photo = steady.upload(steady.picture())
    some_time = LONG | {"num_inference_steps": 30}
    batch_id, running, *_ = steady.submit(steady.job(photo, params=some_time), *(steady.job(photo) for _ in range(3)))
    steady.step(running)
    before = steady._client.config_get("maxmemory")["maxmemory"]
    steady._client.config_set("maxmemory", 1)
    try:
        with pytest.raises(LedgerUnavailable, match="maxmemory"):
            steady.submit(steady.job(photo))
        assert steady.finished(batch_id).counts["succeeded"] == 4
    finally:
        steady._client.config_set("maxmemory", before)
    next_batch, _ = steady.submit(steady.job(photo))
    assert steady.finished(next_batch).counts["succeeded"] == 1
    assert [child.is_running for child in steady.children] == [True]


@pytest.mark.parametrize("file_format", ["GIF", "TIFF"])
def test_other_formats_fail_as_invalid_input(steady, file_format):
    """What is no JPEG, PNG or WEBP is refused by content, whatever the record says."""
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80)).save(buffer, file_format)
    batch_id, _ = steady.submit(steady.job(steady.upload(buffer.getvalue())))

    (job,) = steady.finished(batch_id).jobs

    assert (job.error.code, job.attempts) == ("invalid_input", 1)


def test_prompt_with_too_many_tokens_fails_by_name(steady):
    """A prompt that the model would cut off fails its job at once, with both numbers; the next job is done."""
    photo = steady.upload(steady.picture())
    too_long = replace(steady.job(photo), prompt="1" * 4000)
    batch_id, *_ = steady.submit(too_long, steady.job(photo))

    failed, done = steady.finished(batch_id).jobs

    assert (failed.error.code, failed.attempts) == ("invalid_input", 1)
    assert failed.error.detail == "the prompt has 4002 tokens; this model reads at most 512: shorten it"
    assert done.error is None


@pytest.mark.timeout(180)
def test_ten_thousand_photos_of_one_owner_do_not_make_five_of_another_wait(steady, tmp_path):
    """Whoever comes beside ten thousand jobs is served in every second claim, through the API and by a real worker."""
    many = flood(steady, "many", 200)
    with client_of(steady, "few", tmp_path) as client:
        batch = submit_photos(client, steady.picture(seed=5), 5, steady.FLUX)
        steady.until(
            "the end of the five", lambda: client.get(f"/v1/batches/{batch['id']}").json()["status"] == "finished"
        )
    few = steady.wait(steady.api.read_batch(batch["id"]))
    assert few.counts["succeeded"] == 5
    claimed = claims(steady.alive()[0].log_file)
    places = [place for place, job_id in enumerate(claimed) if job_id in {job.id for job in few.jobs}]
    # Who claimed just before the first of the five may have done so before they came.
    before = [steady.read(job_id) for job_id in claimed[places[0] - 3 : places[0]]]
    since = [job for job in before if job.started_at_ms > few.created_at_ms]
    assert len(since) <= 1
    assert all(later - earlier <= 2 for earlier, later in itertools.pairwise(places)), places
    assert places[-1] - places[0] + len(since) < 10

    # Nearly all of the ten thousand still wait; none of them is lost, and none has to be done.
    for first in range(0, len(many), 500):
        steady.wait(steady.api.cancel("many", many[first : first + 500]))
    open_jobs = f"{steady.prefix}:open"
    steady.until("the end of all", lambda: not steady._client.scard(open_jobs))
    waits = [steady.read(job_id).status for job_id in (many[0], many[-1])]
    assert waits == [JobStatus.SUCCEEDED, JobStatus.CANCELLED]
