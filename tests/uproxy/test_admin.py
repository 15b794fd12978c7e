"""The admin server on real sockets and its real loop: what it answers, and that no client keeps it busy."""

import asyncio
import contextlib
import json
import logging
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uproxy import admin, plane

OK = "GET {} HTTP/1.1\r\nHost: x\r\n\r\n"


def converse(routes, *sent: bytes, finish: bool = False) -> bytes:
    """What a client reads until the server closes, when it writes these pieces, each in a turn of its own."""

    async def run() -> bytes:
        server = await admin.serve("127.0.0.1", 0, routes)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            try:
                for piece in sent:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if finish:
                    writer.write_eof()
                return await asyncio.wait_for(reader.read(), 10)
            finally:
                await close(writer)

    return plane.run(run())


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def status(answer: bytes) -> int:
    line = answer.split(b"\r\n", 1)[0]
    assert line.startswith(b"HTTP/1.1 "), answer
    return int(line.split()[1])


def body(answer: bytes) -> str:
    return answer.partition(b"\r\n\r\n")[2].decode()


def echo(request: admin.Request) -> admin.Response:
    return admin.Response(f"{request.method} {request.path} {dict(request.query)}".encode())


def test_a_route_is_answered_and_the_connection_closed():
    answer = converse({"/a": echo}, b"GET /a?x=1&y=%20z HTTP/1.1\r\nHost: h\r\nAccept: */*\r\n\r\n")
    assert status(answer) == 200
    assert body(answer) == "GET /a {'x': '1', 'y': ' z'}"
    head = answer.partition(b"\r\n\r\n")[0]
    assert b"\r\nconnection: close" in head
    assert b"\r\ncontent-length: %d" % len(body(answer)) in head


def test_byte_by_byte_is_the_same():
    request = OK.format("/a").encode()
    whole = converse({"/a": echo}, request)
    assert converse({"/a": echo}, *(request[i : i + 1] for i in range(len(request)))) == whole


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        ("GET /no HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        ("GET /a/ HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        ("PUT /a HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        ("HEAD /a HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        ("get /a HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        ("POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 200),
        ("GET /a HTTP/1.0\r\n\r\n", 200),
        ("GET /a HTTP/1.1\r\n\r\n", 400),
        ("GET /a HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        ("GET /a HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        ("GET /a HTTP/2.0\r\nHost: x\r\n\r\n", 400),
        ("GET  /a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET /a\r\nHost: x\r\n\r\n", 400),
        ("GET http://x/a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET /a\x00 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET /a HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        ("GET /a HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400),
        ("GET /a HTTP/1.1\r\nHost: x\nX: y\r\n\r\n", 400),
        ("GET /a HTTP/1.1\r\nHost: x\r\nX: \x00\r\n\r\n", 400),
        ("POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", 413),
        ("POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: +0\r\n\r\n", 413),
        ("POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 413),
        ("GET /a HTTP/1.1\r\nHost: x\r\nX: " + "y" * admin.MAX_HEAD + "\r\n\r\n", 431),
        ("x" * admin.MAX_HEAD, 431),
    ],
)
def test_bad_requests_are_told_apart(sent, wanted):
    assert status(converse({"/a": echo}, sent.encode("latin-1"))) == wanted


def test_a_second_request_on_the_connection_is_not_read():
    calls = []

    def count(request: admin.Request) -> admin.Response:
        calls.append(request.path)
        return admin.Response(b"")

    answer = converse({"/a": count}, OK.format("/a").encode() * 3)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert calls == ["/a"]


def test_a_failing_handler_answers_500_and_says_nothing_of_why(caplog):
    def fail(request: admin.Request) -> admin.Response:
        raise RuntimeError("the secret")

    with caplog.at_level(logging.ERROR):
        answer = converse({"/a": fail}, OK.format("/a").encode())
    assert status(answer) == 500
    assert b"secret" not in answer
    assert "the secret" in caplog.text


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda b: b"GET /a HTTP/1.1\r\nHost: x\r\n" + b))
def test_any_head_is_a_request_or_refused(head):
    try:
        request = admin.parse_request(head)
    except admin.BadRequestError:
        return
    assert request.method in ("GET", "POST")
    assert request.path.startswith("/")


def test_a_client_that_stalls_is_cut(monkeypatch):
    monkeypatch.setattr(admin, "TIMEOUT_S", 0.05)

    async def run() -> None:
        async with await admin.serve("127.0.0.1", 0, {"/a": echo}) as server:
            address = server.sockets[0].getsockname()
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"GET /a HT")
            assert await asyncio.wait_for(reader.read(), 5) == b""
            await close(writer)

    plane.run(run())


def test_a_client_that_does_not_take_its_answer_is_cut(monkeypatch):
    monkeypatch.setattr(admin, "TIMEOUT_S", 0.1)
    large = admin.Response(b"x" * 50_000_000)

    async def run() -> None:
        async with await admin.serve("127.0.0.1", 0, {"/a": lambda _: large}) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), limit=1000)
            writer.write(OK.format("/a").encode())
            await asyncio.sleep(0.5)
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(50_000_000), 5)
            await close(writer)

    plane.run(run())


def test_connections_are_bounded_and_a_place_is_given_back():
    async def run() -> None:
        async with await admin.serve("127.0.0.1", 0, {"/a": echo}) as server:
            address = server.sockets[0].getsockname()

            async def ask() -> int:
                reader, writer = await asyncio.open_connection(*address)
                writer.write(OK.format("/a").encode())
                try:
                    return status(await reader.read())
                except ConnectionResetError:  # refused with the request unread
                    return 503
                finally:
                    await close(writer)

            idle = [await asyncio.open_connection(*address) for _ in range(admin.MAX_CONNECTIONS)]
            await asyncio.sleep(0.05)
            assert await ask() == 503
            for _, writer in idle[:2]:
                await close(writer)
            await asyncio.sleep(0.05)
            assert [await ask() for _ in range(5)] == [200] * 5
            for _, writer in idle:
                await close(writer)

    plane.run(run())


class TestRoutes:
    def ask(self, routes, path: str, method: str = "GET") -> tuple[int, str]:
        answer = converse(routes, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return status(answer), body(answer)

    def test_readiness_lists_what_is_pending(self):
        pending = {"config", "certificate"}
        routes = admin.ready_routes(lambda: pending)
        assert self.ask(routes, "/healthz/ready") == (503, "not ready, pending:\ncertificate\nconfig\n")
        pending.clear()
        assert self.ask(routes, "/healthz/ready") == (200, "ready\n")

    def test_metrics_have_both_paths(self):
        routes = admin.metrics_routes(lambda: b"m 1\n")
        assert self.ask(routes, "/metrics") == self.ask(routes, "/stats/prometheus") == (200, "m 1\n")
        assert b"text/plain; version=0.0.4" in converse(routes, OK.format("/metrics").encode())

    def test_admin(self):
        logger = logging.getLogger("test_admin")
        logger.setLevel("INFO")
        quits = []
        routes = admin.admin_routes(lambda: {"b": [1], "a": HTTPStatus.OK}, lambda: quits.append(1), logger)
        code, dump = self.ask(routes, "/config_dump")
        assert (code, json.loads(dump)) == (200, {"a": 200, "b": [1]})
        assert self.ask(routes, "/logging") == (200, "level info\n")
        assert self.ask(routes, "/logging?level=debug", "POST") == (200, "level debug\n")
        assert logger.level == logging.DEBUG
        assert self.ask(routes, "/logging?level=loud", "POST")[0] == 400
        assert logger.level == logging.DEBUG
        assert self.ask(routes, "/quitquitquit", "POST") == (200, "draining\n")
        assert quits == [1]
        assert self.ask(routes, "/") == (200, "/config_dump\n/logging\n/quitquitquit\n")

    @pytest.mark.parametrize("path", ["/quitquitquit", "/logging?level=debug"])
    def test_a_get_changes_nothing(self, path):
        """A link that somebody is made to follow must not stop a proxy."""
        logger = logging.getLogger("test_admin_get")
        logger.setLevel("INFO")
        quits = []
        routes = admin.admin_routes(dict, lambda: quits.append(1), logger)
        assert self.ask(routes, path)[0] == 405
        assert (quits, logger.level) == ([], logging.INFO)
