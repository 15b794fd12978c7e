"""The responder between an application and its nameservers: real sockets; the kernel's word is made up."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass

import dns.message
import dns.rcode
import pytest

from control.api.address import parse_address
from control.api.workload import Endpoint, Service, ServicePort
from control.client.state import State
from tests.support.certificates import DB
from tests.support.pair import published
from uproxy import dns as responder
from uproxy import plane
from uproxy.dns import Responder
from uproxy.plane import Plane
from uproxy.redirect import OriginalDestination, Route
from uproxy.telemetry import Telemetry

LOCAL = "127.0.0.1"
VIP, VIP6 = parse_address("240.240.0.1"), parse_address("fd75::1")
PODS = tuple(parse_address(f"10.0.0.{number}") for number in (1, 2, 3))
PORTS = (ServicePort("", 80, 80, ""),)

Behaviour = Callable[[socket.socket, bytes, tuple[str, int]], None]


def mesh() -> State:
    """`db` has an address of each family, `pods` is headless, `empty` has none at all."""
    state = State("cluster.local")
    records = [
        Service("shop", "db", (VIP, VIP6), PORTS, {}, (DB,)),
        Service("shop", "pods", (), PORTS, {}, (DB,)),
        Service("shop", "empty", (), PORTS, {}, (DB,)),
        *(
            Endpoint("shop/pods", f"shop/pod-{n}", address, DB, {80: 80}, 1, n != 1, {})
            for n, address in enumerate(PODS)
        ),
    ]
    state.apply([published(record, 1) for record in records])
    return state


@pytest.fixture
def nameserver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Behaviour], list[bytes]]]:
    """Makes a nameserver that does something with each query, and makes it the one that applications ask."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((LOCAL, 0))
        asked = OriginalDestination(parse_address(LOCAL), sock.getsockname()[1], Route.UNKNOWN)
        monkeypatch.setattr(responder, "original_destination", lambda listener: asked)

        def start(behaviour: Behaviour) -> list[bytes]:
            heard: list[bytes] = []

            def serve() -> None:
                while (received := sock.recvfrom(4096))[0]:
                    heard.append(received[0])
                    behaviour(sock, *received)

            threading.Thread(target=serve, daemon=True).start()
            return heard

        yield start
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ending:
            ending.sendto(b"", sock.getsockname())


def echo(sock: socket.socket, query: bytes, sender: tuple[str, int]) -> None:
    """Answers that there is such a name, without data."""
    sock.sendto(dns.message.make_response(dns.message.from_wire(query)).to_wire(), sender)


def silent(sock: socket.socket, query: bytes, sender: tuple[str, int]) -> None:
    pass


@dataclass
class Site:
    telemetry: Telemetry
    address: tuple[str, int]

    def client(self) -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.settimeout(3)
        made.connect(self.address)
        return made

    async def ask(self, name: str, record_type: str = "A") -> dns.message.Message:
        query = dns.message.make_query(name, record_type)
        return dns.message.from_wire(await self.send(query.to_wire()))

    async def send(self, wire: bytes) -> bytes:
        def exchange() -> bytes:
            with self.client() as app:
                app.send(wire)
                return app.recv(65535)

        return await asyncio.to_thread(exchange)

    def count(self, name: str) -> int:
        text = self.telemetry.render().decode()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"uproxy_dns_{name}_total "))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind((LOCAL, 0))
        monkeypatch.setattr(responder, "FIRST_PORT", free.getsockname()[1])
    monkeypatch.setattr(responder, "PORTS", 1)

    def start(test: Callable[[Site], Coroutine[object, object, None]], state: State | None = None) -> None:
        async def main() -> None:
            data_plane = Plane(asyncio.get_running_loop())
            telemetry = Telemetry("test")
            answering = Responder(data_plane, mesh() if state is None else state, telemetry)
            answering.listen()
            try:
                async with asyncio.timeout(20):
                    await test(Site(telemetry, (LOCAL, responder.FIRST_PORT)))
            finally:
                answering.close()
                data_plane.close()

        plane.run(main())

    return start


def addresses(message: dns.message.Message) -> list[str]:
    return sorted(record.address for found in message.answer for record in found)


def test_names_of_the_mesh_are_answered_here(run, nameserver):
    heard = nameserver(silent)

    async def test(site: Site) -> None:
        for name in ("db.shop.svc.cluster.local", "db.shop.svc", "db.shop"):
            assert addresses(await site.ask(name)) == [VIP]
            assert addresses(await site.ask(name, "AAAA")) == [VIP6]
            nothing = await site.ask(name, "MX")
            assert (nothing.rcode(), nothing.answer) == (dns.rcode.NOERROR, [])
        assert addresses(await site.ask("pods.shop")) == [PODS[0], PODS[2]], "the endpoints that are ready"
        assert (await site.ask("empty.shop")).rcode() == dns.rcode.NOERROR
        for name in ("nobody.shop.svc.cluster.local", "db.nowhere.svc", "a.db.shop.svc", "nowhere.svc"):
            assert (await site.ask(name)).rcode() == dns.rcode.NXDOMAIN, name
        for name in ("shop.svc.cluster.local", "svc.cluster.local", "svc"):
            assert (await site.ask(name)).rcode() == dns.rcode.NOERROR, name
        assert site.count("answered") == 18

    run(test)
    assert heard == []


def test_other_names_are_asked_for_where_they_were(run, nameserver):
    """With a number of their own, and nothing else changed."""
    answers: list[bytes] = []

    def with_data(sock: socket.socket, query: bytes, sender: tuple[str, int]) -> None:
        answers.append(dns.message.make_response(dns.message.from_wire(query)).to_wire() + b"and more")
        sock.sendto(answers[-1], sender)

    heard = nameserver(with_data)

    async def test(site: Site) -> None:
        for name in ("www.example.com", "example.com", "other.shop", "localhost"):
            query = dns.message.make_query(name, "TXT", use_edns=0, payload=1400).to_wire()
            assert await site.send(query) == query[:2] + answers[-1][2:]
            assert heard[-1][2:] == query[2:]
        assert len({query[:2] for query in heard}) > 1
        assert site.count("forwarded") == 4

    run(test)


def test_none_goes_on_to_a_nameserver_that_only_tunnels_reach(run, nameserver, monkeypatch):
    heard = nameserver(echo)
    asked = dataclasses.replace(responder.original_destination(None), route=Route.TUNNEL)
    monkeypatch.setattr(responder, "original_destination", lambda listener: asked)

    async def test(site: Site) -> None:
        assert (await site.ask("www.example.com")).rcode() == dns.rcode.SERVFAIL
        assert addresses(await site.ask("db.shop")) == [VIP]
        assert [site.count(name) for name in ("failed", "answered", "forwarded")] == [1, 1, 0]

    run(test)
    assert heard == []


def test_a_query_that_cannot_be_read_is_refused(run, nameserver):
    heard = nameserver(echo)

    async def test(site: Site) -> None:
        query = dns.message.make_query("db.shop", "A").to_wire()
        assert await site.send(query[:-3]) == query[:2] + b"\x81\x81" + bytes(8)
        with site.client() as app:
            for nothing in (b"", b"short", dns.message.make_response(dns.message.from_wire(query)).to_wire()):
                app.send(nothing)
            app.settimeout(0.3)
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(app.recv, 100)

    run(test)
    assert heard == []


def test_what_is_no_answer_is_not_heard(run, nameserver):
    """Another number, another question, a query, another sender: the true answer still comes."""

    def lie(sock: socket.socket, query: bytes, sender: tuple[str, int]) -> None:
        truth = dns.message.make_response(dns.message.from_wire(query)).to_wire()
        sock.sendto(bytes((truth[0] ^ 1,)) + truth[1:3] + bytes((truth[3] | 3,)) + truth[4:], sender)
        sock.sendto(
            truth[:2] + dns.message.make_response(dns.message.make_query("evil.com", "A")).to_wire()[2:], sender
        )
        sock.sendto(query, sender)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.sendto(truth[:3] + bytes((truth[3] | 3,)) + truth[4:], sender)
        sock.sendto(truth, sender)

    nameserver(lie)

    async def test(site: Site) -> None:
        assert (await site.ask("example.com")).rcode() == dns.rcode.NOERROR

    run(test)


def test_a_nameserver_that_sends_strays_for_ever_is_given_up(run, nameserver):
    def babble(sock: socket.socket, query: bytes, sender: tuple[str, int]) -> None:
        for _ in range(40):
            sock.sendto(query, sender)

    nameserver(babble)

    async def test(site: Site) -> None:
        with pytest.raises(TimeoutError):
            await site.ask("example.com")
        assert site.count("failed") == 1

    run(test)


def test_a_nameserver_that_is_not_there_fails_at_once(run, monkeypatch):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
        closed.bind((LOCAL, 0))
        nobody = OriginalDestination(parse_address(LOCAL), closed.getsockname()[1], Route.UNKNOWN)
    monkeypatch.setattr(responder, "original_destination", lambda listener: nobody)

    async def test(site: Site) -> None:
        began = time.monotonic()
        assert (await site.ask("example.com")).rcode() == dns.rcode.SERVFAIL
        assert time.monotonic() - began < responder.FORWARD_TIMEOUT_S

    run(test)


def test_a_query_that_no_nameserver_is_known_for_fails(run):
    """Nothing that capture brought: the kernel says nothing of this socket."""

    async def test(site: Site) -> None:
        assert (await site.ask("example.com")).rcode() == dns.rcode.SERVFAIL
        assert addresses(await site.ask("db.shop")) == [VIP]

    run(test)


def test_a_silent_nameserver_neither_holds_up_the_mesh_nor_takes_more_than_its_share(run, nameserver, monkeypatch):
    monkeypatch.setattr(responder, "MAX_FORWARDED", 20)
    monkeypatch.setattr(responder, "FORWARD_TIMEOUT_S", 1.0)
    heard = nameserver(silent)

    async def test(site: Site) -> None:
        with contextlib.ExitStack() as waiting:
            for _ in range(20):
                waiting.enter_context(site.client()).send(dns.message.make_query("example.com", "A").to_wire())
            while len(heard) < 20:  # noqa: ASYNC110 - a thread's
                await asyncio.sleep(0.01)
            assert (await site.ask("example.com")).rcode() == dns.rcode.SERVFAIL, "there is no more room"
            assert addresses(await site.ask("db.shop")) == [VIP]
            await asyncio.sleep(1.3)
            assert (await asyncio.gather(site.ask("db.shop"), return_exceptions=True))[0]
            assert site.count("failed") == 21
            with pytest.raises(TimeoutError):
                await site.ask("example.com")  # there is room again: it waits, too
        assert len(heard) == 21

    run(test)


def test_without_configuration_nothing_that_may_be_the_meshs_leaves(run, nameserver):
    heard = nameserver(echo)

    async def test(site: Site) -> None:
        for name in ("db.shop.svc.cluster.local", "db.shop"):
            assert (await site.ask(name)).rcode() == dns.rcode.SERVFAIL
        assert heard == []
        assert (await site.ask("www.example.com")).rcode() == dns.rcode.NOERROR

    run(test, State("cluster.local"))
