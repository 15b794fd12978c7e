"""What connections need and the proxy does not know: asked once, waited for, bounded.

A real control plane publishes to a broker without a network; a test decides when it delivers what.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Callable, Coroutine

import pytest

from control.api.address import parse_address
from control.api.gateway import Binding, Gateway, Traffic, Via
from control.api.identity import make_id
from control.api.index import ResidentService, ResidentWorkload
from control.api.topics import address_shard
from control.api.workload import Endpoint, Service, ServicePort, Workload
from control.client.libcrypto import ConfigVerifier
from control.client.replica import Replica, Status
from control.client.state import State
from control.server.ca import Authority
from control.server.core import Core
from control.server.signing import ConfigKey
from control.server.store import Store
from tests.support.certificates import WEB
from tests.support.desired import service, together, workload
from tests.support.plane import NOW, Broker, ControlPlane, Truth, signer
from tests.support.published import PREFIX, Shelf
from tests.support.records import TRUST_DOMAIN
from uproxy import demand, plane
from uproxy.demand import Demand
from uproxy.errors import RefusedError
from uproxy.outbound import Outbound, Self
from uproxy.plane import Plane
from uproxy.pool import Pool
from uproxy.resolve import Plan, Resolver

SERVICES = 12


def vip(number: int) -> str:
    return parse_address(f"240.240.1.{number}")


def neighbour(address: str) -> str:
    """An address where nobody lives, in the same shard."""
    return next(
        other
        for number in range(1, 65536)
        if address_shard(other := parse_address(f"10.98.{number >> 8}.{number & 255}")) == address_shard(address)
    )


def backend(number: int) -> str:
    return parse_address(f"10.96.1.{number}")


MESH = together(
    workload("web", "10.96.0.10"),
    *(service(f"db-{n}", vip=vip(n)) for n in range(1, SERVICES + 1)),
    *(workload(f"db-{n}", backend(n), app=f"db-{n}") for n in range(1, SERVICES + 1)),
    service("empty", vip=vip(200)),
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], bytes]:
    """What the control plane published, and its root certificate."""
    directory = tmp_path_factory.mktemp("control")
    authority = Authority.create(directory / "ca", "cluster.local")
    store = Store(directory / "mesh.db")
    core = Core(store, authority, ConfigKey.open(directory / "ca", authority, time.time()))
    core.apply([("mesh.yaml", MESH)])
    shelf = Shelf()
    shelf.drain(core)
    store.close()
    return shelf.retained, ssl.PEM_cert_to_DER_cert(authority.bundle_pem.decode())


BOUND = tuple(f"infra/wp-{number}" for number in range(1, 7))


@pytest.fixture(scope="module")
def bound() -> tuple[dict[str, bytes], bytes]:
    """The same of another mesh, with a service that is bound to a waypoint, and workloads to two each."""
    mesh, broker, truth = ControlPlane(int(NOW)), Broker(), Truth()
    ways = [Binding(gateway, Via.WAYPOINT) for gateway in BOUND]
    identity = make_id(TRUST_DOMAIN, "shop", "db")
    ports = (ServicePort("http", 80, 8080, ""),)
    truth.put(
        Workload("shop", "web", "web", WEB, (parse_address("10.96.0.10"),), {}, {}, "", 1),
        Service("shop", "db-1", (vip(1),), ports, {}, (identity,), ways[0]),
        Endpoint("shop/db-1", "shop/db-1", backend(1), identity, {80: 8080}, 1, True, {}),
        *(Gateway("infra", key.partition("/")[2], Traffic.ALL, (), ("shop/db-1",), ()) for key in BOUND),
    )
    truth.residents[vip(1)] = ResidentService("shop", "db-1", (80,), bound=True)
    for number in (1, 2, 3):
        pair = ((0, ways[2 * number - 2]), (8080, ways[2 * number - 1]))
        truth.residents[backend(number)] = ResidentWorkload("shop", f"db-{number}", "db", {}, pair)
    broker.publish(mesh.start())
    broker.publish(mesh.publish(truth))
    return broker.retained, signer().root


class Proxy:
    """The part of a proxy that asks, and a broker that answers at its next turn, but for what is held back."""

    def __init__(self, published: tuple[dict[str, bytes], bytes]) -> None:
        self.retained, root = published
        self.plane = Plane(asyncio.get_running_loop())
        self.state = State("cluster.local")
        self.replica = Replica("cluster.local", ConfigVerifier(self.state.trust_domain, lambda: [root]))
        self.replica.want_workload(WEB, "web")
        self.demand = Demand(self.plane, self.state, self.replica, self.interests_changed)
        self.resolver = Resolver(self.state, random.Random(1))
        self.held_back: Callable[[str], bool] = lambda topic: False
        self.subscribed: set[str] = set()
        self.subscriptions: list[str] = []
        """Every filter, each time it was subscribed to."""
        self._delivered: set[str] = set()
        self._due = False

    def interests_changed(self) -> None:
        if not self._due:
            self._due = True
            self.plane.loop.call_soon(self.deliver)

    def deliver(self) -> None:
        self._due = False
        wanted = self.replica.filters()
        self.subscriptions += sorted(wanted - self.subscribed)
        self._delivered = {topic for topic in self._delivered if _matches(wanted & self.subscribed, topic)}
        self.subscribed = set(wanted)
        for topic, payload in self.retained.items():
            if _matches(wanted, topic) and topic not in self._delivered and not self.held_back(topic):
                self._delivered.add(topic)
                self._take(self.replica.receive(topic, payload, time.time()))
        while self.replica.has_work:
            self._take(self.replica.work(time.time()))
        if self.replica.asks_anew:  # what has come names more
            self.interests_changed()
        self.plane.run(self.demand.progress)

    def _take(self, batches: object) -> None:
        for batch in batches:  # type: ignore[attr-defined]
            self.state.apply(batch)

    async def dial(self, number: int) -> str:
        """The address of the first hop to a service; empty when it is refused."""
        try:
            await self.demand.destination(vip(number))
            return self.resolver.plan(vip(number), 80).hops[0].address
        except RefusedError:
            return ""

    async def all(self, *coroutines: Coroutine[object, object, object]) -> list[object]:
        """The results of coroutines of the plane, run at once."""
        results: dict[int, object] = {}

        async def keep(number: int, coroutine: Coroutine[object, object, object]) -> None:
            try:
                results[number] = await coroutine
            except RefusedError as error:
                results[number] = error

        for number, coroutine in enumerate(coroutines):
            self.plane.spawn(keep(number, coroutine))
        while len(results) < len(coroutines):  # noqa: ASYNC110 - the plane's coroutines set no asyncio event
            await asyncio.sleep(0.005)
        return [results[number] for number in range(len(coroutines))]

    async def one(self, coroutine: Coroutine[object, object, object]) -> object:
        return (await self.all(coroutine))[0]


def _matches(filters: object, topic: str) -> bool:
    return any(
        topic == one or (one.endswith("/#") and (topic + "/").startswith(one[:-1]))
        for one in filters  # type: ignore[attr-defined]
    )


def run(published: tuple[dict[str, bytes], bytes], test: Callable[[Proxy], Coroutine[object, object, None]]) -> None:
    async def main() -> None:
        proxy = Proxy(published)
        try:
            async with asyncio.timeout(30):
                await test(proxy)
            assert not proxy.plane.tasks
            assert not proxy.demand._waiting
        finally:
            proxy.plane.close()

    plane.run(main())


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand, "PATIENCE_S", 0.3)


def test_a_burst_of_first_dials_is_one_subscription(published: tuple[dict[str, bytes], bytes]) -> None:
    async def test(proxy: Proxy) -> None:
        proxy.deliver()
        proxy.subscriptions.clear()
        assert set(await proxy.all(*(proxy.dial(1) for _ in range(500)))) == {backend(1)}
        assert len(proxy.subscriptions) == len(set(proxy.subscriptions)) == 3, "a shard, the service, its endpoints"
        proxy.subscriptions.clear()
        assert await proxy.one(proxy.dial(1)) == backend(1)
        assert proxy.subscriptions == []

    run(published, test)


def test_a_connection_asks_only_for_what_it_lacks(published: tuple[dict[str, bytes], bytes], patience: None) -> None:
    async def test(proxy: Proxy) -> None:
        own = Self("shop/web", str(WEB), proxy.state.trust_domain, ())
        pool = Pool(proxy.plane, lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ())
        connections, telemetry = None, None
        outbound = Outbound(proxy.plane, proxy.state, pool, connections, telemetry, own, proxy.demand)  # type: ignore
        proxy.deliver()
        for asks in (True, False):
            proxy.demand.used.clear()
            proxy.subscriptions.clear()
            plan = await proxy.one(outbound._configured(vip(1), 80))
            assert isinstance(plan, Plan)
            assert plan.hops[0].address == backend(1)
            assert proxy.demand.used == {"shop/db-1"}
            assert bool(proxy.subscriptions) is asks
        proxy.held_back = lambda topic: True
        for address, port, reason in ((vip(200), 80, "no-config"), (vip(1), 81, "no-config")):
            proxy.subscriptions.clear()
            refused = await proxy.one(outbound._configured(address, port))
            assert isinstance(refused, RefusedError)
            assert refused.reason == reason
        proxy.held_back = lambda topic: False
        proxy.interests_changed()
        refused = await proxy.one(outbound._configured(vip(200), 80))
        assert isinstance(refused, RefusedError)
        assert refused.reason == "no-endpoint"

    run(published, test)


def test_what_nobody_has_is_refused_at_once(published: tuple[dict[str, bytes], bytes]) -> None:
    async def test(proxy: Proxy) -> None:
        proxy.deliver()
        began = time.monotonic()
        unknown = neighbour(vip(1))
        assert await proxy.one(proxy.demand.destination(unknown)) is None
        assert proxy.replica.address_status(unknown) is Status.ABSENT
        for name in ("shop/nobody", "shop/db-99"):
            assert await proxy.one(proxy.demand.service(name)) is None
            assert proxy.state.service(name) is None
        assert await proxy.one(proxy.dial(200)) == "", "a service without an endpoint"
        assert time.monotonic() - began < demand.NAME_PATIENCE_S

    run(published, test)


def test_connections_wait_for_the_base(published: tuple[dict[str, bytes], bytes]) -> None:
    async def test(proxy: Proxy) -> None:
        proxy.held_back = lambda topic: topic.startswith(PREFIX + "root/")
        proxy.deliver()
        assert not proxy.state.whole
        proxy.plane.loop.call_later(0.1, lambda: setattr(proxy, "held_back", lambda topic: False))
        proxy.plane.loop.call_later(0.1, proxy.interests_changed)
        assert set(await proxy.all(*(proxy.dial(n) for n in (1, 2, 1)))) == {backend(1), backend(2)}

    run(published, test)


@pytest.mark.parametrize("late", ["root/", "addr/", "svc/", "ep/shop/db-1/", "ep/shop/db-1"])
def test_whatever_does_not_come_is_waited_for_and_then_refused(
    published: tuple[dict[str, bytes], bytes], late: str, patience: None
) -> None:
    async def test(proxy: Proxy) -> None:
        proxy.held_back = lambda topic: topic.startswith(PREFIX + late)
        proxy.deliver()
        began = time.monotonic()
        refused = await proxy.one(proxy.demand.destination(vip(1)))
        assert isinstance(refused, RefusedError)
        assert refused.reason == "no-config"
        assert "did not come from the control plane" in refused.detail
        assert time.monotonic() - began > 0.25
        assert proxy.demand.timeouts == 1
        proxy.held_back = lambda topic: False
        proxy.interests_changed()
        assert await proxy.one(proxy.dial(1)) == backend(1)

    run(published, test)


class TestNames:
    def test_what_is_there_and_what_is_not_is_known_at_once(self, published: tuple[dict[str, bytes], bytes]) -> None:
        async def test(proxy: Proxy) -> None:
            proxy.replica.want_namespaces()
            proxy.deliver()
            proxy.subscriptions.clear()
            began = time.monotonic()
            assert await proxy.one(proxy.demand.name("com", "com/example")) is None
            assert not proxy.demand.has_namespace("com")
            assert proxy.subscriptions == [], "nothing is asked for in a namespace that is none"
            assert await proxy.one(proxy.demand.name("shop", "shop/nobody")) is None
            assert proxy.state.service("shop/nobody") is None
            assert await proxy.one(proxy.demand.name("shop", "")) is None
            assert proxy.demand.has_namespace("shop")
            assert await proxy.one(proxy.demand.name("shop", "shop/db-1")) is None
            found = proxy.state.service("shop/db-1")
            assert found is not None
            assert found.vips == (vip(1),)
            assert time.monotonic() - began < demand.NAME_PATIENCE_S

        run(published, test)

    @pytest.mark.parametrize("late", ["root", "root/", "svc/"])
    def test_what_does_not_come_is_refused_before_a_resolver_asks_again(
        self, published: tuple[dict[str, bytes], bytes], late: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(demand, "NAME_PATIENCE_S", 0.3)

        async def test(proxy: Proxy) -> None:
            proxy.held_back = lambda topic: (
                topic == PREFIX + late or (late.endswith("/") and topic.startswith(PREFIX + late))
            )
            proxy.replica.want_namespaces()
            proxy.deliver()
            refused = await proxy.one(proxy.demand.name("shop", "shop/db-1"))
            assert isinstance(refused, RefusedError)
            assert refused.reason == "no-config"
            proxy.held_back = lambda topic: False
            proxy.interests_changed()
            assert await proxy.one(proxy.demand.name("shop", "shop/db-1")) is None
            assert proxy.state.service("shop/db-1") is not None

        run(published, test)


def test_a_proxy_that_ends_ends_what_waits(published: tuple[dict[str, bytes], bytes]) -> None:
    async def test(proxy: Proxy) -> None:
        proxy.plane.loop.call_later(
            0.1, lambda: proxy.plane.run(lambda: proxy.plane.abort(RefusedError("shutting-down", "")))
        )
        ended = await proxy.all(*(proxy.demand.destination(vip(1)) for _ in range(3)))
        assert {error.reason for error in ended if isinstance(error, RefusedError)} == {"shutting-down"}

    run(published, test)


def test_services_make_room_for_each_other(
    published: tuple[dict[str, bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "MAX_SERVICES", 4)

    async def test(proxy: Proxy) -> None:
        proxy.deliver()
        for number in (1, 2, 3, 4):
            assert await proxy.one(proxy.dial(number)) == backend(number)
        proxy.demand.used.add("shop/db-1")
        proxy.demand.tick(time.monotonic() + demand.SWEEP_S)
        await proxy.one(proxy.dial(5))
        assert set(proxy.replica.services()) == {"shop/db-3", "shop/db-4", "shop/db-1", "shop/db-5"}
        await proxy.one(proxy.demand.service("shop/nobody"))
        assert "shop/db-3" not in proxy.replica.services()
        await proxy.one(proxy.dial(6))
        assert "shop/nobody" not in proxy.replica.services(), "what nobody has goes first"
        assert "shop/db-4" in proxy.replica.services()
        assert proxy.demand.services == 4
        proxy.deliver()
        assert proxy.state.service("shop/db-2") is None, "it is out of the state too"
        assert await proxy.one(proxy.dial(2)) == backend(2), "and comes back when it is dialled"

    run(published, test)


def test_what_never_came_is_forgotten_and_what_came_is_kept(
    published: tuple[dict[str, bytes], bytes], patience: None
) -> None:
    async def test(proxy: Proxy) -> None:
        proxy.deliver()
        await proxy.one(proxy.dial(1))
        await proxy.one(proxy.demand.service("shop/nobody"))
        proxy.held_back = lambda topic: "db-2" in topic
        await proxy.one(proxy.demand.service("shop/db-2"))
        now = time.monotonic()
        for sweep in (1, 2):
            assert set(proxy.replica.services()) == {"shop/db-1", "shop/db-2", "shop/nobody"}
            proxy.demand.tick(now + 2 * sweep * demand.SWEEP_S)
        assert set(proxy.replica.services()) == {"shop/db-1"}

    run(published, test)


def test_a_caller_and_the_service_it_dialled_are_known_by_their_first_connection(
    published: tuple[dict[str, bytes], bytes],
) -> None:
    async def test(proxy: Proxy) -> None:
        proxy.deliver()
        caller = backend(1)
        assert proxy.state.workload_at(caller) is None
        await proxy.one(proxy.demand.introduce(caller, "shop/db-2"))
        known = proxy.state.workload_at(caller)
        assert known is not None
        assert known.name == "db-1"
        assert proxy.state.service("shop/db-2") is not None
        proxy.subscriptions.clear()
        await proxy.one(proxy.demand.introduce(neighbour(caller), ""))
        assert proxy.subscriptions == [], "its shard is here"

    run(published, test)


def test_a_caller_is_not_kept_waiting_for_its_name(
    published: tuple[dict[str, bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "COURTESY_S", 1.0)

    async def test(proxy: Proxy) -> None:
        proxy.deliver()
        proxy.held_back = lambda topic: True
        for least, most in ((1.0, demand.PATIENCE_S), (0.0, 1.0)):
            began = time.monotonic()
            await proxy.one(proxy.demand.introduce(backend(1), "shop/db-2"))
            assert least <= time.monotonic() - began < most
        assert proxy.demand.timeouts == 0

    run(published, test)


def test_what_callers_make_us_ask_for_is_bounded(
    published: tuple[dict[str, bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "MAX_SERVED", 3)

    async def test(proxy: Proxy) -> None:
        proxy.deliver()
        await proxy.one(proxy.dial(1))
        for number in range(1, SERVICES + 1):
            await proxy.one(proxy.demand.introduce(None, f"shop/db-{number}"))
        assert len(proxy.replica.services()) == 4
        assert "shop/db-1" in proxy.replica.services(), "it was dialled too"
        proxy.held_back = lambda topic: True
        before = len(proxy.replica.filters())
        callers = [parse_address(f"10.97.0.{number}") for number in range(1, 200)]
        await proxy.all(*(proxy.demand.introduce(caller, "") for caller in callers))
        assert len(proxy.replica.filters()) == before + demand._MAX_STRANGERS, "so many at once"
        proxy.demand.tick(time.monotonic() + demand.SWEEP_S)
        await proxy.all(*(proxy.demand.introduce(caller, "") for caller in reversed(callers)))
        assert len(proxy.replica.filters()) > before + demand._MAX_STRANGERS, "others a minute later"
        monkeypatch.setattr(demand, "MAX_CALLER_BYTES", 1)
        proxy.demand.tick(time.monotonic() + 3 * demand.SWEEP_S)
        before = len(proxy.replica.filters())
        others = [parse_address(f"10.99.0.{number}") for number in range(1, 200)]
        await proxy.all(*(proxy.demand.introduce(caller, "") for caller in others))
        assert len(proxy.replica.filters()) == before, "memory is bounded"

    run(published, test)


def test_a_destination_is_known_when_its_waypoint_is(bound: tuple[dict[str, bytes], bytes], patience: None) -> None:
    async def test(proxy: Proxy) -> None:
        proxy.held_back = lambda topic: topic.startswith(PREFIX + "gw/")
        proxy.deliver()
        for need, gateway in (
            (proxy.demand.destination(vip(1)), BOUND[0]),
            (proxy.demand.service("shop/db-1"), BOUND[0]),
            (proxy.demand.destination(backend(2)), BOUND[2]),
        ):
            refused = await proxy.one(need)
            assert isinstance(refused, RefusedError)
            assert refused.reason == "no-config"
            assert proxy.state.gateway(gateway) is None
        assert "Gateway infra/wp-3 did not come" in str(refused)
        proxy.held_back = lambda topic: False
        proxy.interests_changed()
        assert await proxy.one(proxy.demand.destination(vip(1))) is None
        assert proxy.state.gateway(BOUND[0]) is not None
        assert await proxy.one(proxy.demand.destination(backend(2))) is None
        assert all(proxy.state.gateway(gateway) is not None for gateway in BOUND[2:4]), "each that it may be bound to"
        proxy.subscriptions.clear()
        assert await proxy.one(proxy.demand.destination(backend(2))) is None
        assert proxy.subscriptions == []

    run(bound, test)


def test_a_connection_waits_for_the_waypoint_of_what_it_dials(
    bound: tuple[dict[str, bytes], bytes], patience: None
) -> None:
    async def test(proxy: Proxy) -> None:
        own = Self("shop/web", str(WEB), proxy.state.trust_domain, ())
        pool = Pool(proxy.plane, lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ())
        connections, telemetry = None, None
        outbound = Outbound(proxy.plane, proxy.state, pool, connections, telemetry, own, proxy.demand)  # type: ignore
        proxy.deliver()
        for address, port in ((vip(1), 80), (backend(2), 8080)):
            refused = await proxy.one(outbound._configured(address, port))
            assert isinstance(refused, RefusedError)
            assert refused.reason == "no-waypoint"
            assert "of which no process runs" in refused.detail, "it is known by then"

    run(bound, test)


def test_waypoints_of_workloads_make_room_for_each_other(
    bound: tuple[dict[str, bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "MAX_GATEWAYS", 3)
    dumped: list[bytes] = []

    async def first(proxy: Proxy) -> None:
        proxy.deliver()
        await proxy.one(proxy.demand.destination(vip(1)))
        for number in (1, 2, 3):
            await proxy.one(proxy.demand.destination(backend(number)))
        assert set(proxy.replica.gateways()) == {*BOUND[3:], BOUND[0]}, "a service is bound to the first"
        dumped.append(proxy.replica.dump())

    async def second(proxy: Proxy) -> None:
        for batch in proxy.replica.restore(dumped[0]):
            proxy.state.apply(batch)
        proxy.demand.take_over()
        assert await proxy.one(proxy.demand.destination(backend(3))) is None, "with no broker at all"
        assert proxy.subscriptions == []
        proxy.deliver()
        for number in (1, 2):
            await proxy.one(proxy.demand.destination(backend(number)))
        assert len(proxy.replica.gateways()) <= demand.MAX_GATEWAYS + 1

    run(bound, first)
    run(bound, second)


def test_services_of_an_earlier_process_are_counted(published: tuple[dict[str, bytes], bytes]) -> None:
    dumped: list[bytes] = []

    async def first(proxy: Proxy) -> None:
        proxy.deliver()
        await proxy.one(proxy.dial(1))
        dumped.append(proxy.replica.dump())

    async def second(proxy: Proxy) -> None:
        for batch in proxy.replica.restore(dumped[0]):
            proxy.state.apply(batch)
        proxy.demand.take_over()
        assert proxy.demand.services == 1
        assert await proxy.one(proxy.dial(1)) == backend(1), "with no broker at all"
        assert proxy.subscriptions == []

    run(published, first)
    run(published, second)
