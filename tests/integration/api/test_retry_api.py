"""Failed and cancelled jobs are queued again, finished batches are deleted, and neither touches anything else."""

import io
import json
import secrets
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from server.errors import ObjectNotFound
from server.keys import KeyStore

DAY_SECONDS = 24 * 3600


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def upload_id(api):
    """Give a photo that is in the store."""
    return api.upload(picture())[0]


@pytest.fixture
def accept(api, upload_id):
    """Give a function that submits a batch of `count` jobs of one photo."""
    return lambda count=1: api.accept(*[{"upload_id": upload_id}] * count)


def read(api, batch):
    return api.http.get(f"/v1/batches/{batch['id']}").json()


def retry(api, kind, one):
    return api.http.post(f"/v1/{kind}/{one['id']}/retry")


def retry_many(api, ids, **options):
    return api.http.post("/v1/jobs/retry", json={"ids": ids}, **options)


def told(api, batch):
    """List what was told of a batch: kind, and the round that ended or the status and attempts of the job."""
    entries = api.redis.xrange(f"restage:batch:{batch['id']}:events")
    found = [(fields["type"], json.loads(fields["data"])) for _, fields in entries]
    return [(kind, data.get("round") or (data["status"], data["attempts"])) for kind, data in found]


def check_refused(response, status, code, *words):
    assert response.status_code == status, response.text
    assert response.json()["code"] == code
    for word in words:
        assert word in response.json()["detail"]


def test_a_batch_is_retried_in_rounds(api, accept):
    """A retry queues what failed and what was cancelled, and leaves what succeeded; each round ends with one event."""
    batch = accept(3)
    done, failed = api.run_next(), api.fail_next()
    api.http.post(f"/v1/batches/{batch['id']}/cancel")
    before = read(api, batch)
    assert before["status"] == "finished"
    assert before["jobs"][1]["error"] == {"code": "invalid_input", "detail": "The photo is cut off."}

    response = retry(api, "batches", batch)
    assert response.status_code == 200
    again = response.json()
    assert again == read(api, batch)
    assert (again["status"], again["finished_at"], again["expires_at"]) == ("queued", None, None)
    assert again["counts"] == {"total": 3, "queued": 2, "running": 0, "succeeded": 1, "failed": 0, "cancelled": 0}
    assert [job["id"] for job in again["jobs"]] == [job["id"] for job in batch["jobs"]]
    assert {name: value for name, value in again["jobs"][0]["output"].items() if "url" not in name} == {
        name: value for name, value in before["jobs"][0]["output"].items() if "url" not in name
    }
    for job in again["jobs"][1:]:
        assert (job["status"], job["error"], job["finished_at"], job["progress"]) == ("queued", None, None, None)
        assert job["params"] == batch["jobs"][job["index"]]["params"]
    assert [job["queue_position"] for job in again["jobs"]] == [None, 1, 2]

    assert api.fail_next().id == failed.id
    api.run_next()
    assert retry(api, "batches", batch).status_code == 200
    api.run_next()
    end = read(api, batch)
    assert end["counts"]["succeeded"] == 3
    # Attempts count on over the rounds; the job that was cancelled before its first had none then.
    assert [job["attempts"] for job in end["jobs"]] == [1, 3, 1]
    assert end["started_at"] == before["started_at"]
    assert [what for kind, what in told(api, batch) if kind == "batch.finished"] == [1, 2, 3]
    assert done.id == end["jobs"][0]["id"]
    assert api.redis.scard("restage:open") == 0


def test_a_retry_is_told_as_an_event(api, accept):
    """Whoever follows the batch sees the job wait again, run again and end again."""
    batch = accept()
    api.fail_next()
    assert retry(api, "jobs", batch["jobs"][0]).json()["status"] == "queued"
    api.run_next()
    assert told(api, batch) == [
        ("job.started", ("running", 1)),
        ("job.failed", ("failed", 1)),
        ("batch.finished", 1),
        ("job.retrying", ("queued", 1)),
        ("job.started", ("running", 2)),
        ("job.succeeded", ("succeeded", 2)),
        ("batch.finished", 2),
    ]


def test_a_job_of_an_open_batch_is_retried_within_its_round(api, accept):
    """A batch that has not finished goes on: its end comes once, after the job that was retried."""
    batch = accept(2)
    failed = api.fail_next()
    response = retry(api, "jobs", {"id": failed.id})
    assert (response.status_code, response.json()["status"], response.json()["error"]) == (200, "queued", None)
    assert read(api, batch)["counts"]["queued"] == 2
    # It goes to the end of its owner's line.
    assert [job["queue_position"] for job in read(api, batch)["jobs"]] == [2, 1]
    api.run_next()
    assert api.run_next().id == failed.id
    assert [what for kind, what in told(api, batch) if kind == "batch.finished"] == [1]


def test_what_cannot_be_retried_is_a_conflict(api, accept):
    """Open and succeeded jobs, and batches without a failed or cancelled one, are refused, and nothing changes."""
    batch = accept(2)
    first, second = batch["jobs"]
    check_refused(retry(api, "batches", batch), 409, "conflict", "no failed or cancelled job")
    check_refused(retry(api, "jobs", first), 409, "conflict", "not done")
    running = api.worker.claim(["tiny-qwen-image-edit-2511"], num_held=0)
    assert running.id == first["id"]
    check_refused(retry(api, "jobs", first), 409, "conflict", "not done")
    api.http.post(f"/v1/jobs/{second['id']}/cancel")
    assert retry(api, "jobs", second).status_code == 200
    check_refused(retry(api, "jobs", second), 409, "conflict", "not done")
    assert read(api, batch)["counts"] | {"total": 2} == {
        "total": 2,
        "queued": 1,
        "running": 1,
        "succeeded": 0,
        "failed": 0,
        "cancelled": 0,
    }
    other = accept()
    api.run_next()
    api.run_next()
    assert read(api, other)["status"] == "finished"
    check_refused(retry(api, "jobs", other["jobs"][0]), 409, "conflict", "succeeded")
    check_refused(retry(api, "batches", other), 409, "conflict", "nothing to retry")


@pytest.mark.parametrize("unknown", ["0" * 32, "nope", "{id}:jobs", "%00", "..%2f..%2fhealth", "{id}%20", "retry"])
def test_unknown_ids_are_not_found(api, accept, unknown):
    """Whatever stands in the place of an id, retry and delete answer 404 and touch nothing."""
    batch = accept()
    api.fail_next()
    job = batch["jobs"][0]
    for method, path, own in (
        ("POST", "/v1/batches/{}/retry", batch["id"]),
        ("DELETE", "/v1/batches/{}", batch["id"]),
        ("GET", "/v1/batches/{}/events", batch["id"]),
        ("GET", "/v1/batches/{}/archive", batch["id"]),
        ("POST", "/v1/jobs/{}/retry", job["id"]),
    ):
        response = api.http.request(method, path.format(unknown.replace("{id}", own)))
        check_refused(response, 404, "not_found")
    assert read(api, batch)["counts"]["failed"] == 1


def test_many_jobs_of_many_batches_are_retried_at_once(api, accept):
    """All that can be retried is; each of the others is named by its place with the reason, and the answer is 207."""
    first, second = accept(2), accept(2)
    ids = [job["id"] for batch in (first, second) for job in batch["jobs"]]
    api.fail_next()
    api.run_next()
    api.fail_next()
    unknown = "0" * 32
    wanted = [ids[2], unknown, ids[1], ids[0], ids[3], "nope"]
    response = retry_many(api, wanted)
    assert response.status_code == 207
    assert [job["id"] for job in response.json()["data"]] == [ids[2], ids[0]]
    assert {job["status"] for job in response.json()["data"]} == {"queued"}
    assert [(error["index"], error["code"]) for error in response.json()["errors"]] == [
        (1, "not_found"),
        (2, "conflict"),
        (4, "conflict"),
        (5, "not_found"),
    ]
    for error in response.json()["errors"]:
        assert wanted[error["index"]] in error["detail"]
    api.fail_next()
    response = retry_many(api, [ids[3]])
    assert (response.status_code, response.json()["errors"]) == (200, [])


def test_nothing_to_retry_names_each_id(api, accept):
    """Where no job can be queued again the answer is 422 with a pointer to each."""
    batch = accept()
    response = retry_many(api, ["nope", batch["jobs"][0]["id"]])
    check_refused(response, 422, "nothing_accepted", "none of the 2")
    assert [(error["location"], error["index"], error["code"]) for error in response.json()["errors"]] == [
        ("/ids/0", 0, "not_found"),
        ("/ids/1", 1, "conflict"),
    ]


def test_an_id_that_stands_twice_is_retried_once(api, accept):
    """The same id again is no mistake: the job is queued once, and shown once."""
    batch = accept(2)
    failed = api.fail_next().id
    response = retry_many(api, [failed, failed, failed])
    assert response.status_code == 200, response.text
    assert ([job["id"] for job in response.json()["data"]], response.json()["errors"]) == ([failed], [])
    assert [kind for kind, _ in told(api, batch)].count("job.retrying") == 1
    response = retry_many(api, ["0" * 32, failed, "0" * 32])
    assert [error["location"] for error in response.json()["errors"]] == ["/ids/0", "/ids/1", "/ids/2"]


@pytest.mark.parametrize(
    ("body", "locations"),
    [
        ({"ids": []}, ["/ids"]),
        ({"ids": ["0" * 32] * 101}, ["/ids"]),
        ({"ids": "0" * 32}, ["/ids"]),
        ({"ids": [7, "0" * 32, None]}, ["/ids/0", "/ids/2"]),
        ({"ids": None}, ["/ids"]),
        ({}, ["/ids"]),
        ({"ids": ["0" * 32], "force": True}, ["/force"]),
        ({"job_ids": ["0" * 32]}, ["/ids", "/job_ids"]),
        ([], [""]),
        ({"ids": ["a\u0000"]}, ["/ids/0"]),
    ],
)
def test_a_wrong_request_to_retry_is_refused_with_pointers(api, body, locations):
    """Mistakes in the request itself refuse it whole, and say where they are."""
    response = api.http.post("/v1/jobs/retry", json=body)
    check_refused(response, 422, "invalid_request")
    assert [error["location"] for error in response.json()["errors"]] == locations


def test_a_hundred_jobs_are_retried_in_one_call(api, upload_id, accept):
    """As many ids as are allowed go at once."""
    ids = [job["id"] for _ in range(2) for job in accept(50)["jobs"]]
    for job_id in ids[::50]:
        api.http.post(f"/v1/batches/{api.http.get(f'/v1/jobs/{job_id}').json()['batch_id']}/cancel")
    response = retry_many(api, ids)
    assert response.status_code == 200
    assert [job["id"] for job in response.json()["data"]] == ids


def test_retries_respect_how_many_jobs_may_be_open(open_api):
    """Where not all would fit, none is queued, and 503 says when to come again."""
    with open_api(RESTAGE__LIMITS__MAX_OPEN_JOBS="3") as api:
        [upload_id] = api.upload(picture())
        batch = api.accept(*[{"upload_id": upload_id}] * 3)
        ids = [job["id"] for job in batch["jobs"]]
        api.http.post(f"/v1/batches/{batch['id']}/cancel")
        other = api.accept({"upload_id": upload_id})
        for response in (retry(api, "batches", batch), retry_many(api, ids), retry_many(api, [*ids, "nope"])):
            check_refused(response, 503, "queue_full", "3 jobs")
            assert int(response.headers["retry-after"]) > 0
            assert read(api, batch)["counts"]["cancelled"] == 3
        # The same id twice takes one place.
        assert retry_many(api, [ids[0], ids[0], ids[1]]).status_code == 200
        check_refused(retry(api, "jobs", {"id": ids[2]}), 503, "queue_full")
        api.http.post(f"/v1/batches/{other['id']}/cancel")
        assert retry(api, "jobs", {"id": ids[2]}).status_code == 200


def test_two_retries_at_once_queue_a_job_once(api, accept):
    """Of many retries of one batch at the same time one queues its jobs; the others find them queued."""
    batch = accept(3)
    api.http.post(f"/v1/batches/{batch['id']}/cancel")
    with ThreadPoolExecutor(8) as threads:
        statuses = list(threads.map(lambda _: retry(api, "batches", batch).status_code, range(8)))
    assert set(statuses) <= {200, 409}
    assert statuses.count(200) >= 1
    assert read(api, batch)["counts"]["queued"] == 3
    assert [kind for kind, _ in told(api, batch)].count("job.retrying") == 3
    assert api.redis.hget(f"restage:batch:{batch['id']}", "round") == "2"


def test_nobody_retries_or_deletes_anothers_work(open_api, tmp_path):
    """Another owner's batches and jobs answer as if they were not there; an admin may retry and delete them."""
    keys = KeyStore(tmp_path / "keys.jsonl")
    drawn = {"ana": keys.add("ana", "user"), "ben": keys.add("ben", "user"), "op": keys.add("op", "admin")}
    who = {name: {"Authorization": f"Bearer {key}"} for name, key in drawn.items()}
    with open_api(RESTAGE__AUTH__MODE="keys", RESTAGE__AUTH__KEYS_FILE=str(keys.path)) as api:
        batches = {}
        for name in ("ana", "ben"):
            [upload_id] = api.upload(picture(), headers=who[name])
            batches[name] = api.submit({"upload_id": upload_id}, headers=who[name]).json()["batch"]
            api.http.post(f"/v1/batches/{batches[name]['id']}/cancel", headers=who[name])
        ana, ben = batches["ana"], batches["ben"]
        job_ids = [batches[name]["jobs"][0]["id"] for name in ("ana", "ben")]
        for path in (f"/v1/batches/{ana['id']}/retry", f"/v1/jobs/{job_ids[0]}/retry"):
            check_refused(api.http.post(path, headers=who["ben"]), 404, "not_found")
        check_refused(api.http.delete(f"/v1/batches/{ana['id']}", headers=who["ben"]), 404, "not_found")
        check_refused(retry_many(api, job_ids[:1], headers=who["ben"]), 422, "nothing_accepted")
        response = retry_many(api, job_ids, headers=who["ben"])
        assert (response.status_code, response.json()["errors"][0]["code"]) == (207, "not_found")
        assert [job["id"] for job in response.json()["data"]] == job_ids[1:]
        assert api.http.get(f"/v1/batches/{ana['id']}", headers=who["ana"]).json()["counts"]["cancelled"] == 1

        response = retry_many(api, job_ids[:1], headers=who["op"])
        assert (response.status_code, response.json()["data"][0]["status"]) == (200, "queued")
        for batch in (ana, ben):
            api.http.post(f"/v1/batches/{batch['id']}/cancel", headers=who["op"])
            assert api.http.delete(f"/v1/batches/{batch['id']}", headers=who["op"]).status_code == 204


def test_a_retry_after_the_photos_are_gone_is_refused(api, accept, pass_time, wait_until):
    """Once the inputs' time is over, retries are refused with a reason of their own; before, they are not."""
    batch, mixed = accept(), accept(2)
    job = batch["jobs"][0]
    api.fail_next()
    api.fail_next()
    done = api.run_next()
    pass_time(api.redis, 6 * DAY_SECONDS)
    response = retry(api, "jobs", job)
    assert response.status_code == 200
    api.fail_next()
    # The retry began the time anew.
    pass_time(api.redis, 6 * DAY_SECONDS)
    assert retry(api, "jobs", job).status_code == 200
    api.fail_next()
    pass_time(api.redis, 8 * DAY_SECONDS)
    wait_until(lambda: api.redis.hget(f"restage:batch:{batch['id']}", "inputs_released"))
    wait_until(lambda: api.redis.hget(f"restage:batch:{mixed['id']}", "inputs_released"))
    check_refused(retry(api, "jobs", job), 409, "input_expired", "send them again")
    check_refused(retry(api, "batches", batch), 409, "input_expired")
    response = retry_many(api, [job["id"], done.id])
    assert [error["code"] for error in response.json()["errors"]] == ["input_expired", "conflict"]
    assert read(api, batch)["status"] == "finished"


def test_a_fresh_round_has_its_whole_error_budget(api, accept, pass_time, wait_until):
    """Errors of the round before do not count: the job is tried as often as a new one."""
    accept()

    def give_back():
        job = api.worker.claim(["tiny-qwen-image-edit-2511"], num_held=0)
        return job, api.worker.retry(
            job.id, job.fence, delay_seconds=0, counts=True, max_errors=2, code="internal_error", detail="No."
        )

    assert [give_back()[1] for _ in range(2)] == ["ok", "failed"]
    [failed] = api.http.get("/v1/jobs?status=failed").json()["data"]
    assert failed["attempts"] == 2
    assert retry(api, "jobs", failed).status_code == 200
    assert [give_back()[1] for _ in range(2)] == ["ok", "failed"]
    assert api.http.get(f"/v1/jobs/{failed['id']}").json()["attempts"] == 4


def is_stored(api, kind, key):
    try:
        _ = api.store.read_start(key, 1) if kind == "uploads" else api.store.read_output(key)
    except ObjectNotFound:
        return False
    return True


def output_key(api, job_id):
    return json.loads(api.redis.hget(f"restage:job:{job_id}", "output"))["key"]


def delete(api, batch):
    return api.http.delete(f"/v1/batches/{batch['id']}")


def test_a_finished_batch_is_deleted_with_all_that_is_its_own(api, accept, upload_id, pass_time, wait_until):
    """204, then 404: records, results and, once their form is of no use any more, photos are gone from the store."""
    batch = accept(2)
    check_refused(delete(api, batch), 409, "conflict", "cancel it")
    first = api.run_next()
    check_refused(delete(api, batch), 409, "conflict", "not done")
    keys = [output_key(api, job.id) for job in (first, api.run_next())]
    assert all(is_stored(api, "outputs", key) for key in keys)

    response = delete(api, batch)
    assert (response.status_code, response.content) == (204, b"")
    check_refused(delete(api, batch), 404, "not_found")
    for path in ("", "/events", "/archive"):
        check_refused(api.http.get(f"/v1/batches/{batch['id']}{path}"), 404, "not_found")
    for job in batch["jobs"]:
        check_refused(api.http.get(f"/v1/jobs/{job['id']}"), 404, "not_found")
        check_refused(retry(api, "jobs", job), 404, "not_found")
    assert api.http.get("/v1/jobs").json()["data"] == []

    wait_until(lambda: not any(is_stored(api, "outputs", key) for key in keys))
    # The form could bring the photo back, so the photo waits for its end.
    assert is_stored(api, "uploads", upload_id)
    pass_time(api.redis, 1000)
    wait_until(lambda: not is_stored(api, "uploads", upload_id))
    wait_until(lambda: api.redis.zcard("restage:trash") == 0)
    standing = ("restage:reply:", "restage:worker", "restage:served:")
    left = {key for key in api.redis.scan_iter("restage:*") if not key.startswith(standing)}
    of_models = {"restage:models", "restage:speed:tiny-qwen-image-edit-2511"}
    assert left <= {"restage:schema", "restage:swept", "restage:changes", "restage:control", *of_models}


def test_photos_that_another_batch_needs_stay(api, accept, upload_id, pass_time, wait_until):
    """A photo of two batches goes with the second one."""
    first, second = accept(), accept(2)
    for batch in (first, second):
        api.http.post(f"/v1/batches/{batch['id']}/cancel")
    pass_time(api.redis, 1000)
    assert delete(api, first).status_code == 204
    wait_until(lambda: api.redis.hget(f"restage:upload:{upload_id}", "references") == "2")
    pass_time(api.redis, 1000)
    assert retry(api, "batches", second).status_code == 200
    assert is_stored(api, "uploads", upload_id)
    api.run_next()
    api.run_next()
    assert delete(api, second).status_code == 204
    wait_until(lambda: not is_stored(api, "uploads", upload_id))


def test_deleting_leaves_other_batches_and_their_results_alone(api, accept, wait_until):
    """Only the batch that was named goes; lists and counts of the others are as before."""
    batches = [accept(2) for _ in range(3)]
    jobs = [api.run_next() for _ in range(6)]
    keys = {job.id: output_key(api, job.id) for job in jobs}
    gone = batches[1]
    before = [read(api, batch) for batch in (batches[2], batches[0])]
    assert delete(api, gone).status_code == 204
    gone_keys = [keys[job["id"]] for job in gone["jobs"]]
    wait_until(lambda: not any(is_stored(api, "outputs", key) for key in gone_keys))
    assert all(is_stored(api, "outputs", key) for key in keys.values() if key not in gone_keys)
    listed = api.http.get("/v1/batches").json()["data"]
    assert listed == [{name: value for name, value in batch.items() if name != "jobs"} for batch in before]


def test_the_idempotency_key_of_a_deleted_batch_does_not_bring_it_back(api, upload_id):
    """The first answer is gone with its batch; the same key then says so, and another key works."""
    key = {"Idempotency-Key": secrets.token_hex(8)}
    batch = api.submit({"upload_id": upload_id}, headers=key).json()["batch"]
    api.http.post(f"/v1/batches/{batch['id']}/cancel")
    assert delete(api, batch).status_code == 204
    check_refused(api.submit({"upload_id": upload_id}, headers=key), 404, "not_found", "use a new key")
    assert api.submit({"upload_id": upload_id}, headers={"Idempotency-Key": "new"}).status_code == 201
