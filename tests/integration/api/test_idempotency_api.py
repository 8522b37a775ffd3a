"""The same request, sent again for any reason, is accepted once."""

import io
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from server.errors import LedgerUnavailable, NothingAccepted
from server.ledger.api_side import ApiLedger
from server.submit.accept import Submitter
from server.submit.files import FileUploads
from server.submit.look import PhotoLook
from server.submit.request import BatchRequest
from server.submit.resolve import Resolver

JSON = {"Content-Type": "application/json"}


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80)).save(buffer, "PNG")
    return buffer.getvalue()


def num_batches(api):
    return len([key for key in api.redis.keys("restage:batch:*") if key.count(":") == 2])


def test_the_same_key_and_body_answer_the_first_result_again(api):
    """A repeated request gets the first status, errors and place, with the batch as it is now."""
    [upload_id] = api.upload(picture())
    items = [{"upload_id": upload_id}, {"upload_id": "0" * 32}]
    first = api.submit(*items, label="a", headers={"Idempotency-Key": "key-1"})
    done = api.run_next()
    again = api.http.post(
        "/v1/batches",
        # Other spelling, same meaning.
        content=f'{{"label": "a",\n "items": [{{"upload_id":"{upload_id}"}}, {{"upload_id": "{"0" * 32}"}}]}}',
        headers={"Idempotency-Key": "key-1", "Content-Type": "application/json; charset=utf-8"},
    )
    assert (first.status_code, again.status_code) == (207, 207)
    assert again.headers["location"] == first.headers["location"]
    assert again.json()["errors"] == first.json()["errors"]
    assert first.json()["batch"]["status"] == "queued"
    assert again.json()["batch"]["status"] == "finished"
    assert again.json()["batch"]["jobs"][0]["id"] == done.id
    assert num_batches(api) == 1


def test_the_same_key_with_another_body_is_refused(api):
    """A key stands for one body; another one is told, and nothing is queued."""
    [upload_id] = api.upload(picture())
    api.submit({"upload_id": upload_id}, headers={"Idempotency-Key": "key-1"})
    other = api.submit({"upload_id": upload_id}, label="b", headers={"Idempotency-Key": "key-1"})
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")
    assert num_batches(api) == 1


def test_a_refused_request_does_not_use_up_its_key(api):
    """After a 422 the corrected body may come under the same key."""
    [upload_id] = api.upload(picture())
    refused = api.submit({"upload_id": "0" * 32}, headers={"Idempotency-Key": "key-1"})
    accepted = api.submit({"upload_id": upload_id}, headers={"Idempotency-Key": "key-1"})
    assert (refused.status_code, accepted.status_code) == (422, 201)


def test_requests_that_race_under_one_key_make_one_batch(api):
    """Twenty identical requests at once name the same batch, and only one exists."""
    [upload_id] = api.upload(picture())
    with ThreadPoolExecutor(20) as threads:
        answers = list(
            threads.map(lambda _: api.submit({"upload_id": upload_id}, headers={"Idempotency-Key": "key-1"}), range(20))
        )
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["batch"]["id"] for answer in answers}) == 1
    assert num_batches(api) == 1


@pytest.mark.parametrize("num_heard", [0, 20])
def test_a_client_that_goes_away_during_the_answer_finds_its_batch(open_live_api, num_heard):
    """Whoever hangs up before the answer, or in its midst, and asks again, twice, hears of the one batch there is."""
    with open_live_api() as api:
        [upload_id] = api.upload(picture())
        body = json.dumps({"items": [{"upload_id": upload_id}]}).encode()
        head = (
            f"POST /v1/batches HTTP/1.1\r\nHost: {api.http.base_url.netloc.decode()}\r\nIdempotency-Key: key-1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((api.http.base_url.host, api.http.base_url.port), timeout=30) as line:
            line.sendall(head.encode() + body)
            assert len(line.recv(num_heard)) == num_heard
        [again, once_more] = [
            api.http.post("/v1/batches", content=body, headers={"Idempotency-Key": "key-1", **JSON}) for _ in range(2)
        ]
        assert (again.status_code, once_more.status_code) == (201, 201)
        assert again.json()["batch"]["id"] == once_more.json()["batch"]["id"]
        assert num_batches(api) == 1
        assert api.redis.scard("restage:open") == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "k\xf6y"])
def test_a_key_that_cannot_be_kept_is_refused(api, key):
    """Keys are 1 to 255 printable ASCII characters."""
    response = api.http.post(
        "/v1/batches",
        json={"items": [{"upload_id": "0" * 32}]},
        headers=[(b"Idempotency-Key", key.encode("latin-1"))],
    )
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


class ForgettingLook(PhotoLook):
    """Looks as ever, and then lets uploads expire before the batch is accepted."""

    def __init__(self, services, redis, expired):
        super().__init__(services.store, services.settings.limits, threads=services.store_threads, timeout_seconds=10)
        self.redis, self.expired = redis, expired

    async def look(self, records):
        found = await super().look(records)
        for upload_id in self.expired:
            self.redis.delete(f"restage:upload:{upload_id}")
        return found


def make_submitter(services, redis, expired, ledger=None):
    look = ForgettingLook(services, redis, expired)
    resolver = Resolver(
        services.registry, services.prompts, default_model="tiny-flux-kontext", max_prompt_characters=100
    )
    ledger = ledger or services.ledger
    uploads = FileUploads(services.store, ledger, services.settings, threads=services.store_threads)
    return Submitter(services.settings, resolver=resolver, look=look, uploads=uploads, ledger=ledger)


def test_an_upload_that_expires_meanwhile_costs_only_its_items(api):
    """An upload gone between look and accept becomes an error of its items; the others are accepted."""
    kept, gone = api.upload(picture(), picture())
    request = BatchRequest.model_validate(
        {
            "defaults": {"model": "tiny-qwen-image-edit-2511"},
            "items": [
                {"upload_id": gone},
                {"upload_id": kept},
                {"upload_ids": [kept, gone]},
                {"upload_id": "0" * 32},
            ],
        }
    )
    submitter = make_submitter(api.http.app.state.services, api.redis, [gone])
    submission = api.http.blocking_portal.call(submitter.submit, "local", request, None)
    assert submission.http_status == 207
    assert [(error.index, error.location, error.code) for error in submission.errors] == [
        (0, "/items/0/upload_id", "upload_not_found"),
        (2, "/items/2/upload_ids/1", "upload_not_found"),
        (3, "/items/3/upload_id", "upload_not_found"),
    ]
    assert [job.index for job in submission.batch.jobs] == [1]
    assert num_batches(api) == 1


def test_a_batch_whose_uploads_all_expire_meanwhile_is_refused(api):
    """When nothing is left to accept, nothing is."""
    [gone] = api.upload(picture())
    request = BatchRequest.model_validate({"items": [{"upload_id": gone}]})
    submitter = make_submitter(api.http.app.state.services, api.redis, [gone])
    with pytest.raises(NothingAccepted):
        api.http.blocking_portal.call(submitter.submit, "local", request, None)
    assert num_batches(api) == 0


class UnreadableLedger(ApiLedger):
    """Loses its connection right after the batch was accepted."""

    async def read_batch(self, batch_id):
        raise LedgerUnavailable(f"gone before {batch_id} was read")


def test_an_accepted_batch_is_told_even_if_it_cannot_be_read(api):
    """Once the ledger has accepted, the client hears so, whatever happens to the connection then."""
    [upload_id] = api.upload(picture())
    request = BatchRequest.model_validate({"items": [{"upload_id": upload_id}]})
    services = api.http.app.state.services
    ledger = UnreadableLedger(services.ledger._client, key_prefix="restage")
    submitter = make_submitter(services, api.redis, [], ledger)
    submission = api.http.blocking_portal.call(submitter.submit, "local", request, None)
    assert submission.http_status == 201
    assert submission.batch.counts["queued"] == 1
    assert submission.batch.created_at_ms > 0
    assert num_batches(api) == 1
    assert submission.batch.id in api.redis.keys("restage:batch:*")[0]
