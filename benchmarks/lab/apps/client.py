"""Web: a client that does one job per line of JSON on standard input and answers with one line of JSON.

Standard library only; copied to run. It knows nothing of the mesh: ordinary sockets, ordinary addresses.

    {"job": "http", "host": …, "port": …, "path": …, "body": …}       -> {"status", "body", "peer", "us"}
    {"job": "redis", "host": …, "port": …, "command": [...]}           -> {"reply", "us"}
    {"job": "dial", "host": …, "port": …, "send": …, "timeout_s": …}   -> {"connected", "received"}
    {"job": "pings", "host": …, "port": …, "count": …}                 -> {"us": [...]}
    {"job": "closed-loop", "host", "port", "connections", "seconds"}   -> {"requests", "seconds"}
A job that fails answers {"error": name of the exception, "errno": …, "text": …}.
"""

from __future__ import annotations

import http.client
import json
import selectors
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

_TIMEOUT_S = 10.0
_PING = b"PING\r\n"
_PONG = b"+PONG\r\n"


def fetch(host: str, port: int, path: str = "/", body: str | None = None) -> dict[str, Any]:
    """One HTTP request on a connection of its own."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET" if body is None else "POST", path, body)
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


def pings(host: str, port: int, count: int) -> dict[str, Any]:
    """Round trips of a Redis PING, one at a time on one connection, in microseconds."""
    with socket.create_connection((host, port), timeout=_TIMEOUT_S) as made:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        took = []
        for _ in range(count):
            began = time.perf_counter_ns()
            made.sendall(_PING)
            received = made.recv(64)
            while len(received) < len(_PONG):
                more = made.recv(64)
                if not more:
                    raise ConnectionError("the connection ended in the middle of a reply")
                received += more
            took.append((time.perf_counter_ns() - began) / 1000)
        return {"us": took}


def closed_loop(host: str, port: int, connections: int, seconds: float) -> dict[str, Any]:
    """Redis PINGs on many connections at once, the next one when the last is answered."""
    selector = selectors.DefaultSelector()
    made = [socket.create_connection((host, port), timeout=_TIMEOUT_S) for _ in range(connections)]
    try:
        for one in made:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one.setblocking(False)
            selector.register(one, selectors.EVENT_READ, one)
        requests = 0
        began = time.perf_counter()
        until = began + seconds
        for one in made:
            one.send(_PING)
        while time.perf_counter() < until:
            for key, _ in selector.select(_TIMEOUT_S):
                ready: socket.socket = key.data
                if len(ready.recv(64)) != len(_PONG):
                    raise ConnectionError("a reply of the wrong length")
                requests += 1
                ready.send(_PING)
        took = time.perf_counter() - began
        # The last replies are on their way: closing on unread data would reset the connections.
        for one in made:
            one.setblocking(True)
            one.recv(64)
        return {"requests": requests, "seconds": took}
    finally:
        for one in made:
            one.close()
        selector.close()


def _since_us(began: float) -> float:
    return round((time.perf_counter() - began) * 1e6, 1)


_JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "http": fetch,
    "redis": ask_redis,
    "dial": dial,
    "pings": pings,
    "closed-loop": closed_loop,
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
