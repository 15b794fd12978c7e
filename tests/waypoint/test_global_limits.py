"""Rate limits that several processes count together, in a real Redis behind a uProxy."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from control.api.policy import Target
from control.api.traffic import RateLimit, Redis, Share, TrafficPolicy
from control.api.workload import Endpoint, Service, ServicePort
from control.client.state import Changes
from control.server.ca import Authority
from tests.support.certificates import DB
from tests.support.pair import DB_ADDRESS
from tests.support.through_waypoint import Through, run_through
from tests.support.waiting import until, until_true
from uproxy.plane import READ
from uproxy.resolve import Hop
from waypoint import redis as module
from waypoint.byte_stream import ByteStream
from waypoint.caller import Caller
from waypoint.upstream import Cause, Upstream

GET = b"GET / HTTP/1.1\r\nHost: db\r\n"


class Server:
    """A Redis at db's address, which ends with the test."""

    def __init__(self, directory: Path) -> None:
        with socket.create_server((DB_ADDRESS, 0)) as free:
            self.port = free.getsockname()[1]
        self._directory = directory
        self.process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        options = ["--save", "", "--appendonly", "no", "--protected-mode", "no", "--dir", str(self._directory)]
        command = ["redis-server", "--bind", DB_ADDRESS, "--port", str(self.port), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        for _ in range(500):
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection((DB_ADDRESS, self.port)):
                return
            time.sleep(0.01)
        raise AssertionError("no Redis")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path)
    yield found
    found.stop()


def counted(through: Through, server: Server, *limits: RateLimit, fail_open: bool = True, name: str = "few") -> None:
    """Say so, and where the Redis is."""
    target = (Target("Service", "shop/db"),)
    through.pair.apply(
        Service("shop", "redis", (), (ServicePort("", 6379, server.port, "redis"),), {}, (DB,)),
        Endpoint("shop/redis", "shop/db", DB_ADDRESS, DB, {6379: server.port}, 1, True, {}),
        TrafficPolicy("shop", name, target, limits, redis=Redis("shop/redis", 6379, 1000, fail_open)),
    )


async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
    writer.close()


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *fields: bytes) -> tuple[int, bytes]:
    writer.write(GET + b"".join(b"%b\r\n" % field for field in fields) + b"\r\n")
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
    return int(head.split(b" ", 2)[1]), head


def test_processes_count_together(identities: Path, authority: Authority, server: Server):
    hourly = RateLimit(10, 3_600_000, 10, everywhere=True)

    async def first(through: Through) -> None:
        counted(through, server, hourly)
        callers = [await through.open() for _ in range(4)]
        found = await asyncio.gather(*(ask(*callers[number]) for number in range(4)))
        for _ in range(3):
            found += await asyncio.gather(*(ask(*callers[number]) for number in range(4)))
        assert sorted(status for status, _ in found) == [200] * 10 + [429] * 6
        refused = next(head for status, head in found if status == 429)
        assert b"\r\nretry-after: 360\r\n" in refused
        assert b"\r\nx-uproxy-policy: shop/few\r\n" in refused
        for _, writer in callers:
            writer.close()
        await until(lambda: len(through.telemetry.exchanges) == 16)
        assert {one.flag for one in through.telemetry.exchanges} == {"-", "RL"}

    async def second(through: Through) -> None:
        counted(through, server, hourly)
        reader, writer = await through.open()
        assert (await ask(reader, writer))[0] == 429, "another process, the same allowance"
        counted(through, server, RateLimit(11, 3_600_000, 11, everywhere=True))
        assert (await ask(reader, writer))[0] == 200, "another limit counts anew"
        writer.close()

    run_through(identities, authority, tell, first)
    run_through(identities, authority, tell, second)


def test_the_rate_is_that_of_a_local_limit_and_each_share_has_its_own(
    identities: Path, authority: Authority, server: Server
):
    async def client(through: Through) -> None:
        counted(through, server, RateLimit(1, 300, 2, Share.HEADER, "x-user", everywhere=True))
        reader, writer = await through.open()
        ours, theirs = await through.open(), await through.open(through.pair.db)
        for user in (b"x-user: ann", b"x-user: " + b"b" * 1000, b"x-other: c"):
            found = [(await ask(reader, writer, user))[0] for _ in range(3)]
            assert found == [200, 200, 429]
        began = time.monotonic()
        while (await ask(reader, writer, b"x-user: ann"))[0] == 429:
            await asyncio.sleep(0.02)
            assert time.monotonic() - began < 10
        both = (
            RateLimit(1, 3_600_000, 5, everywhere=True),
            RateLimit(1, 3_600_000, 1, Share.IDENTITY, everywhere=True),
        )
        counted(through, server, *both)
        assert [(await ask(*ours))[0] for _ in range(9)] == [200] + [429] * 8
        assert (await ask(*theirs))[0] == 200, "who was refused by one limit has taken nothing of the other"
        for end in (writer, ours[1], theirs[1]):
            end.close()

    run_through(identities, authority, tell, client)


def test_without_the_redis_requests_pass_or_are_refused_as_the_policy_says(
    identities: Path, authority: Authority, server: Server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "RETRY_S", 0.05)
    hourly = RateLimit(2, 3_600_000, 2, everywhere=True)

    async def client(through: Through) -> None:
        counted(through, server, hourly)
        reader, writer = await through.open()
        assert [(await ask(reader, writer))[0] for _ in range(3)] == [200, 200, 429]
        server.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert (await ask(reader, writer))[0] == 200, "it is silent: open"
        assert time.monotonic() - began > 0.9
        server.process.send_signal(signal.SIGCONT)
        await until_answered(reader, writer, 429)
        server.stop()
        assert [(await ask(reader, writer))[0] for _ in range(3)] == [200] * 3
        counted(through, server, hourly, fail_open=False)
        status, head = await ask(reader, writer)
        assert status == 500
        assert b"\r\nx-uproxy-reason: rate-limit-store\r\n" in head
        server.start()
        await until_answered(reader, writer, 429)  # it has forgotten what was before
        writer.close()
        await until(lambda: through.telemetry.exchanges[-1].flag == "RL")
        assert "RLSE" in {one.flag for one in through.telemetry.exchanges}
        failures = [
            line for line in through.telemetry.render().splitlines() if b"global_rate_limit_failures_total " in line
        ]
        assert int(failures[-1].split()[-1]) >= 5

    async def until_answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wanted: int) -> None:
        async def answered() -> bool:
            return (await ask(reader, writer))[0] == wanted

        await until_true(answered)

    run_through(identities, authority, tell, client)


def test_a_connection_that_nobody_wants_once_it_is_there_is_closed(
    identities: Path, authority: Authority, server: Server, monkeypatch: pytest.MonkeyPatch
):
    opened, ended = asyncio.Event(), asyncio.Event()
    stream = Upstream.stream

    async def slow(upstream: Upstream, caller: Caller, hop: Hop, cause: Cause) -> ByteStream:
        found = await stream(upstream, caller, hop, cause)
        if hop.authority.endswith(b":%d" % server.port):
            opened.set()
            await upstream._plane.ready(held, READ, 10)  # it takes its time
        return found

    async def listens(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        ended.set()
        writer.close()

    async def client(through: Through) -> None:
        server.stop()
        other = await asyncio.start_server(listens, DB_ADDRESS, server.port)
        counted(through, server, RateLimit(2, 3_600_000, 2, everywhere=True))
        reader, writer = await through.open()
        asked = asyncio.get_running_loop().create_task(ask(reader, writer))
        await opened.wait()
        through.pair.withdraw(TrafficPolicy("shop", "few", (Target("Service", "shop/db"),)))
        through.pair.plane.run(lambda: through.gateway.config_changed(Changes(policies=frozenset({"shop/few"}))))
        release.send(b"now")
        async with asyncio.timeout(30):
            await ended.wait()
        assert (await asked)[0] == 200, "open"
        writer.close()
        other.close()

    held, release = socket.socketpair()
    monkeypatch.setattr(Upstream, "stream", slow)
    with held, release:
        run_through(identities, authority, tell, client)


@pytest.mark.parametrize("said", [b"+OK\r\n", b"$-1\r\n", b"*1\r\n:0\r\n", b"*2\r\n:1\r\n:0\r\n"])
def test_what_does_not_answer_the_question_lets_nobody_pass(
    identities: Path, authority: Authority, server: Server, said: bytes
):
    async def chatter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 16):
            writer.write(said * 2)  # to SCRIPT LOAD, and to the question
        writer.close()

    async def client(through: Through) -> None:
        server.stop()
        other = await asyncio.start_server(chatter, DB_ADDRESS, server.port)
        counted(through, server, RateLimit(2, 3_600_000, 2, everywhere=True), fail_open=False)
        reader, writer = await through.open()
        assert (await ask(reader, writer))[0] == 500
        writer.close()
        other.close()

    run_through(identities, authority, tell, client)


def test_a_redis_that_wants_a_password_is_no_redis(
    identities: Path, authority: Authority, server: Server, caplog: pytest.LogCaptureFixture
):
    secret = ["redis-cli", "-h", DB_ADDRESS, "-p", str(server.port), "config", "set", "requirepass", "x"]
    subprocess.run(secret, check=True, stdout=subprocess.DEVNULL, timeout=30)

    async def client(through: Through) -> None:
        counted(through, server, RateLimit(2, 3_600_000, 2, everywhere=True), fail_open=False)
        reader, writer = await through.open()
        assert (await ask(reader, writer))[0] == 500
        assert "NOAUTH" in caplog.text
        writer.close()

    run_through(identities, authority, tell, client)
