"""What goes wrong on the way: peers that vanish, freeze or flood, bugs of ours, and changes at the worst moment.

Each of these once left something hanging, cut something short in silence, or hurt a bystander.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from control.api.policy import Action, AuthorizationPolicy, Rule, Source
from control.server.ca import Authority
from tests.support import hbone as support
from tests.support.hbone import CONNECT
from tests.support.pair import DB_ADDRESS, Pair, running_pair
from tests.support.site import Site
from uproxy import explicit, hbone, plane, tunnel
from uproxy.connections import HALF_CLOSED_TIMEOUT_S
from uproxy.errors import Flag
from uproxy.listener import MAX_HANDSHAKES
from uproxy.plane import Plane, Waiter
from uproxy.relay import Relay

Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
NETWORK = "127.0.80"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ca") / "ca", "cluster.local")


def run(
    tmp_path: Path, authority: Authority, server: Server, client: Callable[[Pair], Awaitable[None]], *, limit: int = 20
) -> None:
    """Serve as db's application, and run the client against the pair. Nothing may be left of it."""

    async def main() -> None:
        app = await asyncio.start_server(server, DB_ADDRESS, 0)
        port = app.sockets[0].getsockname()[1]
        try:
            async with running_pair(tmp_path, authority, port) as pair, asyncio.timeout(limit):
                await client(pair)
                await eventually(lambda: not pair.plane.tasks, "a connection's coroutine is left")
                assert not pair.web.connections
                assert not pair.db.connections
        finally:
            app.close()

    plane.run(main())


async def eventually(check: Callable[[], bool], what: str, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    writer.close()


async def sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(1 << 20):
            pass
    writer.close()


async def receive(app: socket.socket, size: int = 65536) -> bytes:
    return await asyncio.get_running_loop().sock_recv(app, size)


async def opened(pair: Pair, message: bytes = b"x") -> socket.socket:
    """A connection that works."""
    app = pair.dial()
    await asyncio.get_running_loop().sock_sendall(app, message)
    assert await receive(app, len(message)) == message
    return app


async def is_reset(app: socket.socket) -> bool:
    """Whether the connection ends with RST; False: it ends with FIN, as if all was well."""
    try:
        while await receive(app):
            pass
    except ConnectionResetError:
        return True
    finally:
        app.close()
    return False


def carrier_of(pair: Pair) -> tunnel.Tunnel:
    (carrier,) = pair.web.pool.tunnels()
    return carrier


@contextlib.contextmanager
def deaf(pair: Pair, listener: tunnel.Tunnel) -> Iterator[None]:
    """This end of a tunnel reads nothing, as a stopped process does not."""
    fd = listener._sock.fileno()
    pair.plane.rearm(fd, 0)
    yield
    if not listener.closed:
        pair.plane.rearm(fd, plane.READ)


# -- changes at the worst moment


def test_a_stream_half_closed_from_its_first_moment_gets_the_whole_time(tmp_path: Path, authority: Authority) -> None:
    answer = asyncio.Event()

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b""
        await answer.wait()
        writer.write(b"late")
        writer.close()

    async def client(pair: Pair) -> None:
        app = pair.dial()
        app.shutdown(socket.SHUT_WR)
        await eventually(lambda: any(r.half_closed for r in relays(pair.db)), "it is not half-closed")
        soon = time.monotonic() + HALF_CLOSED_TIMEOUT_S - 5
        pair.plane.run(lambda: pair.db.connections.tick(soon))
        pair.plane.run(lambda: pair.web.connections.tick(soon))
        answer.set()
        assert await receive(app) == b"late"
        assert await receive(app) == b""
        app.close()

    run(tmp_path, authority, server, client)


def test_a_forgotten_half_closed_stream_ends(tmp_path: Path, authority: Authority) -> None:
    over = asyncio.Event()

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        await over.wait()
        writer.transport.abort()

    async def client(pair: Pair) -> None:
        app = pair.dial()
        app.shutdown(socket.SHUT_WR)
        await eventually(lambda: any(r.half_closed for r in relays(pair.db)), "it is not half-closed")
        now = time.monotonic()
        pair.plane.run(lambda: pair.db.connections.tick(now))
        pair.plane.run(lambda: pair.db.connections.tick(now + HALF_CLOSED_TIMEOUT_S + 1))
        assert await is_reset(app)
        over.set()
        await asyncio.sleep(0.01)

    run(tmp_path, authority, server, client)


def relays(proxy: object) -> list[Relay]:
    return [live.relay for live in proxy.connections._live]  # type: ignore[attr-defined]


def test_a_policy_that_comes_while_the_application_is_dialled_applies(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def client(pair: Pair) -> None:
        (await opened(pair)).close()
        gate: Waiter[None] = Waiter(pair.plane)
        dialled = pair.plane.connect

        async def slow(*arguments: object, **more: object) -> socket.socket:
            await gate
            return await dialled(*arguments, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(pair.plane, "connect", slow)
        app = pair.dial()
        await asyncio.sleep(0.05)
        rule = Rule(sources=(Source(principals=("cluster.local/ns/shop/sa/web",)),))
        pair.apply_policy(AuthorizationPolicy("shop", "no", Action.DENY, None, (rule,)))
        pair.plane.run(lambda: gate.set(None))
        assert await is_reset(app)
        assert pair.db.telemetry.ended[-1].flag is Flag.DENY

    run(tmp_path, authority, echo, client)


def test_what_was_sent_arrives_though_its_tunnel_is_retired(tmp_path: Path, authority: Authority) -> None:
    """The connection ended well for its sender while its last bytes wait in a tunnel that nobody needs any more."""
    size, got = 200_000, bytearray()

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"x")
        writer.write_eof()
        await asyncio.sleep(0)
        with contextlib.suppress(ConnectionResetError):
            while data := await reader.read(65536):
                got.extend(data)
        writer.close()

    async def client(pair: Pair) -> None:
        app = pair.dial()
        assert await receive(app) == b"x"
        assert await receive(app) == b""
        carrier = carrier_of(pair)
        carrier._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        (far,) = pair.db.inbound.server.tunnels()
        far._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        with deaf(pair, far):
            await asyncio.get_running_loop().sock_sendall(app, bytes(size))
            app.close()
            await eventually(lambda: not pair.web.connections, "the sender's side has not ended")
            assert carrier.blocked, "this test needs a tunnel that is full"
            pair.plane.run(pair.web.pool.retire)
            pair.plane.run(lambda: pair.web.pool.tick(time.monotonic()))
            await asyncio.sleep(0.05)
        await eventually(lambda: not pair.db.connections, "the receiver's side has not ended")
        # The server may still read what the kernel holds for it.
        await eventually(lambda: len(got) == size, "not all that was sent has arrived")
        await eventually(
            lambda: not pair.db.inbound.server.tunnels() and not pair.web.pool.tunnels(), "a tunnel is left"
        )

    run(tmp_path, authority, server, client)


# -- peers that misbehave


def test_a_peer_that_always_hangs_up_is_not_asked_by_each_connection_in_turn(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def client(pair: Pair) -> None:
        served = 0
        serve = pair.db.inbound.server.serve

        async def hang_up(sock: socket.socket) -> None:
            nonlocal served
            served += 1
            await serve(sock)
            waiter: Waiter[None] = Waiter(pair.plane)
            pair.plane.call_later(0.02, lambda: waiter.set(None))
            await waiter
            for carrier in pair.db.inbound.server.tunnels():
                carrier._fail("hung up")

        monkeypatch.setattr(pair.db.inbound.server, "serve", hang_up)
        monkeypatch.setattr(pair.db.inbound, "_serve_connect", never)
        apps = [pair.dial() for _ in range(40)]
        async with asyncio.TaskGroup() as group:
            ends = [group.create_task(is_reset(app)) for app in apps]
        assert all(end.result() for end in ends)
        assert served <= 5, f"{served} handshakes for 40 connections to one broken peer"

    async def never(*_: object) -> None: ...

    run(tmp_path, authority, echo, client)


def test_refusals_do_not_use_up_what_a_peer_may_send() -> None:
    """A client that dials a closed port for an hour must not lose the tunnel that it shares with others."""
    pair = support.Pair()
    for _ in range(hbone.CONTROL_QUOTA // 50 + 10):
        streams = [pair.client.open(CONNECT) for _ in range(50)]
        pair.exchange()
        for stream in streams:
            answered = pair.server.streams[stream.id]
            pair.server.respond(answered, [(b":status", b"503")], end=True)
            pair.server.reset(answered, hbone.ErrorCode.NO_ERROR)
        pair.exchange()
        for stream in streams:
            pair.client.reset(stream, hbone.ErrorCode.CANCEL)
        pair.client_events.clear()
        pair.server_events.clear()
    pair.opened()


def test_idle_connections_to_the_tunnel_port_keep_nobody_out(tmp_path: Path, authority: Authority) -> None:
    async def client(pair: Pair) -> None:
        idle = []
        for _ in range(MAX_HANDSHAKES + 20):
            sock = socket.create_connection((DB_ADDRESS, 15008))
            sock.setblocking(False)
            idle.append(sock)
            await asyncio.sleep(0)
        await asyncio.sleep(0.1)
        (await opened(pair)).close()
        assert len(pair.plane.tasks) <= MAX_HANDSHAKES + 8
        for sock in idle:
            sock.close()

    run(tmp_path, authority, echo, client)


def test_a_tunnel_whose_peer_reads_nothing_ends_instead_of_growing(tmp_path: Path, authority: Authority) -> None:
    async def client(pair: Pair) -> None:
        app = await opened(pair)
        carrier = carrier_of(pair)
        (far,) = pair.db.inbound.server.tunnels()
        with deaf(pair, far):
            carrier.blocked = True  # as when the socket takes no more

            def flood() -> None:
                for _ in range(12_000):
                    carrier.open(CONNECT).abandon()

            pair.plane.run(flood)
            assert await is_reset(app)
            assert carrier.closed
        (await opened(pair)).close()

    run(tmp_path, authority, echo, client)


def test_a_frozen_peer_is_given_up_after_the_keepalive(tmp_path: Path, authority: Authority) -> None:
    async def client(pair: Pair) -> None:
        app = await opened(pair)
        carrier = carrier_of(pair)
        (far,) = pair.db.inbound.server.tunnels()
        with deaf(pair, far):
            now = time.monotonic()
            pair.plane.run(lambda: pair.web.pool.tick(now + tunnel.KEEPALIVE_S + 1))
            await asyncio.sleep(0.05)
            assert not carrier.closed
            late = now + tunnel.KEEPALIVE_S + tunnel.KEEPALIVE_TIMEOUT_S + 3
            pair.plane.run(lambda: pair.web.pool.tick(late))
            assert await is_reset(app)
        await eventually(lambda: not pair.db.inbound.server.tunnels(), "the other end keeps its half")

    run(tmp_path, authority, echo, client)


# -- fairness


def test_every_sender_on_a_tunnel_gets_its_turn(tmp_path: Path, authority: Authority) -> None:
    async def client(pair: Pair) -> None:
        apps = [pair.dial() for _ in range(24)]
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(loop.sock_sendall(app, bytes(64 << 20))) for app in apps]
        await asyncio.sleep(1.5)
        sent = sorted(relay.sent for relay in relays(pair.web))
        assert len(sent) == len(apps)
        for task in tasks:
            task.cancel()
        for app in apps:
            app.close()
        assert sent[0] > sent[-1] / 4, f"KiB sent: {[s >> 10 for s in sent]}"

    run(tmp_path, authority, sink, client)


def test_streams_that_wait_for_their_own_window_are_left_alone(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        if await reader.readexactly(1) == b"s":
            writer.transport.pause_reading()
            await release.wait()
            writer.transport.abort()
            return
        del sock
        await sink(reader, writer)

    async def client(pair: Pair) -> None:
        loop = asyncio.get_running_loop()
        slow = [pair.dial() for _ in range(30)]
        tasks = [loop.create_task(loop.sock_sendall(app, b"s" + bytes(16 << 20))) for app in slow]
        carrier_waits = lambda: [len(c.starved) for c in pair.web.pool.tunnels()] == [len(slow)]  # noqa: E731
        await asyncio.sleep(0.3)
        await eventually(carrier_waits, "not all of them wait for their windows")
        woken = 0
        on_room = Relay.on_room

        def counted(relay: Relay) -> None:
            nonlocal woken
            woken += relay.stream.send_window <= 0
            on_room(relay)

        monkeypatch.setattr(Relay, "on_room", counted)
        fast = pair.dial()
        await loop.sock_sendall(fast, b"f" + bytes(48 << 20))
        fast.close()
        assert woken == 0
        for task in tasks:
            task.cancel()
        for app in slow:
            app.close()
        release.set()

    run(tmp_path, authority, server, client)


# -- bugs of ours


def test_a_bug_in_one_relay_ends_that_connection_and_no_other(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def client(pair: Pair) -> None:
        bystander, app = await opened(pair), await opened(pair)
        (victim,) = [r for r in relays(pair.web) if r._sock.getpeername() == app.getsockname()]  # type: ignore[union-attr]
        reserve = hbone.Connection.reserve

        def broken(connection: hbone.Connection, stream: hbone.Stream) -> memoryview:
            if stream is victim.stream:
                raise ValueError("a bug")
            return reserve(connection, stream)

        monkeypatch.setattr(hbone.Connection, "reserve", broken)
        app.send(b"y")
        assert await is_reset(app)
        bystander.send(b"z")
        assert await receive(bystander) == b"z"
        bystander.close()

    run(tmp_path, authority, echo, client)


def test_a_bug_in_one_tunnel_ends_that_tunnel(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def client(pair: Pair) -> None:
        app = await opened(pair)
        connection = carrier_of(pair).connection

        def broken(_: memoryview) -> list[hbone.Event]:
            raise ValueError("a bug")

        monkeypatch.setattr(connection, "receive", broken)
        app.send(b"y")
        assert await is_reset(app)
        (await opened(pair)).close()

    run(tmp_path, authority, echo, client)


def test_a_flush_that_fails_keeps_no_other_from_its_turn() -> None:
    flushed = []

    class Item:
        def __init__(self, error: Exception | None) -> None:
            self.error = error

        def flush(self) -> None:
            if self.error:
                raise self.error
            flushed.append(self)

    async def main() -> None:
        data_plane = Plane(asyncio.get_running_loop())
        for item in (Item(ValueError("a bug")), Item(None)):
            data_plane.mark_dirty(item)
        await asyncio.sleep(0.01)
        data_plane.close()

    plane.run(main())
    assert len(flushed) == 1


def test_a_dial_that_fails_in_an_unknown_way_holds_nobody(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def client(pair: Pair) -> None:
        async def dial(*_: object) -> tunnel.Tunnel:
            waiter: Waiter[None] = Waiter(pair.plane)
            pair.plane.call_later(0.05, lambda: waiter.set(None))
            await waiter
            raise ValueError("a bug")

        monkeypatch.setattr(tunnel, "dial", dial)
        apps = [pair.dial() for _ in range(3)]
        async with asyncio.timeout(30):
            assert [await is_reset(app) for app in apps] == [True] * 3

    run(tmp_path, authority, echo, client)


# -- memory


def test_what_has_ended_does_not_wait_for_the_garbage_collector(tmp_path: Path, authority: Authority) -> None:
    """A tunnel holds 128 KiB of buffer, and a full collection may be an hour away."""
    kinds = (tunnel.Tunnel, Relay, hbone.Connection, hbone.Stream, plane.Task)

    def alive() -> list[str]:
        return [type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, kinds)]

    async def client(pair: Pair) -> None:
        gc.collect()
        assert alive() == []
        gc.disable()
        for _ in range(3):
            apps = [await opened(pair) for _ in range(3)]
            apps[0].close()
            plane.reset(apps[1])
            apps[2].shutdown(socket.SHUT_WR)
            assert await receive(apps[2]) == b""
            apps[2].close()
            refused = pair.dial(DB_ADDRESS, 1)
            assert await is_reset(refused)
            await eventually(lambda: not pair.plane.tasks, "a connection is left")
            pair.plane.run(pair.web.pool.retire)
            pair.plane.run(lambda: pair.web.pool.tick(time.monotonic()))
            await eventually(
                lambda: not pair.db.inbound.server.tunnels() and not pair.web.pool.tunnels(), "a tunnel is left"
            )
        for proxy in (pair.web, pair.db):
            proxy.telemetry.ended.clear()  # each of these knows its relay
        await asyncio.sleep(0.01)
        assert alive() == []

    try:
        run(tmp_path, authority, echo, client)
    finally:
        gc.enable()


# -- explicit mode


def test_a_socks_client_that_trickles_is_let_go(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explicit, "SOCKS_TIMEOUT_S", 0.4)

    async def client(pair: Pair) -> None:
        from tests.support.pair import connected_pair

        app, proxied = connected_pair()
        pair.plane.spawn(explicit.serve_socks(pair.plane, pair.web.outbound, pair.state, proxied))
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in (5, 200, *range(1, 100)):
                app.send(bytes((byte,)))
                await asyncio.sleep(0.1)
        app.close()
        assert time.monotonic() - started < 8

    run(tmp_path, authority, echo, client)


# -- the whole process


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site.create(tmp_path, NETWORK)


def dialled(site: Site) -> tuple[socket.socket, socket.socket]:
    """A connection through both proxies: the caller's end and the application's."""
    with socket.create_server(site.application) as listener:
        caller = socket.create_connection(site.forward, timeout=30)
        listener.settimeout(30)
        served, _ = listener.accept()
    served.settimeout(30)
    return caller, served


@pytest.mark.parametrize("victim", ["web", "db"])
def test_a_killed_proxy_never_looks_like_a_clean_end(site: Site, victim: str) -> None:
    """kill -9 amid an answer of unknown length: a FIN would make the part that arrived look like the whole."""
    with site.running("db") as db, site.running("web") as web:
        caller, served = dialled(site)
        with caller, served:
            served.sendall(b"part of it")
            assert caller.recv(100) == b"part of it"
            {"db": db, "web": web}[victim].kill()
            with pytest.raises(ConnectionResetError):
                caller.recv(100)
            with pytest.raises(ConnectionResetError):
                served.recv(100)


def test_a_drain_resets_what_is_still_being_dialled(site: Site) -> None:
    with socket.create_server((site.application[0], 15008)), site.running("web", "--drain-timeout-s", "0.3") as web:
        with socket.create_connection(site.forward, timeout=30) as caller:
            time.sleep(0.3)
            web.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionResetError):
                caller.recv(1)
        assert web.wait(timeout=60) == 0


def test_a_certificate_that_could_not_be_read_once_is_read_again(site: Site) -> None:
    with site.running("db"):
        bundle = site.path / "db" / "bundle.pem"
        whole = bundle.read_bytes()
        bundle.write_bytes(b"")
        os.utime(site.path / "db" / "chain.pem")
        wait_for(lambda: "the new certificate is refused" in site.log("db"))
        bundle.write_bytes(whole)
        wait_for(lambda: "a new certificate is in use" in site.log("db"))
        assert site.log("db").count("the new certificate is refused") == 1


def wait_for(check: Callable[[], bool], seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def processor_s(process: subprocess.Popen[str]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_running_out_of_descriptors_burns_nothing_and_passes(site: Site) -> None:
    def few_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))

    with (
        socket.create_server(site.application) as listener,
        site.running("db"),
        site.running("web", before_exec=few_descriptors) as web,
    ):
        callers = [socket.create_connection(site.forward, timeout=30) for _ in range(120)]
        time.sleep(0.5)
        before = processor_s(web)
        time.sleep(1)
        assert processor_s(web) - before < 0.3
        assert "cannot accept" in site.log("web")
        for caller in callers:
            caller.close()
        listener.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:
                listener.accept()[0].close()
        listener.settimeout(30)
        with socket.create_connection(site.forward, timeout=30) as caller:
            caller.sendall(b"x")
            while True:
                served, _ = listener.accept()
                with served:
                    if served.recv(1) == b"x":
                        break
