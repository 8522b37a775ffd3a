"""What the API page shows to receivers of webhooks works as it stands there."""

import re
import time
from email.message import Message
from pathlib import Path
from typing import Any

from server.webhook_secret import new_webhook_secret
from server.webhooks.signing import signature_headers

PAGE = Path(__file__).parent.parent.parent / "docs" / "api.md"


def test_receivers_can_verify_as_the_api_page_shows() -> None:
    """The function of the page takes what is signed with the secret now, and refuses everything else."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    [block] = [block for block in blocks if "def verify(" in block]
    page: dict[str, Any] = {}
    exec(block, page)  # noqa: S102 (our own page)
    verify = page["verify"]

    old, new = new_webhook_secret(), new_webhook_secret()
    body, now = '{"type":"batch.finished","label":"Größe"}'.encode(), int(time.time())
    for moment in (now - 200, now, now + 200):
        headers = signature_headers("msg_1", moment, body, [new, old])
        assert verify(old, headers, body)
        assert verify(new, as_message(headers), body)
    signed = signature_headers("msg_1", now, body, [old])
    assert not verify(new, signed, body)
    assert not verify(old, signed, body + b" ")
    for moment in (now - 400, now + 400, 0, -now):
        assert not verify(old, signature_headers("msg_1", moment, body, [old]), body)
    right = signed["webhook-signature"]
    for changed in (
        {"webhook-id": "msg_2"},
        {"webhook-timestamp": str(now + 1)},
        {"webhook-timestamp": ""},
        {"webhook-timestamp": "now"},
        {"webhook-timestamp": "9" * 5000},
        {"webhook-signature": ""},
        {"webhook-signature": "v1,"},
        {"webhook-signature": right.removeprefix("v1,")},
        {"webhook-signature": f"v2{right.removeprefix('v1')}"},
        {"webhook-signature": right[:-4]},
        {"webhook-signature": f"{right}\xe4"},
    ):
        assert not verify(old, signed | changed, body), changed
        assert not verify(old, as_message(signed | changed), body), changed
    for name in signed:
        without = {known: value for known, value in signed.items() if known != name}
        assert not verify(old, without, body), name
        assert not verify(old, as_message(without), body), name


def as_message(headers: dict[str, str]) -> Message:
    """Give headers as `http.server` and WSGI frameworks do, with names in any case."""
    message = Message()
    for name, value in headers.items():
        message[name.title()] = value
    return message
