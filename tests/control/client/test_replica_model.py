"""The contract: whatever becomes of messages on their way, what a proxy holds is what the control plane published as a
whole, never goes back, knows whether it is whole, and becomes equal to the control plane's truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from control.api import index, messages, records
from control.api.address import IpAddress
from control.api.gateway import Binding, Gateway, Traffic, Via
from control.api.identity import make_id, proxy_hash
from control.api.index import ResidentService
from control.api.policy import Action, AuthorizationPolicy
from control.api.route import NO_MODIFIER, Backend, HTTPRoute, Match, Parent, PathKind, PathMatch, RouteRule
from control.api.topics import (
    AddressesRootTopic,
    AddressesTopic,
    EndpointTopic,
    GatewayTopic,
    ManifestTopic,
    PolicyTopic,
    RequestAuthenticationTopic,
    RootTopic,
    RouteTopic,
    ServiceTopic,
    Topic,
    TrafficTopic,
    TrustTopic,
    WorkloadTopic,
    address_shard,
    format_topic,
    parse_topic,
)
from control.api.workload import Endpoint, Service, ServicePort, Workload, key
from control.client.replica import ADDRESSES, Status
from tests.support import plane
from tests.support.examples import examples
from tests.support.plane import NOW, ROOT_NAMESPACE, Broker, ControlPlane, Truth, namespace_of
from tests.support.records import TRUST_DOMAIN, policies, request_authentications, traffic_policies, workloads

WEB = make_id(TRUST_DOMAIN, "shop", "web")
OWN = format_topic(TRUST_DOMAIN, WorkloadTopic(proxy_hash(WEB), "web-1"))
OWN_NAMESPACES = ("shop", ROOT_NAMESPACE)
WP = make_id(TRUST_DOMAIN, "shop", "wp")
WAYPOINT = "shop/wp"
GATEWAYS = (WAYPOINT, "bank/gw")
BINDINGS = (
    *(Binding(one, Via.WAYPOINT) for one in GATEWAYS),
    *(Binding(one, Via.WAYPOINT, canary=other, percent=10) for one, other in permutations(GATEWAYS)),
)

service_keys = st.sampled_from(["shop/web", "shop/web", "shop/db", "bank/db", "bank/x"])
sides = st.sampled_from(["uproxy", "uproxy", "waypoint", "node"])
ips = st.integers(1, 12).map(lambda number: IpAddress(f"10.0.0.{number}"))
residents = st.builds(ResidentService, st.just("shop"), st.sampled_from(["web", "db"]), st.just((80,)))


@st.composite
def services(draw) -> Service:
    namespace, service = draw(service_keys).split("/")
    ports = (ServicePort("http", draw(st.integers(1, 3)), 8080, ""),)
    binding = draw(st.none() | st.sampled_from(BINDINGS))
    return Service(namespace, service, (draw(ips),), ports, {}, (make_id(TRUST_DOMAIN, namespace, "web"),), binding)


@st.composite
def gateways(draw) -> Gateway:
    namespace, _, gateway = draw(st.sampled_from(GATEWAYS)).partition("/")
    served = draw(st.sets(service_keys, max_size=3))
    return Gateway(namespace, gateway, Traffic.SERVICE, (), tuple(sorted(served)), ())


@st.composite
def routes(draw) -> HTTPRoute:
    namespace = draw(st.sampled_from(["shop", "bank"]))
    some_services = st.sampled_from(["web", "db", "x"]).map(lambda own: f"{namespace}/{own}")
    backends = draw(st.lists(some_services, max_size=2))
    rule = RouteRule(
        name="",
        matches=(Match(PathMatch(PathKind.PREFIX, "/"), (), (), ""),),
        request=NO_MODIFIER,
        response=NO_MODIFIER,
        backends=tuple(Backend(one, 80, 1, NO_MODIFIER, NO_MODIFIER) for one in backends),
        timeout_ms=0,
        backend_timeout_ms=0,
    )
    return HTTPRoute(namespace, draw(st.sampled_from(["a", "b"])), (Parent(draw(some_services), 0),), (), (rule,))


@st.composite
def endpoints(draw) -> Endpoint:
    service = draw(service_keys)
    namespace = service.partition("/")[0]
    workload = f"{namespace}/{draw(st.sampled_from(['web-1', 'web-2', 'web-3']))}"
    identity = make_id(TRUST_DOMAIN, namespace, "web")
    return Endpoint(service, workload, draw(ips), identity, {80: 8080}, draw(st.integers(1, 3)), True, {})


own_workloads = st.builds(
    lambda ip, weight: Workload("shop", "web-1", "web", WEB, (ip,), {}, {}, "", weight), ips, st.integers(1, 3)
)
few_policies = st.builds(
    AuthorizationPolicy,
    st.sampled_from(["shop", "shop", "bank", ROOT_NAMESPACE]),
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from([Action.ALLOW, Action.DENY]),
    st.none(),
    st.just(()),
)
some = st.one_of(
    services(), endpoints(), endpoints(), endpoints(), few_policies, own_workloads, gateways(), gateways(), routes()
)
changes = st.one_of(
    st.lists(some, min_size=1, max_size=4),
    st.lists(
        st.one_of(some, workloads(), policies, request_authentications(), traffic_policies()), min_size=1, max_size=4
    ),
)


TROUBLES = ("start", "start", "refresh", "back up", "restore", "collect", "wipe", "key")


def name(topic: Topic) -> str:
    return format_topic(TRUST_DOMAIN, topic)


def bodies(truth: Truth, namespace: str, kind: type) -> dict[str, messages.Body]:
    """Topic -> body of a truth's records of one kind, in one namespace."""
    return {
        name(topic): records.write(record)
        for topic, record in truth.records.items()
        if isinstance(topic, kind) and namespace_of(record) == namespace
    }


def keys_of(truth: Truth, kind: type) -> dict[str, object]:
    """Key -> record, of a truth's services or Gateways."""
    return {key(t.namespace, t.name): record for t, record in truth.records.items() if isinstance(t, kind)}


def served(gateway: Gateway | None, every_route: list[HTTPRoute]) -> set[str]:
    """Where a waypoint's Gateway leads."""
    own = set(gateway.services) if gateway is not None else set()
    return own | {
        backend.service
        for route in every_route
        if any(parent.service in own for parent in route.parents)
        for rule in route.rules
        for backend in rule.backends
    }


def _parsed(text: str) -> Topic | None:
    return None if text.endswith("#") else parse_topic(TRUST_DOMAIN, text)


def shard_body(truth: Truth, number: int) -> Mapping[str, object]:
    residents = {ip: truth.residents[ip] for ip in sorted(truth.residents) if address_shard(ip) == number}
    return index.write(index.AddressShard(residents))["addresses"]


def _waypoint() -> plane.Proxy:
    def want(replica):
        replica.want_workload(WP, "wp-1")
        replica.want_waypoint(WAYPOINT)

    return plane.Proxy(want)


class Contract(RuleBasedStateMachine):
    """One uProxy, one waypoint and one node agent at one broker."""

    def __init__(self) -> None:
        super().__init__()
        self.plane = ControlPlane(1_000_000)
        self.uproxy = plane.uproxy(WEB, "web-1")
        self.waypoint = _waypoint()
        self.node = plane.node_agent()
        self.proxies = {"uproxy": self.uproxy, "waypoint": self.waypoint, "node": self.node}
        self.broker = Broker(*self.proxies.values())
        self.floors: dict[tuple[str, str], tuple[int, int]] = {}
        self.newest: dict[str, tuple[int, int]] = {}
        """Topic -> stamp of the newest root or manifest that the uProxy has got."""
        self.snapshots = [(side, None, {}, {}) for side in self.proxies]
        self.backups: list[ControlPlane] = []
        self.shelves: list[dict[str, bytes]] = [{}]
        """What the broker retained once."""
        self.leaving: set[str] = set()
        """Services that were dropped and are still subscribed to."""
        self.was_absent: set[str] = set()
        """Services that the proxy was told not to exist: they come with their root, complete or not."""
        self.disturbed = False
        """Whether somebody has meddled with what a proxy got, so that only reconnecting helps it."""

    @initialize(found=st.lists(some, min_size=4, max_size=12), wanted=st.sets(service_keys, max_size=3))
    def begin(self, found, wanted):
        self.broker.publish(self.plane.start())
        truth = Truth()
        truth.put(Workload("shop", "web-1", "web", WEB, (IpAddress("10.0.0.1"),), {}, {}, "", 1), *found)
        self.broker.publish(self.plane.publish(truth))
        for service in sorted(wanted):
            self._want(service)
        for proxy in self.proxies.values():
            proxy.connect(self.broker.retained)

    # The control plane

    @rule(found=changes, gone=st.lists(st.integers(0, 30), max_size=2), data=st.data())
    def change(self, found, gone, data):
        truth = Truth(dict(self.plane.truth.records), dict(self.plane.truth.residents))
        for number in gone:
            if truth.records:
                del truth.records[list(truth.records)[number % len(truth.records)]]
            if truth.residents:
                del truth.residents[list(truth.residents)[number % len(truth.residents)]]
        truth.put(*found)
        truth.residents |= data.draw(st.dictionaries(ips, residents, max_size=2))
        published = self.plane.publish(truth)
        # A crash in the middle, sometimes: the rest is published by the audit of the next start.
        cut = data.draw(st.sampled_from([False, False, False, True]))
        self.broker.publish(published[: data.draw(st.integers(0, len(published)))] if cut else published)
        self.shelves.append(dict(self.broker.retained))

    @rule(
        what=st.sampled_from(["start", "start", "refresh", "back up", "restore", "collect", "wipe", "key"]),
        number=st.integers(0, 10),
    )
    def trouble(self, what, number):
        """At the control plane or its broker."""
        match what:
            case "start":
                self._start()
            case "refresh":
                self.plane.now += 30
                self.broker.publish(self.plane.refresh())
            case "back up":
                self.backups.append(self.plane.backup())
            case "restore" if self.backups:
                backup = self.backups[number % len(self.backups)].backup()
                backup.now = self.plane.now
                self.disturbed |= backup.signer is not self.plane.signer
                self.plane = backup
                self._start()
            case "collect":
                self.broker.publish(self.plane.collect())
            case "wipe":
                for proxy in self.proxies.values():
                    proxy.disconnect()
                self.broker.retained.clear()
                self.broker.publish(self.plane.audit({}))
            case "key":
                self.disturbed = True  # until the trust arrives, what is signed anew is not known to be newer
                self.broker.publish(self.plane.change_key(number % 3))

    def _start(self):
        self.plane.now += 1000
        self.broker.publish(self.plane.start(self.broker.epoch()))
        self.broker.publish(self.plane.audit(self.broker.retained))

    # The way to a proxy

    @rule(side=sides, count=st.integers(1, 60), jumps=st.lists(st.integers(0, 100), max_size=10))
    def deliver(self, side, count, jumps):
        for number in range(count):
            self._deliver(side, jumps[number] if number < len(jumps) else 0)
        self._follow_on(side)

    @rule(side=sides, seed=st.randoms(use_true_random=False))
    def deliver_shuffled(self, side, seed):
        """All of it, in any order."""
        seed.shuffle(self.proxies[side].queue)
        while self.proxies[side].queue:
            self._deliver(side, 0)
        self._follow_on(side)

    def _follow_on(self, side):
        """Subscribe to what has been learnt to be of interest."""
        proxy = self.proxies[side]
        if proxy.subscribed and proxy.replica.asks_anew:
            proxy.subscribe(self.broker.retained)
            proxy.flush(NOW)
            if side == "uproxy":
                self._forget_leaving()

    def _deliver(self, side, place):
        proxy = self.proxies[side]
        if not proxy.queue:
            return
        place %= len(proxy.queue)
        topic, payload = proxy.queue[place]
        proxy.deliver(NOW, place)
        if side == "uproxy" and payload:
            self._note(topic, payload)

    def _note(self, topic, payload):
        if (topic, payload) not in self.broker.log:
            return
        match parse_topic(TRUST_DOMAIN, topic):
            case RootTopic(namespace):
                wanted = namespace in self._namespaces()
            case ManifestTopic(namespace, service):
                wanted = key(namespace, service) in self.uproxy.replica.services()
            case _:
                return
        if wanted:
            self.newest[topic] = max(self.newest.get(topic, (-1, -1)), messages.decode(payload).stamp)

    @rule(side=sides, number=st.integers(0, 1000), count=st.integers(1, 30), place=st.integers(0, 1000))
    def repeat(self, side, number, count, place):
        """Messages that were published once arrive again, or late."""
        proxy = self.proxies[side]
        number %= len(self.broker.log)
        late = self.broker.log[number : number + count]
        self.disturbed |= any(topic == name(TrustTopic()) for topic, _ in late)
        place %= len(proxy.queue) + 1
        proxy.queue[place:place] = late

    @rule(side=sides, place=st.integers(0, 1000), count=st.integers(1, 5))
    def lose(self, side, place, count):
        """A broker drops messages, and says nothing."""
        queue = self.proxies[side].queue
        place %= len(queue) + 1
        del queue[place : place + count]

    @rule(side=sides, what=st.sampled_from(["now", "now", "before", "off"]), number=st.integers(0, 1000))
    def connect(self, side, what, number):
        """To the broker, or to one that has fallen behind."""
        match what:
            case "now":
                self._connect(side, self.broker.retained)
            case "before":
                self._connect(side, self.shelves[number % len(self.shelves)])
                self.disturbed = True
            case "off":
                self.proxies[side].disconnect()

    def _connect(self, side, retained):
        self.proxies[side].connect(retained)
        if side == "uproxy":
            self._forget_leaving()

    @rule(side=sides, number=st.integers(0, 1000), how=st.integers(0, 6), place=st.integers(0, 1000), data=st.data())
    def forge(self, side, number, how, place, data):
        """Somebody who holds the broker, but no key."""
        self.disturbed = True
        proxy = self.proxies[side]
        topic, payload = self.broker.log[number % len(self.broker.log)]
        envelope = messages.decode(payload)
        # Nothing protects a manifest from one that claims to be newer: until the next epoch, its service is not whole.
        if not isinstance(parse_topic(TRUST_DOMAIN, topic), ManifestTopic) or how == 4:
            newer = replace(envelope, version=envelope.version + data.draw(st.integers(0, 3)))
            other, _ = self.broker.log[data.draw(st.integers(0, 1000)) % len(self.broker.log)]
            match how:
                case 0:
                    payload = messages.encode(newer)
                case 1:
                    payload = messages.encode(replace(newer, body=None))
                case 2:
                    payload = messages.encode(replace(newer, epoch=newer.epoch + 1))
                case 3 if not isinstance(parse_topic(TRUST_DOMAIN, other), ManifestTopic):
                    topic = other
                case 4:
                    payload = payload[: data.draw(st.integers(0, len(payload)))]
                case 5:
                    payload = data.draw(st.binary(max_size=40))
                case 6 if envelope.body is not None:
                    spoilt = dict(envelope.body)
                    spoilt.update(data.draw(st.sampled_from([{"signature": b""}, {"x": 1}, {"labels": {"app": "x"}}])))
                    payload = messages.encode(replace(envelope, body=spoilt))
            proxy.queue.insert(place % (len(proxy.queue) + 1), (topic, payload))

    # The proxy

    @rule(service=service_keys, want=st.sampled_from([True, True, False]), data=st.data())
    def interest(self, service, want, data):
        if want:
            self._want(service)
        else:
            self.leaving |= {service} & set(self.uproxy.replica.services())
            self.uproxy.replica.drop_service(service)
            if data.draw(st.booleans()):
                self._follow()

    def _want(self, service):
        if service not in self.uproxy.replica.services():
            namespace, _, service_name = service.partition("/")
            self.newest.pop(name(ManifestTopic(namespace, service_name)), None)
            if namespace not in self._namespaces():
                self.newest.pop(name(RootTopic(namespace)), None)
        self.leaving.discard(service)
        self.uproxy.replica.want_service(service)
        self._follow()

    @rule(ip=ips)
    def want_address(self, ip):
        self.uproxy.replica.want_address(ip)
        self._follow()

    def _follow(self):
        if self.uproxy.subscribed:
            self.uproxy.subscribe(self.broker.retained)
            self._forget_leaving()

    def _forget_leaving(self):
        self.uproxy.flush(NOW)  # what is dropped goes with the next batch
        self.leaving.clear()
        for topic in list(self.newest):
            match _parsed(topic):
                case RootTopic(namespace) if namespace not in self._namespaces():
                    del self.newest[topic]
        self.was_absent &= set(self.uproxy.replica.services())

    @rule(side=sides)
    def idle(self, side):
        self.proxies[side].idle(NOW)

    @rule(side=sides)
    def dump(self, side):
        roots = self.proxies[side].replica.roots()
        self.snapshots.append((side, self.proxies[side].replica.dump(), roots, dict(self.newest)))

    @rule(number=st.integers(0, 1000))
    def restart(self, number):
        side, snapshot, roots, newest = self.snapshots[number % len(self.snapshots)]
        self.proxies[side].restart(snapshot)
        for owner in list(self.floors):
            if owner[0] == side:
                del self.floors[owner]
        self.floors |= {(side, owner): root[:2] for owner, root in roots.items()}
        if side == "uproxy":
            self.was_absent.clear()
            self.leaving.clear()
            manifests = {t: stamp for t, stamp in newest.items() if isinstance(_parsed(t), ManifestTopic)}
            self.newest = manifests if self.uproxy.replica.based else {}

    # What must hold

    def _namespaces(self):
        wanted = (*self.uproxy.replica.services(), *self.uproxy.replica.gateways())
        return {*OWN_NAMESPACES, *(one.partition("/")[0] for one in wanted)}

    @invariant()
    def never_goes_back(self):
        for side, proxy in self.proxies.items():
            for owner, root in proxy.replica.roots().items():
                assert root[:2] >= self.floors.get((side, owner), (-1, -1))
                self.floors[side, owner] = root[:2]

    @invariant()
    def what_is_listed_was_published_as_a_whole(self):
        self._check_node()
        self._check_waypoint()
        replica, held = self.uproxy.replica, self.uproxy.held
        roots = replica.roots()
        if not replica.based:
            assert not held
            return
        expected: dict[str, messages.Body] = {}
        for namespace in OWN_NAMESPACES:
            truth = self._truth(RootTopic(namespace), roots[namespace])
            expected |= bodies(truth, namespace, PolicyTopic)
            expected |= {topic: body for topic, body in bodies(truth, namespace, WorkloadTopic).items() if topic == OWN}
        for service in {*replica.services(), *self.leaving}:
            namespace, _, service_name = service.partition("/")
            topic = name(ServiceTopic(namespace, service_name))
            status = replica.service_status(service)
            if status is Status.WAITING and topic not in held:
                continue
            record = bodies(self._truth(RootTopic(namespace), roots[namespace]), namespace, ServiceTopic).get(topic)
            if service in self.leaving:
                expected[topic] = record
                continue
            assert (record is None) == (status is Status.ABSENT)
            if record is None:
                self.was_absent.add(service)
            else:
                expected[topic] = record
                assert status is Status.KNOWN or service in self.was_absent or self._lacks_gateway(service)
        self._check_gateways(self.uproxy)
        kinds = (PolicyTopic, WorkloadTopic, ServiceTopic, RouteTopic)
        assert {t: b for t, b in held.items() if isinstance(parse_topic(TRUST_DOMAIN, t), kinds)} == expected
        for topic in held:
            match parse_topic(TRUST_DOMAIN, topic):
                case EndpointTopic(namespace, service, _):
                    assert name(ServiceTopic(namespace, service)) in held
                case AddressesTopic():
                    genuine = [messages.decode(p).body for t, p in self.broker.log if t == topic]
                    assert held[topic] in genuine

    def _lacks_gateway(self, service):
        binding = self.uproxy.state.service(service).binding
        if binding is None:
            return False
        return any(self.uproxy.replica.gateway_status(one) is Status.WAITING for one in binding.gateways)

    def _check_gateways(self, proxy):
        """Whatever is bound leads to its Gateway, which is what the same root says as everything else."""
        replica, state = proxy.replica, proxy.state
        bound = {one for service in state.services() if service.binding is not None for one in service.binding.gateways}
        own = set() if proxy is self.uproxy else {WAYPOINT}
        assert bound - own <= set(replica.gateways())
        if replica.whole:
            assert all(replica.gateway_status(one) is not Status.WAITING for one in replica.gateways())
        for gateway in {*replica.gateways(), *own, *GATEWAYS}:
            namespace = gateway.partition("/")[0]
            status = replica.gateway_status(gateway)
            if status is not Status.WAITING:
                truth = self._truth(RootTopic(namespace), replica.roots()[namespace])
                assert state.gateway(gateway) == keys_of(truth, GatewayTopic).get(gateway)
                assert (state.gateway(gateway) is not None) == (status is Status.KNOWN)
            elif gateway not in replica._gateways:  # else it may be leaving
                assert state.gateway(gateway) is None

    def _check_waypoint(self):
        replica, held, state = self.waypoint.replica, self.waypoint.held, self.waypoint.state
        assert replica.whole == (not replica.waiting())
        if not replica.based:
            assert not held
            return
        self._check_gateways(self.waypoint)
        roots = replica.roots()
        for namespace, root in roots.items():
            truth = self._truth(RootTopic(namespace), root)
            for kind in (PolicyTopic, RequestAuthenticationTopic, TrafficTopic, RouteTopic):
                expected = bodies(truth, namespace, kind)
                found = {
                    t: b for t, b in held.items() if isinstance(p := _parsed(t), kind) and p.namespace == namespace
                }
                assert found == expected
            every_service = keys_of(truth, ServiceTopic)
            for service in replica.services():
                status = replica.service_status(service)
                if service.startswith(f"{namespace}/") and status is not Status.WAITING:
                    assert state.service(service) == every_service.get(service)
                    assert (service in every_service) == (status is Status.KNOWN)
        whole = PolicyTopic | RequestAuthenticationTopic | TrafficTopic | RouteTopic
        assert {t.split("/")[4] for t in held if isinstance(_parsed(t), whole)} <= roots.keys()
        assert set(replica.services()) == served(state.gateway(WAYPOINT), self._routes_held(held))
        if replica.whole:
            assert all(replica.service_status(service) is not Status.WAITING for service in replica.services())

    def _routes_held(self, held):
        topics = {t: _parsed(t) for t in held}
        return [records.read(p, held[t], TRUST_DOMAIN) for t, p in topics.items() if isinstance(p, RouteTopic)]

    def _check_node(self):
        replica, held = self.node.replica, self.node.held
        assert replica.based or not held
        if replica.based:
            truth = self._truth(AddressesRootTopic(), replica.roots()[ADDRESSES])
            numbers = {address_shard(ip) for ip in truth.residents}
            assert {t: b["addresses"] for t, b in held.items()} == {
                name(AddressesTopic(number)): shard_body(truth, number) for number in numbers
            }

    def _truth(self, topic, root):
        return self.plane.history[name(topic), root[:2]]

    @invariant()
    def knows_whether_it_is_whole(self):
        replica = self.uproxy.replica
        assert replica.whole == (not replica.waiting())
        if not replica.whole or self.disturbed:
            return
        for namespace in self._namespaces():
            newest = self.newest.get(name(RootTopic(namespace)), (-1, -1))
            assert replica.roots()[namespace][:2] >= newest
        for service in replica.services():
            if replica.service_status(service) is Status.KNOWN:
                topic = ManifestTopic(*service.split("/"))
                if name(topic) in self.newest:
                    truth = self.plane.history[name(topic), self.newest[name(topic)]]
                    assert self._held_endpoints(service) == self._endpoints(truth, service)

    def _held_endpoints(self, service):
        prefix = f"mesh/v1/{TRUST_DOMAIN}/ep/{service}/"
        return {topic: body for topic, body in self.uproxy.held.items() if topic.startswith(prefix)}

    def _endpoints(self, truth, service):
        namespace, _, service_name = service.partition("/")
        return {
            name(topic): records.write(record)
            for topic, record in truth.records.items()
            if isinstance(topic, EndpointTopic) and (topic.namespace, topic.service) == (namespace, service_name)
        }

    @rule()
    def converges(self):
        """Once the broker has all and delivers it, everybody holds the truth, and says so."""
        self.broker.publish(self.plane.audit(self.broker.retained))
        for side, proxy in self.proxies.items():
            self._connect(side, self.broker.retained)
            while proxy.queue:
                self._deliver(side, 0)
                if not proxy.queue:
                    proxy.idle(NOW)
                    self._follow_on(side)
            proxy.idle(NOW)
        self.disturbed = False
        truth = self.plane.truth
        there = {namespace for namespace in self._namespaces() if name(RootTopic(namespace)) in self.broker.retained}
        replica = self.uproxy.replica
        assert replica.based == there.issuperset(OWN_NAMESPACES)
        if replica.based:
            shards = {topic for topic in replica.filters() if isinstance(_parsed(topic), AddressesTopic)}
            known = shards & self.broker.retained.keys()
            assert replica.whole == (there == self._namespaces() and known == shards), replica.waiting()
            for service in replica.services():
                namespace, _, service_name = service.partition("/")
                exists = ServiceTopic(namespace, service_name) in truth.records
                status = Status.KNOWN if exists else Status.ABSENT if namespace in there else Status.WAITING
                assert replica.service_status(service) is status
                assert self._held_endpoints(service) == (self._endpoints(truth, service) if exists else {})
            for topic in known:
                assert self.uproxy.held[topic]["addresses"] == shard_body(truth, _parsed(topic).shard)
            for owner, root in replica.roots().items():
                then = self._truth(RootTopic(owner), root)
                for kind in (ServiceTopic, PolicyTopic, WorkloadTopic):
                    assert bodies(then, owner, kind) == bodies(truth, owner, kind)
        self._waypoint_converged()
        assert self.node.replica.whole
        assert self._truth(AddressesRootTopic(), self.node.replica.roots()[ADDRESSES]).residents == truth.residents

    def _waypoint_converged(self):
        truth, replica, state = self.plane.truth, self.waypoint.replica, self.waypoint.state
        every_route = [one for t, one in truth.records.items() if isinstance(t, RouteTopic)]
        gateway = keys_of(truth, GatewayTopic).get(WAYPOINT)
        there = {one for one in ("shop", "bank", ROOT_NAMESPACE) if name(RootTopic(one)) in self.broker.retained}
        assert replica.based == there.issuperset(OWN_NAMESPACES)
        if not replica.based:
            return
        assert state.gateway(WAYPOINT) == gateway
        needed = served(gateway, every_route)
        assert set(replica.services()) <= needed, "routes of a namespace that has no root are unknown"
        namespaces = {one.partition("/")[0] for one in (*replica.services(), *replica.gateways())}
        assert replica.whole == namespaces.issubset(there), replica.waiting()
        if replica.whole:
            assert set(replica.services()) == needed
            for service in needed:
                assert state.service(service) == keys_of(truth, ServiceTopic).get(service)
                held = {t: b for t, b in self.waypoint.held.items() if f"/ep/{service}/" in t}
                assert held == (self._endpoints(truth, service) if state.service(service) is not None else {})

    def teardown(self):
        self.converges()


def test_the_contract():
    run_state_machine_as_test(
        Contract,
        settings=settings(
            max_examples=examples(50),
            stateful_step_count=50,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
