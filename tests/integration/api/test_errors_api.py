"""Every refusal is a problem document with an id that the log knows too, whatever is thrown at the server."""

import asyncio
import logging

import pytest

JSON = {"Content-Type": "application/json"}


def post(api, content, headers=None):
    return api.http.post("/v1/batches", content=content, headers=JSON if headers is None else headers)


def check_problem(response, status, code):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["type"] == f"urn:restage:error:{code}"
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["title"]
    assert problem["detail"]
    assert problem["request_id"] == response.headers["x-request-id"]
    return problem


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "malformed_body"),
        (b"{", 400, "malformed_body"),
        (b"\xff\xfe{}", 400, "malformed_body"),
        (b'{"items": [{"upload_id": "\xed\xa0\x80"}]}', 400, "malformed_body"),
        (b"[" * 100_000 + b"]" * 100_000, 400, "malformed_body"),
        (b'{"items":' + b"[" * 50 + b"]" * 50 + b"}", 400, "malformed_body"),
        (b'{"items": NaN}', 400, "malformed_body"),
        (b'{"items": 1e999}', 400, "malformed_body"),
        (b'{"items": ' + b"9" * 5000 + b"}", 400, "malformed_body"),
        (b'{"items": [], "items": []}', 400, "malformed_body"),
        (b'{"items": [{"upload_id": "a\\u0000"}]}', 422, "invalid_request"),
        (b'{"items": [{"upload_id": "a\\ud800"}]}', 422, "invalid_request"),
        (b'{"items": [{"upload_id": "a", "metadata": {"\\ud800": "x"}}]}', 422, "invalid_request"),
        (b'{"items": "x"}', 422, "invalid_request"),
        (b"null", 422, "invalid_request"),
        (b'"x"', 422, "invalid_request"),
        (b" " * 1_000_001, 413, "payload_too_large"),
    ],
)
def test_bodies_that_break_parsers_are_refused(api, content, status, code):
    """Malformed, ambiguous and hostile bodies get a 4xx that says what is wrong, never a 500."""
    check_problem(post(api, content), status, code)


def test_a_body_without_a_length_is_cut_off_at_the_limit(api):
    """The limit holds for what arrives, not for what is announced."""
    response = post(api, (b" " * 100_000 for _ in range(11)))
    check_problem(response, 413, "payload_too_large")


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/mixed; boundary=x", "application/jsonp", None])
def test_other_content_types_are_refused(api, content_type):
    """Only JSON and forms are read, and only when the request says so."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    check_problem(post(api, b"{}", headers), 415, "unsupported_media_type")


def test_a_thousand_mistakes_are_not_all_told(api):
    """The number of mistakes in an answer is bounded; the text says how many there are."""
    body = {"items": [{"upload_id": "a"}], **{f"x{number}": 1 for number in range(1000)}}
    problem = check_problem(api.http.post("/v1/batches", json=body), 422, "invalid_request")
    assert len(problem["errors"]) == 50
    assert "999 more" in problem["detail"]


def test_a_body_that_trickles_is_given_up(open_api):
    """A client that never ends its body does not hold its connection for ever."""
    sent = []

    async def receive():
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/batches", "query_string": b"", "headers": headers}
    scope |= {"scheme": "http", "server": ("a", 80), "client": ("b", 1), "root_path": "", "http_version": "1.1"}
    with open_api(RESTAGE__SERVER__BODY_TIMEOUT_SECONDS="0.05") as api:
        api.http.blocking_portal.call(api.http.app, scope, receive, send)
    assert sent[0]["status"] == 408
    assert b'"request_timeout"' in sent[1]["body"]


def test_a_host_that_is_none_is_refused(api):
    """A request with a broken Host header is the caller's fault."""
    check_problem(api.http.get("/v1/models", headers={"Host": "a b"}), 400, "bad_request")


def test_unknown_routes_and_methods_are_problems_too(api):
    """What Litestar answers by itself has the same shape, and 405 says what is allowed."""
    check_problem(api.http.get("/v1/nothing"), 404, "not_found")
    check_problem(api.http.get("/schema"), 404, "not_found")
    response = api.http.delete("/v1/models")
    check_problem(response, 405, "method_not_allowed")
    assert "GET" in response.headers["allow"]


@pytest.mark.parametrize(
    ("given", "is_kept"), [("abc-DEF_1.2", True), ("a" * 129, False), ("a b", False), ("a\x7f", False), ("", False)]
)
def test_a_sane_request_id_is_taken_over(api, given, is_kept):
    """A client's own id comes back if it is harmless; else a new one is drawn."""
    response = api.http.get("/health/live", headers={"X-Request-Id": given})
    assert (response.headers["x-request-id"] == given) == is_kept
    assert len(response.headers["x-request-id"]) >= 8


def test_a_mistake_of_ours_is_logged_and_not_shown(api, capfd, caplog):
    """What nobody expected becomes a 500 without internals; its traceback is in the log."""
    # No request can do this: the ledger's answer is broken on purpose.
    api.redis.hset("restage:batch:" + "a" * 32, mapping={"id": "a" * 32, "owner": "local"})
    with caplog.at_level(logging.ERROR):
        response = api.http.get("/v1/batches/" + "a" * 32)
    problem = check_problem(response, 500, "internal_error")
    assert "KeyError" not in response.text
    log = "".join(capfd.readouterr()) + caplog.text
    assert "request.failed" in log
    assert "KeyError" in log
    assert problem["request_id"] in log


def test_every_answer_has_the_safe_headers(api):
    """No answer may be taken for another type, shown in another site's frame, or leak a signed address."""
    for path in ("/health/live", "/v1/models", "/nothing", "/docs"):
        headers = api.http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["content-security-policy"] == "frame-ancestors 'none'"
    assert api.http.get("/v1/models").headers["cache-control"] == "no-store"
