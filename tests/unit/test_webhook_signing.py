"""Webhooks' signatures: those of Standard Webhooks, with secrets of its form, of whoever submitted the batch."""

import base64
import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.keys import KeyStore
from server.settings import WebhooksSettings
from server.webhook_secret import check_webhook_secret, new_webhook_secret, webhook_secret_bytes
from server.webhooks.addresses import InvalidWebhook
from server.webhooks.signing import WebhookSecrets, signature_headers

# Published with the reference implementations of Standard Webhooks.
PUBLISHED = {
    "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "timestamp": 1614265330,
    "body": b'{"test": 2432232314}',
    "signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
}


def secret_of(num_bytes: int) -> str:
    return "whsec_" + base64.b64encode(b"x" * num_bytes).decode()


def test_the_published_signature_is_made() -> None:
    """Receivers' libraries must accept what is sent, so the published example must come out to the letter."""
    made = signature_headers(PUBLISHED["id"], PUBLISHED["timestamp"], PUBLISHED["body"], [PUBLISHED["secret"]])

    assert made == {
        "webhook-id": PUBLISHED["id"],
        "webhook-timestamp": "1614265330",
        "webhook-signature": PUBLISHED["signature"],
    }


@given(st.binary(max_size=200), st.integers(0, 2**33))
def test_two_secrets_make_two_signatures(body: bytes, timestamp: int) -> None:
    """While a secret is rotated, each of the two must verify the body; the newest comes first."""
    secrets = [new_webhook_secret(), new_webhook_secret()]

    signatures = signature_headers("msg_a_1", timestamp, body, secrets)["webhook-signature"].split(" ")

    assert signatures == [
        "v1,"
        + base64.b64encode(
            hmac.new(base64.b64decode(secret[6:]), b"msg_a_1.%d." % timestamp + body, hashlib.sha256).digest()
        ).decode()
        for secret in secrets
    ]


def test_secrets_are_drawn_anew() -> None:
    """Every secret must have the announced form, 256 bits, and be another one."""
    drawn = {new_webhook_secret() for _ in range(50)}

    assert len(drawn) == 50
    assert {len(webhook_secret_bytes(secret)) for secret in drawn} == {32}


@pytest.mark.parametrize(("num_bytes", "is_right"), [(23, False), (24, True), (64, True), (65, False), (0, False)])
def test_secrets_have_24_to_64_bytes(num_bytes: int, is_right: bool) -> None:
    """The bounds of Standard Webhooks hold."""
    if is_right:
        assert webhook_secret_bytes(secret_of(num_bytes)) == b"x" * num_bytes
    else:
        with pytest.raises(ValueError, match="24 to 64 random bytes"):
            webhook_secret_bytes(secret_of(num_bytes))


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "whsec_",
        secret_of(32)[6:],
        secret_of(32) + "\n",
        "WHSEC_" + secret_of(32)[6:],
        "whsec_whsec_" + secret_of(30)[6:],
        secret_of(32).replace("e", "é", 2),
        "whsec_" + "-_" * 20,
        "whsk_" + secret_of(32)[6:],
    ],
)
def test_other_secrets_are_refused(secret: str) -> None:
    """Anything else must be refused, without being repeated."""
    with pytest.raises(ValueError, match="needs whsec_") as caught:
        check_webhook_secret(secret)
    assert not secret.strip() or secret.strip() == "whsec_" or secret.strip() not in str(caught.value)


def test_without_keys_the_servers_secret_signs() -> None:
    """With auth.mode none the secret of the settings must sign for everybody; without one a webhook is refused."""
    secret = new_webhook_secret()
    secrets = WebhookSecrets(WebhooksSettings.model_validate({"secret": secret}), None)
    assert secrets.of("none") == secrets.of(None) == (secret,)
    secrets.check("none")

    with pytest.raises(InvalidWebhook, match=r"webhooks\.secret_file") as caught:
        WebhookSecrets(WebhooksSettings(), None).check("none")
    assert caught.value.errors[0].location == "/webhook"


def test_with_keys_each_has_its_own(tmp_path) -> None:
    """The secrets of the key that submitted must sign, and not the server's; a key without one is told what to do."""
    keys = KeyStore(tmp_path / "keys.jsonl")
    first, second = (keys.add(owner, "user").split("_")[1] for owner in ("a", "b"))
    secrets = WebhookSecrets(WebhooksSettings.model_validate({"secret": new_webhook_secret()}), keys)

    assert secrets.of(first) == keys.webhook_secrets(first)
    assert secrets.of(first) != secrets.of(second)
    assert secrets.of(None) == secrets.of("none") == secrets.of("zzzzzzzz") == ()
    secrets.check(first)
    keys.revoke(first)
    assert secrets.of(first) == ()
    with pytest.raises(InvalidWebhook, match=f"rotate-webhook {first}"):
        secrets.check(first)
