"""Webhooks on the whole stack: each end of a batch is told once, signed, through every trouble."""

import base64
import hashlib
import hmac
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from server.keys import KeyStore
from server.ports import free_ports

FLUX = "tiny-flux-kontext"
TIMEOUT_SECONDS = 100.0  # so long that no slow machine lets a held request end by itself
LEASE_SECONDS = TIMEOUT_SECONDS + 30
SOME_SWEEPS_SECONDS = 2.0  # four of config/test.yaml
DAY_SECONDS = 24 * 3600


class Told:
    """One request as it arrived."""

    def __init__(self, path: str, headers: Message, body: bytes) -> None:
        self.path, self.headers, self.body = path, headers, body
        self.id = headers["webhook-id"]
        self.signatures = headers["webhook-signature"].split(" ")
        self.content = json.loads(body)

    def signature(self, secret: str) -> str:
        """Sign it again, as Standard Webhooks describes it."""
        key = base64.b64decode(secret.removeprefix("whsec_"))
        signed = b".".join([self.id.encode(), self.headers["webhook-timestamp"].encode(), self.body])
        return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


class Receiver:
    """Somebody's web server; `answer` gives the status for each request, counted from 0, and may take its time."""

    def __init__(self, answer: Callable[[int], int]) -> None:
        self.told: list[Told] = []
        self.num_connections = 0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                number = len(receiver.told)
                receiver.told.append(Told(self.path, self.headers, body))
                status = answer(number)
                with suppress(ConnectionError):  # whoever called may be dead by now
                    self.send_response(status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (http.server's word)
                pass

        class Server(ThreadingHTTPServer):
            def verify_request(self, request: Any, client_address: Any) -> bool:
                receiver.num_connections += 1
                return super().verify_request(request, client_address)

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/staged?token=t"
        threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receive() -> Iterator[Callable[..., Receiver]]:
    """Give a function that starts a receiver: `receive(answer)`; one that takes everything when left out."""
    started: list[Receiver] = []

    def start(answer: Callable[[int], int] = lambda _number: 204) -> Receiver:
        started.append(Receiver(answer))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture(autouse=True)  # before the stack, whose API starts with it
def keys(tmp_path: Path, monkeypatch) -> KeyStore:
    """Give keys to every process that starts from now on, and let it call webhooks on 127.0.0.1."""
    path = tmp_path / "keys.jsonl"
    monkeypatch.setenv("RESTAGE__AUTH__MODE", "keys")
    monkeypatch.setenv("RESTAGE__AUTH__KEYS_FILE", str(path))
    monkeypatch.setenv("RESTAGE__WEBHOOKS__ALLOWED_HOSTS", "[127.0.0.1]")
    monkeypatch.setenv("RESTAGE__WEBHOOKS__TIMEOUT_SECONDS", str(TIMEOUT_SECONDS))
    return KeyStore(path)


class Agency:
    """Somebody with a key who submits batches; without a worker they end by being cancelled."""

    def __init__(self, stack, key: str) -> None:
        self.key_id = key.split("_")[1]
        self.client = stack.client
        self.client.http.headers["Authorization"] = f"Bearer {key}"
        stack.wait_api()
        buffer = io.BytesIO()
        Image.new("RGB", (96, 80), (40, 90, 160)).save(buffer, "PNG")
        self.photo = buffer.getvalue()
        [self.upload_id] = self.client.upload({"room.png": self.photo})

    def body(self, url: str, num_items: int = 1) -> dict[str, Any]:
        """Ask for a batch with a webhook."""
        items = [{"upload_id": self.upload_id} for _ in range(num_items)]
        return {"defaults": {"model": FLUX}, "items": items, "webhook": {"url": url}}

    def finish(self, url: str) -> str:
        """Bring a batch to its end; returns its id."""
        batch = self.client.submit(self.body(url))
        self.cancel(batch["id"])
        return batch["id"]

    def cancel(self, batch_id: str) -> None:
        """Cancel a batch that nobody has begun."""
        response = self.client.call("POST", f"/v1/batches/{batch_id}/cancel")
        assert response.json()["status"] == "finished", response.text

    def deliveries(self, batch_id: str) -> list[tuple[int, int, str, int | None]]:
        """Say how the attempts went: round, attempt, outcome, status."""
        shown = self.client.batch(batch_id)["webhook"]["deliveries"]
        return [(one["round"], one["attempt"], one["outcome"], one["http_status"]) for one in shown]


@pytest.fixture
def agency(keys, stack) -> Agency:
    """Give an agency with a key."""
    return Agency(stack, keys.add("oak", "user"))


def without_urls(batch: dict[str, Any]) -> dict[str, Any]:
    """Take from a batch what only works for a while, and what only its owner should know."""
    shown = json.loads(json.dumps(batch))
    del shown["webhook"]["url"]
    for job in shown["jobs"]:
        if job["output"]:
            del job["output"]["url"], job["output"]["url_expires_at"]
    return shown


def test_each_end_of_a_batch_is_told_once(stack, agency, keys, receive, valkey, pass_time, wait_until) -> None:
    """The receiver gets the batch as GET shows it, signed, by two secrets while one is rotated; a retry too."""
    receiver, client = receive(), agency.client
    [old] = keys.webhook_secrets(agency.key_id)
    batch = client.submit(agency.body(receiver.url, 3) | {"label": "Größe 🏠", "metadata": {"mls": "123"}})
    assert batch["webhook"] == {"url": receiver.url, "deliveries": []}
    later = [job["id"] for job in batch["jobs"][1:]]
    for job_id in later:
        assert client.call("POST", f"/v1/jobs/{job_id}/cancel").status_code == 200
    stack.start_worker()

    def next_end(number: int) -> Told:
        client.finished(batch["id"])
        wait_until(lambda: len(agency.deliveries(batch["id"])) == number, 60)
        return receiver.told[-1]

    check_told(next_end(1), client.batch(batch["id"]), [old])
    new = keys.rotate_webhook(agency.key_id)
    assert client.call("POST", f"/v1/jobs/{later[0]}/retry").status_code == 200
    check_told(next_end(2), client.batch(batch["id"]), [new, old])
    assert keys.rotate_webhook(agency.key_id) is None
    assert client.call("POST", f"/v1/batches/{batch['id']}/retry").status_code == 200
    check_told(next_end(3), client.batch(batch["id"]), [new])

    pass_time(valkey.client(), DAY_SECONDS)
    time.sleep(SOME_SWEEPS_SECONDS)
    assert [one.content["data"]["counts"]["succeeded"] for one in receiver.told] == [1, 2, 3]
    assert len({one.id for one in receiver.told}) == 3
    # What lets us in at the receiver is in nothing that may be handed on.
    assert not any(b"token=t" in one.body for one in receiver.told)
    assert b"token=t" not in client.call("GET", f"/v1/batches/{batch['id']}/archive").content
    assert agency.deliveries(batch["id"]) == [(round_, 1, "delivered", 204) for round_ in (1, 2, 3)]


def check_told(told: Told, batch: dict[str, Any], secrets: list[str]) -> None:
    """What the receiver got is what the client sees, and carries a signature of each secret, the newest first."""
    assert told.path == "/staged?token=t"
    assert told.headers["content-type"] == "application/json"
    assert told.headers["user-agent"].startswith("Restage/")
    assert told.signatures == [told.signature(secret) for secret in secrets]
    assert abs(int(told.headers["webhook-timestamp"]) - time.time()) < 100
    assert told.content.keys() == {"type", "timestamp", "data"}
    assert told.content["type"] == "batch.finished"
    assert datetime.fromisoformat(told.content["timestamp"]) == datetime.fromisoformat(batch["finished_at"])
    shown = without_urls(batch)
    shown["webhook"]["deliveries"].pop()  # this one, which nobody knew the outcome of when it was sent
    assert told.content["data"] == shown
    assert b"X-Amz" not in told.body


def test_two_servers_tell_each_batch_once(stack, agency, receive, make_client, valkey, pass_time, wait_until) -> None:
    """Ten batches that end together are told once each, though two processes send, and both have to."""
    together = threading.Barrier(10)  # one process has no more than eight requests open

    def answer(_number: int) -> int:
        together.wait(TIMEOUT_SECONDS - 10)
        return 200

    receiver = receive(answer)
    port = free_ports(1)[0]
    stack.start("api", RESTAGE__SERVER__PORT=str(port))
    other = make_client(f"http://127.0.0.1:{port}")
    other.http.headers["Authorization"] = agency.client.http.headers["Authorization"]
    wait_until(lambda: is_up(other.http), 60)

    here = [agency.client.submit(agency.body(receiver.url))["id"] for _ in range(5)]
    there = [other.submit(agency.body(receiver.url))["id"] for _ in range(5)]
    for batch_id in (*here, *there):
        agency.cancel(batch_id)
    wait_until(lambda: all(map(agency.deliveries, (*here, *there))), 60)

    pass_time(valkey.client(), DAY_SECONDS)
    time.sleep(SOME_SWEEPS_SECONDS)
    told = [one.content["data"]["id"] for one in receiver.told]
    assert sorted(told) == sorted((*here, *there))
    assert len({one.id for one in receiver.told}) == 10
    assert all(agency.deliveries(batch_id) == [(1, 1, "delivered", 200)] for batch_id in (*here, *there))
    num_sent = [child.log_file.read_text().count("webhook.delivered") for child in stack.children]
    assert sum(num_sent) == 10
    assert min(num_sent) >= 2


def is_up(http) -> bool:
    """Whether an API answers."""
    import httpx

    with suppress(httpx.HTTPError):
        return http.get("/health/ready").status_code == 200
    return False


def test_a_receiver_in_trouble_is_told_again(agency, keys, receive, valkey, pass_time, wait_until) -> None:
    """After two answers of 500 the third attempt, under the same id, is the last; each is logged in the batch."""
    receiver = receive(lambda number: 500 if number < 2 else 200)
    redis_client = valkey.client(decode_responses=True)
    batch_id = agency.finish(receiver.url)
    for number, delay_ms in enumerate((5_000, 30_000), start=1):
        wait_until(lambda number=number: len(agency.deliveries(batch_id)) == number, 60)
        [*_, latest] = map(json.loads, redis_client.lrange(f"restage:batch:{batch_id}:deliveries", 0, -1))
        due = redis_client.zscore("restage:webhooks", f"{batch_id}:1")
        assert delay_ms * 0.75 <= due - latest["at_ms"] <= delay_ms * 1.25
        assert len(receiver.told) == number
        pass_time(redis_client, delay_ms * 1.25 / 1000)
    wait_until(lambda: len(agency.deliveries(batch_id)) == 3, 60)

    pass_time(redis_client, DAY_SECONDS)
    time.sleep(SOME_SWEEPS_SECONDS)
    outcomes = [(1, 1, "retrying", 500), (1, 2, "retrying", 500), (1, 3, "delivered", 200)]
    assert agency.deliveries(batch_id) == outcomes
    assert len(receiver.told) == 3
    assert len({one.id for one in receiver.told}) == 1
    [secret] = keys.webhook_secrets(agency.key_id)
    shown = agency.client.batch(batch_id)["webhook"]["deliveries"]
    for number, one in enumerate(receiver.told):
        assert one.signatures == [one.signature(secret)]
        assert one.content["data"]["webhook"]["deliveries"] == shown[:number]
    assert [one["detail"] for one in shown] == ["answered with status 500", "answered with status 500", None]


def test_a_server_that_dies_while_it_sends_sends_again(stack, agency, receive, valkey, pass_time, wait_until) -> None:
    """After kill -9 with a request open, another process sends the same once the lease has run out, and not before."""
    may_answer = threading.Event()

    def answer(_number: int) -> int:
        may_answer.wait(TIMEOUT_SECONDS)
        return 200

    receiver = receive(answer)
    batch_id = agency.finish(receiver.url)
    wait_until(lambda: receiver.told, 60)
    [api] = stack.children
    api.kill_group()
    may_answer.set()
    stack.restart_api()
    time.sleep(SOME_SWEEPS_SECONDS)
    assert len(receiver.told) == 1
    assert agency.deliveries(batch_id) == []

    pass_time(valkey.client(), LEASE_SECONDS)
    wait_until(lambda: agency.deliveries(batch_id), 60)
    first, second = receiver.told
    assert first.id == second.id
    assert first.body == second.body
    assert agency.deliveries(batch_id) == [(1, 2, "delivered", 200)]


REFUSED = (
    "http://example.com/hook",
    "http://localhost/hook",
    "ftp://127.0.0.1/hook",
    "//127.0.0.1/hook",
    "https://10.0.0.1/hook",
    "https://169.254.169.254/latest/meta-data",
    "https://127.0.0.2/hook",
    "https://127.1/hook",
    "https://2130706433/hook",
    "https://0x7f000001/hook",
    "https://[::1]/hook",
    "https://[::ffff:127.0.0.1]/hook",
    "https://hidden:word@example.com/hook",
    "http://127.0.0.1@example.com/hook",
    "http://hidden@127.0.0.1/hook",
    "http://127.0.0.1/hook#hidden",
    "http://127.0.0.1:99999/hook",
)


def test_who_may_not_be_called_is_not(stack, agency, keys, receive, valkey, wait_until) -> None:
    """A webhook that cannot be called is refused with nothing accepted; a name that leads inside is never called."""
    redis_client = valkey.client(decode_responses=True)
    for url in REFUSED:
        check_refused(agency, agency.body(url), "/webhook/url")
    receiver = receive()
    line = json.loads(keys.path.read_text())
    keys.path.write_text(json.dumps(line | {"webhook_secrets": []}) + "\n")  # of before there were webhooks
    check_refused(agency, agency.body(receiver.url), "/webhook")
    keys.path.write_text(json.dumps(line) + "\n")
    stack.restart_api(RESTAGE__AUTH__MODE="none")
    check_refused(agency, agency.body(receiver.url), "/webhook")
    assert not [*redis_client.scan_iter("restage:batch:*"), *redis_client.scan_iter("restage:job:*")]
    assert [*redis_client.scan_iter("restage:upload:*")] == [f"restage:upload:{agency.upload_id}"]

    stack.restart_api()
    body = agency.body(f"https://localhost:{receiver.port}/")
    accepted = agency.client.call("POST", "/v1/batches", json=body, headers={"Idempotency-Key": "one"})
    assert accepted.status_code == 201, accepted.text  # nothing of the refused ones was remembered either
    batch_id = accepted.json()["batch"]["id"]
    agency.cancel(batch_id)
    wait_until(lambda: agency.deliveries(batch_id), 60)
    [delivery] = agency.client.batch(batch_id)["webhook"]["deliveries"]
    assert (delivery["outcome"], delivery["http_status"]) == ("retrying", None)
    assert delivery["detail"].startswith("the host has no address that may be called")
    assert "webhooks.allowed_hosts" in delivery["detail"]
    assert receiver.num_connections == 0


def check_refused(agency: Agency, body: dict[str, Any], location: str) -> None:
    """The same request is refused as JSON and as a form; the answer names the place and repeats no secret."""
    options: dict[str, Any] = {"headers": {"Idempotency-Key": "one"}}
    form = body | {"items": [{"file": "photo"}]}
    files = {"batch": (None, json.dumps(form), "application/json"), "photo": ("room.png", agency.photo, "image/png")}
    for sent in ({"json": body}, {"files": files}):
        response = agency.client.call("POST", "/v1/batches", **options, **sent)
        assert response.status_code == 422, (body, response.text)
        problem = response.json()
        assert problem["code"] == "invalid_webhook"
        assert [one["location"] for one in problem["errors"]] == [location]
        assert "hidden" not in response.text
    assert agency.client.call("GET", "/v1/batches").json()["data"] == []


def test_a_deleted_batch_is_told_no_more(agency, receive, valkey, pass_time, wait_until) -> None:
    """What waits to be delivered goes with the batch, also while an attempt is under way; the others are told."""
    may_answer = threading.Event()

    def answer(number: int) -> int:
        if number == 1:
            may_answer.wait(TIMEOUT_SECONDS)
        return 503 if number < 2 else 200

    receiver = receive(answer)
    redis_client = valkey.client(decode_responses=True)
    waiting = agency.finish(receiver.url)
    wait_until(lambda: agency.deliveries(waiting), 60)
    under_way = agency.finish(receiver.url)
    wait_until(lambda: len(receiver.told) == 2, 60)
    for batch_id in (waiting, under_way):
        assert agency.client.call("DELETE", f"/v1/batches/{batch_id}").status_code == 204
    may_answer.set()
    after = agency.finish(receiver.url)
    wait_until(lambda: agency.deliveries(after), 60)

    pass_time(redis_client, DAY_SECONDS)
    time.sleep(SOME_SWEEPS_SECONDS)
    assert [one.content["data"]["id"] for one in receiver.told] == [waiting, under_way, after]
    assert redis_client.exists("restage:webhooks") == 0
    for batch_id in (waiting, under_way):
        assert [*redis_client.scan_iter(f"restage:batch:{batch_id}*")] == []
