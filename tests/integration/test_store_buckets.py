"""The buckets get their rules for browsers and for their lifecycle, shown on a real S3 server."""

import io
import secrets
import socket
import threading
from contextlib import contextmanager

import httpx
import pytest
from structlog.testing import capture_logs

from server.embedded import EmbeddedStore
from server.settings import LimitsSettings, RetentionSettings
from server.store import Store

RETENTION, LIMITS = RetentionSettings(), LimitsSettings()
PAGE, OTHER_PAGE = "https://app.example.com", "https://elsewhere.example.com"
OWN_RULES = {
    "cors": "<CORSConfiguration><CORSRule>{id}<AllowedOrigin>https://mine.example</AllowedOrigin>"
    "<AllowedMethod>PUT</AllowedMethod></CORSRule></CORSConfiguration>",
    "lifecycle": "<LifecycleConfiguration><Rule>{id}<Filter><Prefix>tmp/</Prefix></Filter><Status>Enabled</Status>"
    "<Expiration><Days>1</Days></Expiration></Rule></LifecycleConfiguration>",
}


@pytest.fixture
def make_store(s3):
    """Give a function that makes a Store with two buckets that only this test has; keyword arguments are settings."""
    names = {"uploads_bucket": f"up-{secrets.token_hex(4)}", "outputs_bucket": f"out-{secrets.token_hex(4)}"}
    stores = []

    def make(**changes):
        store = Store(s3.settings.model_copy(update={**names, **changes}))
        stores.append(store)
        store.ensure_buckets()
        return store

    yield make
    for store in stores:
        store.close()


def prepare(store, retention=RETENTION):
    with capture_logs() as logs:
        store.prepare_buckets(retention, LIMITS)
    return logs


def buckets(store):
    return store._settings.uploads_bucket, store._settings.outputs_bucket


def stored(store, bucket, subject):
    """Give each rule that the store keeps as a list of (name, text)."""
    return [[(each.tag.rpartition("}")[2], each.text) for each in rule.iter()] for rule in read(store, bucket, subject)]


def read(store, bucket, subject):
    return store._buckets._read(bucket, subject)


def send_form(store, key, origin):
    form = store.upload_form(key, content_type="image/jpeg", max_size_bytes=10, ttl_seconds=60)
    return httpx.post(form.url, data=form.fields, files={"file": ("a.jpg", b"photo")}, headers={"Origin": origin})


def ask_first(url, origin, method):
    """Send what a browser sends before a request of another origin's page that is more than a plain form."""
    headers = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": "x-any"}
    return httpx.options(url, headers=headers)


def output_url(store, key):
    store.put_output(key, b"result", "image/webp")
    return store.output_url(key, filename="a.webp", content_type="image/webp", ttl_seconds=600)[0]


def test_any_page_may_send_photos_and_fetch_results(make_store):
    """By default a page of any origin can post a form, read its answer, and read a result."""
    store = make_store()
    assert prepare(store) == []
    key = secrets.token_hex(16)
    form_url = f"{store._upload_url}/"  # with its slash, or SeaweedFS answers for all buckets at once
    url = output_url(store, f"{key}/1/output.webp")
    for origin in (PAGE, OTHER_PAGE, "null"):
        asked = ask_first(form_url, origin, "POST")
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] in {origin, "*"}
        assert asked.headers["access-control-allow-methods"] == "POST"
        assert asked.headers["access-control-allow-headers"] == "x-any"
        assert "access-control-allow-credentials" not in asked.headers
        sent = send_form(store, key, origin)
        assert sent.status_code == 204
        assert sent.headers["access-control-allow-origin"] in {origin, "*"}
        assert ask_first(url, origin, "GET").status_code == 200
        fetched = httpx.get(url, headers={"Origin": origin})
        assert fetched.content == b"result"
        assert fetched.headers["access-control-allow-origin"] in {origin, "*"}


def test_a_preflight_of_the_form_itself_passes(make_store):
    """The address of the form, just as it is given out, allows a page to post with a progress bar."""
    store = make_store()
    prepare(store)
    asked = ask_first(store._upload_url, PAGE, "POST")
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] in {PAGE, "*"}


def test_only_the_named_pages_may(make_store):
    """With origins in the settings, pages of others read nothing; a form sent without a page works as ever."""
    store = make_store(cors_origins=[PAGE])
    assert prepare(store) == []
    key = secrets.token_hex(16)
    url = output_url(store, f"{key}/1/output.webp")
    for origin, allowed in ((PAGE, PAGE), (OTHER_PAGE, None)):
        assert ask_first(f"{store._upload_url}/", origin, "POST").headers.get("access-control-allow-origin") == allowed
        assert send_form(store, key, origin).headers.get("access-control-allow-origin") == allowed
        assert httpx.get(url, headers={"Origin": origin}).headers.get("access-control-allow-origin") == allowed
    assert httpx.get(url).content == b"result"


def test_rules_follow_the_settings(make_store):
    """The next start brings our rules up to date, and takes away those that were switched off."""
    store = make_store()
    prepare(store)
    uploads, outputs = buckets(store)
    assert ("Days", "76") in stored(store, uploads, "lifecycle")[0]
    assert ("Days", "74") in stored(store, outputs, "lifecycle")[0]
    changed = make_store(cors_origins=[PAGE, "https://*.example.org"])
    longer = RetentionSettings(records_seconds=400 * 86_400)
    for _ in range(2):  # the second time there is nothing to do
        assert prepare(changed, longer) == []
        (lifecycle,) = stored(store, outputs, "lifecycle")
        assert ("ID", "restage-backstop") in lifecycle
        assert ("Days", "814") in lifecycle
        (cors,) = stored(store, uploads, "cors")
        assert [text for name, text in cors if name == "AllowedOrigin"] == [PAGE, "https://*.example.org"]
    assert prepare(make_store(cors_origins=[], lifecycle=False)) == []
    for bucket in (uploads, outputs):
        assert stored(store, bucket, "cors") == stored(store, bucket, "lifecycle") == []


def test_rules_that_are_right_are_not_written_again(make_store):
    """Each start asks, and writes only what differs."""
    store = make_store()
    prepare(store)
    calls = []
    call = store._buckets._call
    store._buckets._call = lambda *arguments: (calls.append(arguments[0]), call(*arguments))[1]
    prepare(store)
    assert calls == ["GET"] * 4


@pytest.mark.parametrize("rule_id", ["<ID>mine</ID>", ""], ids=["with an id", "without"])
@pytest.mark.parametrize("subject", ["cors", "lifecycle"])
@pytest.mark.parametrize("is_on", [True, False])
def test_rules_of_an_operator_are_left_alone(make_store, subject, rule_id, is_on):
    """Somebody else's rules stay as they are; that ours are missing is logged once for each bucket."""
    store = make_store(cors_origins=["*"] if is_on else [], lifecycle=is_on)
    uploads, outputs = buckets(store)
    store._buckets._call("PUT", uploads, subject, OWN_RULES[subject].format(id=rule_id).encode())
    before = stored(store, uploads, subject)
    logs = prepare(store)
    assert stored(store, uploads, subject) == before
    assert bool(stored(store, outputs, subject)) == is_on
    wanted = [("store.rules_kept", "warning", subject, uploads)] if is_on else []
    assert [(log["event"], log["log_level"], log["subject"], log["bucket"]) for log in logs] == wanted


def answer(status, body, content_type="application/xml"):
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return (head + body).encode()


@contextmanager
def answering(data):
    """Listen on a free port and give every request the same answer; yields host:port."""

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65_536)
                connection.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    "data",
    [
        answer("501 Not Implemented", "<Error><Code>NotImplemented</Code></Error>"),
        answer("405 Method Not Allowed", "<Error><Code>MethodNotAllowed</Code></Error>"),
        answer("403 Forbidden", "<Error><Code>AccessDenied</Code></Error>"),
        answer("404 Not Found", "<Error><Code>NoSuchBucket</Code></Error>"),
        answer("501 Not Implemented", "", "text/plain"),
        answer("500 Internal Server Error", "<Error><Code>InternalError</Code></Error>"),
        answer("200 OK", "<ListBucketResult><Name>b</Name></ListBucketResult>"),
        answer("200 OK", "<html>", "text/html"),
        answer("200 OK", ""),
        b"",
    ],
    ids=["501", "405", "403", "404", "501 bare", "500", "a listing", "a page", "nothing", "hung up"],
)
def test_a_store_without_such_rules_stops_nothing(s3, data):
    """Whatever a store answers that knows no CORS and no lifecycle: one warning for each, and the server goes on."""
    with answering(data) as endpoint:
        store = Store(s3.settings.model_copy(update={"endpoint": endpoint}))
        logs = prepare(store)
        assert [(log["event"], log["log_level"], log["subject"]) for log in logs] == [
            ("store.rules_refused", "warning", "cors"),
            ("store.rules_refused", "warning", "lifecycle"),
        ]
        assert all(endpoint in log["error"] and "Signature" not in log["error"] for log in logs)
        store.close()
        silenced = Store(s3.settings.model_copy(update={"endpoint": endpoint, "cors_origins": [], "lifecycle": False}))
        assert prepare(silenced) == []
        silenced.close()


def test_objects_live_on_under_the_lifecycle_rule(tmp_path):
    """With its rule set, SeaweedFS stores, reads and deletes as before, over a restart too, and stamps no object."""
    server = EmbeddedStore(tmp_path / "store")
    server.start()
    server.wait_ready()
    store = Store(server.settings)
    try:
        store.put_output("a/1/before.webp", b"before", "image/webp")
        assert prepare(store) == []
        store.put_output("a/1/after.webp", b"after", "image/webp")
        etag = store.put_upload("photo", io.BytesIO(b"photo"), 5, "image/jpeg")
        server.stop()
        server.start()
        server.wait_ready()
        store.close()
        store = Store(server.settings)
        store.put_output("a/1/later.webp", b"later", "image/webp")
        for name in ("before", "after", "later"):
            assert store.read_output(f"a/1/{name}.webp") == name.encode()
            # A time to live that is stamped on an object when it is written could never be taken back.
            filer = f"http://127.0.0.1:{server.ports[6]}/buckets/restage-outputs/a/1/{name}.webp"
            assert httpx.get(filer, params={"metadata": "true"}).json()["TtlSec"] == 0
        assert store.fetch_upload("photo", etag) == b"photo"
        assert prepare(store) == []
        assert store.delete(["outputs/a/1/", "uploads/photo"])
    finally:
        store.close()
        server.kill()
