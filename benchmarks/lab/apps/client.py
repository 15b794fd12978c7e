"""Web: a client that does one job per line of JSON on standard input and answers with one line of JSON.

Standard library only; copied to run. It knows nothing of the mesh: ordinary sockets, ordinary addresses.

    {"job": "http", "host", "port", "path", "body", "method"}          -> {"status", "body", "peer", "us"}
    {"job": "redis", "host": …, "port": …, "command": [...]}           -> {"reply", "us"}
    {"job": "dial", "host": …, "port": …, "send": …, "timeout_s": …}   -> {"connected", "received"}
    {"job": "round-trips", "host": …, "port": …, "count": …}           -> {"us": [...]}
    {"job": "closed-loop", "host", "port", "connections", "seconds"}   -> {"requests", "seconds"}
    {"job": "traffic", "http": [host, port], "redis": [host, port]}    -> {"began"}; goes on beside other jobs
    {"job": "traffic-told", "end": …}                                  -> {"requests", "failed", …}, see Traffic
    {"job": "open-loop", "host": …, "port": …, "per_s": …}             -> {"began"}; goes on beside other jobs
    {"job": "open-loop-end"}                                           -> {"requests": [...]}, see OpenLoop
    {"job": "kept-alive", "host", "port", "connections", "pause_s", "turns"} -> {"began"}; goes on beside other jobs
    {"job": "kept-alive-end"}                                          -> {"requests": [...]}, see KeptAlive
A job that fails answers {"error": name of the exception, "errno": …, "text": …}.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_TIMEOUT_S = 10.0
_PING = b"PING\r\n"
_PONG = b"+PONG\r\n"
_GET = b"GET / HTTP/1.1\r\nhost: reviews\r\n\r\n"
_PAUSE_S = 0.005
_MAX_TOLD = 5


def fetch(host: str, port: int, path: str = "/", body: str | None = None, method: str = "") -> dict[str, Any]:
    """One HTTP request on a connection of its own. `method`: GET, or POST when there is a body, unless it says more."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body)
        answer = connection.getresponse()
        content = answer.read().decode()
        peer = connection.sock.getpeername()[0] if connection.sock else host
        return {"status": answer.status, "body": content, "peer": peer, "us": _since_us(began)}
    finally:
        connection.close()


def ask_redis(host: str, port: int, command: list[str]) -> dict[str, Any]:
    """One command in RESP, its reply undecoded but for the line ends."""
    began = time.perf_counter()
    with socket.create_connection((host, port), timeout=_TIMEOUT_S) as made:
        parts = [word.encode() for word in command]
        made.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts))
        reply = made.recv(65536).decode()
        return {"reply": reply.strip().replace("\r\n", " "), "us": _since_us(began)}


def dial(host: str, port: int, send: str = "", timeout_s: float = _TIMEOUT_S) -> dict[str, Any]:
    """Connect, send if asked, and read once."""
    with socket.create_connection((host, port), timeout=timeout_s) as made:
        made.sendall(send.encode())
        return {"connected": True, "received": made.recv(4096).decode("utf-8", "replace")}


def round_trips(host: str, port: int, count: int) -> dict[str, Any]:
    """Round trips of an HTTP request, one at a time on one connection, in microseconds."""
    with socket.create_connection((host, port), timeout=_TIMEOUT_S) as made:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        took = []
        for _ in range(count):
            began = time.perf_counter_ns()
            made.sendall(_GET)
            received = bytearray()
            while not _is_whole(received):
                _receive(made, received)
            took.append((time.perf_counter_ns() - began) / 1000)
        return {"us": took}


def closed_loop(host: str, port: int, connections: int, seconds: float) -> dict[str, Any]:
    """HTTP requests on many connections at once, the next one when the last is answered."""
    selector = selectors.DefaultSelector()
    made = {socket.create_connection((host, port), timeout=_TIMEOUT_S): bytearray() for _ in range(connections)}
    try:
        for one in made:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(one, selectors.EVENT_READ, one)
        requests = 0
        began = time.perf_counter()
        until = began + seconds
        for one in made:
            one.sendall(_GET)
        while time.perf_counter() < until:
            for key, _ in selector.select(_TIMEOUT_S):
                ready: socket.socket = key.data
                _receive(ready, made[ready])
                if _is_whole(made[ready]):
                    requests += 1
                    made[ready].clear()
                    ready.sendall(_GET)
        took = time.perf_counter() - began
        # The last answers are on their way: closing on unread data would reset the connections.
        for one, received in made.items():
            while not _is_whole(received):
                _receive(one, received)
        return {"requests": requests, "seconds": took}
    finally:
        for one in made:
            one.close()
        selector.close()


def _receive(made: socket.socket, received: bytearray) -> None:
    more = made.recv(4096)
    if not more:
        raise ConnectionError("the connection ended before the answer did")
    received += more


def _is_whole(received: bytearray) -> bool:
    """Whether an answer with a Content-Length is there from its head to its end. Raises OSError when it is not 200."""
    head = received.find(b"\r\n\r\n")
    if head < 0:
        return False
    if not received.startswith(b"HTTP/1.1 200"):
        raise OSError(f"answered {received[:40].decode('latin-1')!r}")
    at = received.lower().index(b"\r\ncontent-length:")
    return len(received) >= head + 4 + int(received[at + 17 : received.index(b"\r\n", at + 2)])


class Traffic:
    """Requests one after the other until ended: HTTP on a new connection each time, and Redis on one that stays.

    A request that fails is counted, and the next one is made: what is told in the end is all of it.
    """

    def __init__(self, http: tuple[str, int], redis: tuple[str, int]) -> None:
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._counts = {"new connections": 0, "one connection": 0}
        self._answers: dict[str, int] = {}
        self._callers: dict[str, int] = {}
        self._failures: list[str] = []
        self._longest_us = 0.0
        self._threads = [
            threading.Thread(target=self._fetch, args=http, daemon=True),
            threading.Thread(target=self._ping, args=redis, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def told(self) -> dict[str, Any]:
        """Counts so far; `answers` by the version that answered, `callers` by who the application was told had called,
        `failed` with the first few of the failures.
        """
        with self._lock:
            return {
                "requests": dict(self._counts),
                "answers": dict(self._answers),
                "callers": dict(self._callers),
                "failed": len(self._failures),
                "failures": self._failures[:_MAX_TOLD],
                "longest_ms": round(self._longest_us / 1000, 1),
            }

    def end(self) -> dict[str, Any]:
        self._ended.set()
        for thread in self._threads:
            thread.join(_TIMEOUT_S)
        return self.told()

    def _fetch(self, host: str, port: int) -> None:
        while not self._ended.wait(_PAUSE_S):
            began = time.perf_counter()
            try:
                answer = fetch(host, port)
                if answer["status"] != 200:
                    raise ConnectionError(f"status {answer['status']}")
                content = json.loads(answer["body"])
                version, caller = str(content["version"]), str(content.get("caller", ""))
            except (OSError, ValueError, http.client.HTTPException) as error:
                self._failed(f"http: {type(error).__name__}: {error}", began)
            else:
                self._took("new connections", began, version, caller)

    def _ping(self, host: str, port: int) -> None:
        while not self._ended.is_set():
            began = time.perf_counter()
            try:
                with socket.create_connection((host, port), timeout=_TIMEOUT_S) as made:
                    while not self._ended.wait(_PAUSE_S):
                        began = time.perf_counter()
                        made.sendall(_PING)
                        if made.recv(64) != _PONG:
                            raise ConnectionError("no PONG")
                        self._took("one connection", began)
            except OSError as error:
                self._failed(f"redis: {type(error).__name__}: {error}", began)
                self._ended.wait(_PAUSE_S)

    def _took(self, kind: str, began: float, version: str | None = None, caller: str = "") -> None:
        with self._lock:
            self._counts[kind] += 1
            self._longest_us = max(self._longest_us, _since_us(began))
            if version is not None:
                self._answers[version] = self._answers.get(version, 0) + 1
                self._callers[caller] = self._callers.get(caller, 0) + 1

    def _failed(self, text: str, began: float) -> None:
        with self._lock:
            self._failures.append(f"{text} after {_since_us(began) / 1000:.1f} ms")


class OpenLoop:
    """HTTP requests that begin when their time has come, however long the others take, each on a new connection."""

    def __init__(self, host: str, port: int, per_s: float) -> None:
        self._target = (host, port)
        self._interval_s = 1 / per_s
        self._ended = threading.Event()
        self._requests: list[tuple[float, float, str, str]] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    def end(self) -> dict[str, Any]:
        """Every request: when it began and ended (monotonic), the caller the application was told of, what failed."""
        self._ended.set()
        self._thread.join(2 * _TIMEOUT_S)
        return {"requests": self._requests}

    async def _run(self) -> None:
        due = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while not self._ended.is_set():
                group.create_task(self._fetch())
                due += self._interval_s
                await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _fetch(self) -> None:
        began, caller, failure = time.monotonic(), "", ""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(*self._target)
                try:
                    writer.write(_GET.replace(b"host", b"connection: close\r\nhost"))
                    received = bytearray(await reader.read())
                    if not _is_whole(received):
                        raise ConnectionError(f"the connection ended after {len(received)} bytes")
                finally:
                    writer.close()
            caller = json.loads(received.partition(b"\r\n\r\n")[2])["caller"]
        except (OSError, ValueError) as error:
            failure = f"{type(error).__name__}: {error}"
        self._requests.append((began, time.monotonic(), caller, failure))


class KeptAlive:
    """HTTP requests one after the other on connections that are kept, and made anew when the server has ended them, as
    it may between two requests, or after some requests. None is sent twice.
    """

    def __init__(self, host: str, port: int, connections: int, pause_s: float, turns: int) -> None:
        self._target = (host, port)
        self._pause_s = pause_s
        self._turns = turns
        self._ended = threading.Event()
        self._requests: list[tuple[float, float, str, str, float]] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(connections)), daemon=True)
        self._thread.start()

    def end(self) -> dict[str, Any]:
        """As of `OpenLoop`; and when its connection was opened."""
        self._ended.set()
        self._thread.join(2 * _TIMEOUT_S)
        return {"requests": self._requests}

    async def _run(self, connections: int) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(connections):
                group.create_task(self._keep(self._turns + number))

    async def _keep(self, turns: int) -> None:
        while not self._ended.is_set():
            began = opened = time.monotonic()
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    reader, writer = await asyncio.open_connection(*self._target)
                try:
                    for _ in range(turns):
                        if self._ended.is_set() or reader.at_eof() or reader.exception() is not None:
                            break
                        began = time.monotonic()
                        async with asyncio.timeout(_TIMEOUT_S):
                            caller, last = await self._ask(reader, writer)
                        self._requests.append((began, time.monotonic(), caller, "", opened))
                        if last:
                            break
                        await asyncio.sleep(self._pause_s)
                finally:
                    writer.close()
            except (OSError, ValueError, EOFError) as error:
                self._requests.append((began, time.monotonic(), "", f"{type(error).__name__}: {error}", opened))

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, bool]:
        """The caller that the application was told of, and whether the server ends the connection."""
        writer.write(_GET)
        received = bytearray()
        while not _is_whole(received):
            more = await reader.read(4096)
            if not more:
                raise ConnectionError(f"the connection ended after {len(received)} bytes")
            received += more
        head, _, body = received.partition(b"\r\n\r\n")
        return json.loads(body)["caller"], b"\r\nconnection: close" in head.lower()


_running: list[Traffic] = []
_open_loops: list[OpenLoop] = []
_kept_alive: list[KeptAlive] = []


def begin_traffic(http: list[Any], redis: list[Any]) -> dict[str, Any]:
    """Start traffic beside the jobs; one at a time."""
    if _running:
        raise OSError("traffic runs already")
    _running.append(Traffic((http[0], http[1]), (redis[0], redis[1])))
    return {"began": True}


def tell_traffic(end: bool = False) -> dict[str, Any]:
    """What the traffic has seen so far, or all of it when it is ended."""
    if not _running:
        raise OSError("no traffic runs")
    return _running.pop().end() if end else _running[0].told()


def begin_open_loop(host: str, port: int, per_s: float) -> dict[str, Any]:
    """Start an open loop beside the jobs."""
    _open_loops.append(OpenLoop(host, port, per_s))
    return {"began": True}


def end_open_loop() -> dict[str, Any]:
    """End the one that was started last."""
    return _open_loops.pop().end()


def begin_kept_alive(host: str, port: int, connections: int, pause_s: float, turns: int) -> dict[str, Any]:
    """Start requests on kept connections beside the jobs, so many at least on each."""
    _kept_alive.append(KeptAlive(host, port, connections, pause_s, turns))
    return {"began": True}


def end_kept_alive() -> dict[str, Any]:
    """End those that were started last."""
    return _kept_alive.pop().end()


def _since_us(began: float) -> float:
    return round((time.perf_counter() - began) * 1e6, 1)


_JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "http": fetch,
    "redis": ask_redis,
    "dial": dial,
    "round-trips": round_trips,
    "closed-loop": closed_loop,
    "traffic": begin_traffic,
    "traffic-told": tell_traffic,
    "open-loop": begin_open_loop,
    "open-loop-end": end_open_loop,
    "kept-alive": begin_kept_alive,
    "kept-alive-end": end_kept_alive,
}


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = _JOBS[job.pop("job")](**job)
        except (OSError, http.client.HTTPException) as error:
            answer = {"error": type(error).__name__, "errno": getattr(error, "errno", None), "text": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
