"""Reviews, version 2: a small HTTP server as an application would write one. Standard library only; copied to run.

It answers with what it was asked, and by whom, as far as anybody told it.

python3 reviews.py ADDRESS PORT VERSION
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Reviews(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    version = ""

    def do_GET(self) -> None:
        self._answer({})

    def do_DELETE(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        self._answer({"received": body.decode("utf-8", "replace")})

    def _answer(self, content: dict[str, str]) -> None:
        asked = {"version": self.version, "method": self.command, "path": self.path}
        caller = {"caller": self.headers.get("x-forwarded-client-cert", "")}
        body = json.dumps({**asked, **caller, **content}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    Reviews.version = sys.argv[3]
    ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Reviews).serve_forever()
