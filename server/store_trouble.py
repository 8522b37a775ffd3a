"""What can go wrong between us and the object store: how often it is tried again, and what it is called in the end."""

import http.client
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from xml.etree.ElementTree import ParseError

import urllib3
from minio.error import MinioException, S3Error
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    MaxRetryError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    ResponseError,
)

from server.errors import ObjectChanged, ObjectNotFound, StoreTooSlow, StoreUnavailable
from server.settings import StoreSettings
from server.store_deadline import Deadlines, running_transfer


class EmptyObject(Exception):
    """Raised when a range of an object was asked for that has no byte at all."""


class Patience(urllib3.Retry):
    """Tries again after refused connections, resets and server errors, but not after silence.

    Silence has already cost the whole read timeout, and the caller is waiting. Nor after the end of the call's time.
    """

    def increment(self, *args: Any, error: Exception | None = None, **kwargs: Any) -> "Patience":
        """Count one more failure; raises `error` if it was silence, or comes too late to try again."""
        transfer = running_transfer()
        if error is not None and (_is_silence(error) or (transfer is not None and transfer.is_over)):
            raise error
        return super().increment(*args, error=error, **kwargs)


class StoreTrouble:
    """Turns all that the S3 client raises into errors of ours.

    Their text is our own: what urllib3 says may hold a URL, and a URL its signature.
    """

    def __init__(self, settings: StoreSettings, deadlines: Deadlines) -> None:
        self._endpoint = settings.endpoint
        self._read_timeout_seconds = settings.read_timeout_seconds
        self._transfer_timeout_seconds = settings.transfer_timeout_seconds
        self._deadlines = deadlines

    @contextmanager
    def translated(self, bucket: str, key: str | None = None, *, moves_object: bool = False) -> Generator[None]:
        """Run a call about `bucket`, and `key` in it; one that moves a whole object gets more time than others.

        Raises:
            ObjectNotFound: there is no such object.
            ObjectChanged: it is not the one that was asked for.
            EmptyObject: it has no bytes where a range was asked for.
            StoreTooSlow: its time was over, though bytes may still have come.
            StoreUnavailable: anything else.
        """
        place = f"{bucket}/{key}" if key else bucket
        # Without an object to move, an answer is either soon whole or not worth waiting for.
        seconds = self._transfer_timeout_seconds if moves_object else 2 * self._read_timeout_seconds
        with self._deadlines.limited(min(seconds, self._transfer_timeout_seconds)) as transfer:
            try:
                with self._named(place):
                    yield
            except (StoreUnavailable, ObjectNotFound, ObjectChanged, EmptyObject) as error:
                if transfer.is_over:
                    raise self._too_slow(transfer.seconds, place) from error
                raise
            # What was cut may look whole, as an error or as an answer.
            if transfer.is_over:
                raise self._too_slow(transfer.seconds, place)

    @contextmanager
    def _named(self, place: str) -> Generator[None]:
        try:
            yield
        except S3Error as error:
            raise self._explain(error, place) from error
        except MinioException as error:
            raise self.unavailable(f"gave an answer for {place} that is not S3's") from error
        except MaxRetryError as error:
            raise self.unavailable(f"could not be used for {place}: {_name_cause(error)}") from error
        except ReadTimeoutError as error:
            raise self.unavailable(f"was silent for {self._read_timeout_seconds:g} s over {place}") from error
        except (HTTPError, http.client.HTTPException, OSError) as error:
            raise self.unavailable(f"broke off over {place} ({type(error).__name__})") from error
        except (ParseError, UnicodeDecodeError) as error:
            raise self.unavailable(f"gave an answer for {place} that cannot be read") from error

    def unavailable(self, what: str) -> StoreUnavailable:
        """Make the error for a store that `what` (such as "has no bucket x")."""
        return StoreUnavailable(f"the store at {self._endpoint} {what}")

    def _too_slow(self, seconds: float, place: str) -> StoreTooSlow:
        return StoreTooSlow(f"the store at {self._endpoint} did not get done with {place} within {seconds:g} s")

    def _explain(self, error: S3Error, place: str) -> Exception:
        match error.code:
            case "NoSuchKey" | "NoSuchObject":
                return ObjectNotFound(f"nothing is stored under {place}")
            case "PreconditionFailed":
                return ObjectChanged(f"{place} was stored again with other bytes after it was accepted")
            case "InvalidRange":
                return EmptyObject(place)
            case code:
                return self.unavailable(f"answered {code} for {place}")


def _is_silence(error: Exception) -> bool:
    if isinstance(error, ReadTimeoutError):
        return True
    # A block of a body that was not taken in time: urllib3 makes one error of all that breaks a connection off.
    return isinstance(error, ProtocolError) and any(isinstance(cause, TimeoutError) for cause in error.args)


def _name_cause(error: MaxRetryError) -> str:
    """Say in our words why all tries failed."""
    match error.reason:
        case ResponseError() as answers:
            return str(answers)  # "too many 503 error responses"
        case NewConnectionError() | ConnectTimeoutError():
            return "no connection"
        case reason:
            return type(reason).__name__
