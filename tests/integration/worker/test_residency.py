"""What is in memory together, what leaves it first, and how a model comes back that could not be loaded."""

import json
import shutil
import time

import pytest

from pipelines.memory_plan import needed_bytes
from server.worker.placement import Swap
from tests.integration.worker.lane_kit import LaneKit

QWEN, FLUX, KLEIN = "tiny-qwen-image-edit-2511", "tiny-flux-kontext", "tiny-flux2-klein"
THREE = {"RESTAGE__MODELS__ENABLED": json.dumps([QWEN, FLUX, KLEIN])}


@pytest.fixture
def workers(new_workers, valkey):
    """Give a ledger and a registry of three models."""
    return new_workers(valkey.url, **THREE)


@pytest.fixture
def sizes(workers):
    """Give the sizes of the models, as a worker counts them."""
    kit = LaneKit(workers, max_resident_models=None)
    kit.residency.check_all()
    return kit.residency.room.sizes


def started(workers, *, budget, in_hand=(), **settings):
    """Give a kit whose models were checked and loaded, with room for some of them."""
    kit = LaneKit(workers, max_resident_models=None, memory_bytes=budget, **settings)
    kit.residency.check_all()
    kit.residency.preload()
    while kit.residency.preload_next():
        pass
    kit.residency._in_hand = lambda: set(in_hand)
    return kit.residency


def room_for_two(sizes):
    """Give a budget that holds any two of the models, and not all three."""
    budget = max(needed_bytes([sizes[QWEN], sizes[other]]) for other in (FLUX, KLEIN))
    assert budget < needed_bytes(sizes.values())
    return budget


def test_what_fits_is_loaded_at_the_start_and_the_least_used_makes_room(workers, sizes):
    """The default model comes first; of those in memory the one goes that was not used for longest."""
    residency = started(workers, budget=room_for_two(sizes))
    assert residency.loaded == [QWEN, FLUX]
    assert {model: one.weights_bytes for model, one in residency.statuses().items()} == {
        model: size.weights_bytes for model, size in sizes.items()
    }
    residency.require(QWEN)
    residency.require(KLEIN)
    assert residency.loaded == [QWEN, KLEIN], "FLUX was loaded later, but used before"
    residency.swap(Swap(FLUX))
    assert residency.loaded == [KLEIN, FLUX]
    assert residency.left_seconds(QWEN) is not None
    assert residency.left_seconds(FLUX) is not None, "it was here before"
    assert (residency.load_seconds(KLEIN) or 0) > 0


def test_jobs_are_served_once_one_model_is_there(workers):
    """The others come one by one while no job is in hand, but for what has been in memory and left it since."""
    kit = LaneKit(workers, max_resident_models=None)
    residency, in_hand = kit.residency, {QWEN}
    residency._in_hand = lambda: in_hand
    residency.check_all()
    assert not residency.has_started
    residency.preload()
    assert (residency.loaded, residency.has_started) == ([QWEN], True)
    ready = {model: (one.ready, one.resident) for model, one in residency.statuses().items()}
    assert ready == {QWEN: (True, True), FLUX: (True, False), KLEIN: (True, False)}

    assert residency.preload_next()
    assert residency.loaded == [QWEN], "a job is on its way"
    in_hand.clear()
    told = []
    residency._on_change = lambda: told.append(residency.is_preloading)
    assert residency.preload_next()
    assert (residency.loaded, told) == ([QWEN, FLUX], [True, False])
    residency.swap(Swap(KLEIN, (FLUX,)))
    residency.swap(Swap(QWEN, (KLEIN,)))
    assert not residency.preload_next()
    assert residency.loaded == [QWEN]


def test_a_model_with_a_job_in_hand_leaves_last(workers, sizes):
    """However long it was not used: another has nothing to do."""
    residency = started(workers, budget=room_for_two(sizes), in_hand=[QWEN])
    residency.require(QWEN)
    residency.require(FLUX)
    residency.require(KLEIN)
    assert residency.loaded == [QWEN, KLEIN]


def test_a_model_whose_weights_do_not_fit_is_refused_by_name(workers, sizes):
    """One line says how much it takes and what there is; one that fits but for the estimate of its runs is served."""
    residency = started(workers, budget=sizes[FLUX].weights_bytes)
    assert residency.loaded == [FLUX]
    status = residency.statuses()[QWEN]
    assert not status.ready
    assert (status.reason or "").startswith(f"{QWEN}: its weights take 0.00 GiB, and this worker has 0.00 GiB")
    assert "worker.memory_bytes" in (status.reason or "")


def test_a_run_that_is_larger_than_planned_has_room_made_for_it(workers, sizes):
    """Others leave until it fits by estimate, and no further; one that would not fit alone is tried all the same."""
    residency = started(workers, budget=needed_bytes([sizes[QWEN], sizes[FLUX]]))
    assert residency.loaded == [QWEN, FLUX]
    residency.make_room(FLUX, height=128, width=128, num_photos=1)
    assert residency.loaded == [QWEN, FLUX]
    residency.make_room(FLUX, height=16_384, width=16_384, num_photos=1)
    assert residency.loaded == [FLUX]
    residency.make_room(FLUX, height=16_384, width=16_384, num_photos=1)
    assert residency.loaded == [FLUX]


def test_a_device_that_is_not_there_is_what_is_wrong_with_every_model(workers):
    """Nothing is served, and each model says so; the thread lives on to tell it."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    from server.worker.residency import Residency
    from server.worker.specs import model_specs

    specs = model_specs(workers.settings, workers.registry)
    residency = Residency(specs, device="cuda:0", load_timeout_seconds=60, on_change=lambda: None)
    residency.check_all()
    residency.preload()
    assert (residency.usable, residency.loaded) == ([], [])


def test_a_repaired_model_is_served_without_a_restart(new_workers, valkey, weights_dir, tmp_path):
    """A model whose file was torn is looked at again after a while, again later if it still is, and then served."""
    folder = tmp_path / "weights"
    shutil.copytree(weights_dir, folder)
    file = folder / FLUX / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    workers = new_workers(valkey.url, RESTAGE__MODELS__WEIGHTS_DIR=str(folder), **THREE)
    residency = started(workers, budget=None, model_retry_seconds=0.05)
    assert residency.loaded == [QWEN, KLEIN]
    assert FLUX not in residency.usable
    time.sleep(0.06)
    assert residency.due_for_check() == [FLUX]
    residency.check_again(FLUX)
    assert residency.due_for_check() == [], "the wait begins anew, and is twice as long"
    file.write_bytes(whole)
    residency.check_again(FLUX)
    assert FLUX in residency.usable
    assert residency.statuses()[FLUX].reason is None
    residency.swap(Swap(FLUX))
    assert residency.loaded == [QWEN, KLEIN, FLUX]
