"""What the operator sees of the workers, and nobody else."""

from datetime import datetime, timedelta

from server.keys import KeyStore
from server.ledger.status import CurrentJob, WorkerMemory, WorkerModel, WorkerStatus

QWEN, FLUX, KLEIN = "tiny-qwen-image-edit-2511", "tiny-flux-kontext", "tiny-flux2-klein"

BUSY = WorkerStatus(
    id="worker-1",
    device="cuda:1",
    pid=7,
    models={
        QWEN: WorkerModel(
            ready=True, resident=True, version="1", weights_bytes=1_200_000, loaded_seconds=90.0, idle_seconds=30.0
        ),
        FLUX: WorkerModel(ready=True, weights_bytes=800_000),
        KLEIN: WorkerModel(ready=False, reason="its weights are missing"),
    },
    held_jobs=("j1", "j2"),
    current_job=CurrentJob("j1", QWEN, step=3, total_steps=8),
    memory=WorkerMemory(80_000_000_000, allocated_bytes=1_300_000, reserved_bytes=2_000_000),
    loading=FLUX,
    leaving=(QWEN,),
)


def test_workers_are_shown_as_they_announce_themselves(api):
    """Memory, models, placement and jobs of a worker are there, with times by the clock of Redis."""
    assert api.http.get("/v1/workers").json() == {"data": []}
    api.worker.announce(BUSY)
    [worker] = api.http.get("/v1/workers").json()["data"]
    announced_at = datetime.fromisoformat(worker.pop("announced_at"))
    seconds, micros = api.redis.time()
    assert abs(announced_at.timestamp() - seconds - micros / 1e6) < 60
    [resident] = worker.pop("resident")
    assert announced_at - datetime.fromisoformat(resident.pop("loaded_at")) == timedelta(seconds=90)
    assert announced_at - datetime.fromisoformat(resident.pop("last_used_at")) == timedelta(seconds=30)
    assert resident == {"model": QWEN, "version": "1", "weights_bytes": 1_200_000}
    assert worker == {
        "id": "worker-1",
        "device": "cuda:1",
        "pid": 7,
        "memory": {"budget_bytes": 80_000_000_000, "allocated_bytes": 1_300_000, "reserved_bytes": 2_000_000},
        "loading": FLUX,
        "leaving": [QWEN],
        "ready": [QWEN, FLUX],
        "refused": [{"model": KLEIN, "reason": "its weights are missing"}],
        "current_job": {"id": "j1", "model": QWEN, "step": 3, "total_steps": 8},
        "held_jobs": ["j1", "j2"],
    }


def test_a_worker_that_left_is_not_shown(api):
    """After its farewell a worker is in no list."""
    api.worker.announce(BUSY)
    api.worker.leave()
    assert api.http.get("/v1/workers").json() == {"data": []}


def test_only_an_admin_may_look_at_the_workers(open_api, tmp_path):
    """A key of the role user gets 403, and nothing of what workers say; an admin's gets the list."""
    keys = KeyStore(tmp_path / "keys.jsonl")
    with open_api(RESTAGE__AUTH__MODE="keys", RESTAGE__AUTH__KEYS_FILE=str(keys.path)) as api:
        api.worker.announce(BUSY)
        answers = [
            api.http.get("/v1/workers", headers={"Authorization": f"Bearer {keys.add('ana', role)}"})
            for role in ("user", "admin")
        ]
    assert [answer.status_code for answer in answers] == [403, 200]
    assert answers[0].json()["code"] == "forbidden"
    assert "worker-1" not in answers[0].text
    assert answers[1].json()["data"][0]["id"] == "worker-1"
