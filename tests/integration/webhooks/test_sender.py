"""From a batch that has finished to a receiver that knows, through a real ledger and real receivers."""

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from structlog.testing import capture_logs

from server.api.views import record_of_batch
from server.errors import LedgerUnavailable
from server.jobs import Batch, Delivery, Webhook
from server.keys import KeyStore, KeysUnavailable
from server.ledger.api_side import ApiLedger, connect
from server.ports import free_ports
from server.webhook_secret import new_webhook_secret, webhook_secret_bytes
from server.webhooks.sender import WebhookSender
from tests.integration.ledger.kit import LedgerKit
from tests.integration.webhooks.receiving import OK, Received, Receiver, answer_with

Receive = Callable[..., Receiver]
SECRETS = (new_webhook_secret(), new_webhook_secret())


class Desk:
    """A ledger with batches that have finished, and the sender that tells of them."""

    def __init__(self, kit: LedgerKit, settings_for: Any) -> None:
        self.kit = kit
        self.secrets: dict[str | None, tuple[str, ...]] = {"key1": SECRETS}
        self._settings_for = settings_for

    def accept(self, batch_id: str, url: str, *, key_id: str = "key1", label: str | None = None) -> Batch:
        """Have a batch accepted, with a webhook."""
        batch = replace(self.kit.batch(batch_id, ["qwen"]), webhook=Webhook(url), key_id=key_id, label=label)
        self.kit.announce_uploads(batch)
        assert self.kit.submit(batch).kind == "accepted"
        return batch

    def finish(self, batch_id: str, url: str, **options: Any) -> None:
        """Have a batch accepted and finished, with a webhook."""
        self.accept(batch_id, url, **options)
        assert self.kit.commit(self.kit.claim(["qwen"])) == "ok"

    def sender(self, **environment: str) -> WebhookSender:
        """Make a sender that may call localhost."""
        settings = self._settings_for(
            **{"RESTAGE__WEBHOOKS__ALLOWED_HOSTS": "[localhost]", "RESTAGE__SWEEP__INTERVAL_SECONDS": "0.1"}
            | environment
        )
        return WebhookSender(
            self.kit.api, settings, secrets_of=lambda key_id: self.secrets.get(key_id, ()), view=record_of_batch
        )

    def send(self, **environment: str) -> None:
        """Send all that is due."""
        self.kit.run(self.sender(**environment).send_due())

    def deliveries(self, batch_id: str) -> tuple[Delivery, ...]:
        """Say what came of the attempts so far."""
        webhook = self.kit.read(batch_id).webhook
        assert webhook is not None
        return webhook.deliveries


@pytest.fixture
def desk(valkey: Any, settings_for: Any) -> Iterator[Desk]:
    """Give a desk on an empty ledger."""
    kit = LedgerKit(valkey.url)
    kit.run(kit.api.check_schema())
    yield Desk(kit, settings_for)
    kit.close()


async def until(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110 (receivers live in threads)
        await asyncio.sleep(0.02)


def verify(received: Received, secret: str) -> bool:
    """Check a request as a receiver does that knows one secret."""
    headers = received.headers
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + received.body
    expected = base64.b64encode(hmac.new(webhook_secret_bytes(secret), content, hashlib.sha256).digest()).decode()
    return f"v1,{expected}" in headers["webhook-signature"].split(" ")


def test_a_receiver_is_told_once(desk: Desk, receive: Receive) -> None:
    """The receiver must get the batch, signed with every secret, without URLs; and never again."""
    receiver = receive()
    desk.finish("b1", f"http://localhost:{receiver.port}/hook", label="Größe 🏠")

    desk.send()
    desk.send()

    (received,) = receiver.received
    assert received.headers["content-type"] == "application/json"
    assert received.headers["user-agent"].startswith("Restage/")
    assert received.headers["webhook-id"] == "msg_b1_1"
    assert abs(int(received.headers["webhook-timestamp"]) - time.time()) < 100
    assert all(verify(received, secret) for secret in SECRETS)
    assert not verify(received, new_webhook_secret())
    body = json.loads(received.body)
    assert body.keys() == {"type", "timestamp", "data"}
    assert body["type"] == "batch.finished"
    data = body["data"]
    assert (data["id"], data["status"], data["label"]) == ("b1", "finished", "Größe 🏠")
    assert datetime.fromisoformat(body["timestamp"]) == datetime.fromisoformat(data["finished_at"])
    assert body["timestamp"].endswith("Z")
    assert data["counts"]["succeeded"] == 1
    assert data["jobs"][0]["output"].keys() & {"url", "url_expires_at"} == set()
    (delivery,) = desk.deliveries("b1")
    assert (delivery.round, delivery.attempt, delivery.outcome) == (1, 1, "delivered")
    assert (delivery.http_status, delivery.detail) == (204, None)


def test_a_failure_is_tried_again_under_the_same_id(desk: Desk, receive: Receive) -> None:
    """A failed attempt must be noted and come again after its pause, with the same id and a signature of its own."""
    receiver = receive(answer_with(b"HTTP/1.1 500 Oops\r\nContent-Length: 9\r\n\r\nsecretive", OK))
    desk.finish("b1", f"http://localhost:{receiver.port}/")

    desk.send()
    desk.send()
    assert len(receiver.received) == 1
    assert [(one.outcome, one.http_status) for one in desk.deliveries("b1")] == [("retrying", 500)]
    assert desk.deliveries("b1")[0].detail == "answered with status 500"

    desk.kit.pass_time(7)
    desk.send()
    first, second = receiver.received
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == "msg_b1_1"
    assert verify(first, SECRETS[0])
    assert verify(second, SECRETS[0])
    assert [(one.attempt, one.outcome, one.http_status) for one in desk.deliveries("b1")] == [
        (1, "retrying", 500),
        (2, "delivered", 204),
    ]


def test_each_round_is_told(desk: Desk, receive: Receive) -> None:
    """A batch that is retried and finishes again must be told again, under another id."""
    receiver = receive()
    desk.accept("b1", f"http://localhost:{receiver.port}/")
    desk.kit.fail(desk.kit.claim(["qwen"]))
    desk.send()
    assert desk.kit.run(desk.kit.api.reopen("ana", ["b1-0"], max_open_jobs=100)) == ["queued"]
    desk.kit.commit(desk.kit.claim(["qwen"]))
    desk.send()

    assert [one.headers["webhook-id"] for one in receiver.received] == ["msg_b1_1", "msg_b1_2"]
    counts = [json.loads(one.body)["data"]["counts"] for one in receiver.received]
    assert [(one["failed"], one["succeeded"]) for one in counts] == [(1, 0), (0, 1)]


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answered with status 404"),
        (
            b"HTTP/1.1 302 Found\r\nLocation: http://localhost/\r\nContent-Length: 0\r\n\r\n",
            "answered with status 302; redirects are not followed",
        ),
        (b"", "the connection ended without an answer of HTTP"),
        (b"A" * 10_000, "the connection ended without an answer of HTTP"),
    ],
)
def test_what_went_wrong_is_noted_in_our_words(desk: Desk, receive: Receive, answer: bytes, detail: str) -> None:
    """A note must say what happened and hold nothing that a receiver wrote."""
    receiver = receive(answer_with(answer))
    desk.finish("b1", f"http://localhost:{receiver.port}/")

    with capture_logs() as logs:
        desk.send()

    (delivery,) = desk.deliveries("b1")
    assert (delivery.outcome, delivery.detail) == ("retrying", detail)
    (log,) = [log for log in logs if log["event"] == "webhook.postponed"]
    assert (log["batch_id"], log["round"], log["attempt"], log["detail"]) == ("b1", 1, 1, detail)
    assert "localhost" not in str(log)


def test_a_receiver_that_is_gone_is_given_up(desk: Desk, receive: Receive) -> None:
    """After 410 nothing more must be sent, ever."""
    receiver = receive(answer_with(b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n"))
    desk.finish("b1", f"http://localhost:{receiver.port}/")

    desk.send()
    desk.kit.pass_time(100)
    desk.send()

    assert [(one.outcome, one.http_status) for one in desk.deliveries("b1")] == [("gave_up", 410)]
    assert len(receiver.received) == 1


def test_a_receiver_that_never_answers_is_given_up_in_the_end(desk: Desk, receive: Receive) -> None:
    """When the time is over, the last attempt must be noted as such, and none follow."""
    receiver = receive(answer_with(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"))
    desk.finish("b1", f"http://localhost:{receiver.port}/")

    desk.send(RESTAGE__WEBHOOKS__GIVE_UP_SECONDS="0.01")
    time.sleep(0.05)
    desk.kit.pass_time(100)
    desk.send(RESTAGE__WEBHOOKS__GIVE_UP_SECONDS="0.01")
    desk.kit.pass_time(100)
    desk.send(RESTAGE__WEBHOOKS__GIVE_UP_SECONDS="0.01")

    assert desk.deliveries("b1")[-1].outcome == "gave_up"
    assert len(receiver.received) == len(desk.deliveries("b1")) <= 2


def test_hosts_that_are_not_allowed_any_more_are_not_called(desk: Desk, receive: Receive) -> None:
    """What was allowed when the batch came must be checked again when it is called."""
    receiver = receive()
    desk.finish("b1", f"http://localhost:{receiver.port}/")
    desk.finish("b2", f"https://localhost:{receiver.port}/")

    desk.send(RESTAGE__WEBHOOKS__ALLOWED_HOSTS="[]")

    assert receiver.num_connections == 0
    assert "not allowed any more" in (desk.deliveries("b1")[0].detail or "")
    assert "no address that may be called" in (desk.deliveries("b2")[0].detail or "")
    assert {desk.deliveries(one)[0].outcome for one in ("b1", "b2")} == {"retrying"}


def test_nothing_is_sent_unsigned(desk: Desk, receive: Receive) -> None:
    """A key that was revoked, or whose file cannot be read, must keep the webhook back, not send it unsigned."""
    receiver = receive()
    desk.finish("b1", f"http://localhost:{receiver.port}/", key_id="key2")
    desk.send()
    assert receiver.num_connections == 0
    assert "no secret to sign with" in (desk.deliveries("b1")[0].detail or "")

    # The key is back, such as a volume that was not mounted.
    desk.secrets["key2"] = SECRETS[:1]
    desk.kit.pass_time(7)
    desk.send()
    (received,) = receiver.received
    assert received.headers["webhook-signature"].count("v1,") == 1


def test_keys_that_cannot_be_read_are_waited_for(
    desk: Desk, receive: Receive, settings_for: Any, tmp_path: Any
) -> None:
    """An unreadable file of keys must be noted as our trouble and the webhook sent later."""
    receiver = receive()
    desk.finish("b1", f"http://localhost:{receiver.port}/")
    (tmp_path / "keys.jsonl").mkdir()
    keys = KeyStore(tmp_path / "keys.jsonl")
    with pytest.raises(KeysUnavailable):
        keys.webhook_secrets("key1")

    settings = settings_for(RESTAGE__WEBHOOKS__ALLOWED_HOSTS="[localhost]")
    sender = WebhookSender(desk.kit.api, settings, secrets_of=lambda key: keys.webhook_secrets(key or ""), view=vars)
    desk.kit.run(sender.send_due())

    assert receiver.num_connections == 0
    (delivery,) = desk.deliveries("b1")
    assert (delivery.outcome, delivery.detail) == ("retrying", "the secrets could not be read")


class SlowReceiver:
    """Answers only once it is released; counts how many requests it has at the same time."""

    def __init__(self, receive: Receive) -> None:
        self.released = threading.Event()
        self.most_at_once = 0
        self._num_now = 0
        self._lock = threading.Lock()
        self._receiver = receive(self._wait)
        self.url = f"http://localhost:{self._receiver.port}/"

    @property
    def received(self) -> list[Received]:
        """What has arrived, answered or not."""
        return self._receiver.received

    def _wait(self, connection: Any, _number: int) -> None:
        with self._lock:
            self._num_now += 1
            self.most_at_once = max(self.most_at_once, self._num_now)
        self.released.wait(30)
        with self._lock:
            self._num_now -= 1
        connection.sendall(OK)


def test_slow_receivers_keep_nobody_waiting(desk: Desk, receive: Receive) -> None:
    """While some receivers are slow, all others must be told."""
    slow, quick = SlowReceiver(receive), receive()
    for number in range(7):
        desk.finish(f"slow{number}", slow.url)
    for number in range(20):
        desk.finish(f"quick{number}", f"http://localhost:{quick.port}/")

    async def send() -> None:
        sending = asyncio.create_task(desk.sender(RESTAGE__WEBHOOKS__TIMEOUT_SECONDS="60").send_due())
        await until(lambda: len(quick.received) >= 20)
        assert len(slow.received) == 7
        slow.released.set()
        await sending

    desk.kit.run(asyncio.wait_for(send(), 30))
    assert all(desk.deliveries(f"slow{number}")[0].outcome == "delivered" for number in range(7))


def test_eight_are_sent_at_the_same_time(desk: Desk, receive: Receive) -> None:
    """However many are due, at most eight requests may be open; the others follow."""
    slow = SlowReceiver(receive)
    for number in range(12):
        desk.finish(f"b{number}", slow.url)

    async def send() -> None:
        sending = asyncio.create_task(desk.sender(RESTAGE__WEBHOOKS__TIMEOUT_SECONDS="60").send_due())
        await until(lambda: len(slow.received) >= 8)
        await asyncio.sleep(0.3)
        assert len(slow.received) == 8
        slow.released.set()
        await sending

    desk.kit.run(asyncio.wait_for(send(), 30))
    assert slow.most_at_once == 8
    assert len({one.headers["webhook-id"] for one in slow.received}) == 12


def test_what_becomes_due_meanwhile_is_sent(desk: Desk, receive: Receive) -> None:
    """A delivery that becomes due while another hangs must not wait for it."""
    slow, quick = SlowReceiver(receive), receive()
    desk.finish("slow", slow.url)
    late = desk.accept("late", f"http://localhost:{quick.port}/")

    async def send() -> None:
        sending = asyncio.create_task(desk.sender(RESTAGE__WEBHOOKS__TIMEOUT_SECONDS="60").send_due())
        await until(lambda: slow.received)
        await desk.kit.api.cancel(late.owner, [job.id for job in late.jobs])
        await until(lambda: quick.received)
        slow.released.set()
        await sending

    desk.kit.run(asyncio.wait_for(send(), 30))
    assert desk.deliveries("slow")[0].outcome == "delivered"


def test_a_sender_that_is_stopped_leaves_its_work_to_the_next(desk: Desk, receive: Receive) -> None:
    """A delivery that was cut off is due again once its lease has run out, under the same id."""

    def hang(_connection: Any, number: int) -> None:
        if number == 0:
            time.sleep(1)
        else:
            _connection.sendall(OK)

    receiver = receive(hang)
    desk.finish("b1", f"http://localhost:{receiver.port}/")

    async def stop() -> None:
        sending = asyncio.create_task(desk.sender().run())
        await until(lambda: receiver.received)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)

    desk.kit.run(asyncio.wait_for(stop(), 30))
    assert desk.deliveries("b1") == ()
    desk.send()
    assert len(receiver.received) == 1
    desk.kit.pass_time(41)
    desk.send()
    assert [one.headers["webhook-id"] for one in receiver.received] == ["msg_b1_1"] * 2
    assert [(one.attempt, one.outcome) for one in desk.deliveries("b1")] == [(2, "delivered")]


def test_one_bad_batch_stops_no_other(desk: Desk, receive: Receive) -> None:
    """A mistake of ours with one batch must be logged once, and the others sent; the sender lives on."""
    receiver = receive()
    desk.finish("bad", f"http://localhost:{receiver.port}/bad")
    desk.finish("good1", f"http://localhost:{receiver.port}/")
    desk.finish("good2", f"http://localhost:{receiver.port}/")

    def view(batch: Batch) -> dict[str, Any]:
        if batch.id == "bad":
            raise KeyError("a mistake of ours")
        return {"id": batch.id}

    sender = desk.sender()
    sender._view = view

    async def run() -> None:
        running = asyncio.create_task(sender.run())
        await until(lambda: len(receiver.received) >= 2)
        await asyncio.sleep(0.3)
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    with capture_logs() as logs:
        desk.kit.run(asyncio.wait_for(run(), 30))
    assert {json.loads(one.body)["data"]["id"] for one in receiver.received} == {"good1", "good2"}
    assert [log["event"] for log in logs].count("webhooks.failed") == 1


def test_redis_that_is_away_is_waited_for(settings_for: Any) -> None:
    """An outage must be logged once, and end nothing."""
    settings = settings_for(
        RESTAGE__REDIS__URL=f"redis://127.0.0.1:{free_ports(1)[0]}/0", RESTAGE__SWEEP__INTERVAL_SECONDS="0.05"
    )

    async def run() -> None:
        ledger = ApiLedger(connect(settings.redis), key_prefix="restage")
        sender = WebhookSender(ledger, settings, secrets_of=lambda _: SECRETS, view=record_of_batch)
        with pytest.raises(LedgerUnavailable):
            await sender.send_due()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sender.run(), 1)
        await ledger.close()

    with capture_logs() as logs:
        asyncio.run(run())
    assert [log["event"] for log in logs] == ["webhooks.failed"]
