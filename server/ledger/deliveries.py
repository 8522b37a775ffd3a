"""Webhooks that are due, and how each attempt to deliver one went."""

from dataclasses import asdict
from typing import Literal

from server.jobs import Delivery, DueWebhook
from server.ledger.api_scripts import ApiScripts
from server.ledger.reading import parse_batch_reply
from server.ledger.records import dump


class LedgerWebhooks(ApiScripts):
    """The calls of the webhooks' sender."""

    SCRIPTS = ("take_webhooks", "note_delivery")

    async def take_webhooks(self, *, limit: int, lease_seconds: float) -> list[DueWebhook]:
        """Return deliveries that are due; those that are not noted are due again after `lease_seconds`."""
        replies = await self._run("take_webhooks", limit, int(lease_seconds * 1000))
        return [
            DueWebhook(parse_batch_reply(batch), int(round_), int(attempt), int(since))
            for round_, attempt, since, batch in replies
        ]

    async def note_delivery(
        self,
        batch_id: str,
        round: int,  # noqa: A002 (the word of the ledger)
        attempt: int,
        *,
        outcome: Literal["delivered", "retrying", "gave_up"],
        http_status: int | None,
        detail: str | None,
        delay_seconds: float | None,
    ) -> None:
        """Log an attempt in its batch; the next one is due after `delay_seconds`, or there is none."""
        # The ledger's clock says when.
        delivery = Delivery(round, attempt, 0, outcome, http_status, detail)
        delay_ms = "" if delay_seconds is None else int(delay_seconds * 1000)
        await self._run("note_delivery", batch_id, round, dump(asdict(delivery)), delay_ms)
