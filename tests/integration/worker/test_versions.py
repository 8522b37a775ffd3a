"""A job runs on the version and the weights that it was accepted for, or fails and says why."""

import json
import shutil
from dataclasses import replace

import pytest

from server.model_entry import PreviousVersion
from server.registry import Registry


@pytest.fixture
def accept(workers):
    """Give a function that accepts a job of Qwen's twin for a version, and for weights."""
    photo = workers.upload(workers.picture())

    def job(version="1", weights_sha256=None):
        params = {"num_inference_steps": 2}
        made = workers.job(photo, workers.QWEN, params=params)
        return replace(made, model_version=version, weights_sha256=weights_sha256)

    return job


def registry_of(workers, **changes):
    """Give the registry with another entry for Qwen's twin."""
    entries = {entry.id: entry for entry in workers.registry}
    entries[workers.QWEN] = entries[workers.QWEN].model_copy(update=changes)
    return Registry(list(entries.values()))


def run(kit, job):
    """Run a job; returns it with its image or error. What the ledger would have said of its weights stands in it."""
    (in_hand,) = kit.claim(job)
    in_hand.job = replace(in_hand.job, weights_sha256=job.weights_sha256)
    kit.lane.submit(in_hand)
    return kit.next_end()


def test_a_version_that_was_replaced_still_runs_where_it_is_kept(workers, running_lane, accept):
    """Jobs of both versions run, each on its own; without the older one its jobs fail as the entry no longer has it."""
    from server.worker.errors import ModelChanged

    old = PreviousVersion(version="1", weights=workers.QWEN)
    kept = registry_of(workers, version="2", previous=[old])
    with running_lane(registry=kept, max_resident_models=1) as kit:
        assert run(kit, accept("1"))[1].size
        assert kit.residency.loaded == [f"{workers.QWEN}@1"]
        assert list(kit.residency.resident) == [workers.QWEN]
        assert run(kit, accept("2"))[1].size
        assert kit.residency.loaded == [workers.QWEN]
        assert workers.QWEN in kit.residency.statuses()
        assert f"{workers.QWEN}@1" not in kit.residency.statuses()
    with running_lane(registry=registry_of(workers, version="2")) as kit:
        _, error = run(kit, accept("1"))
        assert isinstance(error, ModelChanged)
        assert str(error) == (
            f"The job was accepted for version 1 of {workers.QWEN}; this server has 2 now. Submit it again."
        )


def test_weights_that_were_replaced_are_noticed(workers, running_lane, accept, weights_dir, tmp_path):
    """A job names the weights it was accepted for, and does not run on others, though the version is the same."""
    from pipelines.manifest import MANIFEST_NAME, make_manifest, weights_sha256, write_manifest
    from server.worker.errors import ModelChanged

    shutil.copytree(weights_dir, tmp_path / "weights")
    folder = tmp_path / "weights" / workers.QWEN
    write_manifest(folder, make_manifest(folder))
    digest = weights_sha256(make_manifest(folder))
    workers.settings = workers.settings.model_copy(
        update={"models": workers.settings.models.model_copy(update={"weights_dir": tmp_path / "weights"})}
    )
    with running_lane() as kit:
        job, image = run(kit, accept(weights_sha256=digest))
        assert image.size
        assert job.weights_sha256 == digest
        assert kit.residency.statuses()[workers.QWEN].weights_sha256 == digest

        # Another configuration, as a new revision would bring it: the model is loaded anew from it.
        config = folder / "vae" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()), indent=7))
        write_manifest(folder, make_manifest(folder))
        kit.residency.evict_others(None)
        _, error = run(kit, accept(weights_sha256=digest))
        assert isinstance(error, ModelChanged)
        assert str(error) == (
            f"The weights of {workers.QWEN} 1 are not those that the job was accepted for. Submit it again."
        )
        # Nobody knows what these weights are, so nothing can be said against them.
        (folder / MANIFEST_NAME).unlink()
        kit.residency.evict_others(None)
        assert run(kit, accept(weights_sha256=digest))[1].size


def test_a_model_runs_as_its_entry_says_or_is_refused(workers, running_lane, accept):
    """A job is told how its model was run; where that cannot be done here, the model is not ready, and says why."""
    from pipelines.optimization_params import Optimizations

    wanted = Optimizations(offload="group")
    with running_lane(registry=registry_of(workers, optimizations=wanted)) as kit:
        job, image = run(kit, accept())
        assert image.size
        assert job.optimizations == {"offload": "group"}
        assert kit.residency.is_exclusive(workers.QWEN)
    wanted = Optimizations(attention="flash")
    with running_lane(registry=registry_of(workers, optimizations=wanted)) as kit:
        run(kit, accept())
        status = kit.residency.statuses()[workers.QWEN]
        assert not status.ready
        assert status.reason.startswith(f"{workers.QWEN}: optimizations.attention: flash needs CUDA; on cpu there are")
