"""What the handlers work with; made once in `server.main` and handed to them by Litestar."""

from dataclasses import dataclass

import anyio

from server.api.crowding import LargeBodies, OpenStreams
from server.api.stopping import Stopping
from server.changes import Changes
from server.keys import KeyStore
from server.ledger.api_side import ApiLedger
from server.prompts import Prompts
from server.registry import Registry
from server.settings import Settings
from server.store import Store
from server.submit.accept import Submitter
from server.webhooks.signing import WebhookSecrets


@dataclass(frozen=True)
class Services:
    """Everything that a handler may need. `keys` is None where nobody needs one (`auth.mode: none`)."""

    settings: Settings
    registry: Registry
    prompts: Prompts
    keys: KeyStore | None
    ledger: ApiLedger
    store: Store
    store_threads: anyio.CapacityLimiter
    submitter: Submitter
    changes: Changes
    webhook_secrets: WebhookSecrets
    streams: OpenStreams
    large_bodies: LargeBodies
    stopping: Stopping
