"""Every process is replaced by another while clients submit and follow batches: they notice nothing that matters."""

import io
import itertools
import json
import random
import re
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from PIL import Image

from server.ports import free_ports
from tests.conftest import REPOSITORY
from tests.e2e.conftest import Stack, content_type_of, wait_for

FLUX = "tiny-flux-kontext"
NUM_CLIENTS = 3
USER, PASSWORD = "restage", "a-long-random-password"


def documented_user() -> list[str]:
    """Read from the document for operators what Restage's user of Redis may do."""
    text = (REPOSITORY / "docs" / "security.md").read_text()
    [rules] = re.findall(r"^ACL SETUSER restage ((?:.*\\\n)*.*)$", text, flags=re.MULTILINE)
    return rules.replace("\\\n", " ").split()


@pytest.fixture
def redis_user(valkey: Any) -> Iterator[Any]:
    """Give a Redis on which the processes may do what the documents allow them, and no more."""
    client = valkey.client(decode_responses=True)
    rules = [f">{PASSWORD}" if rule.startswith(">") else rule for rule in documented_user()]
    client.execute_command("ACL", "SETUSER", USER, *rules)
    client.acl_log_reset()
    yield client
    client.acl_deluser(USER)


@pytest.fixture
def stack(valkey: Any, redis_user: Any, s3: Any, weights_dir: Any, tmp_path: Any) -> Iterator[Stack]:
    """Give processes without the rights of an operator."""
    environment = {
        "RESTAGE_ENV": "test",
        "RESTAGE__REDIS__URL": valkey.url.replace("redis://", f"redis://{USER}@"),
        "RESTAGE__REDIS__PASSWORD": PASSWORD,
        "RESTAGE__MODELS__WEIGHTS_DIR": str(weights_dir),
        "RESTAGE__MODELS__ENABLED": f'["{FLUX}"]',
        "RESTAGE__MODELS__DEFAULT": FLUX,
        **s3.environment,
    }
    running = Stack(environment, tmp_path, port=0)
    try:
        yield running
    finally:
        running.stop()
        print(re.sub(r"X-Amz-[^ \"]*", "…", running.logs()))  # noqa: T201


class Servers:
    """The addresses that clients know, as a load balancer has them: an old one goes some time after its process."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._running: dict[str, Any] = {}
        self.urls: list[str] = []

    def add(self) -> str:
        """Start an API; its address is known once it serves."""
        [port] = free_ports(1)
        url = f"http://127.0.0.1:{port}"
        self._running[url] = self._stack.start("api", RESTAGE__SERVER__PORT=str(port))
        return url

    def wait(self, url: str) -> None:
        """Wait until an API serves, and tell the clients."""

        def look() -> bool:
            assert self._running[url].is_running, self._running[url].tail()
            try:
                return httpx.get(f"{url}/health/ready").is_success
            except httpx.TransportError:
                return False

        wait_for("the API", look)
        self.urls.append(url)

    def end(self, url: str) -> None:
        """End an API while clients still call it."""
        child = self._running.pop(url)
        child.send_signal(signal.SIGTERM)
        wait_for("the end of the API", lambda: not child.is_running)
        assert child.poll() == 0
        time.sleep(0.2)
        self.urls.remove(url)


class Caller(threading.Thread):
    """A client that submits batches and follows each to its end, one after the other.

    It repeats what was refused with 503 or found nobody listening, at another address. All else is a failure.
    """

    def __init__(self, servers: Servers, seed: int) -> None:
        super().__init__(daemon=True)
        self._servers = servers
        self._random = random.Random(seed)
        # Every other one makes a connection for each call, and comes to the door in its closing more often.
        self._http = httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=seed % 2))
        self.met: Counter[str] = Counter()
        self.followed: dict[str, list[str]] = {}
        self.failures: list[str] = []
        self.stopping = False

    def run(self) -> None:
        try:
            upload_id = self.upload()
            while not self.stopping:
                self.follow(self.submit(upload_id))
        except (httpx.HTTPError, AssertionError, KeyError) as error:
            self.failures.append(f"{type(error).__name__}: {error}")
        finally:
            self._http.close()

    @contextmanager
    def answered(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """Give the answer to a call, from whoever gives one."""
        for _ in range(200):
            url = self._random.choice(self._servers.urls)
            try:
                with self._http.stream(method, url + path, **options) as response:
                    self.met[str(response.status_code)] += 1
                    if response.status_code != 503:
                        yield response
                        return
                    assert int(response.headers["retry-after"]) > 0
            except httpx.ConnectError:
                self.met["nobody listens"] += 1
            time.sleep(0.05)
        raise AssertionError(f"{method} {path} was never answered")

    def call(self, method: str, path: str, **options: Any) -> Any:
        with self.answered(method, path, **options) as response:
            response.read()
            assert response.status_code in {200, 201}, response.text
            return response.json()

    def upload(self) -> str:
        buffer = io.BytesIO()
        Image.new("RGB", (96, 80 + self._random.randrange(100)), (5, 90, 160)).save(buffer, "PNG")
        data = buffer.getvalue()
        file = {"filename": "a.png", "content_type": content_type_of("a.png"), "size_bytes": len(data)}
        [form] = self.call("POST", "/v1/uploads", json={"files": [file]})["uploads"]
        httpx.post(form["url"], data=form["fields"], files={"file": data}, timeout=60).raise_for_status()
        return form["upload_id"]

    def submit(self, upload_id: str) -> str:
        body = {"defaults": {"params": {"num_inference_steps": 2}}, "items": [{"upload_id": upload_id}] * 2}
        headers = {"Idempotency-Key": secrets.token_hex(8)}
        batch = self.call("POST", "/v1/batches", json=body, headers=headers)["batch"]
        self.followed[batch["id"]] = []
        return batch["id"]

    def follow(self, batch_id: str) -> None:
        kinds, last_id = self.followed[batch_id], None
        for _ in range(100):
            headers = {} if last_id is None else {"Last-Event-ID": last_id}
            with self.answered("GET", f"/v1/batches/{batch_id}/events", headers=headers) as response:
                assert response.status_code == 200
                for event in read_events(response.iter_lines()):
                    last_id = event.get("id", last_id)
                    kinds.append(event["event"])
            if kinds and kinds[-1] == "batch.finished":
                return
            self.met["stream taken up"] += 1
        raise AssertionError(f"batch {batch_id} did not end: {kinds}")


def read_events(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """Read the fields of events; a stream that ends within one ends without it."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line and "event" in fields:
            yield fields
        name, _, value = line.partition(": ")
        fields = fields | {name: value} if line else {}


def test_every_process_is_replaced_under_load(stack: Stack, redis_user: Any) -> None:
    """No answer of the 500s but 503, no connection cut, nothing lost, each batch finished once and each job run once.

    The processes work under the very rights that the documents give their user of Redis.
    """
    servers = Servers(stack)
    first, second = servers.add(), servers.add()
    old_workers = [stack.start_worker()]
    servers.wait(first)
    servers.wait(second)

    def num_ready() -> int:
        return httpx.get(f"{servers.urls[0]}/health/ready").json()["models"].get(FLUX, 0)

    wait_for("a worker", lambda: num_ready() == 1)
    new_worker = stack.start_worker()
    callers = [Caller(servers, seed) for seed in range(NUM_CLIENTS)]
    for caller in callers:
        caller.start()
    for old in (first, second):
        new = servers.add()
        servers.wait(new)
        servers.end(old)
    wait_for("the new worker", lambda: num_ready() == 2)
    for worker in old_workers:
        worker.send_signal(signal.SIGTERM)
        wait_for("the end of the worker", lambda worker=worker: not worker.is_running)
        assert worker.poll() == 0
    num_before = sum(len(caller.followed) for caller in callers)
    wait_for("work of the new worker", lambda: sum(len(one.followed) for one in callers) > num_before + NUM_CLIENTS)
    for caller in callers:
        caller.stopping = True
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()

    met = sum((caller.met for caller in callers), Counter())
    print(met)  # noqa: T201
    assert [caller.failures for caller in callers] == [[]] * NUM_CLIENTS
    assert set(met) <= {"200", "201", "503", "nobody listens", "stream taken up"}
    followed = dict(itertools.chain.from_iterable(caller.followed.items() for caller in callers))
    assert len(followed) > 2 * NUM_CLIENTS
    assert all(kinds.count("batch.finished") == 1 for kinds in followed.values())
    for batch_id in followed:
        told = [fields["type"] for _, fields in redis_user.xrange(f"restage:batch:{batch_id}:events")]
        assert told.count("batch.finished") == 1
        assert told.count("job.started") == told.count("job.succeeded") == 2
    assert redis_user.zcard("restage:shelf:*:finished") == redis_user.zcard("restage:shelf:*:all") == len(followed)
    assert new_worker.is_running
    denied = redis_user.acl_log()
    assert not denied, json.dumps(denied, default=str)
