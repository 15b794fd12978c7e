"""The conversation that `benchmarks.guard` counts, in one process: `python -m benchmarks.scripted DIRECTORY`.

Two uProxies and a waypoint on one plane, with real sockets on loopback and real TLS, and the applications at both ends
as callbacks of the same plane: they cost little, and the order of events is the program's alone. `web` dials `db`
directly, and `api` and `rpc`, which are HTTP/1.1 and HTTP/2 and bound to the waypoint.

Each scenario prepares and warms itself up, and then runs between two calls of a C function that nothing else calls
(`MARK`), at which the counter is read. At the end the process prints what it ran, as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import select
import socket
import ssl
import struct
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hpack import Encoder

from control.api import messages, records, topics
from control.api.address import HBONE_PORT, parse_address
from control.api.gateway import Binding, Gateway, Instance, Traffic, Via
from control.api.identity import SpiffeId
from control.api.messages import Envelope
from control.api.policy import Action, AuthorizationPolicy, Operation, Rule, Source, Target
from control.api.records import Record
from control.api.route import NO_MODIFIER, Backend, HTTPRoute, Match, Parent, PathKind, PathMatch, RouteRule
from control.api.workload import Endpoint, Service, ServicePort, Workload
from control.client.state import State
from uproxy import authz, plane
from uproxy.access_log import AccessLog, Style
from uproxy.connections import Connections
from uproxy.header_block import encode_headers
from uproxy.inbound import Inbound
from uproxy.listener import Listeners, TunnelServer
from uproxy.outbound import Outbound, Self
from uproxy.plane import Plane, Waiter
from uproxy.pool import Pool
from uproxy.redirect import OriginalDestination, Route
from uproxy.telemetry import Telemetry
from uproxy.tls import Context, Credentials, client_context, server_context
from waypoint import authz as request_authz
from waypoint import gateway, request, routing
from waypoint.telemetry import WaypointTelemetry
from waypoint.upstream import Upstream
from waypoint.ways import Tunnels

MARK: Final = "ctermid"
"""The C library's function that is called at the beginning and the end of what counts."""

NAMES: Final = ("web", "db", "wp")
TRUST_DOMAIN: Final = "cluster.local"
_WEB, _DB, _WP = IDENTITIES = tuple(SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/{name}") for name in NAMES)
_WEB_ADDRESS, _DB_ADDRESS, _WP_ADDRESS = (parse_address(f"127.0.79.{number}") for number in (1, 2, 3))
_DIRECT, _BOUND, _HTTP2 = (parse_address(f"240.240.9.{number}") for number in (9, 10, 11))
_PORT: Final = 6379
_SERVED: Final = ("shop/api", "shop/rpc")
"""By the waypoint."""
_POLICIES: Final = 40
_MOST_BY_HTTP2: Final = 100
"""Requests of one connection, which are made beforehand."""
_ROUTES: Final = 20
_STALL_S: Final = 20.0
_COMPARED: Final = 15  # bytes of an answer: "HTTP/1.1 200 OK"

_REQUEST: Final = (
    b"GET /v7/things?page=%d HTTP/1.1\r\nhost: api.shop\r\nuser-agent: guard\r\naccept: */*\r\n"
    b"x-request-id: %032x\r\n\r\n"
)
"""Each has a page and an id of its own, as what follows."""
_RESPONSE: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 64\r\n\r\n" + bytes(64)
_CHUNKED_HEAD: Final = (
    b"POST /v7/things?page=%d HTTP/1.1\r\nhost: api.shop\r\ntransfer-encoding: chunked\r\nx-request-id: %032x\r\n\r\n"
)
_CHUNKS: Final = (b"800\r\n" + bytes(0x800) + b"\r\n") * 8 + b"0\r\n\r\n"

_FRAME: Final = struct.Struct(">LBL")  # of HTTP/2: length and type, flags, stream
_DATA, _HEADERS, _SETTINGS, _WINDOW_UPDATE = 0, 1, 4, 8
_END_STREAM, _END_HEADERS = 1, 4
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_GET: Final = {b":method": b"GET", b":scheme": b"http", b":authority": b"api.shop", b"user-agent": b"guard"}
_CALL: Final = {**_GET, b":method": b"POST", b"content-type": b"application/grpc", b"te": b"trailers"}
_MESSAGE: Final = b"\0\0\0\0\x40" + bytes(64)
_OK: Final = encode_headers([(b":status", b"200"), (b"content-type", b"text/plain"), (b"content-length", b"64")])
_GRPC_OK: Final = encode_headers([(b":status", b"200"), (b"content-type", b"application/grpc")])
_TRAILERS: Final = encode_headers([(b"grpc-status", b"0")])

Run = Callable[[int], Coroutine[Any, Any, None]]
"""Does so many operations, as a coroutine of the plane."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """`prepare` is a coroutine of the plane, too. `reference`: the scenario that it is compared with."""

    name: str
    label: str
    """One operation, for people."""
    operations: int
    prepare: Callable[[World], Coroutine[Any, Any, Run]]
    reference: str


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _FRAME.pack(len(payload) << 8 | kind, flags, stream) + payload


_BEGIN: Final = _frame(_SETTINGS, 0, 0, b"") + _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">L", 1 << 30))


class World:
    """The three proxies, the applications, and how to dial."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._contexts: dict[str, tuple[Context, Context]] = {}
        self.plane = Plane(asyncio.get_running_loop())
        self.state = State(TRUST_DOMAIN)
        self.log = AccessLog(os.devnull, Style.JSON)  # flushed between scenarios: a timer would come at any time
        self._dialled: list[Application] = []
        self._listeners = Listeners(self.plane)
        self._applications = [_application(self.plane, answer) for answer in (_echo, _serve_http, _serve_http2)]
        changes = self.state.apply([_published(record) for record in _mesh(*(port for _, port in self._applications))])
        self.web, self.db = (
            _UProxy(self, f"shop/{name}", identity, address)
            for name, identity, address in (("web", _WEB, _WEB_ADDRESS), ("db", _DB, _DB_ADDRESS))
        )
        self.db.inbound.config_changed(changes)
        self._listeners.listen(_DB_ADDRESS, HBONE_PORT, self.db.inbound.server.serve)
        self._start_waypoint()

    def _start_waypoint(self) -> None:
        contexts = self.contexts("wp")
        self._waypoint_pool = Pool(self.plane, lambda: contexts[0], (_WP_ADDRESS,))
        self._upstream = Upstream(self.plane, Tunnels(self._waypoint_pool))
        telemetry = WaypointTelemetry("guard", self.log)
        found = gateway.Gateway(self.plane, self.state, "shop/wp", _WP, self._upstream, Connections(), telemetry)
        self._waypoint = TunnelServer(
            self.plane, lambda: contexts[1], TRUST_DOMAIN, found.on_request, _not_a_tunnel, queues=True
        )
        self._listeners.listen(_WP_ADDRESS, HBONE_PORT, self._waypoint.serve)

    def contexts(self, name: str) -> tuple[Context, Context]:
        """A client's and a server's. Made once: that takes as long as a thousand round trips."""
        if name not in self._contexts:
            credentials = Credentials.load(self._directory / name)
            self._contexts[name] = client_context(credentials), server_context(credentials)
        return self._contexts[name]

    def dial(self, address: str) -> Application:
        """A connection of web's application, as capture would hand it over."""
        app, proxied = _connected_pair()
        destination = OriginalDestination(parse_address(address), _PORT, Route.TUNNEL)
        self.plane.spawn(self.web.outbound.serve(proxied, destination))
        application = Application(self.plane, app)
        self._dialled.append(application)
        return application

    async def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine of the plane to its end."""
        ended = asyncio.get_running_loop().create_future()

        async def run() -> None:
            try:
                ended.set_result(await coroutine)
            except Exception as error:
                ended.set_exception(error)

        self.plane.spawn(run())
        return await ended

    async def settle(self) -> None:
        """Until no connection is left; what was logged of them is written. Raises TimeoutError."""
        for application in self._dialled:
            await self.run(application.close())
        self._dialled.clear()
        self.plane.run(self._upstream.close)
        async with asyncio.timeout(_STALL_S):
            while self.plane.tasks:  # noqa: ASYNC110 - it is between scenarios
                await asyncio.sleep(0.01)
        self.log.flush()

    def close(self) -> None:
        self._listeners.close()
        for listener, _ in self._applications:
            self.plane.unwatch(listener.fileno())
            listener.close()
        for carriers in (self.web.pool, self._waypoint_pool, self._waypoint, self.db.inbound.server):
            self.plane.run(carriers.close)
        self.log.close()
        self.plane.close()


class _UProxy:
    """Its parts, as `uproxy.run` wires them."""

    def __init__(self, world: World, key: str, identity: SpiffeId, address: str) -> None:
        own = Self(key, str(identity), TRUST_DOMAIN, (parse_address(address),))
        contexts = world.contexts(identity.service_account)
        telemetry, connections = Telemetry("guard", world.log), Connections()
        self.pool = Pool(world.plane, lambda: contexts[0], own.addresses)
        self.outbound = Outbound(world.plane, world.state, self.pool, connections, telemetry, own)
        self.inbound = Inbound(world.plane, world.state, lambda: contexts[1], connections, telemetry, own)


Whole = Callable[[bytes, int], bool]
"""Whether an answer is whole with the bytes that came last, and so many in all. Raises ConnectionError."""


class Application:
    """The calling end of a connection."""

    def __init__(self, data_plane: Plane, sock: socket.socket) -> None:
        self._plane = data_plane
        self._sock = sock
        self._whole: Whole = _closed
        self._received = 0
        self._waiter: Waiter[None] | None = None
        data_plane.watch(sock.fileno(), plane.READ, self._on_events)

    async def exchange(self, content: bytes, whole: Whole) -> None:
        """Send, and wait for an answer. Raises OSError."""
        self._waiter, self._whole, self._received = Waiter(self._plane), whole, 0
        self._sock.send(content)
        await self._plane.wait(self._waiter, _STALL_S)

    async def close(self) -> None:
        """End our side, and wait for the end of the other. Raises OSError."""
        if self._sock.fileno() < 0:
            return
        self._waiter, self._whole = Waiter(self._plane), _closed
        self._sock.shutdown(socket.SHUT_WR)
        await self._plane.wait(self._waiter, _STALL_S)
        self._plane.unwatch(self._sock.fileno())
        self._sock.close()

    def _on_events(self, _: int) -> None:
        data = self._sock.recv(1 << 16)
        assert self._waiter is not None
        self._received += len(data)
        try:
            if self._whole(data, self._received):
                self._waiter.set(None)
        except ConnectionError as error:
            self._waiter.fail(error)


def _closed(data: bytes, received: int) -> bool:
    """Nothing more comes."""
    return not data


def _as(answer: bytes) -> Whole:
    """One that begins as this one, and is at least as long."""

    def whole(data: bytes, received: int) -> bool:
        if received == len(data) and data[:_COMPARED] != answer[:_COMPARED]:
            raise ConnectionError(f"{data!r} is not what was asked for")
        return received >= len(answer)

    return whole


def _ends(stream: int) -> Whole:
    """One of HTTP/2 with the status 200, which comes in whole frames: they are small."""

    def whole(data: bytes, received: int) -> bool:
        own = [(kind, flags, payload) for kind, flags, number, payload in _frames(data) if number == stream]
        if any(kind > _HEADERS for kind, _, _ in own) or (own[:1] and own[0][2][:1] not in (b"\x88", b"\x20")):
            raise ConnectionError(f"{data!r} is not what was asked for")
        return any(flags & _END_STREAM for _, flags, _ in own)

    return whole


def _frames(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, stream and payload of each frame."""
    position = len(_PREFACE) if data.startswith(_PREFACE) else 0
    while position < len(data):
        first, flags, stream = _FRAME.unpack_from(data, position)
        position += 9 + (first >> 8)
        yield first & 0xFF, flags, stream, data[position - (first >> 8) : position]


# -- the applications


def _application(data_plane: Plane, answer: Callable[[bytes], bytes]) -> tuple[socket.socket, int]:
    """Something at db's address that answers whatever comes; its listener and port."""
    listener = socket.create_server((_DB_ADDRESS, 0))
    listener.setblocking(False)

    def accept(_: int) -> None:
        sock, _ = listener.accept()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def on_events(_: int) -> None:
            data = sock.recv(1 << 16)
            if data:
                if answered := answer(data):
                    sock.send(answered)
            else:
                data_plane.unwatch(sock.fileno())
                sock.close()

        data_plane.watch(sock.fileno(), select.EPOLLIN, on_events)

    data_plane.watch(listener.fileno(), plane.READ, accept)
    return listener, listener.getsockname()[1]


def _echo(data: bytes) -> bytes:
    return data


def _serve_http(data: bytes) -> bytes:
    """It knows its callers: heads come whole, and bodies end so."""
    return _RESPONSE if data.endswith(b"\r\n\r\n") else b""


def _serve_http2(data: bytes) -> bytes:
    """Likewise. What has a body is a gRPC call, answered with as much."""
    answer = b""
    for kind, flags, stream, payload in _frames(data):
        if kind == _SETTINGS and not flags:
            answer += _BEGIN + _frame(_SETTINGS, 1, 0, b"")
        elif kind == _HEADERS and flags & _END_STREAM:
            answer += _frame(_HEADERS, _END_HEADERS, stream, _OK) + _frame(_DATA, _END_STREAM, stream, bytes(64))
        elif kind == _DATA:
            answer += _frame(_HEADERS, _END_HEADERS, stream, _GRPC_OK) + _frame(_DATA, 0, stream, payload)
            answer += _frame(_HEADERS, _END_HEADERS | _END_STREAM, stream, _TRAILERS)
    return answer


# -- the mesh


def _mesh(echo_port: int, http_port: int, http2_port: int) -> list[Record]:
    web, db, wp = (
        Workload("shop", name, name, identity, (address,), {"app": name}, {}, "", 1)
        for name, identity, address in zip(NAMES, IDENTITIES, (_WEB_ADDRESS, _DB_ADDRESS, _WP_ADDRESS), strict=True)
    )
    services: list[Record] = []
    for name, vip, port, protocol, binding in (
        ("db", _DIRECT, echo_port, "tcp", None),
        ("api", _BOUND, http_port, "http", Binding("shop/wp", Via.WAYPOINT)),
        ("rpc", _HTTP2, http2_port, "http2", Binding("shop/wp", Via.WAYPOINT)),
    ):
        ports = (ServicePort("", _PORT, port, protocol),)
        services.append(Service("shop", name, (vip,), ports, {}, (_DB,), binding))
        services.append(Endpoint(f"shop/{name}", "shop/db", _DB_ADDRESS, _DB, {_PORT: port}, 1, True, {}))
    waypoint = Gateway("shop", "wp", Traffic.SERVICE, (Instance("shop/wp", _WP_ADDRESS),), _SERVED, ())
    return [web, db, wp, *services, waypoint, *_connection_policies(), *_request_policies(), *map(_route, _SERVED)]


def _connection_policies() -> list[AuthorizationPolicy]:
    """Of db; the last one allows web and the waypoint."""
    others = [Source(principals=(f"{TRUST_DOMAIN}/ns/shop/sa/other{number}",)) for number in range(_POLICIES)]
    last = Source(namespaces=("shop",))
    return [
        AuthorizationPolicy("shop", f"connection{number}", action, {"app": "db"}, (Rule(sources=(source,)),))
        for number, (action, source) in enumerate(
            [(Action.DENY, other) for other in others[::2]]
            + [(Action.ALLOW, other) for other in others[1::2]]
            + [(Action.ALLOW, last)]
        )
    ]


def _request_policies() -> list[AuthorizationPolicy]:
    """Of api and rpc; the last one allows web what the scenarios ask for."""
    web = Source(principals=(_WEB.principal,))
    operations = [
        Operation(methods=("GET",), paths=(f"/v{number}/secrets/*", f"*/private{number}"))
        for number in range(_POLICIES)
    ]
    allowed = Operation(methods=("GET", "POST"), paths=("/v7/*",))
    target = tuple(Target("Service", service) for service in _SERVED)
    return [
        AuthorizationPolicy("shop", f"request{number}", action, None, (Rule((web,), (operation,)),), target)
        for number, (action, operation) in enumerate(
            [(Action.DENY, operation) for operation in operations] + [(Action.ALLOW, allowed)]
        )
    ]


def _route(service: str) -> HTTPRoute:
    backend = Backend(service, _PORT, 1, NO_MODIFIER, NO_MODIFIER)
    rules = tuple(
        RouteRule(
            f"v{number}",
            (Match(PathMatch(PathKind.PREFIX, f"/v{number}"), (), (), ""),),
            NO_MODIFIER,
            NO_MODIFIER,
            (backend,),
            0,
            0,
        )
        for number in range(_ROUTES)
    )
    return HTTPRoute("shop", f"routes-{service.rpartition('/')[2]}", (Parent(service, 0),), (), rules)


def _published(record: Record) -> tuple[str, bytes]:
    """A record as the control plane publishes it."""
    topic = topics.format_topic(_DB.trust_domain, records.topic_of(record))
    return topic, messages.encode(Envelope(epoch=1, version=1, issued_at=0, body=records.write(record)))


# -- the scenarios


def _round_trips(size: int) -> Callable[[World], Coroutine[Any, Any, Run]]:
    async def prepare(world: World) -> Run:
        application, content = world.dial(_DIRECT), bytes(size)
        whole = _as(content)

        async def run(count: int) -> None:
            for _ in range(count):
                await application.exchange(content, whole)

        return run

    return prepare


def _side_by_side(connections: int) -> Callable[[World], Coroutine[Any, Any, Run]]:
    """Requests of many connections leave and arrive together."""

    async def prepare(world: World) -> Run:
        applications, content = [world.dial(_DIRECT) for _ in range(connections)], bytes(64)
        whole = _as(content)

        async def run(count: int) -> None:
            for _ in range(count // connections):
                each = [_settling(world, application.exchange(content, whole)) for application in applications]
                for answered in each:
                    await answered

        return run

    return prepare


def _settling(world: World, coroutine: Coroutine[Any, Any, None]) -> Waiter[None]:
    """Run a coroutine beside this one."""
    ended: Waiter[None] = Waiter(world.plane)

    async def run() -> None:
        try:
            await coroutine
            ended.set(None)
        except OSError as error:
            ended.fail(error)

    world.plane.spawn(run())
    return ended


async def _connections(world: World) -> Run:
    async def run(count: int) -> None:
        for _ in range(count):
            await _connect(world)

    return run


def _crowds(size: int) -> Callable[[World], Coroutine[Any, Any, Run]]:
    """Connections that come and go together."""

    async def prepare(world: World) -> Run:
        async def run(count: int) -> None:
            for _ in range(count // size):
                for ended in [_settling(world, _connect(world)) for _ in range(size)]:
                    await ended

        return run

    return prepare


async def _connect(world: World) -> None:
    """A connection, opened and closed."""
    application = world.dial(_DIRECT)
    await application.exchange(bytes(64), _as(bytes(64)))
    await application.close()


async def _tunnels(world: World) -> Run:
    async def run(count: int) -> None:
        for _ in range(count):
            world.web.pool.retire()
            await _connect(world)

    return run


def _requests(head: bytes, body: bytes = b"") -> Callable[[World], Coroutine[Any, Any, Run]]:
    async def prepare(world: World) -> Run:
        application, numbers, whole = world.dial(_BOUND), itertools.count(), _as(_RESPONSE)

        async def run(count: int) -> None:
            for number in itertools.islice(numbers, count):
                await application.exchange(head % (number, number) + body, whole)

        return run

    return prepare


def _requests_by_http2(
    fields: Mapping[bytes, bytes], path: Callable[[int], bytes], message: bytes = b""
) -> Callable[[World], Coroutine[Any, Any, Run]]:
    """One after the other on one connection, as a client writes them that makes use of all of HPACK."""

    async def prepare(world: World) -> Run:
        application, encoder = world.dial(_HTTP2), Encoder()
        asked = []
        for number, stream in enumerate(range(1, 2 * _MOST_BY_HTTP2, 2)):
            head = [(b":path", path(number)), *fields.items(), (b"x-request-id", b"%032x" % number)]
            flags = _END_HEADERS | (0 if message else _END_STREAM)
            frames = _frame(_HEADERS, flags, stream, encoder.encode(head))
            asked.append((frames + (_frame(_DATA, _END_STREAM, stream, message) if message else b""), _ends(stream)))
        asked[0] = (_PREFACE + _BEGIN + asked[0][0], asked[0][1])
        remaining = iter(asked)

        async def run(count: int) -> None:
            for frames, ends in itertools.islice(remaining, count):
                await application.exchange(frames, ends)

        return run

    return prepare


def _thing(number: int) -> bytes:
    return b"/v7/%d" % number


def _method(_: int) -> bytes:
    return b"/v7/Call"


async def _decisions(world: World) -> Run:
    """One of a connection, one of a request, and its route, without any transport."""
    of_connections = authz.compile_policies(_connection_policies())
    of_requests = request_authz.compile_policies(_request_policies())
    router = routing.compile_routes((_route("shop/api"),), "shop/api", _PORT)
    fields = ((b"host", b"api.shop"), (b"user-agent", b"guard"), (b"accept", b"*/*"))

    async def run(count: int) -> None:
        for number in range(count):
            # Another port each time: what was decided once is remembered.
            assert of_connections.decide(_WEB, _WEB_ADDRESS, _DB_ADDRESS, _PORT + number).allowed
            asked = request.read_request("GET", "/v7/things?page=3", fields)
            assert of_requests.decide(_WEB, _WEB_ADDRESS, _BOUND, _PORT, asked).allowed
            assert router.route(asked) is not None

    return run


# -- what they are compared with


class _Bare:
    """TLS between two ends in memory, and nothing else."""

    def __init__(self, client: Context, server: Context) -> None:
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client, self.server = client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)
        ends, done = [self.client, self.server], 0
        while done < 2:
            done = 0
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
                    done += 1

    def echo(self, content: bytes) -> None:
        self.client.write(content)
        self.server.write(self.server.read(1 << 16))
        self.client.read(1 << 16)


def _bare_echo(size: int) -> Callable[[World], Coroutine[Any, Any, Run]]:
    async def prepare(world: World) -> Run:
        bare, content = _Bare(world.contexts("web")[0], world.contexts("db")[1]), bytes(size)

        async def run(count: int) -> None:
            for _ in range(count):
                bare.echo(content)

        return run

    return prepare


async def _bare_handshakes(world: World) -> Run:
    client, server = world.contexts("web")[0], world.contexts("db")[1]

    async def run(count: int) -> None:
        for _ in range(count):
            _Bare(client, server)

    return run


async def _python(_: World) -> Run:
    """What the interpreter costs: calls, attributes, dictionaries, slices of bytes."""

    class Counter:
        __slots__ = ("total",)

        def __init__(self) -> None:
            self.total = 0

        def add(self, number: int) -> int:
            self.total += number
            return self.total

    async def run(count: int) -> None:
        counter, table, view = Counter(), dict[bytes, int](), memoryview(bytes(range(64)))
        for _ in range(count):
            for start in range(0, 64, 2):
                key = bytes(view[start : start + 2])
                table[key] = counter.add(len(key)) + table.get(key, 0) % 7
            assert "-".join(str(value) for value in table.values())

    return run


REFERENCES: Final = (
    Scenario("python", "a fixed piece of Python", 100, _python, ""),
    Scenario("tls-64", "a bare echo of 64 B through TLS", 200, _bare_echo(64), ""),
    Scenario("tls-16k", "a bare echo of 16 KB through TLS", 40, _bare_echo(16 << 10), ""),
    Scenario("tls-handshake", "a bare TLS handshake", 3, _bare_handshakes, ""),
)
SCENARIOS: Final = (
    Scenario("round-trip-64", "a round trip of 64 B", 160, _round_trips(64), "tls-64"),
    Scenario("side-by-side", "a round trip of 64 B, 32 connections at once", 320, _side_by_side(32), "tls-64"),
    Scenario("round-trip-16k", "a round trip of 16 KB", 60, _round_trips(16 << 10), "tls-16k"),
    Scenario("connection", "a connection, opened and closed", 40, _connections, "python"),
    Scenario("connections", "a connection, 16 opened and closed at once", 320, _crowds(16), "python"),
    Scenario("tunnel", "a connection, opened on a tunnel of its own", 4, _tunnels, "tls-handshake"),
    Scenario("request", "an HTTP request through a waypoint", 40, _requests(_REQUEST), "python"),
    Scenario("http2", "an HTTP/2 request through a waypoint", 40, _requests_by_http2(_GET, _thing), "python"),
    Scenario("grpc", "a gRPC call through a waypoint", 40, _requests_by_http2(_CALL, _method, _MESSAGE), "python"),
    Scenario(
        "upload", "an HTTP request with a chunked body of 16 KB", 30, _requests(_CHUNKED_HEAD, _CHUNKS), "tls-16k"
    ),
    Scenario("decisions", "a connection and a request judged, and routed", 100, _decisions, "python"),
)


def _connected_pair() -> tuple[socket.socket, socket.socket]:
    """A real TCP connection over loopback, both ends non-blocking."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = socket.create_connection(listener.getsockname())
        proxied, _ = listener.accept()
    for sock in (app, proxied):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return app, proxied


def _not_a_tunnel(source: str, started: float, error: Exception) -> None:
    raise error


@contextlib.asynccontextmanager
async def _world(directory: Path) -> AsyncIterator[World]:
    world = World(directory)
    try:
        yield world
    finally:
        world.close()


async def converse(directory: Path, names: Sequence[str]) -> list[tuple[str, int]]:
    """Run the named scenarios (none: all) and their references; names and operations, in the order of the marks."""
    ran = []
    chosen = [scenario for scenario in SCENARIOS if not names or scenario.name in names]
    wanted = {scenario.reference for scenario in chosen}
    chosen = [reference for reference in REFERENCES if reference.name in wanted] + chosen
    async with _world(directory) as world:
        for scenario in chosen:
            run = await world.run(scenario.prepare(world))
            await world.run(run(max(scenario.operations // 4, 2)))
            gc.collect()
            os.ctermid()
            await world.run(run(scenario.operations))
            os.ctermid()
            ran.append((scenario.name, scenario.operations))
            await world.settle()
    return ran


def main(argv: Sequence[str]) -> int:
    """DIRECTORY has an identity directory for each of NAMES; further arguments are scenarios."""
    json.dump(plane.run(converse(Path(argv[0]), argv[1:])), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
