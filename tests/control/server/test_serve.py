"""The control plane as a process, where a whole `meshctl up` would be too slow or too coarse."""

import asyncio
import os
import resource
import signal
import socket
import ssl
import time
from functools import partial

import pytest

from control.api.identity import make_id, parse_trust_domain
from control.server import serve as serving
from control.server.ca import Authority
from control.server.serve import REFUSALS, Running, Settings, serve
from control.server.svid import due, issue_own
from tests.support.brokers import free_port


@pytest.fixture(autouse=True)
def _limits():
    """`serve` raises the limit of descriptors, of this process here."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def settings(tmp_path):
    Authority.create(tmp_path / "ca", "cluster.local")
    return Settings(
        directory=tmp_path / "mesh",
        ca=tmp_path / "ca",
        passphrase_file=None,
        socket=tmp_path / "sock",
        host="127.0.0.1",
        listen="127.0.0.1",
        port=free_port(),
        broker_port=1,
        brokers=("mqtts://127.0.0.1:1",),  # where nobody is
        broker_pid_file=None,
        certificate_ttl_s=3600,
        metrics_port=0,
    )


def serial(port: int, bundle) -> str:
    """Of the certificate that the certificate server shows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(bundle)
    with socket.create_connection(("127.0.0.1", port), 10) as raw, context.wrap_socket(raw) as connection:
        return connection.getpeercert()["serialNumber"]


def look_until_renewed(port: int, bundle) -> None:
    first, deadline = serial(port, bundle), time.monotonic() + 20
    while serial(port, bundle) == first:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_its_own_certificate_is_renewed_and_shown_to_new_connections(settings, monkeypatch):
    monkeypatch.setattr(serving, "issue_own", partial(issue_own, ttl_s=3))
    monkeypatch.setattr(serving, "due", partial(due, ttl_s=3))

    async def run():
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()

        async def look():
            await ready.wait()
            bundle = settings.directory / "control-plane" / "bundle.pem"
            await asyncio.to_thread(look_until_renewed, settings.port, bundle)
            os.kill(os.getpid(), signal.SIGTERM)

        async with asyncio.TaskGroup() as group:
            group.create_task(look())
            await serve(settings, lambda _: loop.call_soon(ready.set))

    asyncio.run(run())


def test_it_serves_with_its_broker_away_and_ends_when_told(settings):
    told: list[Running] = []

    def ready(running: Running) -> None:
        told.append(running)
        assert settings.socket.is_socket()
        os.kill(os.getpid(), signal.SIGTERM)

    asyncio.run(serve(settings, ready))
    assert told[0].doors.control == f"https://127.0.0.1:{settings.port}"
    assert told[0].doors.brokers == settings.brokers
    assert not settings.socket.exists()
    # The store is free again, and the same directory serves a second time.
    asyncio.run(serve(settings, ready))
    assert len(told) == 2


def test_a_socket_that_cannot_be_made_ends_it_with_a_reason(settings):
    settings.socket.write_text("precious")
    with pytest.raises(REFUSALS, match="is no socket"):
        asyncio.run(serve(settings, lambda _: pytest.fail("ready")))


def test_a_broker_directory_that_cannot_be_written_ends_it_with_a_reason(settings):
    settings.directory.mkdir()
    (settings.directory / "broker").write_text("a file")
    with pytest.raises(REFUSALS, match="the broker cannot be run"):
        asyncio.run(serve(settings, lambda _: pytest.fail("ready")))


def test_a_ca_that_is_not_there_is_told(settings, tmp_path):
    for path in (tmp_path / "ca").iterdir():
        path.unlink()
    with pytest.raises(REFUSALS, match="meshctl ca init"):
        asyncio.run(serve(settings, lambda _: pytest.fail("ready")))


def test_users_who_are_declared_are_gathered_and_those_with_a_token_are_not_kept_waiting():
    web, db, node = (make_id(parse_trust_domain("cluster.local"), "shop", name) for name in ("web", "db", "node"))
    known, told = {web}, []

    async def admit(identities, _waypoints):
        told.append(set(identities))
        await asyncio.sleep(0.1)

    async def run():
        users = serving._Users(admit, lambda: frozenset(known), frozenset)
        await asyncio.to_thread(users.review)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(users.run())
            known.add(db)
            for _ in range(50):
                users.changed()
                await asyncio.sleep(0.005)
            assert told == [{web}, {web, db}]
            known.add(node)
            await asyncio.to_thread(users.admit, node)
            assert told[2:] == [{web, db, node}]
            await asyncio.to_thread(users.admit, web)
            assert len(told) == 3
            running.cancel()

    asyncio.run(run())
