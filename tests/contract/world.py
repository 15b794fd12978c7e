"""A control plane, a broker and proxies, all real, and the faults that happen to them.

What is checked at every batch that a proxy takes: it holds exactly what one root says that the control plane signed,
and no root after a newer one. `settle` ends all faults and then asks that everybody knows everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

import uproxy
from control.api import messages, records, status
from control.api.address import IpAddress
from control.api.identity import SpiffeId, proxy_hash
from control.api.messages import Body, Envelope
from control.api.policy import DEFAULT_ROOT_NAMESPACE
from control.api.route import HTTPRoute
from control.api.signing import SIGNATURE
from control.api.status import ADDRESSES, Kind, ProxyStatus, RootStamp
from control.api.topics import (
    AddressesTopic,
    EndpointTopic,
    GatewayTopic,
    PolicyTopic,
    RequestAuthenticationTopic,
    RevocationsTopic,
    RouteTopic,
    ServiceTopic,
    StatusTopic,
    TrafficTopic,
    WorkloadTopic,
    format_topic,
    parse_topic,
)
from control.client.libcrypto import ConfigVerifier
from control.client.mqtt import BrokerAccess
from control.client.replica import Batch, Replica, Status
from control.client.state import State
from control.client.subscriber import Subscriber
from control.server.core import Core, Publication
from control.server.rights import is_node
from tests.support.brokers import Broker, client, tls
from tests.support.control_plane import ControlPlane
from tests.support.desired import together
from tests.support.relay import Relay, relay
from tests.support.waiting import until

PREFIX = "mesh/v1/cluster.local/"
WP = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/wp")
WAYPOINT = "shop/wp"
"""The Gateway of its processes."""
SETTLE_S = 90.0

Records = dict[str, Body]
"""Topic without its prefix -> body."""


class Ledger:
    """Everything that the control plane ever gave its publisher."""

    def __init__(self) -> None:
        self._by_digest: dict[bytes, bytes] = {}
        self.roots: dict[str, dict[tuple[int, int], bytes]] = {}
        """Topic of a root -> its payloads by stamp; signed again, the newest."""
        self.issued: dict[str, list[bytes]] = {}
        """Topic -> payloads in the order of issue."""
        self.order: list[str] = []
        """The topics of all, in that order."""
        self._said: dict[tuple[str, tuple[int, int]], Records] = {}

    def note(self, batch: Iterable[Publication]) -> None:
        for topic, payload in ((one.topic.removeprefix(PREFIX), one.payload) for one in batch):
            self._by_digest[messages.digest(payload)] = payload
            self.issued.setdefault(topic, []).append(payload)
            self.order.append(topic)
            if payload and (topic.startswith("root/") or topic == "addr"):
                self.roots.setdefault(topic, {})[messages.decode(payload).stamp] = payload

    def indexed(self, namespace: str, stamp: tuple[int, int]) -> Records:
        """What the root of that stamp lists, by name. The digests alone lead there."""
        if (namespace, stamp) not in self._said:
            found: Records = {}
            for digest in self._shards(f"root/{namespace}", stamp).values():
                for entry, listed in _body(self._by_digest[digest])["records"].items():
                    kind, _, rest = entry.partition("/")
                    name = entry if kind == "wl" else f"{kind}/{namespace}/{rest}".rstrip("/")
                    found[name] = _body(self._by_digest[listed])
            self._said[namespace, stamp] = found
        return self._said[namespace, stamp]

    def addresses(self, stamp: tuple[int, int]) -> Records:
        """Who lives where, by the root of that stamp."""
        if (ADDRESSES, stamp) not in self._said:
            found: Records = {}
            for digest in self._shards("addr", stamp).values():
                found |= _body(self._by_digest[digest])["addresses"]
            self._said[ADDRESSES, stamp] = found
        return self._said[ADDRESSES, stamp]

    def _shards(self, topic: str, stamp: tuple[int, int]) -> dict[str, bytes]:
        assert stamp in self.roots.get(topic, {}), f"{topic} {stamp} was never signed"
        return _body(self.roots[topic][stamp])["shards"]


class _NotedCore:
    """A `Core` as its publisher sees it, with every publication noted."""

    def __init__(self, core: Core, ledger: Ledger) -> None:
        self.__dict__.update(core=core, ledger=ledger)

    def __getattr__(self, name: str) -> object:
        return getattr(self.core, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.core, name, value)

    def pending(self) -> Sequence[Publication]:
        batch = self.core.pending()
        self.ledger.note(batch)
        return batch


def content(payload: bytes) -> Body | None:
    """What a message says, without the signature, which differs each time; None for a tombstone."""
    body = messages.decode(payload).body
    return {name: value for name, value in body.items() if name != SIGNATURE} if body is not None else None


def _body(payload: bytes) -> Body:
    body = content(payload)
    assert body is not None
    return body


class Interim(list[tuple[str, bytes]]):
    """A batch after which others come that the replica has made already."""


class Unruly(Replica):
    """A replica whose messages come twice, late and in another order, as `chance` has it."""

    def __init__(self, trust_domain: str, verifier: ConfigVerifier, chance: random.Random) -> None:
        super().__init__(trust_domain, verifier)
        self._chance = chance
        self.unruly = 0.0
        """How many of the messages are repeated or held back."""
        self._held_back: deque[tuple[str, bytes]] = deque()

    def receive(self, topic: str, payload: bytes, now: float) -> Sequence[Batch]:
        given = [(topic, payload)]
        if self._chance.random() < self.unruly:
            self._held_back.append((topic, payload))
            if self._chance.random() < 0.5:
                given = []  # late
        if self._held_back and self._chance.random() < 0.3:
            given.append(self._held_back.popleft())
        return self._received(given, now)

    def calm(self, now: float) -> list[Batch]:
        """Let everything through that was held back, and hold nothing back any more."""
        self.unruly = 0.0
        held, self._held_back = self._held_back, deque()
        return self._received(held, now)

    def _received(self, given: Iterable[tuple[str, bytes]], now: float) -> list[Batch]:
        batches = [batch for message in given for batch in Replica.receive(self, *message, now)]
        return [*map(Interim, batches[:-1]), *batches[-1:]]


@dataclass(frozen=True)
class Who:
    """One proxy's identity and workload."""

    identity: SpiffeId
    workload: str

    @property
    def name(self) -> str:
        return f"{self.identity.namespace}/{self.workload}"


class Proxy:
    """One proxy: replica, state and subscriber, with its own way to the broker. Checks itself at every batch."""

    def __init__(self, who: Who, directory: Path, roots: list[bytes], ledger: Ledger, way: Relay, seed: int) -> None:
        self.who = who
        self.way = way
        self._directory, self._roots, self._ledger = directory, roots, ledger
        self._chance = random.Random(seed)
        self._task: asyncio.Task[None] | None = None
        self._snapshot: bytes | None = None
        self.crash: BaseException | None = None
        self.unruly = 0.0
        self._highest: dict[str, tuple[int, int]] = {}
        self._seen_endpoints: dict[str, int] = {}
        self._reported: object = None
        self._renew()

    def _renew(self) -> None:
        verifier = ConfigVerifier(self.who.identity.trust_domain, lambda: self._roots)
        self.replica = Unruly("cluster.local", verifier, self._chance)
        self.state = State("cluster.local")
        self.records: Records = {}
        if is_node(self.who.identity):
            self.replica.want_all_addresses()
        else:
            self.replica.want_workload(self.who.identity, self.who.workload)
        if self.is_waypoint:
            self.replica.want_waypoint(WAYPOINT)

    @property
    def is_waypoint(self) -> bool:
        return self.who.identity == WP

    # Running

    @property
    def running(self) -> bool:
        return self._task is not None

    def start(self) -> None:
        """Begin from the last good state, if there is one."""
        self.replica.unruly = self.unruly
        if self._snapshot is not None:
            for batch in self.replica.restore(self._snapshot):
                self._take(batch)
        access = BrokerAccess([self.way.url], self.who.identity, lambda: tls(self._directory))
        self.subscriber = Subscriber(self.replica, access, self._take, self._report, on_progress=self._report_progress)
        self._started_at = int(time.time())
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            await self.subscriber.run()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.crash = error
            raise

    async def stop(self, *, forget: bool = False) -> None:
        """End as by kill -9, with the last good state on disk, or without."""
        if self._task is not None:
            if self.replica.based:
                self._snapshot = self.replica.dump()
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        if forget:
            self._snapshot = None
            self._highest.clear()
        self._renew()

    def want(self, service: str) -> None:
        self.replica.want_service(service)
        self.subscriber.interests_changed()

    def drop(self, service: str) -> None:
        self.replica.drop_service(service)
        self.subscriber.interests_changed()

    def want_address(self, ip: IpAddress) -> None:
        self.replica.want_address(ip)
        self.subscriber.interests_changed()

    def calm(self) -> None:
        """Let all messages through, once and at once."""
        for batch in self.replica.calm(time.time()):
            self._take(batch)

    def _report_progress(self) -> None:
        progress = (self.replica.whole, _stamps(self.replica.roots()))
        if progress != self._reported:
            self._reported = progress
            self.subscriber.status_changed()

    def _report(self, online: bool, version: int) -> tuple[str, bytes]:
        report = ProxyStatus(
            kind=Kind.NODE if is_node(self.who.identity) else Kind.WAYPOINT if self.is_waypoint else Kind.UPROXY,
            workload=self.who.name,
            version=uproxy.__version__,
            online=online,
            whole=self.replica.whole,
            waiting=self.replica.waiting(),
            roots=self.replica.roots(),
            applied_at=1,
            serial="01",
            not_after=1,
            problems=self.replica.problems(),
        )
        body = status.write(report)
        return self.status_topic, messages.encode(Envelope(self._started_at, version, int(time.time()), body))

    @property
    def status_topic(self) -> str:
        topic = StatusTopic(proxy_hash(self.who.identity), self.who.workload)
        return format_topic(self.who.identity.trust_domain, topic)

    # What it knows, checked

    def _take(self, batch: Batch) -> None:
        try:
            self._take_checked(batch)
        except Exception as error:  # the subscriber logs it and goes on, as it must
            self.crash = self.crash or error
            raise

    def _take_checked(self, batch: Batch) -> None:
        self.state.apply(batch)  # it refuses what is inconsistent
        for topic, payload in batch:
            name, body = topic.removeprefix(PREFIX), content(payload)
            if body is None:
                self.records.pop(name, None)
            else:
                self.records[name] = body
                self._endpoint_is_no_older(name, body)
        if not isinstance(batch, Interim):
            self._is_what_roots_say()

    def _is_what_roots_say(self) -> None:
        for owner, (epoch, version, _) in self.replica.roots().items():
            stamp = (epoch, version)
            assert stamp >= self._highest.get(owner, (0, 0)), f"{self.who.name}: {owner} goes back to {stamp}"
            self._highest[owner] = stamp
            if owner == ADDRESSES:
                assert self.addresses() == self._ledger.addresses(stamp)
                continue
            said = self._ledger.indexed(owner, stamp)
            held = {name: body for name, body in self.records.items() if _is_indexed_in(name, owner, self.who)}
            assert held == {name: body for name, body in said.items() if name in held}, "a record of another root"
            for kind in self._kinds(owner):
                listed = {name for name in said if name.startswith(f"{kind}/")}
                assert listed == {name for name in held if name.startswith(f"{kind}/")}, f"not each {kind} of a root"
            assert (f"crl/{owner}" in held) is (f"crl/{owner}" in said), "what is revoked is not known"
            for service in self.replica.services():
                if service.startswith(f"{owner}/") and self.replica.service_status(service) is not Status.WAITING:
                    known = self.replica.service_status(service) is Status.KNOWN
                    assert known == (f"svc/{service}" in said)
            for gateway in self.replica.gateways():
                if gateway.startswith(f"{owner}/") and self.replica.gateway_status(gateway) is not Status.WAITING:
                    known = self.replica.gateway_status(gateway) is Status.KNOWN
                    assert known == (f"gw/{gateway}" in said)

    def _kinds(self, namespace: str) -> tuple[str, ...]:
        """Kinds of which it has all records of a namespace in which it has anything."""
        if self.is_waypoint:
            return ("policy", "reqauth", "traffic", "route")
        return ("policy",) if namespace in (self.who.identity.namespace, DEFAULT_ROOT_NAMESPACE) else ()

    def _endpoint_is_no_older(self, name: str, body: Body) -> None:
        """It was issued at or after the one before it: the bodies that came are in the order of their issue."""
        if name.startswith("ep/"):
            issued = [content(one) if one else None for one in self._ledger.issued.get(name, [])]
            at = self._seen_endpoints.get(name, 0)
            assert body in issued[at:], f"{self.who.name}: {name} goes back"
            self._seen_endpoints[name] = issued.index(body, at)

    def addresses(self) -> dict[str, object]:
        return {
            address: who
            for name, body in self.records.items()
            if name.startswith("addr/")
            for address, who in body["addresses"].items()
        }

    def differs(self, plane: ControlPlane, truth: Records) -> str:
        """In what it differs from the control plane, which says `truth`; empty when in nothing."""
        if self.crash is not None:
            raise self.crash
        if not self.running or not self.subscriber.connected:
            return "not connected"
        if not self.replica.whole:
            return f"waits for {self.replica.waiting()}"
        stamps = _stamps(plane.core.roots())
        for owner, root in self.replica.roots().items():
            if stamps.get(owner) != root[:2]:
                return f"root {owner} is {root[:2]}, not {stamps.get(owner)}"
        expected = self._expected(truth)
        if self.records != expected:
            different = {n for n in self.records.keys() | expected.keys() if self.records.get(n) != expected.get(n)}
            return f"records differ: {sorted(different)}"
        reports = plane.core.proxies()
        report = reports.get(self.status_topic)
        if report is None or not report.status.online or not report.status.whole:
            return "not reported as whole"
        if _stamps(report.status.roots) != _stamps(self.replica.roots()):
            return "reported older roots"
        return ""

    def _expected(self, truth: Records) -> Records:
        shards = {name for name in self.records if name.startswith("addr/")}
        if is_node(self.who.identity):
            return {name: body for name, body in truth.items() if name.startswith("addr/") and body["addresses"]}
        own = WorkloadTopic(proxy_hash(self.who.identity), self.who.workload)
        wanted = self._served(truth) if self.is_waypoint else set(self.replica.services())
        bindings = (truth.get(f"svc/{one}", {}).get("binding", ()) for one in wanted)
        bound = {gateway for binding in bindings for gateway in binding[::2]}  # of a canary, too, if there is one
        gateways = bound | {WAYPOINT} if self.is_waypoint else bound
        namespaces = {one.partition("/")[0] for one in (*wanted, *gateways)}
        namespaces |= {self.who.identity.namespace, DEFAULT_ROOT_NAMESPACE}
        found: Records = {}
        for name, body in truth.items():
            match parse_topic(self.who.identity.trust_domain, PREFIX + name):
                case PolicyTopic(namespace, _) if namespace in namespaces and "policy" in self._kinds(namespace):
                    found[name] = body
                case RequestAuthenticationTopic(namespace, _) if namespace in namespaces and "reqauth" in self._kinds(
                    namespace
                ):
                    found[name] = body
                case TrafficTopic(namespace, _) if namespace in namespaces and "traffic" in self._kinds(namespace):
                    found[name] = body
                case RouteTopic(namespace, _) if namespace in namespaces and "route" in self._kinds(namespace):
                    found[name] = body
                case GatewayTopic(namespace, gateway) if f"{namespace}/{gateway}" in gateways:
                    found[name] = body
                case WorkloadTopic() as topic if topic == own:
                    found[name] = body
                case RevocationsTopic():
                    found[name] = body
                case ServiceTopic(namespace, service) if f"{namespace}/{service}" in wanted:
                    found[name] = body
                case EndpointTopic(namespace, service, _) if f"{namespace}/{service}" in wanted:
                    found[name] = body
                case AddressesTopic() if name in shards:
                    found[name] = body
        return found

    def _served(self, truth: Records) -> set[str]:
        """Where the waypoint's Gateway leads: its services, and whatever their routes name."""
        served = set(truth.get(f"gw/{WAYPOINT}", {}).get("services", ()))
        found = set(served)
        for name, body in truth.items():
            match parse_topic(self.who.identity.trust_domain, PREFIX + name):
                case RouteTopic() as topic:
                    route = records.read(topic, body, self.who.identity.trust_domain)
                    assert isinstance(route, HTTPRoute)
                    if served.intersection(parent.service for parent in route.parents):
                        found |= {one.service for rule in route.rules for one in rule.destinations}
        return found


def _is_indexed_in(name: str, namespace: str, who: Who) -> bool:
    kind, *rest = name.split("/")
    return (kind in ("svc", "policy", "reqauth", "traffic", "gw", "route", "crl") and rest[0] == namespace) or (
        kind == "wl" and who.identity.namespace == namespace
    )


def _stamps(roots: Mapping[str, RootStamp]) -> dict[str, tuple[int, int]]:
    """Without the times: roots are signed again all the time."""
    return {name: root[:2] for name, root in roots.items()}


@dataclass(frozen=True)
class Site:
    """What worlds have in common: a running broker, a CA, and who may be there."""

    broker: Broker
    ca_dir: Path
    identities: dict[Who, Path]
    """Proxy -> its identity directory."""


class World:
    """Everything, and what may happen to it."""

    def __init__(self, site: Site, directory: Path, seed: int, stack: AsyncExitStack) -> None:
        self.broker = site.broker
        self.ledger = Ledger()
        self._site, self._directory, self._seed, self._stack = site, directory, seed, stack
        self._publishing: AsyncExitStack | None = None
        self._backup: bytes | None = None
        self._truth: tuple[tuple[int, int], Records] | None = None
        self.proxies: dict[str, Proxy] = {}
        self.attacked = False

    async def open(self) -> None:
        self.way = await self._stack.enter_async_context(relay(self.broker.port))
        self.plane = ControlPlane(self._directory / "plane", self._site.ca_dir, self.way.url)
        self._stack.callback(lambda: self.plane.close())
        self._stack.push_async_callback(self.stop_publishing)
        await self.start_publishing()
        roots = [self.plane.authority.root.public_bytes(Encoding.DER)]
        for number, (who, own) in enumerate(self._site.identities.items()):
            way = await self._stack.enter_async_context(relay(self.broker.port))
            proxy = Proxy(who, own, roots, self.ledger, way, self._seed + number)
            self.proxies[who.workload] = proxy
            proxy.start()
            self._stack.push_async_callback(proxy.stop)

    async def start_publishing(self) -> None:
        self.plane.publisher._core = _NotedCore(self.plane.core, self.ledger)  # type: ignore[assignment]
        self._publishing = AsyncExitStack()
        await self._publishing.enter_async_context(self.plane.running())

    async def stop_publishing(self) -> None:
        if self._publishing is not None:
            await self._publishing.aclose()
            self._publishing = None

    def apply(self, *texts: str) -> None:
        self.plane.core.apply([("world.yaml", together(*texts))], release=True, force=True)

    def truth(self) -> Records:
        """What the control plane says now, by topic without its prefix."""
        stamp = self.plane.store.stamp()
        if self._truth is None or self._truth[0] != stamp:
            bodies = ((one.topic, content(one.payload)) for one in self.plane.store.messages(self.plane.store.topics()))
            self._truth = stamp, {name.removeprefix(PREFIX): body for name, body in bodies if body is not None}
        return self._truth[1]

    async def restart_control_plane(self) -> None:
        await self.stop_publishing()
        self.plane.restart()
        await self.start_publishing()

    async def back_up(self) -> None:
        await self.stop_publishing()
        self._backup = self.plane.backup()
        await self.start_publishing()

    async def restore(self) -> bool:
        """Put the store back to the last backup, if there is one."""
        if self._backup is None:
            return False
        await self.stop_publishing()
        self.plane.restore(self._backup)
        await self.start_publishing()
        return True

    async def forge(self, forged: Iterable[tuple[str, bytes]]) -> None:
        """What a broker in wrong hands can do: put anything under any topic (without its prefix)."""
        self.attacked = True
        async with client(self.broker, self.plane.path.parent / "own") as writer:
            for topic, payload in forged:
                await writer.publish(PREFIX + topic, payload, qos=1, retain=True)

    async def settle(self) -> None:
        """End all faults, and wait until every proxy knows everything. Raises AssertionError."""
        if self.broker.process is None:
            self.broker.start()
        for proxy in self.proxies.values():
            proxy.way.bytes_per_s = None
            proxy.way.heal()
            if not proxy.running:
                proxy.start()
            proxy.calm()
        self.way.heal()
        if self.attacked:
            self.way.cut()  # the next connection begins with an audit
            self.attacked = False
            await until(lambda: not self.plane.publisher.connected)
        try:
            await until(self._settled, SETTLE_S)
        except TimeoutError:
            problems = {name: proxy.differs(self.plane, self.truth()) for name, proxy in self.proxies.items()}
            raise AssertionError(
                f"published: {self.plane.publisher.published} {self.plane.publisher.problem}; {problems}; "
                f"{ {name: proxy.replica.problems() for name, proxy in self.proxies.items()} }"
            ) from None

        for proxy in self.proxies.values():
            proxy.replica.unruly = proxy.unruly

    def _settled(self) -> bool:
        return (
            self.plane.publisher.published
            and not self.plane.core.pending()
            and not any(proxy.differs(self.plane, self.truth()) for proxy in self.proxies.values())
        )


@asynccontextmanager
async def world(site: Site, directory: Path, seed: int) -> AsyncIterator[World]:
    """A world in an empty directory, on a broker that holds nothing yet."""
    async with AsyncExitStack() as stack:
        made = World(site, directory, seed, stack)
        await made.open()
        yield made
