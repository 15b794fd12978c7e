"""The echo services of the Gateway API's conformance suite behind one real waypoint, and a client that asks them.

Everything comes from YAML, as `meshctl apply` takes it. `client` in namespace `shop`, and `consumer` in a namespace of
its own, ask `echo` and its versions; each answers with the request as it arrived and with its own name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import unquote

from control.api import resources
from control.api.address import parse_address
from control.api.identity import SpiffeId
from control.api.mesh import Mesh
from control.api.problems import ResourceErrors
from control.api.records import Record
from control.client.state import Changes
from control.server.ca import Authority
from tests.support.beside_pair import Besides, running_beside
from tests.support.envoy_waypoint import envoy_serving
from tests.support.pair import DB_ADDRESS, Pair, Proxy, connected_pair, issued
from tests.support.through_waypoint import WP, Recorder, Through, bound_pair, running_waypoint
from uproxy import plane
from uproxy.outbound import Self
from uproxy.redirect import OriginalDestination, Route
from waypoint.telemetry import Exchange

T = TypeVar("T")
VERSIONS: Final = ("v1", "v2", "v3")
_VIPS: Final = {"echo": "240.240.7.10", "echo-v1": "240.240.7.1", "echo-v2": "240.240.7.2", "echo-v3": "240.240.7.3"}
_OWN: Final = {"v1": 9001, "v2": 9002, "v3": 9003}
"""Ports of Service `echo` for each version, where there is no way to another Service."""
_JUDGE: Final = """---
apiVersion: v1
kind: Service
metadata: {{name: judge, namespace: shop, labels: {{{labels}}}}}
spec: {{selector: {{app: echo}}, ports: [{{name: http, port: 80, targetPort: {port}}}]}}
"""
"""A service that may be asked."""

_WORKLOADS: Final = """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: wp, namespace: shop, annotations: {mesh.uproxy.dev/engine: ENGINE}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: wp-1, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: wp}}
spec: {address: 127.0.77.3, serviceAccount: wp}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: web, namespace: shop}
spec: {address: 127.0.77.1, serviceAccount: web}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: db, namespace: shop, labels: {app: echo}}
spec: {address: 127.0.77.2, serviceAccount: db}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: app, namespace: consumer}
spec: {address: 127.0.77.4, serviceAccount: app}
"""
CONSUMER: Final = SpiffeId.parse("spiffe://cluster.local/ns/consumer/sa/app")
_SERVICE: Final = """---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: shop, labels: {{istio.io/use-waypoint: wp}}}}
spec:
  clusterIP: {vip}
  selector: {{app: echo}}
  ports: [{ports}]
"""
_PORTS: Final = {"http": 80, "http-alt": 8080, "http-8083": 8083}
"""Of each service."""


@dataclass
class Answer:
    """What a request got."""

    status: int
    headers: dict[str, str]
    """Names in lower case; several lines of one joined by commas."""
    body: bytes

    @property
    def echoed(self) -> dict[str, Any]:
        """The request, as it arrived at the backend: `name`, `method`, `path`, `host`, `headers`, `body`."""
        return json.loads(self.body)  # type: ignore[no-any-return]

    @property
    def by(self) -> str | int:
        """Which version answered; the status of an answer that is nobody's."""
        return str(self.echoed["name"]) if self.status == 200 else self.status


@dataclass
class Echo:
    """One version of the application."""

    name: str
    ports: dict[int, int] = field(default_factory=dict)
    """Port of a service -> where that is."""
    seen: list[dict[str, Any]] = field(default_factory=list)
    """Every request that it got."""
    failures: Counter[str] = field(default_factory=Counter)
    """Of the requests that ask to fail, by id, those that did."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await self._exchange(reader, writer)
        writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request. Headers say how to answer: `delay-ms`; `fail-times` and `fail-with` (a status, or `reset`)."""
        seen = {"name": self.name, **await _request(reader)}
        method, headers = seen["method"], seen["headers"]
        self.seen.append(seen)
        status = "200 OK"
        request_id = headers.get("x-request-id", "")
        if self.failures[request_id] < int(headers.get("fail-times", "0")):
            self.failures[request_id] += 1
            if headers["fail-with"] == "reset":
                writer.transport.abort()
                return
            status = f"{headers['fail-with']} Failed"
        if "delay-ms" in headers:
            await asyncio.sleep(int(headers["delay-ms"]) / 1000)
        text = json.dumps(seen).encode()
        extra = "".join(
            f"{name.removeprefix('answer-')}: {value}\r\n" for name, value in headers.items() if name[:7] == "answer-"
        )
        writer.write(f"HTTP/1.1 {status}\r\ncontent-length: {len(text)}\r\n{extra}\r\n".encode("latin-1"))
        writer.write(b"" if method == "HEAD" else text)


@dataclass
class Judge:
    """The service that is asked whether requests may pass. A request's header `verdict` is its answer, quoted."""

    port: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    """As `Echo.seen`."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                found = await _request(reader)
                self.asked.append(found)
                verdict = unquote(found["headers"].get("verdict", "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"))
                if verdict == "late":
                    await reader.read()  # until who asked has given up
                    break
                writer.write(verdict.encode())
                if "connection: close" in verdict:
                    break
        writer.close()


@dataclass
class Running:
    """A waypoint between two uProxies, whichever its engine is."""

    pair: Pair
    telemetry: Recorder
    applied: Callable[[], Awaitable[None]]
    """Returns when requests are served by what the pair's state says."""

    @classmethod
    def built_in(cls, through: Through | Besides) -> Running:
        async def at_once() -> None: ...

        return cls(through.pair, through.telemetry, at_once)


class NotBesideError(Exception):
    """What was to be applied needs another placement than beside the workload, and was refused for that by name."""


class Suite:
    """The running waypoint. Made by `running_suite`; used from another thread than it runs in."""

    def __init__(
        self,
        running: Running,
        consumer: Proxy,
        echoes: dict[str, Echo],
        judge: Judge,
        loop: asyncio.AbstractEventLoop,
        engine: str,
    ) -> None:
        """`consumer`: the uProxy of the client in another namespace. `engine`: one of `ENGINES`."""
        self.consumer = consumer
        self.engine = engine
        self.echoes = echoes
        self._judge = judge
        self._ended = 0
        self.running = running
        self.warnings: list[str] = []
        """Of what was applied last."""
        self._loop = loop
        self._applied: dict[str, Record] = {}

    @property
    def judged(self) -> list[dict[str, Any]]:
        """What Service `judge` was asked, in order."""
        return self._judge.asked

    def judges(self) -> set[str]:
        """Who has asked it by connections that have ended since `apply`, of which there must be some."""
        for _ in range(500):
            ended = self.running.pair.db.telemetry.ended[self._ended :]
            found = {one.caller or one.source.identity for one in ended if f":{self._judge.port}" in one.hbone_address}
            if found:
                return found
            time.sleep(0.01)
        raise AssertionError("nobody has asked")

    def apply(self, *texts: str, spare: tuple[str, ...] = (), bound_judge: bool = False) -> None:
        """These resources, and the services; whatever was applied before is gone. `spare`: services that are not there.
        `bound_judge`: whether Service `judge` is bound to this waypoint.

        Raises ResourceErrors, NotBesideError.
        """
        services = "".join(
            _SERVICE.format(name=name, vip=vip, ports=self._ports(name))
            for name, vip in _VIPS.items()
            if name not in spare
        ) + _JUDGE.format(port=self._judge.port, labels="istio.io/use-waypoint: wp" if bound_judge else "")
        wanted = _WORKLOADS.replace("ENGINE", self.engine)
        if self.engine == BESIDE:
            wanted = wanted.replace("mesh.uproxy.dev/engine: beside", "mesh.uproxy.dev/placement: sidecar")
            wanted = wanted.replace(", labels: {gateway.networking.k8s.io/gateway-name: wp}", "")
            texts = tuple(_within_echo(text) for text in texts)
        wanted = "---\n".join([wanted + services, *texts])
        try:
            mesh = Mesh.build(resources.parse(wanted, "f.yaml"), "cluster.local")
        except ResourceErrors as errors:
            if self.engine == BESIDE and all("placement sidecar" in str(one) for one in errors.errors):
                raise NotBesideError(str(errors)) from None
            raise
        self.warnings = [str(warning) for warning in mesh.warnings]
        records: dict[str, Record] = {
            f"{type(record).__name__} {getattr(record, 'key', record)}": record
            for record in (
                *mesh.services,
                *mesh.workloads,
                *mesh.endpoints,
                *mesh.gateways,
                *mesh.routes,
                *mesh.policies,
                *mesh.request_authentications,
                *mesh.traffic,
            )
        }
        pair = self.running.pair
        self._ended = len(pair.db.telemetry.ended)

        async def take() -> None:
            for name, record in self._applied.items():
                if name not in records:
                    pair.withdraw(record)
            pair.apply(*(record for name, record in records.items() if self._applied.get(name) != record))
            await self.running.applied()

        self._run(take())
        self._applied = records

    def _ports(self, name: str) -> str:
        """Of a service, in YAML."""
        echo = self.echoes[name[5:] or "v1"]
        found = {named: (port, echo) for named, port in _PORTS.items()}
        if self.engine == BESIDE and name == "echo":
            found |= {f"http-{one}": (port, self.echoes[one]) for one, port in _OWN.items()}
        return ", ".join(
            f"{{name: {named}, port: {port}, targetPort: {one.ports[port]}}}" for named, (port, one) in found.items()
        )

    def ask(
        self,
        path: str = "/",
        method: str = "GET",
        *,
        to: str = "echo",
        port: int = 80,
        host: str = "",
        body: bytes = b"",
        caller: Proxy | None = None,
        **headers: str,
    ) -> Answer:
        """One request on a connection of its own, by `client` or another. Names of headers have `_` for `-`."""
        lines = [f"{method} {path} HTTP/1.1", f"host: {host or to}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if body:
            lines.append(f"content-length: {len(body)}")
        request = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
        return self._run(self._ask(request, method, to, port, caller))

    def record_of(self, request_id: str) -> Exchange:
        """What was recorded of a request, by its `x-request-id`."""
        for _ in range(500):
            for exchange in self.running.telemetry.exchanges:
                if exchange.request_id == request_id:
                    return exchange
            time.sleep(0.01)
        raise AssertionError(f"nothing was recorded of {request_id}")

    def load(self, paths: Sequence[str], each: int) -> Future[list[tuple[str, Answer]]]:
        """Ask for each path so many times, one after the other on a connection of its own; all paths at once."""

        async def main() -> list[tuple[str, Answer]]:
            answers = await asyncio.gather(*(self._ask_often(path, each) for path in paths))
            return [(path, answer) for path, found in zip(paths, answers, strict=True) for answer in found]

        return asyncio.run_coroutine_threadsafe(main(), self._loop)

    async def _ask_often(self, path: str, times: int) -> list[Answer]:
        reader, writer = await self._connect("echo", 80)
        found: list[Answer] = []
        for _ in range(times):
            writer.write(f"GET {path} HTTP/1.1\r\nhost: echo\r\n\r\n".encode())
            found.append(await _answer(reader, "GET"))
        writer.close()
        return found

    async def _ask(self, request: bytes, method: str, to: str, port: int, caller: Proxy | None) -> Answer:
        reader, writer = await self._connect(to, port, caller)
        try:
            writer.write(request)
            return await _answer(reader, method)
        finally:
            writer.close()

    async def _connect(
        self, to: str, port: int, caller: Proxy | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        app, proxied = connected_pair()
        destination = OriginalDestination(parse_address(_VIPS[to]), port, Route.TUNNEL)
        pair = self.running.pair
        pair.plane.spawn((caller or pair.web).outbound.serve(proxied, destination))
        return await asyncio.open_connection(sock=app)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)


def _within_echo(text: str) -> str:
    """A route of Service `echo` that leads to its own ports instead of to the versions' Services."""
    if "parentRefs: [{kind: Service, name: echo-" not in text:
        for name, port in _OWN.items():
            text = text.replace(f"name: echo-{name}, port: 8080", f"name: echo, port: {port}")
    return text


async def _answer(reader: asyncio.StreamReader, method: str) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers: dict[str, str] = {}
    for line in head[1:-2]:
        name, _, value = line.partition(": ")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    length = 0 if method == "HEAD" else int(headers.get("content-length", "0"))
    return Answer(int(head[0].split(" ")[1]), headers, await reader.readexactly(length))


async def _request(reader: asyncio.StreamReader) -> dict[str, Any]:
    """One, as it arrives."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, _ = head[0].split(" ")
    headers: dict[str, str] = {}
    for line in head[1:-2]:
        name, _, value = line.partition(": ")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    body = b""
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readline()
    else:
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    return {
        "method": method,
        "path": path,
        "host": headers.get("host"),
        "headers": headers,
        "body": body.decode("latin-1"),
    }


@contextlib.asynccontextmanager
async def _built_in(directory: Path, authority: Authority, app_port: int) -> AsyncIterator[Running]:
    async with running_waypoint(directory, authority, app_port, "http") as through:
        yield Running.built_in(through)


@contextlib.asynccontextmanager
async def _envoy(directory: Path, authority: Authority, app_port: int) -> AsyncIterator[Running]:
    async with bound_pair(directory, authority, app_port, "http") as pair:
        telemetry = Recorder()
        async with envoy_serving(pair, issued(authority, directory / "wp", WP), telemetry) as serving:

            async def applied() -> None:
                serving.take((), Changes())
                await serving.applied()

            yield Running(pair, telemetry, applied)


@contextlib.asynccontextmanager
async def _beside(directory: Path, authority: Authority, app_port: int) -> AsyncIterator[Running]:
    async with running_beside(directory, authority, app_port, "http") as besides:
        yield Running.built_in(besides)


BESIDE: Final = "beside"
"""The built-in engine, beside the workload: a version of the application is a port of Service `echo`, since a route
leads to no other Service there.
"""
ENGINES: Final = {"built-in": _built_in, "envoy": _envoy, BESIDE: _beside}


@contextlib.contextmanager
def running_suite(directory: Path, engine: str = "built-in") -> Iterator[Suite]:
    """The waypoint and what is behind it, in a thread of its own."""
    authority = Authority.create(directory / "ca", "cluster.local")
    echoes = {name: Echo(name) for name in VERSIONS}
    judge = Judge()
    started: list[Suite] = []
    running, stop = threading.Event(), asyncio.Event()

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:

            async def listen(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> int:
                server = await asyncio.start_server(serve, DB_ADDRESS, 0)
                stack.callback(server.close)
                found: int = server.sockets[0].getsockname()[1]
                return found

            judge.port = await listen(judge.serve)
            for name, echo in echoes.items():
                if engine == BESIDE:  # which is told the workload's port, and not the service's
                    echo.ports = {port: await listen(echo.serve) for port in (*_PORTS.values(), _OWN[name])}
                else:
                    echo.ports = dict.fromkeys(_PORTS.values(), await listen(echo.serve))
            waypoint = await stack.enter_async_context(
                ENGINES[engine](directory / "identities", authority, echoes["v1"].ports[80])
            )
            address, pair = parse_address("127.0.77.4"), waypoint.pair
            identity = issued(authority, directory / "identities" / "consumer", CONSUMER)
            own = Self("consumer/app", str(CONSUMER), CONSUMER.trust_domain, (address,))
            consumer = Proxy(pair.plane, pair.state, own, identity)
            started.append(Suite(waypoint, consumer, echoes, judge, asyncio.get_running_loop(), engine))
            running.set()
            await stop.wait()
            pair.plane.run(consumer.pool.close)

    thread = threading.Thread(target=lambda: plane.run(main()))
    thread.start()
    assert running.wait(30)
    try:
        yield started[0]
    finally:
        started[0]._loop.call_soon_threadsafe(stop.set)
        thread.join(30)


def route(
    *rules: str,
    name: str = "route",
    parents: str = "[{kind: Service, name: echo}]",
    hostnames: str = "",
    kind: str = "HTTPRoute",
    namespace: str = "shop",
) -> str:
    """A route in YAML; each rule as the mapping that it is, in one line or more."""
    lines = [
        "apiVersion: gateway.networking.k8s.io/v1",
        f"kind: {kind}",
        f"metadata: {{name: {name}, namespace: {namespace}}}",
        "spec:",
        f"  parentRefs: {parents}",
        *([f"  hostnames: {hostnames}"] if hostnames else []),
        "  rules:",
        *(f"  - {rule}" for rule in rules),
    ]
    return "\n".join(lines) + "\n"


def to(version: str, weight: int = 1) -> str:
    """A backendRef."""
    return f"{{name: echo-{version}, port: 8080, weight: {weight}}}"


def prefix(path: str) -> str:
    """Matches of one path prefix."""
    return f"[{{path: {{type: PathPrefix, value: {path}}}}}]"


def filtered(path: str, kind: str, content: str, backend: str = "") -> str:
    """A rule of one path prefix and one filter."""
    field = {"URLRewrite": "urlRewrite", "CORS": "cors"}.get(kind, kind[0].lower() + kind[1:])
    rest = f", backendRefs: [{backend}]" if backend else ""
    return f"{{matches: {prefix(path)}, filters: [{{type: {kind}, {field}: {content}}}]{rest}}}"
