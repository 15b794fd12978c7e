"""Who may go direct: what is agreed and true is granted, and whatever else is said is not; an end is an end."""

from __future__ import annotations

import asyncio
import errno
import functools
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import pytest

from bpf.loader import Loader
from control.api.address import IpAddress
from control.api.identity import SpiffeId
from tests.support import near
from tests.support.near import PORT, Pair, Place
from uproxy import sandbox
from uproxy.node import channel, grants, ways
from uproxy.node.channel import Said
from uproxy.node.grants import Grants
from uproxy.node.peers import Peer

pytestmark = pytest.mark.root
_SYN_SENT = 2  # <netinet/tcp.h>: what TCP_INFO begins with


@dataclass
class Agreed:
    """Two uProxies that talk to an agent's grants."""

    pair: Pair
    loader: Loader
    grants: Grants
    web: Peer
    db: Peer

    def key(self):
        (found,) = self.loader.maps.grants.items()
        return found

    @property
    def granted(self) -> bool:
        return bool(self.loader.maps.grants.items())

    def say(self, *, allowed=None, choices=None) -> None:
        self.web.heard_at = self.db.heard_at = time.monotonic()
        self.web.said = Said(choices=(self.pair.choice(),) if choices is None else choices)
        self.grants.heard(self.web)
        self.db.said = Said(allowed=(self.pair.allowed(),) if allowed is None else allowed)
        self.grants.heard(self.db)


@pytest.fixture(params=[("10.97.0.10", "10.97.0.11"), ("fd97::10", "fd97::11")], ids=["v4", "v6"])
def pair(request) -> Iterator[Pair]:
    with near.pair(*request.param) as made:
        yield made


@contextmanager
def agent(pair: Pair, loader: Loader, *, joined: bool = True) -> Iterator[Agreed]:
    captured = [pair.web.captured, pair.db.captured]
    made = Grants(loader.maps, lambda: captured, pair.identity_at)
    (web, web_end), (db, db_end) = pair.web.peer(), pair.db.peer()
    with web_end, db_end:
        if joined:
            made.joined(web)
            made.joined(db)
        yield Agreed(pair, loader, made, web, db)
        made.close()
        for peer in (web, db):
            peer.sockets.close()
            peer.close()


@pytest.fixture
def agreed(pair, loader) -> Iterator[Agreed]:
    with agent(pair, loader) as made:
        yield made


def in_a_loop(test):
    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


async def becomes(condition: Callable[[], bool], within_s: float = 20.0) -> bool:
    end = time.monotonic() + within_s
    while not condition() and time.monotonic() < end:  # noqa: ASYNC110 - of what the kernel is told
        await asyncio.sleep(0.01)
    return condition()


@in_a_loop
async def test_what_both_agree_on_is_granted(agreed):
    agreed.say()
    assert not agreed.granted  # the way has not been tried yet
    assert await becomes(lambda: agreed.granted)
    grant = agreed.loader.maps.grants.items()[agreed.key()]
    assert grant.target_netns == agreed.pair.db.captured.netns_cookie
    assert agreed.key().source_cgroup == agreed.pair.web.captured.app_cgroup
    assert 0 < grant.expiry_ns - time.monotonic_ns() < channel.LIFETIME_S * 1e9
    assert len(agreed.loader.maps.direct_services.items()) == 1
    assert not agreed.loader.maps.admitted.items()  # what the trial needed is gone


NOBODY = SpiffeId("cluster.local", "near", "nobody")


@pytest.mark.parametrize(
    "changes",
    [
        {"identity": NOBODY},
        {"tunnel": "a port of nobody's"},
        {"tunnel": "the application's own"},
        {"tunnel": "an address elsewhere"},
        {"address": "the caller's own"},
        {"address": IpAddress("10.97.0.99")},
        {"port": 15008},
        {"port": 15000},
    ],
    ids=str,
)
@in_a_loop
async def test_what_is_not_so_is_not_granted(agreed, changes):
    pair = agreed.pair
    with pair.web.socket("app") as own:
        own.connect((pair.db.address, 15008))  # what the application can make itself
        meant = {
            "a port of nobody's": (pair.web.address, 1),
            "the application's own": (pair.web.address, own.getsockname()[1]),
            "an address elsewhere": (IpAddress("10.97.0.77"), pair.tunnel_port),
            "the caller's own": pair.web.address,
        }
        agreed.say(allowed=(pair.allowed(**{name: meant.get(value, value) for name, value in changes.items()}),))
        assert not await becomes(lambda: agreed.granted, 0.4)


@in_a_loop
async def test_a_workload_grants_nothing_but_itself(agreed):
    """`web` says that it may be reached at `db`'s address, and that `db` calls it."""
    pair = agreed.pair
    agreed.web.said = Said(allowed=(pair.allowed(), pair.allowed(identity=pair.db.identity)))
    agreed.grants.heard(agreed.web)
    agreed.grants.heard(agreed.db)
    assert not await becomes(lambda: agreed.granted, 0.4)


@in_a_loop
async def test_without_the_callers_channel_nothing_is_granted(pair, loader):
    with agent(pair, loader, joined=False) as agreed:
        agreed.grants.joined(agreed.db)
        agreed.db.said = Said(allowed=(pair.allowed(),))
        agreed.grants.heard(agreed.db)
        assert not await becomes(lambda: agreed.granted, 0.4)


@pytest.mark.parametrize("identity", [NOBODY, None], ids=["somebody else", "not proved"])
@in_a_loop
async def test_a_backend_that_is_not_who_it_must_be_is_not_near(agreed, identity):
    choice = agreed.pair.choice()
    (backend,) = choice.backends
    other = channel.Backend(backend.address, backend.port, 1, identity)
    agreed.say(choices=(channel.Choice(choice.address, choice.port, (other,)),))
    assert not agreed.loader.maps.direct_services.items()


@in_a_loop
async def test_on_a_shared_segment_nothing_is_granted(agreed):
    join_a_bridge(agreed.pair.db)
    agreed.say()
    assert not await becomes(lambda: agreed.granted, 0.4)


def join_a_bridge(place: Place) -> None:
    """Its link becomes one port of several, and it is reached as before."""
    link, address = place.box.host_link, place.address
    sandbox.run_ip(
        [
            f"link add br9 address {sandbox._HOST_MAC} type bridge",
            f"link set {link} master br9",
            "link set br9 up",
            f"neigh add {address} lladdr {sandbox._WORKLOAD_MAC} dev br9 nud permanent",
            f"route replace {address} dev br9",
        ]
    )
    sandbox.write_sysctls({"net/ipv4/conf/br9/forwarding": "1"})


@in_a_loop
async def test_a_way_that_does_not_arrive_is_not_granted(agreed, monkeypatch):
    monkeypatch.setattr(ways, "_PORT", 15020)  # where nobody listens here
    agreed.say()
    assert not await becomes(lambda: agreed.granted, 0.4)
    assert not agreed.loader.maps.admitted.items()


@contextmanager
def connected(pair: Pair) -> Iterator[tuple[socket.socket, socket.socket]]:
    """As the kernel would have let it through."""
    with pair.db.listen("app", PORT) as listener, pair.web.socket("app") as client:
        client.connect((pair.db.address, PORT))
        server, _ = listener.accept()
        with server:
            server.settimeout(30)
            yield client, server


async def granted(agreed: Agreed) -> None:
    agreed.say()
    assert await becomes(lambda: agreed.granted)


@pytest.mark.parametrize(
    "how", ["said no more", "caller may not", "destination may not", "identity", "workload gone", "bridge", "expired"]
)
@in_a_loop
async def test_its_end_is_the_end_of_its_connections(agreed, how, monkeypatch):
    if how == "expired":
        monkeypatch.setattr(grants, "LIFETIME_S", 0.3)
    await granted(agreed)
    with connected(agreed.pair) as (client, server):
        match how:
            case "said no more":
                agreed.say(allowed=())
            case "caller may not":
                agreed.web.said = Said(direct=False)
                agreed.grants.heard(agreed.web)
            case "destination may not":
                agreed.db.said = Said(direct=False)
                agreed.grants.heard(agreed.db)
            case "identity":
                agreed.grants._identity_at = lambda address: NOBODY
                agreed.grants.changed()
            case "workload gone":
                agreed.grants._captured = lambda: [agreed.pair.db.captured]
                agreed.grants.changed()
            case "bridge":
                join_a_bridge(agreed.pair.web)
                monkeypatch.setattr(agreed.grants, "_look_at", 0.0)
                agreed.grants.tick()
            case "expired":
                await asyncio.sleep(0.4)
                agreed.grants.tick()
        assert not agreed.granted
        for end in (client, server):
            with pytest.raises((ConnectionAbortedError, ConnectionResetError)):
                end.recv(1)


@in_a_loop
async def test_a_connection_that_was_just_being_made_ends_too(agreed):
    await granted(agreed)
    agreed.say(allowed=())
    with connected(agreed.pair) as (client, server):
        agreed.grants.tick()
        for end in (client, server):
            with pytest.raises((ConnectionAbortedError, ConnectionResetError)):
                end.recv(1)


@in_a_loop
async def test_a_connection_whose_syn_is_not_answered_yet_ends_too(agreed):
    await granted(agreed)
    with agreed.pair.db.listen("app", PORT) as full, ExitStack() as stack:
        full.listen(0)
        for _ in range(10):
            waiting = stack.enter_context(agreed.pair.web.socket("app"))
            waiting.setblocking(False)
            waiting.connect_ex((agreed.pair.db.address, PORT))
            if waiting.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _SYN_SENT:
                break
        else:
            pytest.fail("the queue does not become full")
        agreed.say(allowed=())
        assert waiting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED


@in_a_loop
async def test_what_is_granted_anew_does_not_end_with_what_was_granted_before(agreed):
    """A former grant's connections are looked for once more, a moment later: whoever is let in by then is another's."""
    await granted(agreed)
    agreed.say(allowed=())
    assert not agreed.granted
    while not agreed.granted:
        agreed.say()
        if not await becomes(lambda: agreed.granted, 0.2):
            agreed.grants.tick()
    with connected(agreed.pair) as (client, server):
        agreed.grants.tick()
        client.sendall(b"x")
        assert server.recv(1) == b"x"


@in_a_loop
async def test_one_that_is_renewed_goes_on(agreed, monkeypatch):
    monkeypatch.setattr(grants, "LIFETIME_S", 0.3)
    await granted(agreed)
    with connected(agreed.pair) as (client, server):
        for _ in range(6):  # the same again
            await asyncio.sleep(0.1)
            agreed.web.heard_at = time.monotonic()
            agreed.grants.heard(agreed.web)
            agreed.grants.heard(agreed.db)
            agreed.grants.tick()
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        agreed.pair.tunnel.close()  # idle tunnels end
        agreed.say()
        server.sendall(b"y")
        assert client.recv(1) == b"y"


@in_a_loop
async def test_another_agent_takes_over_what_is_said_again(agreed, pair, loader):
    await granted(agreed)
    pair.tunnel.close()
    with agent(pair, loader) as next_one:
        assert not loader.maps.direct_services.items()
        next_one.say()
        assert next_one.grants.status()["direct_grants"] == 1
        assert len(loader.maps.direct_services.items()) == 1


@in_a_loop
async def test_another_agent_ends_what_nobody_says_again(agreed, pair, loader, monkeypatch):
    monkeypatch.setattr(grants, "LIFETIME_S", 0.3)
    await granted(agreed)
    with agent(pair, loader) as next_one, connected(pair) as (_, server):
        await asyncio.sleep(0.4)
        next_one.grants.tick()
        assert not loader.maps.grants.items()
        with pytest.raises(ConnectionResetError):
            server.recv(1)


@in_a_loop
async def test_a_suspension_of_the_kernels_stays_for_a_while(agreed, loader, monkeypatch):
    await granted(agreed)
    pair = agreed.key()
    grant = loader.maps.grants.items()[pair]
    loader.maps.grants.put(pair, replace(grant, suspended_ns=time.monotonic_ns()))
    agreed.say()
    assert loader.maps.grants.items()[pair].suspended_ns
    monkeypatch.setattr(grants, "RETRY_S", 0.0)
    agreed.say()
    assert not loader.maps.grants.items()[pair].suspended_ns


@in_a_loop
async def test_a_caller_that_would_rather_dial_by_a_tunnel_does_and_what_is_open_stays(agreed, loader):
    """As after each renewal of its certificate, also for a workload's own address, which is no service."""
    await granted(agreed)
    with connected(agreed.pair) as (client, server):
        agreed.say(choices=())
        assert loader.maps.grants.items()[agreed.key()].suspended_ns
        server.sendall(b"x")
        assert client.recv(1) == b"x"


@in_a_loop
async def test_where_somebody_else_is_to_be_a_caller_goes_by_a_tunnel(agreed, loader):
    await granted(agreed)
    before, address = agreed.pair.identity_at, agreed.pair.db.address
    agreed.grants._identity_at = lambda asked: NOBODY if asked == address else before(asked)
    agreed.grants.changed()
    assert loader.maps.grants.items()[agreed.key()].suspended_ns
    assert not loader.maps.direct_services.items()


@in_a_loop
async def test_what_the_caller_would_not_dial_is_not_granted(agreed):
    agreed.say(choices=())
    assert not await becomes(lambda: agreed.granted, 0.4)
    agreed.say()
    assert await becomes(lambda: agreed.granted)


@in_a_loop
async def test_uproxies_are_told_who_else_is_here(pair, loader, monkeypatch):
    monkeypatch.setattr(grants, "_SETTLE_S", 0.0)
    captured = [pair.web.captured, pair.db.captured]
    made = Grants(loader.maps, lambda: captured, pair.identity_at)
    (web, web_end), (db, db_end) = pair.web.peer(), pair.db.peer()
    with web_end, db_end:
        made.joined(web)
        made.tick()
        assert channel.read_told(web_end.recv(1 << 17)).local == {pair.web.address}
        made.joined(db)
        made.tick()
        assert channel.read_told(db_end.recv(1 << 17)).local == {pair.web.address}
        assert channel.read_told(db_end.recv(1 << 17)).local == {pair.web.address, pair.db.address}
        made.close()
        web.close()
        db.close()
