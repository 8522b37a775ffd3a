"""A real worker changes models in the order that the simulation foretells."""

import json
import re

from server.jobs import Priority
from server.simulation.fleet import Fleet
from server.simulation.simulating import Simulation
from server.simulation.trace import FleetModel, Submission

QWEN = "tiny-qwen-image-edit-2511"
FLUX = "tiny-flux-kontext"
KLEIN = "tiny-flux2-klein"
# Each of these batches comes when the one before has ended, so that the order hangs on no clock. What is in memory goes
# first, then what has more jobs waiting; no two that are not in memory have as many.
BATCHES = [
    [FLUX, QWEN, FLUX, KLEIN],
    [QWEN, QWEN, FLUX],
    [KLEIN, KLEIN, QWEN],
    [FLUX, QWEN, FLUX, QWEN, QWEN],
    [KLEIN, KLEIN],
    [QWEN, FLUX, FLUX],
]


def simulated_loads():
    """List what one device loads, by the simulation."""
    models = [FleetModel(model, 1.0, 1.0, 1.0) for model in (QWEN, FLUX, KLEIN)]
    trace = [
        Submission(1000.0 * (number + 1), "ana", model, Priority.NORMAL, (1.0,))
        for number, batch in enumerate(BATCHES)
        for model in batch
    ]
    outcome = Simulation(Fleet(1, models, max_models=1), trace, keep_loads=True).run()
    assert outcome.num_jobs == sum(map(len, BATCHES))
    return [model for *_, model in outcome.loads]


def test_real_swaps_follow_the_simulated_order(new_workers, valkey):
    """Twenty jobs of three models, with room for one: each model is loaded when the simulation says so."""
    workers = new_workers(
        valkey.url,
        RESTAGE__MODELS__ENABLED=json.dumps([QWEN, FLUX, KLEIN]),
        RESTAGE__WORKER__MAX_RESIDENT_MODELS="1",
        RESTAGE__WORKER__MAX_HELD_JOBS="1",
        RESTAGE__WORKER__POLL_SECONDS="0.1",
        RESTAGE__WORKER__MAX_WAIT_SECONDS="600",
    )
    workers.start()
    workers.wait_ready()
    photo = workers.upload(workers.picture())
    for batch in BATCHES:
        batch_id, *_ = workers.submit(*(workers.job(photo, model) for model in batch))
        done = workers.finished(batch_id)
        assert done.counts["succeeded"] == len(batch), [job.error for job in done.jobs]
    log = workers.children[0].log_file.read_text()
    loads = re.findall(r"model\.loaded.*?model=(\S+)", log)
    assert loads[0] == QWEN
    assert loads[1:] == simulated_loads()
