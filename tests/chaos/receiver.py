"""Somebody's web server that is told when batches have finished, and is in trouble now and then."""

import json
import random
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.chaos.history import History


class Receiver:
    """Notes each webhook in the history, and answers a share of them with 500.

    Args:
        history: is told id, batch and answer of each.
        trouble: share of the requests that are answered with 500.
        seed: of which these are.
    """

    def __init__(self, history: History, *, trouble: float, seed: int) -> None:
        draw = random.Random(seed)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status = 500 if draw.random() < trouble else 204
                webhook_id, batch_id = self.headers["webhook-id"], told["data"]["id"]
                history.add("webhook", webhook_id=webhook_id, batch_id=batch_id, status=status)
                with suppress(OSError):  # whoever called may be dead by now
                    self.send_response(status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (http.server's word)
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/staged"
        threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
