"""Signs what is sent to webhooks as Standard Webhooks wants it, with the secrets of whoever submitted the batch."""

import base64
import hashlib
import hmac
from collections.abc import Sequence

from server.keys import KeyStore
from server.settings import WebhooksSettings
from server.webhook_secret import webhook_secret_bytes
from server.webhooks.addresses import InvalidWebhook


class WebhookSecrets:
    """Whose secrets sign what.

    Args:
        settings: `secret` signs where nobody has a key.
        keys: None where nobody needs one (`auth.mode: none`).
    """

    def __init__(self, settings: WebhooksSettings, keys: KeyStore | None) -> None:
        secret = settings.secret
        self._own = () if secret is None else (secret.get_secret_value(),)
        self._keys = keys

    def of(self, key_id: str | None) -> tuple[str, ...]:
        """Give the secrets that sign for a key, the newest first; none where it was revoked or never had one.

        Raises:
            KeysUnavailable: the file of keys cannot be read.
        """
        if self._keys is None:
            return self._own
        return self._keys.webhook_secrets(key_id) if key_id is not None else ()

    def check(self, key_id: str | None) -> None:
        """See that a webhook can be signed, before its batch is accepted.

        Raises:
            InvalidWebhook: there is no secret to sign with.
            KeysUnavailable: the file of keys cannot be read.
        """
        if self.of(key_id):
            return
        if self._keys is None:
            detail = "this server has no secret to sign with; its operator sets webhooks.secret or webhooks.secret_file"
        else:
            detail = (
                f"the key has no secret to sign with; on the server `restage keys rotate-webhook {key_id}` makes one"
            )
        raise InvalidWebhook(detail, "/webhook")


def signature_headers(message_id: str, timestamp: int, body: bytes, secrets: Sequence[str]) -> dict[str, str]:
    """Sign a body.

    Args:
        message_id: the same for every attempt to deliver the same thing.
        timestamp: seconds since 1970 UTC, of this attempt.
        body: as it is sent, to the byte.
        secrets: `whsec_…`; each makes a signature, so that a receiver may know any of them.

    Returns:
        The headers `webhook-id`, `webhook-timestamp` and `webhook-signature`.

    Raises:
        ValueError: a secret has another form.
    """
    content = f"{message_id}.{timestamp}.".encode("ascii") + body
    digests = [hmac.digest(webhook_secret_bytes(secret), content, hashlib.sha256) for secret in secrets]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(digest).decode('ascii')}" for digest in digests),
    }
