"""An HTTP application that tells what it was asked."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Told(http.server.BaseHTTPRequestHandler):
    """Answers a GET with its headers, in JSON, names in lower case."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = json.dumps({name.lower(): value for name, value in self.headers.items()}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Connections that break are what some tests are about."""


@contextmanager
def running(address: tuple[str, int], handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[int]:
    """A server with this handler; its port."""
    server = _Server(address, handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def telling(address: tuple[str, int]) -> Iterator[None]:
    """The application, running."""
    with running(address, Told):
        yield
