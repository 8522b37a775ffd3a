"""Which models a worker serves: those it can load, one after the other where memory holds one."""

import shutil

from server.jobs import JobStatus

QWEN = "tiny-qwen-image-edit-2511"
FLUX = "tiny-flux-kontext"


def test_model_without_weights_is_reported_and_the_other_served(new_workers, valkey, weights_dir, tmp_path):
    """A folder that is missing and one that is damaged have their reason announced; the third model does its jobs."""
    folder = tmp_path / "weights"
    for name in (QWEN, FLUX):
        shutil.copytree(weights_dir / name, folder / name)
    # The look at the folder finds nothing wrong with it, the load does.
    index = folder / QWEN / "text_encoder" / "config.json"
    index.write_text(index.read_text().replace('"num_hidden_layers": ', '"num_hidden_layers": 1'))
    enabled = f'["{QWEN}", "{FLUX}", "flux-kontext-dev"]'
    workers = new_workers(valkey.url, RESTAGE__MODELS__WEIGHTS_DIR=str(folder), RESTAGE__MODELS__ENABLED=enabled)
    workers.start()
    workers.wait_ready()

    models = workers.statuses()[0].models
    assert models["flux-kontext-dev"].reason == f"flux-kontext-dev: there is no folder {folder / 'flux-kontext-dev'}"
    assert QWEN in models[QWEN].reason
    assert [name for name, model in models.items() if model.ready] == [FLUX]
    assert workers.logs().count("model.refused") == 2

    photo = workers.upload(workers.picture())
    batch_id, _ = workers.submit(workers.job(photo, FLUX))
    _, waiting = workers.submit(workers.job(photo, QWEN))
    assert workers.finished(batch_id).counts["succeeded"] == 1
    assert workers.read(waiting).status is JobStatus.QUEUED


def test_worker_without_any_model_ends_with_status_3(new_workers, valkey, tmp_path):
    """When nothing can be served the process says why, leaves the reason where the API finds it, and ends."""
    workers = new_workers(valkey.url, RESTAGE__MODELS__WEIGHTS_DIR=str(tmp_path))
    child = workers.start()

    workers.until("the end", lambda: not child.is_running)

    assert child.poll() == 3
    assert "worker.useless" in child.tail()
    statuses = workers.wait(workers.api.model_statuses(workers.registry.ids))
    for model_id, status in statuses.items():
        assert not status.ready
        assert f"there is no folder {tmp_path / model_id}" in status.reason


def test_two_models_share_one_place(new_workers, valkey):
    """With room for one model both get their turn: the idle one goes, and a busy one after `max_wait_seconds`."""
    workers = new_workers(valkey.url, RESTAGE__WORKER__MAX_RESIDENT_MODELS="1", RESTAGE__WORKER__MAX_WAIT_SECONDS="1")
    workers.start()
    workers.wait_ready()
    photo = workers.upload(workers.picture())
    slow = {"num_inference_steps": 60, "height": 256, "width": 256}
    qwen = [workers.job(photo, QWEN, params=slow) for _ in range(6)]
    flux = [workers.job(photo, FLUX) for _ in range(2)]
    qwen_batch, *_ = workers.submit(*qwen)
    flux_batch, *_ = workers.submit(*flux)

    flux_done = workers.finished(flux_batch)
    qwen_left = workers.wait(workers.api.read_batch(qwen_batch)).counts
    qwen_done = workers.finished(qwen_batch)

    assert (flux_done.counts["succeeded"], qwen_done.counts["succeeded"]) == (2, 6)
    assert qwen_left["succeeded"] < 6, "the jobs of the busy model were all done first"
    loads = [line.split("model=")[1].split()[0] for line in workers.logs().splitlines() if "model.loaded" in line]
    assert loads == [QWEN, FLUX, QWEN]
