"""Filters in Python: what they may do, and that what they do wrong costs the request and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from control.api.extension import EnvoyFilter, Language, PythonFilter
from control.api.policy import Target
from control.api.traffic import TrafficPolicy
from control.client.state import Changes
from control.server.ca import Authority
from tests.support.certificates import WEB
from tests.support.through_waypoint import Through, run_through
from tests.support.waiting import until, until_true
from uproxy import plane
from waypoint import filter_pool
from waypoint.filter_pool import FilterPool, _Child

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "deploy" / "examples" / "filter"

FILTERS = '''
import os, time

from waypoint.extending import Answer


class Writes:
    def __init__(self, settings):
        self.settings = settings

    def on_request(self, request):
        name, _, value = self.settings["header"].partition("=")
        request.headers = [field for field in request.headers if field[0] != name] + [(name, value)]

    def on_response(self, request, response):
        response.headers.append(("x-seen", f"{request.target} {request.header('x-a')} {response.status}"))


class Wrong:
    """Does what the request asks for."""

    def __init__(self, settings):
        self.held = []
        self.directory = settings.get("directory", "")

    def on_request(self, request):
        match request.header("x-do"):
            case "raise":
                raise RuntimeError("no")
            case "hang":
                time.sleep(60)
            case "die":
                os._exit(3)
            case "bloat":
                self.held.append(bytearray(2 << 30))
            case "write much":
                return Answer(200, [], b"x" * (1 << 20))
            case "write many":
                request.headers += [("x-many", "1")] * 200
            case "say who calls":
                request.headers.append(("x-forwarded-client-cert", "URI=boss"))
            case "move the end":
                request.headers.append(("content-length", "3"))
            case "move the host":
                request.headers = [field for field in request.headers if field[0] != "host"]
            case "split":
                request.headers.append(("x-a", "b" + chr(13) + chr(10) + "x-c: d"))
            case "say who refuses":
                return Answer(403, [("x-uproxy-reason", "policy")], b"no")
            case "say who answers":
                return Answer(200, [("x-forwarded-client-cert", "URI=boss")], b"yes")
            case "end an answer":
                return Answer(200, [("content-length", "1")], b"yes")
            case "return":
                return 7
            case "answer":
                return Answer(418, [("x-b", "c")], b"tea")
            case "answer nothing":
                return Answer(204)
            case "answer oddly":
                return Answer(101)
            case "read the key":
                open(self.directory + "/key.pem").read()
            case "pid":
                return Answer(200, [], str(os.getpid()).encode())


def does_not_load(settings):
    raise ValueError("not with these settings")
'''
ENTRY_POINTS = """[uproxy.waypoint.filters]
writes = some_filters:Writes
wrong = some_filters:Wrong
does-not-load = some_filters:does_not_load
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with filters."""
    (tmp_path / "some_filters.py").write_text(FILTERS)
    info = tmp_path / "some_filters-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-filters\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def policy(*filters: PythonFilter | EnvoyFilter) -> TrafficPolicy:
    return TrafficPolicy("shop", "extended", (Target("Service", "shop/db"),), filters=filters)


async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(head), head))
    writer.close()


Ask = Callable[..., Awaitable[tuple[int, bytes, bytes]]]


def asking(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Ask:
    async def ask(*headers: bytes, path: bytes = b"/") -> tuple[int, bytes, bytes]:
        writer.write(b"GET %b HTTP/1.1\r\nHost: db\r\n%b\r\n" % (path, b"".join(b"%b\r\n" % one for one in headers)))
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        body = await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        return int(head.split(b" ", 2)[1]), head, body

    return ask


@pytest.mark.usefixtures("installed")
def test_filters_change_heads_one_after_the_other(identities: Path, authority: Authority):
    async def client(through: Through) -> None:
        first, second = (
            PythonFilter(f"shop/{value}", "writes", (("header", f"x-a={value}"),), 5000) for value in ("one", "two")
        )
        through.pair.apply(policy(first, second))
        reader, writer = await through.open()
        ask = asking(reader, writer)
        for _ in range(3):
            status, head, body = await ask(path=b"/p/../q?r")
            assert status == 200
            assert b"\r\nx-a: two\r\n" in body
            assert b"x-a: one" not in body
            assert head.count(b"x-seen: /q?r two 200\r\n") == 2
        through.pair.apply(policy(first))
        status, head, body = await ask()
        assert (status, head.count(b"x-seen")) == (200, 1)
        assert b"\r\nx-a: one\r\n" in body
        through.pair.withdraw(policy())
        assert b"x-a" not in (await ask())[2]
        writer.close()

    run_through(identities, authority, tell, client)


@pytest.mark.usefixtures("installed")
def test_the_largest_heads_cost_no_process(identities: Path, authority: Authority, caplog: pytest.LogCaptureFixture):
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        large = head.partition(b"x-large: ")[2].partition(b"\r\n")[0]
        writer.write(b"HTTP/1.1 200 OK\r\nx-large: %b\r\ncontent-length: 0\r\n\r\n" % large)
        writer.close()

    async def client(through: Through) -> None:
        through.pair.apply(policy(PythonFilter("shop/x", "writes", (("header", "x-a=b"),), 5000)))
        reader, writer = await through.open()
        status, head, _ = await asking(reader, writer)(b"x-large: " + b"\xff" * 58_000)
        assert status == 200, caplog.text
        assert head.count(b"\xff") == 58_000
        assert b"\nuproxy_waypoint_filter_restarts_total 0\n" in through.telemetry.render()
        writer.close()

    run_through(identities, authority, echo, client)


WRONG = {
    b"raise": b"RuntimeError: no",
    b"hang": b"no answer within 0.2 s",
    b"die": b"its process ended",
    b"bloat": b"MemoryError",
    b"write much": b"an answer of more than 262144 bytes",
    b"write many": b"a list of at most 100",
    b"say who calls": b"'x-forwarded-client-cert' is the waypoint's own to write",
    b"move the end": b"'content-length' is the waypoint's own to write",
    b"move the host": b"it must leave as they are: host",
    b"say who refuses": b"'x-uproxy-reason' is the waypoint's own to write",
    b"say who answers": b"'x-forwarded-client-cert' is the waypoint's own to write",
    b"end an answer": b"'content-length' is the waypoint's own to write",
    b"split": b"is no header's value",
    b"return": b"on_request returned int",
    b"answer oddly": b"needs a status from 200 to 599",
}


@pytest.mark.usefixtures("installed")
def test_what_a_filter_does_wrong_fails_its_own_request_and_nothing_else(
    identities: Path, authority: Authority, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)

    async def client(through: Through) -> None:
        wrong = PythonFilter("shop/wrong", "wrong", timeout_ms=200)
        through.pair.apply(policy(wrong))
        connections = [await through.open() for _ in range(2)]
        ask, beside = (asking(*one) for one in connections)
        assert (await ask(b"x-do: answer"))[2] == b"tea"
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\nx-do: answer nothing\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 204 ")
        assert b"content-length" not in head, "RFC 9110 section 8.6"
        writer.close()
        for what, told in WRONG.items():
            failing = asyncio.get_running_loop().create_task(ask(b"x-do: " + what))
            assert (await beside())[0] == 200, "others are served meanwhile"
            status, head, body = await failing
            assert (what, status) == (what, 503)
            assert body == b"a filter of this waypoint failed\n"
            assert told.decode() in caplog.text
            assert b"\r\nx-uproxy-reason: extension\r\n" in head
            assert b"\r\nx-uproxy-policy: shop/wrong\r\n" in head
            assert (await ask())[0] == 200, what
        through.pair.apply(policy(PythonFilter("shop/wrong", "wrong", timeout_ms=200, fail_open=True)))
        for what in (b"raise", b"die"):
            assert (await ask(b"x-do: " + what))[0] == 200
        for _, writer in connections:
            writer.close()
        assert b"\nuproxy_waypoint_filter_failures_total 17\n" in through.telemetry.render()

    run_through(identities, authority, tell, client)


@pytest.mark.usefixtures("installed")
def test_a_filter_cannot_read_the_waypoints_key(
    identities: Path, authority: Authority, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)

    async def client(through: Through) -> None:
        directory = (identities / "wp").resolve()
        assert (directory / "key.pem").exists()
        through.pair.apply(policy(PythonFilter("shop/wrong", "wrong", (("directory", str(directory)),), 5000)))
        reader, writer = await through.open()
        ask = asking(reader, writer)
        assert (await ask(b"x-do: read the key"))[0] == 503
        assert "PermissionError: [Errno 13]" in caplog.text
        writer.close()

    run_through(identities, authority, tell, client)


@pytest.mark.usefixtures("installed")
def test_what_does_not_load_or_is_not_there_refuses(
    identities: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(filter_pool, "FIRST_RESTART_S", 5.0)

    async def client(through: Through) -> None:
        reader, writer = await through.open()
        ask = asking(reader, writer)
        for name, told in (
            ("does-not-load", b"ValueError: not with these settings"),
            ("nobody", b"no package that is installed here has entry point 'nobody'"),
            ("", b"there is no Extension shop/x"),
        ):
            through.pair.apply(policy(PythonFilter("shop/x", name)))
            for _ in range(2):
                status, _, body = await ask()
                assert status == 503
                assert body == b"a filter of this waypoint failed\n"
            assert told.decode() in caplog.text
        through.pair.apply(policy(PythonFilter("shop/x", "", fail_open=True)))
        assert (await ask())[0] == 200
        writer.close()

    run_through(identities, authority, tell, client)


@pytest.mark.usefixtures("installed")
def test_a_process_that_does_not_start_costs_those_nothing_that_another_one_serves(
    identities: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(filter_pool, "FIRST_RESTART_S", 0.01)
    start, started = filter_pool._process, list[str]()

    def once(fd: int, entry_point: str, closed: Path | None) -> subprocess.Popen[bytes]:
        started.append(entry_point)
        if len(started) > 1:
            raise OSError("no memory is left")
        return start(fd, entry_point, closed)

    async def client(through: Through) -> None:
        through.pair.apply(policy(PythonFilter("shop/wrong", "wrong", timeout_ms=5000)))
        connections = [await through.open() for _ in range(4)]
        asks = [asking(*one) for one in connections]

        async def serves() -> bool:
            return (await asks[0]())[0] == 200

        await until_true(serves)
        tried = len(started)
        await until(lambda: len(started) > tried)
        assert [status for status, _, _ in await asyncio.gather(*(ask() for ask in asks))] == [200] * 4
        for _, writer in connections:
            writer.close()

    monkeypatch.setattr(filter_pool, "_process", once)
    run_through(identities, authority, tell, client)


@pytest.mark.parametrize("called", [False, True], ids=["uncalled", "called"])
def test_a_process_that_dies_before_it_is_called_is_started_later_and_later(
    monkeypatch: pytest.MonkeyPatch, called: bool
):
    starts: list[int] = []
    monkeypatch.setattr(FilterPool, "_start", lambda self: starts.append(1))

    async def main() -> None:
        data_plane = plane.Plane(asyncio.get_running_loop())
        pool = FilterPool(data_plane, PythonFilter("shop/dies", "dies", (), 100), None)
        starts.clear()
        for _ in range(4):
            child = _Child(pool, None, None)  # type: ignore[arg-type]  # it has ended
            child.ready, child.called = True, called
            pool.on_end(child, "its process ended")
        assert len(starts) == (4 if called else 0)
        assert len(pool._starts) == (0 if called else 4)
        assert pool._delay_s == filter_pool.FIRST_RESTART_S * (1 if called else 2**4)
        pool.retire()
        data_plane.close()

    plane.run(main())


@pytest.mark.usefixtures("installed")
def test_its_processes_end_when_nobody_asks_for_it_and_with_the_waypoint(identities: Path, authority: Authority):
    pids: list[int] = []

    async def client(through: Through) -> None:
        through.pair.apply(policy(PythonFilter("shop/wrong", "wrong", timeout_ms=5000)))
        reader, writer = await through.open()
        ask = asking(reader, writer)
        pids.append(int((await ask(b"x-do: pid"))[2]))
        os.kill(pids[0], signal.SIGKILL)
        await until(lambda: not alive(pids[0]))
        pids.append(int((await ask(b"x-do: pid"))[2]))
        assert alive(pids[1])
        through.pair.apply(policy(PythonFilter("shop/wrong", "wrong", timeout_ms=4000)))
        changes = Changes(policies=frozenset({"shop/extended"}))
        through.pair.plane.run(lambda: through.gateway.config_changed(changes))
        await until(lambda: not alive(pids[1]))
        pids.append(int((await ask(b"x-do: pid"))[2]))
        writer.close()

    run_through(identities, authority, tell, client)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_the_example_of_the_documentation(
    identities: Path, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for file in EXAMPLE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    # As `pip install --editable` does it, without what only a wheel needs.
    build = [sys.executable, "-W", "ignore", "-c", "import setuptools; setuptools.setup()", "-q", "egg_info"]
    subprocess.run(build, cwd=tmp_path, check=True, timeout=60)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = (("prefix", "/admin"), ("testers", str(WEB)))

    async def client(through: Through) -> None:
        through.pair.apply(policy(PythonFilter("shop/maintenance", "maintenance", settings, 5000)))
        web, db = await through.open(), await through.open(through.pair.db)
        status, head, body = await asking(*web)(path=b"/admin/x")
        assert status == 200
        assert b"\r\nx-tester: yes\r\n" in body
        assert b"\r\ncache-control: no-store\r\n" in head
        status, head, body = await asking(*db)(path=b"/admin/x")
        assert (status, body) == (503, b"closed for maintenance\n")
        assert b"\r\nretry-after: 600\r\n" in head
        assert (await asking(*db)(path=b"/shop"))[0] == 200
        for _, writer in (web, db):
            writer.close()

    run_through(identities, authority, tell, client)


def test_the_documentation_shows_what_is_there():
    page = (ROOT / "docs" / "filters.md").read_text()
    for file in ("maintenance.py", "maintenance.yaml"):
        assert (EXAMPLE / file).read_text() in page
    assert 'maintenance = "maintenance:Maintenance"' in (EXAMPLE / "pyproject.toml").read_text()


def test_code_for_an_envoy_is_refused_by_name(identities: Path, authority: Authority):
    async def client(through: Through) -> None:
        through.pair.apply(policy(EnvoyFilter("shop/x", Language.LUA, b"x = 1", fail_open=True)))
        reader, writer = await through.open()
        status, head, body = await asking(reader, writer)()
        assert status == 503
        assert b"x-uproxy-reason: not-expressible\r\n" in head
        assert body == b"the built-in engine cannot run Extension shop/x (Lua)\n"
        writer.close()

    run_through(identities, authority, tell, client)
