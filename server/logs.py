"""How every process writes its log: events with fields, as lines for people or as JSON, on stderr."""

import logging
import sys
from typing import TYPE_CHECKING

import structlog

from server.settings import LogSettings

if TYPE_CHECKING:
    from structlog.types import Processor

# Libraries whose own INFO is about themselves, not about our work.
_QUIET = ("uvicorn", "uvicorn.error", "httpx", "httpcore", "urllib3", "PIL", "asyncio", "filelock")


def configure_logging(settings: LogSettings) -> None:
    """Send our events, and what libraries log through `logging`, to stderr in one format.

    Call it once, first thing in a process. Keys, prompts and the query of a presigned URL are never put into an event.
    """
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_rendering(settings)],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    logging.captureWarnings(capture=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def _rendering(settings: LogSettings) -> "list[Processor]":
    if settings.format == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=False)]
    return [
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=24
        )
    ]
