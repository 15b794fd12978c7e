"""An OpenTelemetry collector, as far as spans need one: OTLP over HTTP, in JSON."""

from __future__ import annotations

import http.server
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.http_app import running


class Collector:
    """Takes what is posted to it. `status` is what it answers."""

    def __init__(self) -> None:
        self.status = 200
        self.posts: list[dict[str, Any]] = []

    def spans(self) -> list[dict[str, Any]]:
        """Everything that it took, with attributes and `service.name` as plain values."""
        found = []
        for post in self.posts:
            for resource in post["resourceSpans"]:
                name = values(resource["resource"])["service.name"]
                for scope in resource["scopeSpans"]:
                    assert scope["scope"]["name"] == "uproxy"
                    found += [{**span, "service": name, "attributes": values(span)} for span in scope["spans"]]
        return found


def values(holder: dict[str, Any]) -> dict[str, Any]:
    """Attributes as plain values."""
    found = {}
    for attribute in holder["attributes"]:
        ((kind, value),) = attribute["value"].items()
        assert (kind, type(value)) in (("stringValue", str), ("intValue", str))  # 64 bits are text in JSON
        found[attribute["key"]] = int(value) if kind == "intValue" else value
    return found


@contextmanager
def collecting(address: tuple[str, int]) -> Iterator[Collector]:
    collector = Collector()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            assert self.headers["content-type"] == "application/json"
            body = self.rfile.read(int(self.headers["content-length"]))
            if collector.status == 200:
                collector.posts.append(json.loads(body))
            self.send_response(collector.status)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None: ...

    with running(address, Handler):
        yield collector
