"""A script that is sent now and whose answer is read later, so that what follows need not wait for Redis's disk."""

from collections.abc import Sequence
from typing import Any, cast

import redis
from redis.exceptions import NoScriptError, RedisError


class SentScript:
    """One call of a script on a connection of its own, which goes back to the client's pool with the answer.

    Where it could not be sent, `answer` calls the script in the usual way.

    Args:
        client: whose pool lends the connection.
        script: registered with the client.
        keys: of the call.
        arguments: of the call.
    """

    def __init__(self, client: redis.Redis, script: Any, keys: Sequence[str], arguments: Sequence[object]) -> None:
        self._script, self._keys, self._arguments = script, keys, arguments
        self._pool: Any = cast("Any", client).connection_pool
        self._connection: Any = None
        try:
            self._connection = self._pool.get_connection()
            self._connection.send_command("EVALSHA", script.sha, len(keys), *keys, *arguments)
        except RedisError:
            self._give_back()

    @property
    def is_sent(self) -> bool:
        """Whether the answer is on its way; no longer, once it was read."""
        return self._connection is not None

    @property
    def is_answered(self) -> bool:
        """Whether there is something to read, if only that the other side has hung up."""
        try:
            return self.is_sent and bool(self._connection.can_read(0))
        except RedisError:
            self._give_back()  # it was reset: nothing can be read from it any more, and `answer` calls anew
            return False

    def answer(self) -> Any:
        """Wait for the answer, and return it. From the second time on the script is called anew.

        Raises:
            RedisError: there is none.
        """
        if self.is_sent:
            try:
                return self._connection.read_response()
            except NoScriptError:
                pass  # Redis has forgotten it: a call in the usual way brings the text along
            finally:
                self._give_back()
        return self._script(keys=self._keys, args=[*self._arguments])

    def _give_back(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool.release(connection)
