"""The admin server on real sockets and its real loop: what it answers, and that no client keeps it busy."""

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Callable
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uproxy import admin, log_levels, plane
from uproxy.tap import INTERVAL_S, MAX_LINES, MAX_TAPS, MAX_WAITING, Taps

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
                return await asyncio.wait_for(reader.read(), 30)
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
            assert await asyncio.wait_for(reader.read(), 30) == b""
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
                await asyncio.wait_for(reader.readexactly(50_000_000), 30)
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

    def test_admin(self, levels):
        quits = []
        routes = admin.admin_routes(
            lambda: {"b": [1], "a": HTTPStatus.OK}, lambda: quits.append(1), lambda: b"[]\n", Taps()
        )
        code, dump = self.ask(routes, "/config_dump")
        assert (code, json.loads(dump)) == (200, {"a": 200, "b": [1]})
        assert self.ask(routes, "/connections") == (200, "[]\n")
        assert self.ask(routes, "/logging") == (200, "level info\n")
        assert self.ask(routes, "/logging?level=debug", "POST") == (200, "level debug\n")
        assert logging.getLogger().level == logging.DEBUG
        assert self.ask(routes, "/logging?level=loud", "POST")[0] == 400
        assert logging.getLogger().level == logging.DEBUG
        assert self.ask(routes, "/quitquitquit", "POST") == (200, "draining\n")
        assert quits == [1]
        assert self.ask(routes, "/") == (200, "/config_dump\n/connections\n/tap\n/logging\n/quitquitquit\n")

    def test_a_part_may_log_at_a_level_of_its_own(self, levels):
        logging.getLogger("access")
        routes = admin.admin_routes(dict, lambda: None, lambda: b"", Taps())
        assert self.ask(routes, "/logging?level=warning,access:debug", "POST") == (200, "level warning,access:debug\n")
        assert logging.getLogger("access").isEnabledFor(logging.DEBUG)
        assert not logging.getLogger("uproxy.admin").isEnabledFor(logging.INFO)
        assert self.ask(routes, "/logging?level=uproxy.admin:error", "POST") == (
            200,
            "level warning,uproxy.admin:error\n",
        )
        assert not logging.getLogger("access").isEnabledFor(logging.DEBUG)
        assert self.ask(routes, "/logging?level=info", "POST") == (200, "level info\n")
        for wrong in ("no.such:debug", "info,debug", "access:", "", "asyncio:debug", "info,access:debug,x"):
            assert self.ask(routes, f"/logging?level={wrong}", "POST")[0] == 400
            assert self.ask(routes, "/logging") == (200, "level info\n")

    def test_levels_of_another_process_are_taken_as_far_as_its_parts_are_here(self, levels):
        log_levels.set_levels("debug,uproxy.admin:error,waypoint.elsewhere:info", of_others=True)
        assert log_levels.levels() == "debug,uproxy.admin:error"

    def test_what_the_code_silences_is_neither_shown_nor_woken(self, levels):
        silenced = logging.getLogger("control.silenced")
        silenced.setLevel(logging.CRITICAL + 1)
        assert log_levels.levels() == "info"
        log_levels.set_levels("debug")
        log_levels.set_levels(log_levels.levels())
        assert silenced.level == logging.CRITICAL + 1
        with pytest.raises(ValueError, match="is no part"):
            log_levels.set_levels("control.silenced:debug")

    @pytest.mark.parametrize("path", ["/quitquitquit", "/logging?level=debug"])
    def test_a_get_changes_nothing(self, path, levels):
        """A link that somebody is made to follow must not stop a proxy."""
        quits = []
        routes = admin.admin_routes(dict, lambda: quits.append(1), lambda: b"", Taps())
        assert self.ask(routes, path)[0] == 405
        assert (quits, logging.getLogger().level) == ([], logging.INFO)


@pytest.fixture
def levels():
    """The levels of a process as it starts; what was changed is undone."""
    log_levels.set_levels("info")
    yield
    log_levels.set_levels("warning")


class TestTap:
    """`/tap` on a real socket: lines as they come, what is left out, and who leaves."""

    def converse(self, conversation) -> None:
        async def run() -> None:
            taps = Taps()
            routes = admin.admin_routes(dict, lambda: None, lambda: b"", taps)
            async with await admin.serve("127.0.0.1", 0, routes) as server:
                await asyncio.wait_for(conversation(taps, server.sockets[0].getsockname()), 30)

        plane.run(run())

    async def watch(self, address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*address, limit=1 << 22)
        writer.write(OK.format("/tap").encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert status(head) == 200
        assert b"application/x-ndjson" in head
        return reader, writer

    def note(self, taps: Taps, number: int) -> None:
        taps.note("event", "info", lambda field: [field("number", number)])

    def test_every_watcher_gets_every_line_in_order_from_when_it_came(self):
        async def conversation(taps, address):
            assert not taps.watched
            first, one = await self.watch(address)
            self.note(taps, 1)
            second, two = await self.watch(address)
            self.note(taps, 2)
            assert [json.loads(await first.readline())["number"] for _ in range(2)] == [1, 2]
            line = json.loads(await second.readline())
            assert {key: line[key] for key in ("message", "level", "number")} == {
                "message": "event", "level": "info", "number": 2
            }  # fmt: skip
            await close(one)
            self.note(taps, 3)
            assert json.loads(await second.readline())["number"] == 3
            await close(two)
            while taps.watched:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        self.converse(conversation)

    def test_what_is_too_much_is_left_out_and_counted(self):
        async def conversation(taps, address):
            reader, writer = await self.watch(address)
            for number in range(MAX_LINES + 50):
                self.note(taps, number)
            lines = [json.loads(await reader.readline()) for _ in range(MAX_LINES + 1)]
            assert [line["number"] for line in lines[:-1]] == list(range(MAX_LINES))
            assert (lines[-1]["message"], lines[-1]["lines"]) == ("left out", 50)
            self.note(taps, 7)
            assert json.loads(await reader.readline())["number"] == 7
            await close(writer)

        self.converse(conversation)

    def test_one_who_does_not_read_costs_bounded_memory_and_is_told_later(self):
        async def conversation(taps, address):
            reader, writer = await self.watch(address)
            tap = next(iter(taps._taps))
            reader._transport.pause_reading()
            long = "x" * 2000
            noted = 0
            while not tap._left_out:
                for _ in range(MAX_LINES):
                    taps.note("event", "info", lambda field: [field("text", long)])
                    noted += 1
                await asyncio.sleep(INTERVAL_S)
                assert tap._outlet.waiting < MAX_WAITING + MAX_LINES * 2200
            reader._transport.resume_reading()
            came = told = 0
            while came + told < noted:
                line = json.loads(await reader.readline())
                came += line["message"] == "event"
                told += line.get("lines", 0)
            assert (came + told, told > 0) == (noted, True)
            await close(writer)

        self.converse(conversation)

    def test_only_so_many_watch(self):
        async def conversation(taps, address):
            writers = [(await self.watch(address))[1] for _ in range(MAX_TAPS)]
            reader, writer = await asyncio.open_connection(*address)
            writer.write(OK.format("/tap").encode())
            assert status(await reader.read()) == 503
            for one in (*writers, writer):
                await close(one)
            while taps.full:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await close((await self.watch(address))[1])

        self.converse(conversation)


class LeftAtOnce(socket.socket):
    """A listening socket whose pages end in the very turn in which something is accepted."""

    left: Callable[[], object]

    def accept(self) -> tuple[socket.socket, object]:
        accepted = super().accept()
        asyncio.get_running_loop().call_soon(self.left)
        return accepted


def test_whoever_was_accepted_is_answered_before_the_pages_end() -> None:
    async def run() -> bytes:
        listening = LeftAtOnce()
        listening.bind(("127.0.0.1", 0))
        pages = await admin.serve("127.0.0.1", 0, {"/a": echo}, listening)
        listening.left = pages.leave
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            ending = group.create_task(pages.answered())
            await asyncio.sleep(0.1)
            assert not ending.done(), "one has not asked yet"
            writer.write(OK.format("/a").encode())
            answer = await reader.read()
            await ending
            assert listening.fileno() < 0
            await close(writer)
        return answer

    assert status(asyncio.run(run())) == 200
