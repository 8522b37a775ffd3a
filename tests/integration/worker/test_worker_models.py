"""Which models a worker serves: those it can load, one after the other where memory holds one."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

from server.jobs import JobStatus
from server.worker.placement import Swap
from tests.integration.worker.lane_kit import LaneKit

QWEN = "tiny-qwen-image-edit-2511"
FLUX = "tiny-flux-kontext"
KLEIN = "tiny-flux2-klein"


def ask_for_more_layers(folder):
    """Make a model's configuration and weights contradict each other; each of its files by itself is whole."""
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 3}))
    (folder / "restage-manifest.json").unlink()


def cut_weights(folder):
    """Take the last byte away from a model's weights."""
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def test_models_that_cannot_be_loaded_are_told_before_any_job_of_theirs_is_taken(
    new_workers, valkey, weights_dir, tmp_path
):
    """With room for one model and weights for one of many: it is served, and of each other is said why it is not.

    A job of a damaged model that waits from before the start stays as it is, and the good model stays in memory. Once
    the folder is repaired, the same process runs the job.
    """
    folder = tmp_path / "weights"
    shutil.copytree(weights_dir, folder)
    shutil.rmtree(folder / KLEIN)
    ask_for_more_layers(folder / QWEN)
    workers = new_workers(
        valkey.url,
        RESTAGE__MODELS__WEIGHTS_DIR=str(folder),
        RESTAGE__MODELS__ENABLED=json.dumps([QWEN, FLUX, KLEIN, "flux-kontext-dev"]),
        RESTAGE__WORKER__MAX_RESIDENT_MODELS="1",
        RESTAGE__WORKER__MAX_WAIT_SECONDS="1",
        RESTAGE__WORKER__MODEL_RETRY_SECONDS="2",
    )
    photo = workers.upload(workers.picture())
    repaired_batch, waiting = workers.submit(workers.job(photo, QWEN))
    workers.start()
    workers.wait_ready()

    statuses = workers.wait(workers.api.model_statuses(workers.registry.ids))
    assert [model for model, status in statuses.items() if status.ready] == [FLUX]
    announced = workers.statuses()[0].models
    assert all((statuses[model].reason or "").endswith(one.reason or "") for model, one in announced.items())
    for model in (KLEIN, "flux-kontext-dev"):
        assert announced[model].reason == f"{model}: there is no folder {folder / model}"
    assert announced[QWEN].reason == (
        f"{QWEN}: config.json and weights of {folder / QWEN / 'transformer'} do not belong together: "
        "missing tensors: 32, such as transformer_blocks.2.attn.add_k_proj.bias"
    )
    refusals = [line for line in workers.logs().splitlines() if "model.refused" in line]
    levels = {
        model: "error" in line.split("model.refused")[0] for model in statuses for line in refusals if model in line
    }
    assert levels == {QWEN: True, KLEIN: False, "flux-kontext-dev": False}

    batch_id, _ = workers.submit(workers.job(photo, FLUX))
    assert workers.finished(batch_id).counts["succeeded"] == 1
    job = workers.read(waiting)
    assert (job.status, job.attempts, job.worker) == (JobStatus.QUEUED, 0, None)
    assert "model.evicted" not in workers.logs()

    shutil.copytree(weights_dir / QWEN, folder / QWEN, dirs_exist_ok=True)
    assert workers.finished(repaired_batch).counts["succeeded"] == 1
    assert workers.wait(workers.api.model_statuses([QWEN]))[QWEN].ready
    assert len(workers.alive()) == 1


def test_model_that_fails_its_load_later_is_refused_and_its_job_costs_nothing(
    new_workers, valkey, weights_dir, tmp_path, decoders
):
    """Weights that are damaged after the start: the job in hand goes back unharmed, no other is taken, others go on."""
    from server.worker.errors import ModelUnavailable

    folder = tmp_path / "weights"
    shutil.copytree(weights_dir, folder)
    workers = new_workers(valkey.url, RESTAGE__MODELS__WEIGHTS_DIR=str(folder))
    kit = LaneKit(workers, max_resident_models=1)
    photo = workers.upload(workers.picture())
    kit.thread.start()
    try:
        workers.until("the default model", lambda: list(kit.residency.resident) == [QWEN])
        assert FLUX in kit.residency.usable
        in_hand, other = kit.claim(workers.job(photo, FLUX), workers.job(photo, QWEN))
        cut_weights(folder / FLUX)
        kit.lane.submit(in_hand)
        ended, error = kit.next_end()
        assert ended is in_hand
        assert isinstance(error, ModelUnavailable)
        assert "bytes, not " in str(error)
        assert kit.residency.usable == [QWEN]
        assert kit.residency.statuses()[FLUX].reason == str(error)
        # What placement decided before it knew puts nothing out of memory.
        kit.lane.submit(other)
        assert kit.next_end()[0] is other
        kit.residency.swap(Swap(load=FLUX, evict=(QWEN,)))
        assert list(kit.residency.resident) == [QWEN]
    finally:
        kit.lane.stop()
        kit.thread.join(60)

    bugs = []
    with ThreadPoolExecutor(1) as pool:
        kit.runner(decoders, pool, bugs.append).fail(in_hand, error)
    assert bugs == []
    job = workers.read(in_hand.job.id)
    assert (job.status, job.error) == (JobStatus.QUEUED, None)
    assert workers.field(job.id, "errors") == "0"


def test_worker_without_any_model_ends_with_status_3(new_workers, valkey, weights_dir, tmp_path):
    """When nothing can be served the process says why, leaves the reason where the API finds it, and ends.

    One model's weights are damaged, the others' missing; jobs that wait are not touched.
    """
    workers = new_workers(valkey.url, RESTAGE__MODELS__WEIGHTS_DIR=str(tmp_path))
    shutil.copytree(weights_dir / FLUX, tmp_path / FLUX)
    cut_weights(tmp_path / FLUX)
    photo = workers.upload(workers.picture())
    _, *waiting = workers.submit(workers.job(photo, FLUX), workers.job(photo, QWEN))
    child = workers.start()

    workers.until("the end", lambda: not child.is_running)

    assert child.poll() == 3
    assert "worker.useless" in child.tail()
    statuses = workers.wait(workers.api.model_statuses(workers.registry.ids))
    assert not any(status.ready for status in statuses.values())
    assert "bytes, not " in statuses.pop(FLUX).reason
    for model_id, status in statuses.items():
        assert f"there is no folder {tmp_path / model_id}" in status.reason
    assert {(job.status, job.attempts) for job in map(workers.read, waiting)} == {(JobStatus.QUEUED, 0)}


def test_two_workers_serve_three_models_as_the_load_shifts(new_workers, valkey):
    """With room for one model each, no model waits for the end of another's queue, whichever is asked for most.

    Each model begins within ten times the bound of placement: `max_wait_seconds`, and for each of the two others a turn
    and a load.
    """
    max_wait_seconds, load_seconds = 1.0, 2.0
    workers = new_workers(
        valkey.url,
        RESTAGE__MODELS__ENABLED=json.dumps([QWEN, FLUX, KLEIN]),
        RESTAGE__WORKER__MAX_RESIDENT_MODELS="1",
        RESTAGE__WORKER__MAX_WAIT_SECONDS=f"{max_wait_seconds}",
    )
    workers.start()
    workers.start()
    workers.wait_ready(2)
    photo = workers.upload(workers.picture())
    batches = {}
    for busy, *others in ((QWEN, FLUX, KLEIN), (KLEIN, QWEN, FLUX)):
        slow = [workers.job(photo, busy, params={"num_inference_steps": 40}) for _ in range(8)]
        batches[busy, "busy"], *_ = workers.submit(*slow)
        for model in others:
            batches[model, busy], *_ = workers.submit(*(workers.job(photo, model) for _ in range(2)))
    ended = {key: workers.finished(batch_id) for key, batch_id in batches.items()}

    assert all(batch.counts["succeeded"] == batch.counts["total"] for batch in ended.values())
    bound_seconds = max_wait_seconds + 2 * (max_wait_seconds + load_seconds)
    for model in (QWEN, FLUX, KLEIN):
        first = min((batch for (one, _), batch in ended.items() if one == model), key=lambda batch: batch.created_at_ms)
        assert (first.started_at_ms or 0) - first.created_at_ms < 10 * bound_seconds * 1000
    flux_done = ended[FLUX, QWEN].finished_at_ms or 0
    assert flux_done < (ended[KLEIN, "busy"].finished_at_ms or 0), "the last and longest queue was done first"
    assert len({job.worker for batch in ended.values() for job in batch.jobs}) == 2
