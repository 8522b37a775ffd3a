"""What a webhook is signed with: the form of Standard Webhooks, `whsec_` and 24 to 64 random bytes in base64."""

import base64
import binascii
import secrets
from typing import Final

_PREFIX: Final = "whsec_"
_NEW_BYTES: Final = 32
_FEWEST_BYTES: Final = 24
_MOST_BYTES: Final = 64


def new_webhook_secret() -> str:
    """Draw a secret of 256 random bits."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(_NEW_BYTES)).decode("ascii")


def check_webhook_secret(secret: str) -> str:
    """Give a secret back as it is.

    Raises:
        ValueError: it has another form; the text does not repeat it.
    """
    webhook_secret_bytes(secret)
    return secret


def webhook_secret_bytes(secret: str) -> bytes:
    """Decode a secret into the 24 to 64 bytes that sign.

    Raises:
        ValueError: it has another form; the text does not repeat it.
    """
    try:
        decoded = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        decoded = b""
    if not secret.startswith(_PREFIX) or not _FEWEST_BYTES <= len(decoded) <= _MOST_BYTES:
        raise ValueError(f"needs {_PREFIX} and {_FEWEST_BYTES} to {_MOST_BYTES} random bytes in base64")
    return decoded
