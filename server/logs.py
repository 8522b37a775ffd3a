"""How every process writes its log: events with fields, as lines for people or as JSON, on stderr."""

import logging
import sys
from typing import TYPE_CHECKING

import structlog

from server.settings import LogSettings

if TYPE_CHECKING:
    from structlog.types import EventDict, Processor

# Libraries whose own INFO is about themselves, not about our work.
_QUIET = ("uvicorn", "uvicorn.error", "httpx", "httpcore", "PIL", "asyncio", "filelock")
# Of a store that is away it warns at each try, and we say once what comes of it.
_QUIETER = ("urllib3",)


# These may have several lines.
_OUR_OWN_TEXTS = frozenset({"event", "exception", "stack"})


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
    for name in _QUIETER:
        logging.getLogger(name).setLevel(logging.ERROR)


def _escape_controls(_logger: object, _method: str, event: "EventDict") -> "EventDict":
    """Write what cannot be seen as an escape: a path may hold what would move a terminal's cursor, or feign a line."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable() and name not in _OUR_OWN_TEXTS:
            event[name] = value.encode("unicode_escape").decode("ascii")
    return event


def _rendering(settings: LogSettings) -> "list[Processor]":
    if settings.format == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=False)]
    return [
        _escape_controls,
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=24
        ),
    ]
