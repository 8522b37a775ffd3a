"""Tells webhooks that their batches have finished: every API process sends what the ledger says is due."""

import asyncio
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from random import SystemRandom
from typing import Any, Final

import structlog

from server.errors import DependencyError
from server.jobs import Batch, DueWebhook
from server.ledger.deliveries import LedgerWebhooks
from server.periodic import Periodic
from server.settings import Settings
from server.webhooks.addresses import InvalidWebhook, check_url
from server.webhooks.delivery import Answer, decide
from server.webhooks.posting import NotDelivered, Poster
from server.webhooks.signing import signature_headers

_log = structlog.stdlib.get_logger()
_MOST_AT_ONCE: Final = 8
# On top of the time that a request may take: the keys are read, and the outcome is noted.
_LEASE_MARGIN_SECONDS: Final = 30.0


class WebhookSender:
    """Sends all that is due, a few at a time, until it is cancelled.

    A delivery that is cut off between its sending and its note is sent again, with the same `webhook-id`.

    Args:
        ledger: says what is due, and keeps what came of it.
        settings: of webhooks, and how often to look.
        secrets_of: the secrets that sign for a key; none where it has been revoked.
        view: a batch as clients see it, as JSON, without URLs.
        poster: sends; left out, one for the settings.
    """

    def __init__(
        self,
        ledger: LedgerWebhooks,
        settings: Settings,
        *,
        secrets_of: Callable[[str | None], tuple[str, ...]],
        view: Callable[[Batch], dict[str, Any]],
        poster: Poster | None = None,
    ) -> None:
        self._ledger = ledger
        self._settings = settings.webhooks
        self._interval_seconds = settings.sweep.interval_seconds
        self._secrets_of = secrets_of
        self._view = view
        self._poster = poster or Poster(settings.webhooks)
        self._random = SystemRandom()
        self._user_agent = f"Restage/{version('restage')}"

    async def run(self) -> None:
        """Work, for ever."""
        await Periodic("webhooks", self.send_due, interval_seconds=self._interval_seconds).run()

    async def send_due(self) -> None:
        """Send all that is due now, and what becomes due meanwhile.

        Raises:
            DependencyError: Redis is away; what was taken is due again when its lease has run out.
        """
        running: set[asyncio.Task[None]] = set()
        failures: list[BaseException] = []
        try:
            while True:
                num_free = 0 if failures else _MOST_AT_ONCE - len(running)
                due = await self._take(num_free) if num_free else []
                running |= {asyncio.create_task(self._deliver(one)) for one in due}
                if not running:
                    break
                # A slow receiver does not keep others waiting: the look for more comes anyway.
                done, running = await asyncio.wait(
                    running, timeout=self._interval_seconds, return_when=asyncio.FIRST_COMPLETED
                )
                failures += [error for task in done if (error := task.exception())]
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if failures:
            raise failures[0]

    async def _take(self, limit: int) -> list[DueWebhook]:
        lease_seconds = self._settings.timeout_seconds + _LEASE_MARGIN_SECONDS
        return await self._ledger.take_webhooks(limit=limit, lease_seconds=lease_seconds)

    async def _deliver(self, due: DueWebhook) -> None:
        answer = await self._attempt(due)
        decision = decide(
            answer,
            attempt=due.attempt,
            elapsed_seconds=time.time() - due.due_since_ms / 1000,
            give_up_seconds=self._settings.give_up_seconds,
            jitter=self._random.random(),
        )
        # The URL is not logged: what identifies us to its receiver may stand in it.
        log = _log.bind(batch_id=due.batch.id, round=due.round, attempt=due.attempt, status=answer.http_status)
        match decision.outcome:
            case "delivered":
                log.info("webhook.delivered")
            case "retrying":
                log.info("webhook.postponed", detail=answer.detail, delay_seconds=round(decision.delay_seconds or 0))
            case "gave_up":
                log.warning("webhook.given_up", detail=answer.detail)
        await self._ledger.note_delivery(
            due.batch.id,
            due.round,
            due.attempt,
            outcome=decision.outcome,
            http_status=answer.http_status,
            detail=answer.detail,
            delay_seconds=decision.delay_seconds,
        )

    async def _attempt(self, due: DueWebhook) -> Answer:
        url = due.batch.webhook.url if due.batch.webhook else ""
        try:
            target = check_url(url, self._settings.allowed_hosts)
            secrets = self._secrets_of(due.batch.key_id)
            if not secrets:
                return Answer(None, "the key has no secret to sign with; it may have been revoked")
            body = self._body(due)
            status = await self._poster.post(target, self._headers(due, body, secrets), body)
        except InvalidWebhook:
            return Answer(None, "the URL is not allowed any more; see webhooks.allowed_hosts")
        except DependencyError:
            return Answer(None, "the secrets could not be read")
        except NotDelivered as error:
            return Answer(None, str(error))
        return Answer(status, _detail(status))

    def _body(self, due: DueWebhook) -> bytes:
        finished_at = datetime.fromtimestamp(due.due_since_ms / 1000, UTC).isoformat(timespec="milliseconds")
        content = {
            "type": "batch.finished",
            "timestamp": finished_at.replace("+00:00", "Z"),
            "data": self._view(due.batch),
        }
        return json.dumps(content, separators=(",", ":")).encode("ascii")

    def _headers(self, due: DueWebhook, body: bytes, secrets: tuple[str, ...]) -> dict[str, str]:
        return {
            "Content-Type": "application/json",
            "User-Agent": self._user_agent,
            **signature_headers(f"msg_{due.batch.id}_{due.round}", int(time.time()), body, secrets),
        }


def _detail(status: int) -> str | None:
    if 200 <= status < 300:
        return None
    if 300 <= status < 400:
        return f"answered with status {status}; redirects are not followed"
    return f"answered with status {status}"
