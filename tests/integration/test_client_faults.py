"""The client against a server that answers as it is told: faults that a real one shows only now and then."""

import asyncio
import hashlib
import io
import json
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import pytest
from rich.console import Console

from server.client.batch import BatchRequest, BatchRun
from server.client.errors import ApiError, ServerUnreachable, TransferFailed
from server.client.http import RestageClient
from server.client.photos import Photo, read_photo
from server.client.progress import BatchProgress
from server.ports import free_ports

T = TypeVar("T")
CUT = "the connection is closed without an answer"


@dataclass
class Answer:
    status: int = 200
    body: bytes = b'{"data": []}'
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class ScriptedServer:
    """Gives one answer after the other, the last one again and again, and keeps what it was asked."""

    url: str
    answers: list[Answer | str]
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def scripted() -> Iterator[Callable[..., ScriptedServer]]:
    """Give a function that starts a server on loopback with a script of answers."""
    running: list[ThreadingHTTPServer] = []

    def start(*answers: Answer | str) -> ScriptedServer:
        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                told.requests.append((self.command, self.path, dict(self.headers), body))
                answer = told.answers.pop(0) if len(told.answers) > 1 else told.answers[0]
                if isinstance(answer, str):
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)

            do_GET = do_POST = _answer  # noqa: N815 (http.server's names)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (http.server's name)
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        told = ScriptedServer(f"http://127.0.0.1:{server.server_port}", list(answers))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        running.append(server)
        return told

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def call(url: str, work: Callable[[RestageClient], Awaitable[T]], **options: Any) -> T:
    """Do one thing with a client."""

    async def run() -> T:
        async with RestageClient(url, **options) as client:
            return await work(client)

    return asyncio.run(run())


@pytest.fixture
def photo(tmp_path: Path) -> Photo:
    file = tmp_path / "hall.jpg"
    file.write_bytes(b"\xff\xd8\xff" + bytes(200_000))
    return read_photo(file)


def test_call_is_made_again_until_the_server_is_back(scripted: Callable[..., ScriptedServer]) -> None:
    """503, a gateway's error page and a cut connection are waited out; the caller hears why."""
    server = scripted(
        Answer(503, b'{"detail": "Redis is not available"}', {"Retry-After": "1"}),
        CUT,
        Answer(502, b"<html>"),
        Answer(),
    )
    heard: list[str] = []
    assert call(server.url, lambda client: client.list_models(), on_wait=heard.append) == []
    assert len(server.requests) == 4
    assert "Redis is not available" in heard[0]
    assert "cut" in heard[1]
    assert "502" in heard[2]


def test_submission_is_repeated_with_the_same_key_and_body(scripted: Callable[..., ScriptedServer]) -> None:
    """After a lost answer the server can tell that it is the same submission."""
    server = scripted(CUT, Answer(201, b'{"batch": {"id": "b"}}'))
    answer = call(server.url, lambda client: client.submit({"items": []}, idempotency_key="k1"), api_key="rsk_1")
    assert answer == {"batch": {"id": "b"}}
    first, second = server.requests
    assert first[2]["Idempotency-Key"] == second[2]["Idempotency-Key"] == "k1"
    assert first[2]["Authorization"] == "Bearer rsk_1"
    assert first[3] == second[3]


def test_patience_ends(scripted: Callable[..., ScriptedServer]) -> None:
    """A server that stays away is given up, with the last reason."""
    server = scripted(Answer(503, b'{"detail": "Redis is not available"}'))
    with pytest.raises(ServerUnreachable, match="Redis is not available"):
        call(server.url, lambda client: client.list_models(), patience_seconds=0.1)


def test_long_retry_after_is_not_waited_for_in_vain(scripted: Callable[..., ScriptedServer]) -> None:
    """Where the server asks for more patience than there is, the call ends at once."""
    server = scripted(Answer(503, b"{}", {"Retry-After": "3600"}))
    with pytest.raises(ServerUnreachable):
        call(server.url, lambda client: client.list_models())
    assert len(server.requests) == 1


def test_nothing_listening_fails_at_once_and_says_how_to_start() -> None:
    """Nobody waits two minutes for a server that was never started."""
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(ServerUnreachable, match="restage up"):
        call(url, lambda client: client.list_models())


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://127.0.0.1", "http://[::"])
def test_address_that_is_none_is_explained(url: str) -> None:
    """A missing scheme is the usual slip."""
    with pytest.raises(ServerUnreachable, match="is no URL of a server"):
        call(url, lambda client: client.list_models())


def test_other_server_is_noticed(scripted: Callable[..., ScriptedServer]) -> None:
    """A web page in place of JSON means that the address is wrong."""
    server = scripted(Answer(200, b"<html>hello</html>"))
    with pytest.raises(ServerUnreachable, match="check RESTAGE_URL"):
        call(server.url, lambda client: client.list_models())


def test_refusal_is_not_repeated(scripted: Callable[..., ScriptedServer]) -> None:
    """A 4xx would be the same again."""
    body = json.dumps({"code": "not_found", "detail": "no such batch"}).encode()
    server = scripted(Answer(404, body))
    with pytest.raises(ApiError, match="404 not_found") as caught:
        call(server.url, lambda client: client.read_batch("b"))
    assert caught.value.code == "not_found"
    assert len(server.requests) == 1


def form(server: ScriptedServer) -> dict[str, Any]:
    return {"url": f"{server.url}/bucket", "fields": {"key": "k", "policy": "p"}}


def test_photo_goes_out_as_a_form_with_the_file_last(scripted: Callable[..., ScriptedServer], photo: Photo) -> None:
    """S3 ignores what follows the file, and refuses a body without a length; the API's key stays out of it."""
    server = scripted(Answer(204, b""))
    counted: list[int] = []
    call(server.url, lambda client: client.send_photo(photo, form(server), counted.append), api_key="rsk_1")
    _, path, headers, body = server.requests[0]
    assert path == "/bucket"
    assert "Authorization" not in headers
    assert body.index(b'name="key"') < body.index(b'name="policy"') < body.index(b'name="file"; filename="hall.jpg"')
    assert photo.path.read_bytes() in body
    assert sum(counted) == photo.size_bytes


def test_photo_is_sent_again_after_a_cut(scripted: Callable[..., ScriptedServer], photo: Photo) -> None:
    """The bar does not count what was lost."""
    server = scripted(CUT, Answer(500, b"<Error><Code>InternalError</Code></Error>"), Answer(204, b""))
    counted: list[int] = []
    call(server.url, lambda client: client.send_photo(photo, form(server), counted.append))
    assert len(server.requests) == 3
    assert sum(counted) == photo.size_bytes


def test_refused_photo_is_not_sent_again(scripted: Callable[..., ScriptedServer], photo: Photo) -> None:
    """What the store says is passed on, with the address that it said it at."""
    server = scripted(Answer(400, b"<Error><Code>BadDigest</Code><Message>other bytes</Message></Error>"))
    with pytest.raises(TransferFailed, match=r"127\.0\.0\.1:.*400 BadDigest: other bytes") as caught:
        call(server.url, lambda client: client.send_photo(photo, form(server), lambda _: None))
    assert caught.value.http_status == 400
    assert len(server.requests) == 1


def output(server: ScriptedServer, data: bytes) -> dict[str, str]:
    return {"url": f"{server.url}/result", "sha256": hashlib.sha256(data).hexdigest()}


def test_result_is_checked_and_appears_whole(scripted: Callable[..., ScriptedServer], tmp_path: Path) -> None:
    """What lies in the folder is what the worker wrote."""
    server = scripted(Answer(200, b"picture"))
    call(server.url, lambda client: client.fetch_result(output(server, b"picture"), tmp_path / "a.webp"))
    assert [file.name for file in tmp_path.iterdir()] == ["a.webp"]
    assert (tmp_path / "a.webp").read_bytes() == b"picture"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(200, b"other"), "other bytes than the worker wrote"),
        (Answer(403, b"<Error><Code>AccessDenied</Code></Error>"), "403 AccessDenied"),
        (Answer(200, b"pic", {"Content-Length": "7"}), "cannot be reached"),
        (CUT, "cannot be reached"),
    ],
)
def test_result_that_is_not_right_leaves_no_file(
    scripted: Callable[..., ScriptedServer], tmp_path: Path, answer: Answer | str, message: str
) -> None:
    """An earlier file stays as it was, and no half of a new one is left."""
    server = scripted(answer)
    (tmp_path / "a.webp").write_bytes(b"earlier")
    with pytest.raises(TransferFailed, match=message):
        call(server.url, lambda client: client.fetch_result(output(server, b"picture"), tmp_path / "a.webp"))
    assert [file.name for file in tmp_path.iterdir()] == ["a.webp"]
    assert (tmp_path / "a.webp").read_bytes() == b"earlier"


def batch_answer(status: str, **job: Any) -> dict[str, Any]:
    """Write a batch of one job as the server shows it."""
    shown = {
        "id": "j",
        "index": 0,
        "name": "hall.jpg",
        "model": "m",
        "status": status,
        "error": None,
        "progress": None,
        "timings": {"queue": 9.0, "fetch": 0.5, "run": 1.0, "store": None},
    } | job
    counts = dict.fromkeys(("queued", "running", "succeeded", "failed", "cancelled"), 0) | {status: 1, "total": 1}
    return {
        "id": "b",
        "status": "finished" if status in {"succeeded", "failed"} else status,
        "counts": counts,
        "jobs": [shown],
    }


def as_json(http_status: int, /, **body: Any) -> Answer:
    return Answer(http_status, json.dumps(body).encode())


def take_through(server: ScriptedServer, photo: Photo, out_dir: Path) -> BatchRun:
    """Take one photo through upload, submission, waiting and download."""

    async def work(client: RestageClient) -> BatchRun:
        with BatchProgress(Console(file=io.StringIO())) as progress:
            run = BatchRun(client, BatchRequest([photo.path], label="12 Oak St"), progress)
            await run.submit()
            await run.finish(out_dir)
        return run

    return call(server.url, work)


@pytest.fixture
def script(scripted: Callable[..., ScriptedServer]) -> Callable[..., ScriptedServer]:
    """Give a function that starts a server whose URLs in answers lead back to itself."""

    def start(*answers: Answer | str) -> ScriptedServer:
        server = scripted(*answers)
        server.answers = [
            replace(answer, body=answer.body.replace(b"SERVER", server.url.encode()))
            if isinstance(answer, Answer)
            else answer
            for answer in answers
        ]
        return server

    return start


FORM = as_json(201, uploads=[{"upload_id": "u", "index": 0, "url": "SERVER/form", "fields": {"key": "k"}}], errors=[])
EXPIRED = Answer(403, b"<Error><Code>AccessDenied</Code></Error>")
SENT = Answer(204, b"")
ACCEPTED = as_json(201, batch=batch_answer("queued"), errors=[])
PICTURE = b"picture"
OUTPUT = {"url": "SERVER/result", "sha256": hashlib.sha256(PICTURE).hexdigest(), "content_type": "image/webp"}
DONE = batch_answer("succeeded", output=OUTPUT)


def test_photo_goes_from_form_to_file(script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path) -> None:
    """The way that all goes well: one call after the other, and the result in the folder."""
    server = script(
        FORM, SENT, ACCEPTED, as_json(200, **batch_answer("running")), as_json(200, **DONE), Answer(200, PICTURE)
    )
    run = take_through(server, photo, tmp_path)
    (result,) = run.results
    assert result.is_done
    assert (result.model, result.seconds) == ("m", 1.5)
    assert (tmp_path / "001-hall.webp").read_bytes() == PICTURE
    submitted = json.loads(server.requests[2][3])
    assert submitted == {"defaults": {}, "items": [{"upload_id": "u", "name": "hall.jpg"}], "label": "12 Oak St"}


def test_expired_form_is_replaced_once(script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path) -> None:
    """Behind many large photos a form may expire before its turn; the batch names the new upload."""
    fresh = as_json(201, uploads=[{"upload_id": "u2", "index": 0, "url": "SERVER/form", "fields": {}}], errors=[])
    server = script(FORM, EXPIRED, fresh, SENT, ACCEPTED, as_json(200, **DONE), Answer(200, PICTURE))
    assert take_through(server, photo, tmp_path).results[0].is_done
    assert json.loads(server.requests[4][3])["items"][0]["upload_id"] == "u2"


def test_stored_photo_is_not_sent_again(script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path) -> None:
    """Where the store has the bytes already there is no form and nothing to send."""
    exists = as_json(201, uploads=[{"upload_id": "u", "index": 0, "exists": True}], errors=[])
    server = script(exists, ACCEPTED, as_json(200, **DONE), Answer(200, PICTURE))
    assert take_through(server, photo, tmp_path).results[0].is_done


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        (
            [as_json(422, code="nothing_accepted", errors=[{"index": 0, "code": "file_too_large", "detail": "d"}])],
            "file_too_large: d",
        ),
        ([FORM, EXPIRED, FORM, EXPIRED], "upload_failed: .*AccessDenied"),
        (
            [
                FORM,
                SENT,
                as_json(422, code="nothing_accepted", errors=[{"index": 0, "code": "damaged_image", "detail": "d"}]),
            ],
            "damaged_image: d",
        ),
    ],
)
def test_refused_photo_ends_without_a_batch(
    script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path, answers: list[Answer], error: str
) -> None:
    """Whoever refuses it, and when, the photo's row says why, and nothing is waited for."""
    run = take_through(script(*answers), photo, tmp_path)
    assert run.batch_id is None
    assert run.results[0].status == "refused"
    assert re.match(error, run.results[0].error or "")


def test_failed_job_is_told_with_its_reason(
    script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path
) -> None:
    """Nothing is fetched, and code and detail are those of the job."""
    failed = batch_answer("failed", error={"code": "invalid_input", "detail": "truncated"})
    run = take_through(script(FORM, SENT, ACCEPTED, as_json(200, **failed)), photo, tmp_path)
    assert (run.results[0].status, run.results[0].error) == ("failed", "invalid_input: truncated")
    assert run.batch_id == "b"
    assert not run.results[0].is_done


def test_download_is_repeated_with_a_fresh_url(
    script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path
) -> None:
    """A URL that expired meanwhile is replaced by reading the job again."""
    server = script(
        FORM, SENT, ACCEPTED, as_json(200, **DONE), EXPIRED, as_json(200, **DONE["jobs"][0]), Answer(200, PICTURE)
    )
    assert take_through(server, photo, tmp_path).results[0].is_done
    assert server.requests[5][1] == "/v1/jobs/j"


def test_result_that_cannot_be_written_is_told(
    script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path
) -> None:
    """The job succeeded; that its file could not be written is another matter, and is told as such."""
    server = script(FORM, SENT, ACCEPTED, as_json(200, **DONE), Answer(200, PICTURE))
    run = take_through(server, photo, tmp_path / "gone")
    assert run.results[0].status == "succeeded"
    assert not run.results[0].is_done
    assert "cannot be written" in (run.results[0].error or "")


def test_mistake_in_the_request_ends_the_run(
    script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path
) -> None:
    """What is wrong with the request as a whole is no photo's fault: it is raised with its places."""
    problem = as_json(
        422,
        code="invalid_request",
        detail="1 mistake",
        errors=[{"location": "/label", "code": "c", "detail": "too long"}],
    )
    with pytest.raises(ApiError, match="/label: too long"):
        take_through(script(FORM, SENT, problem), photo, tmp_path)
