"""A small HTTP/1.1 server for operators: admin (15000), metrics (15020) and readiness (15021).

One request per connection, then `connection: close`: a scrape or a probe needs no more, and nothing that
follows a request can be read as a second one. Everything is bounded: the head (8 KiB), the time (5 s for the
request to come, 5 s for the answer to be taken; only `/tap` goes on until its reader leaves), the connections (32
per listener). A request with a body is refused: no route takes one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import cast
from urllib.parse import parse_qsl

from uproxy import log_levels
from uproxy.tap import MAX_TAPS, Outlet, Taps

MAX_HEAD = 8 * 1024
"""Bytes of request line and headers; nginx and Apache take 8 KiB too, probes and scrapers send under 1."""
MAX_CONNECTIONS = 32
"""At once and per listener; further ones get 503. Prometheus, a probe and a few people are under ten."""
TIMEOUT_S = 5.0
"""For the request to arrive, and again for the answer to be taken."""

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"
JSON_LINES = "application/x-ndjson"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 5.6.2
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") (/[!-~]*) HTTP/1\.([01])")  # origin-form only: RFC 9112 3.2.1
_HEADER_LINE = re.compile(rb"(" + _TOKEN + rb"):[ \t]*([\t -~\x80-\xff]*)")  # no line folding: RFC 9112 5.2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """A request without a body. `query` keeps the last value of a name given twice."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Response:
    """An answer. `allow` names the methods of a 405."""

    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    content_type: str = TEXT
    allow: str = ""


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer that goes on: `begin` is told where to write, and returns what to call when the reader has left."""

    begin: Callable[[Outlet], Callable[[], None]]
    content_type: str


Handler = Callable[[Request], "Response | Stream | asyncio.Future[Response]"]
"""Answers at once, or when others have: it runs on the control loop and must not block."""


class BadRequestError(Exception):
    """A request that is not served; the status says which rule it broke."""

    def __init__(self, status: HTTPStatus, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class Pages:
    """A socket that is listened on, and what was accepted there. As a context manager it ends at once."""

    def __init__(self, server: asyncio.Server, connections: set[_Connection]) -> None:
        self._server = server
        self._connections = connections

    @property
    def sockets(self) -> Sequence[socket.socket]:
        return self._server.sockets

    def leave(self) -> None:
        """Accept no more; what was accepted is answered while the loop runs."""
        loop = asyncio.get_running_loop()
        for sock in self._server.sockets:
            loop.remove_reader(sock.fileno())
        # Not yet: asyncio resets what it accepted in this turn when its server is closed before the next one.
        loop.call_soon(self._server.close)

    async def answered(self) -> None:
        """Leave, and wait until all that ask have their answers, or took longer than anybody may. Streams go on."""
        self.leave()
        await asyncio.sleep(0)
        while any(not one.streaming for one in self._connections):  # noqa: ASYNC110 - their timers end it
            await asyncio.sleep(0.01)

    def close(self) -> None:
        self._server.close()

    async def __aenter__(self) -> Pages:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


async def serve(
    address: str, port: int, routes: Mapping[str, Handler], listening: socket.socket | None = None
) -> Pages:
    """Listen and answer by exact path. OSError if the address cannot be bound. `listening`: a socket that does so."""
    loop = asyncio.get_running_loop()
    open_connections: set[_Connection] = set()

    def connected() -> _Connection:
        return _Connection(loop, routes, open_connections)

    if listening is not None:
        return Pages(await loop.create_server(connected, sock=listening), open_connections)
    return Pages(await loop.create_server(connected, address, port), open_connections)


def admin_routes(
    config_dump: Callable[[], object],
    quit_process: Callable[[], None],
    connections: Callable[[], bytes | asyncio.Future[bytes]],
    taps: Taps,
) -> dict[str, Handler]:
    """Port 15000: `/config_dump` and `/connections` (JSON), `/tap` (a line of JSON for each event),
    `/logging?level=` (POST sets), `/quitquitquit` (POST drains).
    """

    def dump(request: Request) -> Response:
        if refusal := _only("GET", request):
            return refusal
        body = json.dumps(config_dump(), indent=2, sort_keys=True, default=str)
        return Response(body.encode() + b"\n", content_type=JSON)

    def live(request: Request) -> Response | asyncio.Future[Response]:
        return _only("GET", request) or _when_there(connections(), JSON)

    def tap(request: Request) -> Response | Stream:
        if refusal := _only("GET", request):
            return refusal
        if taps.full:
            return _text(f"{MAX_TAPS} watch already", HTTPStatus.SERVICE_UNAVAILABLE)
        return Stream(taps.add, JSON_LINES)

    def level(request: Request) -> Response:
        wanted = request.query.get("level")
        if wanted is None:
            return _only("GET", request) or _text(f"level {log_levels.levels()}")
        if refusal := _only("POST", request):
            return refusal
        try:
            log_levels.set_levels(wanted)
        except ValueError as error:
            return _text(str(error), HTTPStatus.BAD_REQUEST)
        return _text(f"level {log_levels.levels()}")

    def quit_now(request: Request) -> Response:
        if refusal := _only("POST", request):
            return refusal
        quit_process()
        return _text("draining")

    routes: dict[str, Handler] = {
        "/config_dump": dump,
        "/connections": live,
        "/tap": tap,
        "/logging": level,
        "/quitquitquit": quit_now,
    }
    index = "\n".join([*routes, ""])
    return {"/": lambda request: _only("GET", request) or _text(index.rstrip()), **routes}


def metrics_routes(render: Callable[[], bytes | asyncio.Future[bytes]]) -> dict[str, Handler]:
    """Port 15020: the metrics, under Prometheus' own path and Istio's."""

    def metrics(request: Request) -> Response | asyncio.Future[Response]:
        return _only("GET", request) or _when_there(render(), PROMETHEUS)

    return {"/metrics": metrics, "/stats/prometheus": metrics}


def ready_routes(pending: Callable[[], Iterable[str]]) -> dict[str, Handler]:
    """Port 15021: 200 when no task is pending, else 503 and a line per task."""

    def ready(request: Request) -> Response:
        if refusal := _only("GET", request):
            return refusal
        tasks = sorted(pending())
        if tasks:
            return _text("\n".join(["not ready, pending:", *tasks]), HTTPStatus.SERVICE_UNAVAILABLE)
        return _text("ready")

    return {"/healthz/ready": ready}


def parse_request(head: bytes) -> Request:
    """A request from its head, without the empty line after it. BadRequestError if it is not plainly one."""
    first, *lines = head.split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(first)
    if match is None:
        raise BadRequestError(HTTPStatus.BAD_REQUEST, "the request line is not METHOD /path HTTP/1.1")
    method, target, minor = match.groups()
    hosts = 0
    for line in lines:
        header = _HEADER_LINE.fullmatch(line)
        if header is None:
            raise BadRequestError(HTTPStatus.BAD_REQUEST, "a header line is not NAME: VALUE")
        name = header.group(1).lower()
        hosts += name == b"host"
        if name == b"transfer-encoding" or (name == b"content-length" and header.group(2).strip() != b"0"):
            raise BadRequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "no route takes a body")
    if hosts != 1 and (hosts or minor == b"1"):  # RFC 9112 3.2
        raise BadRequestError(HTTPStatus.BAD_REQUEST, "exactly one Host header is needed")
    if method not in (b"GET", b"POST"):
        raise BadRequestError(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and POST are served")
    path, _, query = target.decode("ascii").partition("?")
    return Request(method.decode("ascii"), path, dict(parse_qsl(query, keep_blank_values=True)))


def _only(method: str, request: Request) -> Response | None:
    """The refusal for any other method than this one."""
    if request.method == method:
        return None
    return Response(f"use {method}\n".encode(), HTTPStatus.METHOD_NOT_ALLOWED, allow=method)


def _when_there(body: bytes | asyncio.Future[bytes], content_type: str) -> Response | asyncio.Future[Response]:
    if isinstance(body, bytes):
        return Response(body, content_type=content_type)
    answer: asyncio.Future[Response] = body.get_loop().create_future()
    body.add_done_callback(lambda done: answer.set_result(Response(done.result(), content_type=content_type)))
    return answer


def _text(text: str, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(text.encode("utf-8", "backslashreplace") + b"\n", status)


def _encode(response: Response) -> bytes:
    more = [f"content-length: {len(response.body)}"]
    if response.allow:
        more.append(f"allow: {response.allow}")
    return _head(response.status, response.content_type, *more) + response.body


def _head(status: HTTPStatus, content_type: str, *more: str) -> bytes:
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"content-type: {content_type}",
        "cache-control: no-store",
        "x-content-type-options: nosniff",
        "connection: close",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode("ascii")


class _Connection(asyncio.Protocol):
    """One accepted connection: collects a head, answers, closes; its timer ends it whatever the peer does."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        routes: Mapping[str, Handler],
        open_connections: set[_Connection],
    ) -> None:
        self._loop = loop
        self._routes = routes
        self._open = open_connections
        self._received = bytearray()
        self._answered = False
        self._left: Callable[[], None] | None = None
        """What a stream wants called when its reader has left."""
        self.streaming = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # a stream's, since create_server made it
        self._timer = self._loop.call_later(TIMEOUT_S, self._transport.abort)
        if len(self._open) >= MAX_CONNECTIONS:
            self._answer(_text("too many connections", HTTPStatus.SERVICE_UNAVAILABLE))
        else:
            self._open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._open.discard(self)
        if self._left is not None:
            self._left()

    def data_received(self, data: bytes) -> None:
        if self._answered:
            return
        self._received += data
        end = self._received.find(b"\r\n\r\n", 0, MAX_HEAD)
        if end >= 0:
            response = self._respond(bytes(self._received[:end]))
            if isinstance(response, Response):
                self._answer(response)
            elif isinstance(response, Stream):
                self._begin(response)
            else:
                self._answered = True
                response.add_done_callback(lambda done: self._answer(done.result()))
        elif len(self._received) >= MAX_HEAD:
            self._answer(_text(f"the head is over {MAX_HEAD} bytes", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE))

    def _respond(self, head: bytes) -> Response | Stream | asyncio.Future[Response]:
        try:
            request = parse_request(head)
        except BadRequestError as error:
            allow = "GET, POST" if error.status is HTTPStatus.METHOD_NOT_ALLOWED else ""
            return Response(f"{error.detail}\n".encode(), error.status, allow=allow)
        handler = self._routes.get(request.path)
        if handler is None:
            return _text("no such page", HTTPStatus.NOT_FOUND)
        try:
            return handler(request)
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            return _text("the handler failed; see the log", HTTPStatus.INTERNAL_SERVER_ERROR)

    # -- a stream's outlet

    @property
    def waiting(self) -> int:
        return self._transport.get_write_buffer_size()

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    # -- the answer

    def _begin(self, stream: Stream) -> None:
        self._answered = self.streaming = True
        self._received.clear()
        self._timer.cancel()
        self._transport.write(_head(HTTPStatus.OK, stream.content_type))
        self._left = stream.begin(self)

    def _answer(self, response: Response) -> None:
        self._answered = True
        self._received.clear()
        self._timer.cancel()
        self._timer = self._loop.call_later(TIMEOUT_S, self._transport.abort)
        self._transport.write(_encode(response))
        self._transport.close()
