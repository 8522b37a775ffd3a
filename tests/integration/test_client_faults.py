"""The client against a server that answers as it is told: faults that a real one shows only now and then."""

import asyncio
import hashlib
import io
import json
import re
import threading
import zipfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import pytest
from rich.console import Console

from server.client.batch import BatchRun
from server.client.errors import ApiError, ClientError, ServerUnreachable, TransferFailed
from server.client.http import RestageClient
from server.client.journal import Journal
from server.client.photos import Photo, read_photo
from server.client.progress import BatchProgress
from server.client.record import Record
from server.client.request import BatchRequest, PhotoResult
from server.client.sending import PhotoSender
from server.client.transfers import fetch_result, send_photo
from server.ports import free_ports

T = TypeVar("T")
CUT = "the connection is closed without an answer"


@dataclass
class Answer:
    status: int = 200
    body: bytes = b'{"data": []}'
    headers: dict[str, str] = field(default_factory=dict)


class PatientServer(ThreadingHTTPServer):
    """One that the kernel keeps connections for until they are taken: by itself only five."""

    request_queue_size = 64


@dataclass
class ScriptedServer:
    """Gives one answer after the other, the last one again and again, or asks `answer_to`; keeps what it was asked."""

    url: str
    answers: list[Answer | str]
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    answer_to: Callable[[str, bytes], Answer] | None = None


@pytest.fixture
def scripted() -> Iterator[Callable[..., ScriptedServer]]:
    """Give a function that starts a server on loopback with a script of answers."""
    running: list[PatientServer] = []

    def start(*answers: Answer | str) -> ScriptedServer:
        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                told.requests.append((self.command, self.path, dict(self.headers), body))
                if told.answer_to:
                    answer = told.answer_to(self.path, body)
                else:
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

        server = PatientServer(("127.0.0.1", 0), Handler)
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


@pytest.mark.parametrize("key", ["rsk_1\nX: y", "rsk_\x7f", "rsk_ü"])
def test_key_that_is_none_is_not_sent_and_not_shown(scripted: Callable[..., ScriptedServer], key: str) -> None:
    """A key that was pasted wrongly is told at once, and stands in no message."""
    server = scripted(Answer())
    with pytest.raises(ClientError, match="RESTAGE_API_KEY is no key") as caught:
        call(server.url, lambda client: client.list_models(), api_key=key)
    assert "rsk_" not in str(caught.value)
    assert server.requests == []
    assert call(server.url, lambda client: client.list_models(), api_key="rsk_1\n") == []
    assert server.requests[0][2]["Authorization"] == "Bearer rsk_1"


def test_server_that_went_away_is_told_from_one_that_never_was(scripted: Callable[..., ScriptedServer]) -> None:
    """Who has reached a server is not told to start one."""
    server = scripted(Answer(503, b'{"detail": "1000 jobs are open at most"}'))
    with pytest.raises(ServerUnreachable, match="1000 jobs are open") as caught:
        call(server.url, lambda client: client.list_models(), patience_seconds=0.1)
    assert "restage up" not in str(caught.value)


def test_settings_are_refused_before_photos_are_sent(scripted: Callable[..., ScriptedServer]) -> None:
    """That the upload of the question does not exist is no mistake; anything else is told as the server said it."""
    lost = {"index": 0, "code": "upload_not_found", "detail": "d"}
    good = as_json(422, code="nothing_accepted", errors=[lost])
    bad = as_json(422, code="nothing_accepted", errors=[lost | {"code": "unknown_preset", "detail": "no style 'x'"}])
    server = scripted(good, bad)
    call(server.url, lambda client: client.check_settings({"items": []}))
    with pytest.raises(ClientError, match="unknown_preset: no style 'x'"):
        call(server.url, lambda client: client.check_settings({"items": []}))


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
    call(server.url, lambda client: send_photo(client, photo, form(server), counted.append), api_key="rsk_1")
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
    call(server.url, lambda client: send_photo(client, photo, form(server), counted.append))
    assert len(server.requests) == 3
    assert sum(counted) == photo.size_bytes


def test_photo_that_changed_meanwhile_is_not_sent(scripted: Callable[..., ScriptedServer], photo: Photo) -> None:
    """Another size than announced would be refused after all of it was sent."""
    server = scripted(Answer(204, b""))
    photo.path.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(TransferFailed, match="was changed while it was sent"):
        call(server.url, lambda client: send_photo(client, photo, form(server), lambda _: None))
    assert server.requests == []


def test_store_that_stays_away_is_given_up(scripted: Callable[..., ScriptedServer], photo: Photo) -> None:
    """Patience ends, with the last reason, and the user has heard why it took so long."""
    server = scripted(Answer(503, b"<Error><Code>SlowDown</Code></Error>"))
    heard: list[str] = []
    with pytest.raises(TransferFailed, match="503 SlowDown"):
        call(
            server.url,
            lambda client: send_photo(client, photo, form(server), lambda _: None),
            patience_seconds=0.5,
            on_wait=heard.append,
        )
    assert "waiting for the store" in heard[0]


def test_refused_photo_is_not_sent_again(scripted: Callable[..., ScriptedServer], photo: Photo) -> None:
    """What the store says is passed on, with the address that it said it at."""
    server = scripted(Answer(400, b"<Error><Code>BadDigest</Code><Message>other bytes</Message></Error>"))
    with pytest.raises(TransferFailed, match=r"127\.0\.0\.1:.*400 BadDigest: other bytes") as caught:
        call(server.url, lambda client: send_photo(client, photo, form(server), lambda _: None))
    assert caught.value.http_status == 400
    assert len(server.requests) == 1


def fetch(server: ScriptedServer, file: Path) -> None:
    """Fetch what must be the bytes `picture`."""
    output = {"url": f"{server.url}/result", "sha256": hashlib.sha256(b"picture").hexdigest()}
    call(server.url, lambda client: fetch_result(client, output, file, tag="j"))


def test_result_is_checked_and_appears_whole(scripted: Callable[..., ScriptedServer], tmp_path: Path) -> None:
    """What lies in the folder is what the worker wrote."""
    server = scripted(Answer(200, b"picture"))
    fetch(server, tmp_path / "a.webp")
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
        fetch(server, tmp_path / "a.webp")
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
        "label": "12 Oak St",
        "status": "finished" if status in {"succeeded", "failed"} else status,
        "counts": counts,
        "jobs": [shown],
    }


def as_json(http_status: int, /, **body: Any) -> Answer:
    return Answer(http_status, json.dumps(body).encode())


def take_through(
    server: ScriptedServer, photo: Photo, out_dir: Path, journal: Journal | None = None, *, as_archive: bool = False
) -> BatchRun:
    """Take one photo through upload, submission, waiting and download."""

    async def work(client: RestageClient) -> BatchRun:
        with BatchProgress(Console(file=io.StringIO())) as progress:
            run = BatchRun(client, BatchRequest([photo.path], label="12 Oak St"), progress, journal)
            await run.submit()
            await run.finish(out_dir, as_archive=as_archive)
        return run

    return call(server.url, work, patience_seconds=2.0)


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


def test_photos_are_sent_at_the_same_time(scripted: Callable[..., ScriptedServer], tmp_path: Path) -> None:
    """Sixteen small photos are on their way at once, and no more forms are asked for than will be used soon."""
    num_photos, at_once = 48, 16
    photos = [tmp_path / f"{number}.jpg" for number in range(num_photos)]
    for file in photos:
        file.write_bytes(b"\xff\xd8\xff")
    all_arrived = threading.Barrier(at_once)  # a store that answers none before it has sixteen
    unused: list[int] = []
    server = scripted()

    def answer_to(path: str, body: bytes) -> Answer:
        if path == "/bucket":
            all_arrived.wait(30)
            return SENT
        num_asked = len(json.loads(body)["files"])
        num_sent = sum(request[1] == "/bucket" for request in server.requests)
        num_announced = sum(len(json.loads(one[3])["files"]) for one in server.requests if one[1] == "/v1/uploads")
        unused.append(num_announced - num_sent)
        forms = [{"upload_id": "u", "index": index, **form(server)} for index in range(num_asked)]
        return as_json(201, uploads=forms, errors=[])

    server.answer_to = answer_to
    results = [PhotoResult(index, file) for index, file in enumerate(photos)]
    journal = Journal()
    progress = BatchProgress(Console(file=io.StringIO()))
    call(server.url, lambda client: PhotoSender(client, results, journal, progress).send_all(), patience_seconds=0.1)
    assert [result.error for result in results if result.error] == []
    assert sorted(journal.record.arrived) == list(range(num_photos))
    assert max(unused) <= 2 * at_once


def test_lost_answer_never_makes_a_second_batch(
    script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path
) -> None:
    """A run that ends between submission and answer leaves key and body; the next sends both again, and no photo."""
    journal = Journal()
    gone = script(FORM, SENT, CUT)
    with pytest.raises(ServerUnreachable):
        take_through(gone, photo, tmp_path, journal)
    left = Record.from_bytes(journal.record.to_bytes())
    back = script(ACCEPTED, as_json(200, **DONE), Answer(200, PICTURE))
    assert take_through(back, photo, tmp_path, Journal(record=left)).results[0].is_done
    first, again = gone.requests[2], back.requests[0]
    assert first[2]["Idempotency-Key"] == again[2]["Idempotency-Key"]
    assert first[1::2] == again[1::2]


def test_key_that_belongs_to_another_body_is_told(
    script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path
) -> None:
    """Where the server does not take the repeated submission for the same one, no second batch is made unasked."""
    conflict = as_json(409, code="idempotency_conflict", detail="another body")
    with pytest.raises(ClientError, match="--anew submits a new batch"):
        take_through(script(FORM, SENT, conflict), photo, tmp_path)


def test_uploads_that_expire_again_are_refused(
    script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path
) -> None:
    """Sending anew is tried once, with another key; a server that loses that too has the last word."""
    lost = [{"index": 0, "code": "upload_not_found", "detail": "d"}]
    gone = as_json(422, code="nothing_accepted", errors=lost)
    server = script(FORM, SENT, gone, FORM, SENT, gone)
    run = take_through(server, photo, tmp_path)
    assert (run.results[0].status, run.results[0].error) == ("refused", "upload_not_found: d")
    assert len({request[2]["Idempotency-Key"] for request in server.requests if request[1] == "/v1/batches"}) == 2


def test_result_that_has_expired_is_told(script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path) -> None:
    """A batch that is looked at after its results were removed ends, and says what became of them."""
    expired = batch_answer("succeeded", output=None)
    run = take_through(script(FORM, SENT, ACCEPTED, as_json(200, **expired)), photo, tmp_path)
    assert not run.results[0].is_done
    assert "removed the result after its time" in (run.results[0].error or "")
    assert run.num_to_fetch == 0


def test_other_bytes_are_fetched_once_more_and_then_told(
    script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path
) -> None:
    """What is not the recorded picture never gets its name, and is not fetched for ever."""
    other = Answer(200, b"other")
    server = script(FORM, SENT, ACCEPTED, as_json(200, **DONE), other, as_json(200, **DONE["jobs"][0]), other)
    run = take_through(server, photo, tmp_path)
    assert "other bytes than the worker wrote" in (run.results[0].error or "")
    assert run.num_to_fetch == 1
    assert len(server.requests) == 7
    assert [file.name for file in tmp_path.iterdir()] == [photo.path.name]


def zip_of(*pictures: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for number, picture in enumerate(pictures):
            archive.writestr(f"{number}.webp", picture)
        archive.writestr("manifest.json", "{}")
    return data.getvalue()


WHOLE = zip_of(PICTURE)
FLIPPED = WHOLE.replace(PICTURE, b"pictUre")


@pytest.mark.parametrize(
    "cut", [Answer(200, WHOLE[:-1]), Answer(200, WHOLE[:40]), Answer(200, b""), Answer(200, FLIPPED), CUT, Answer(503)]
)
def test_archive_that_was_cut_is_fetched_again(
    script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path, cut: Answer | str
) -> None:
    """Without a length only the archive itself tells that it is whole; until then it has no name."""
    server = script(FORM, SENT, ACCEPTED, as_json(200, **DONE), cut, Answer(200, WHOLE))
    run = take_through(server, photo, tmp_path, as_archive=True)
    assert run.archive == tmp_path / "12 Oak St.zip"
    assert run.results[0].is_done
    assert (tmp_path / "12 Oak St.zip").read_bytes() == WHOLE
    assert {file.name for file in tmp_path.iterdir()} == {photo.path.name, "12 Oak St.zip"}
    assert [request[1] for request in server.requests[4:]] == ["/v1/batches/b/archive"] * 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(200, zip_of(b"another")), "the archive lacks 1 of 1 results"),
        (as_json(410, code="output_expired", detail="removed"), "410: removed"),
        (Answer(404, b"<html>"), "404"),
    ],
)
def test_archive_that_will_not_come_right_is_told(
    script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path, answer: Answer, reason: str
) -> None:
    """Fetching again would change nothing: an earlier file stays, and the photo's row says why."""
    (tmp_path / "12 Oak St.zip").write_bytes(b"earlier")
    server = script(FORM, SENT, ACCEPTED, as_json(200, **DONE), answer)
    run = take_through(server, photo, tmp_path, as_archive=True)
    assert run.archive is None
    assert reason in (run.results[0].error or "")
    assert len(server.requests) == 5
    assert (tmp_path / "12 Oak St.zip").read_bytes() == b"earlier"


def test_archive_that_lies_there_is_not_fetched_again(
    script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path
) -> None:
    """After a death behind the last step there is nothing left to do."""
    (tmp_path / "12 Oak St.zip").write_bytes(WHOLE)
    server = script(FORM, SENT, ACCEPTED, as_json(200, **DONE))
    assert take_through(server, photo, tmp_path, as_archive=True).results[0].is_done
    assert len(server.requests) == 4


def test_archive_of_nothing_is_not_fetched(script: Callable[..., ScriptedServer], photo: Photo, tmp_path: Path) -> None:
    """Where every job failed there is no archive, and no file that looks like one."""
    failed = batch_answer("failed", error={"code": "invalid_input", "detail": "truncated"})
    run = take_through(script(FORM, SENT, ACCEPTED, as_json(200, **failed)), photo, tmp_path, as_archive=True)
    assert run.archive is None
    assert run.results[0].error == "invalid_input: truncated"
    assert [file.name for file in tmp_path.iterdir()] == [photo.path.name]
