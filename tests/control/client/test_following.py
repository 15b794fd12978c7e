"""Where known things lead: from bound services to their Gateways, from a waypoint's Gateway to all that it serves."""

from __future__ import annotations

import dataclasses

import pytest

from control.api import messages, records
from control.api.address import IpAddress
from control.api.extension import ExternalAuthorization
from control.api.filters import Filters, Mirror
from control.api.gateway import Binding, Gateway, Instance, Traffic, Via
from control.api.identity import make_id, proxy_hash
from control.api.policy import Action, AuthorizationPolicy, Target
from control.api.route import NO_MODIFIER, Backend, HTTPRoute, Match, Parent, PathKind, PathMatch, RouteRule
from control.api.topics import (
    GatewayTopic,
    ManifestTopic,
    RootTopic,
    RouteTopic,
    ServiceTopic,
    format_topic,
    index_entry,
    index_shard,
)
from control.api.workload import Endpoint, Service, ServicePort, Workload
from control.client.following import Following
from control.client.replica import Status
from tests.support import plane
from tests.support.plane import NOW, Broker, ControlPlane, Truth
from tests.support.records import TRUST_DOMAIN

WEB = make_id(TRUST_DOMAIN, "shop", "web")
WP = make_id(TRUST_DOMAIN, "shop", "wp")
TO_WP = Binding("shop/wp", Via.WAYPOINT)
PREFIX = f"mesh/v1/{TRUST_DOMAIN}/"


def name(topic):
    return format_topic(TRUST_DOMAIN, topic)


def service(key="shop/reviews", binding=None):
    namespace, _, own = key.partition("/")
    vip, ports = IpAddress("240.240.0.1"), (ServicePort("http", 80, 8080, ""),)
    return Service(namespace, own, (vip,), ports, {}, (make_id(TRUST_DOMAIN, namespace, "web"),), binding)


def endpoint(key="shop/reviews", workload="web-1"):
    namespace = key.partition("/")[0]
    identity = make_id(TRUST_DOMAIN, namespace, "web")
    return Endpoint(key, f"{namespace}/{workload}", IpAddress("10.0.0.1"), identity, {80: 8080}, 1, True, {})


def gateway(*services, key="shop/wp"):
    namespace, _, own = key.partition("/")
    instances = (Instance(f"{namespace}/{own}-1", IpAddress("10.0.0.9")),)
    return Gateway(namespace, own, Traffic.SERVICE, instances, tuple(sorted(services)), ())


def route(own, parent, *backends, namespace="shop"):
    rule = RouteRule(
        name="",
        matches=(Match(PathMatch(PathKind.PREFIX, "/"), (), (), ""),),
        request=NO_MODIFIER,
        response=NO_MODIFIER,
        backends=tuple(Backend(f"{namespace}/{one}", 80, 1, NO_MODIFIER, NO_MODIFIER) for one in backends),
        timeout_ms=0,
        backend_timeout_ms=0,
    )
    return HTTPRoute(namespace, own, (Parent(f"{namespace}/{parent}", 0),), (), (rule,))


def policy(own, namespace="shop", targets=(), asked=""):
    """`asked`: key of the service that a CUSTOM one has asked."""
    if not asked:
        return AuthorizationPolicy(namespace, own, Action.DENY, None, (), targets)
    return AuthorizationPolicy(
        namespace, own, Action.CUSTOM, None, (), targets, authorizer=ExternalAuthorization(asked, 80, 1000)
    )


def workload(identity, instance):
    address = IpAddress("10.0.0.9")
    return Workload(
        identity.namespace, instance, identity.service_account, identity, (address,), {}, {}, "", 1, bounds=()
    )


class Mesh:
    """A control plane, its broker and one proxy that follows its own interests at once."""

    def __init__(self, proxy):
        self.plane, self.proxy, self.truth = ControlPlane(int(NOW)), proxy, Truth()
        self.broker = Broker(proxy)
        self.replica = proxy.replica
        self.broker.publish(self.plane.start())
        self.put(workload(WEB, "web-1"), workload(WP, "wp-1"))

    def put(self, *found):
        self.truth.put(*found)
        self.broker.publish(self.plane.publish(self.truth))

    def remove(self, *topics):
        for topic in topics:
            del self.truth.records[topic]
        self.broker.publish(self.plane.publish(self.truth))

    def up(self):
        self.proxy.connect(self.broker.retained)
        self.settle()
        return self

    def settle(self):
        self.proxy.deliver_all(NOW)
        while self.replica.asks_anew:
            self.proxy.subscribe(self.broker.retained)
            self.proxy.flush(NOW)
            self.proxy.deliver_all(NOW)

    def want(self, *keys):
        for key in keys:
            self.replica.want_service(key)
        self.proxy.subscribe(self.broker.retained)
        self.proxy.flush(NOW)  # what is dropped goes with the next batch
        self.settle()

    def held(self, kind):
        return {topic.removeprefix(f"{PREFIX}{kind}/") for topic in self.proxy.held if f"/{kind}/" in topic}

    def filters(self):
        return {one.removeprefix(PREFIX) for one in self.replica.filters()}

    def restart(self):
        self.proxy.restart(self.replica.dump())
        self.replica = self.proxy.replica


@pytest.fixture
def mesh():
    return Mesh(plane.uproxy(WEB, "web-1"))


@pytest.fixture
def waypoint():
    def want(replica):
        replica.want_workload(WP, "wp-1")
        replica.want_waypoint("shop/wp")

    return Mesh(plane.Proxy(want))


# A caller


def test_a_caller_has_the_gateway_of_what_it_dials(mesh):
    mesh.put(service(binding=TO_WP), endpoint(), gateway("shop/reviews"))
    mesh.up()
    assert mesh.held("gw") == set()
    mesh.want("shop/reviews")
    assert mesh.held("gw") == {"shop/wp"}
    assert mesh.proxy.state.gateway("shop/wp") == gateway("shop/reviews")
    assert mesh.replica.whole
    assert mesh.replica.service_status("shop/reviews") is Status.KNOWN
    assert mesh.replica.gateways() == ("shop/wp",)


def test_a_flip_is_known_when_the_gateway_is(mesh):
    mesh.put(service(), endpoint(), gateway("shop/reviews"))
    mesh.up().want("shop/reviews")
    mesh.put(service(binding=TO_WP))
    mesh.proxy.deliver_all(NOW)
    assert mesh.proxy.state.service("shop/reviews").binding == TO_WP
    assert mesh.replica.asks_anew
    assert mesh.replica.service_status("shop/reviews") is Status.WAITING
    assert mesh.replica.waiting() == ("gw/shop/wp",)
    assert "gw/shop/wp" in mesh.filters()
    mesh.proxy.subscribe(mesh.broker.retained)
    mesh.settle()
    assert mesh.replica.service_status("shop/reviews") is Status.KNOWN
    assert mesh.replica.whole
    mesh.put(service())
    mesh.settle()
    assert mesh.held("gw") == set()
    assert mesh.replica.gateways() == ()
    assert "gw/shop/wp" not in mesh.filters()


def test_a_gateway_of_another_namespace_comes_and_goes_with_its_last_service(mesh):
    other = Binding("infra/wp", Via.PREFERRED)
    mesh.put(service(binding=other), service("shop/db", binding=other), gateway(key="infra/wp"))
    mesh.put(gateway(key="infra/unused"), policy("a", "infra"), route("r", "x", "y", namespace="infra"))
    mesh.up().want("shop/reviews", "shop/db")
    shard = index_shard(index_entry(GatewayTopic("infra", "wp")))
    assert {one for one in mesh.filters() if "infra" in one} == {
        "gw/infra/wp",
        "root/infra",
        f"index/infra/{shard:02x}",
    }
    assert mesh.held("gw") == {"infra/wp"}
    assert mesh.held("policy") == mesh.held("route") == set(), "none of a caller's business"
    for dropped, left in (("shop/db", {"infra/wp"}), ("shop/reviews", set())):
        mesh.replica.drop_service(dropped)
        mesh.want()
        assert mesh.held("gw") == left
    assert not any("infra" in one for one in mesh.filters())
    assert mesh.replica.whole


def test_a_gateway_that_is_not_there_is_known_not_to_be(mesh):
    mesh.put(service(binding=TO_WP), endpoint())
    mesh.up().want("shop/reviews")
    assert mesh.replica.gateway_status("shop/wp") is Status.ABSENT
    assert mesh.replica.service_status("shop/reviews") is Status.KNOWN
    assert mesh.replica.whole
    mesh.put(gateway())
    mesh.settle()
    assert mesh.proxy.state.gateway("shop/wp") == gateway()


def test_a_gateway_may_be_asked_for_by_itself(mesh):
    mesh.put(gateway(key="infra/wp"), service(binding=Binding("infra/wp", Via.WAYPOINT)))
    mesh.up()
    assert mesh.replica.gateway_status("infra/wp") is Status.WAITING
    mesh.replica.want_gateway("infra/wp")
    mesh.want("shop/reviews")
    assert mesh.held("gw") == {"infra/wp"}
    mesh.replica.drop_gateway("infra/wp")
    mesh.want()
    assert mesh.held("gw") == {"infra/wp"}, "a service is bound to it"
    mesh.replica.want_gateway("infra/wp")
    mesh.replica.drop_service("shop/reviews")
    mesh.want()
    assert mesh.held("gw") == {"infra/wp"}, "it was asked for"
    mesh.replica.drop_gateway("infra/wp")
    mesh.want()
    assert mesh.held("gw") == set()


@pytest.mark.parametrize("key", ["", "shop", "shop/", "/wp", "shop/a/b", "Shop/wp", "shop/+", "#", "a/#"])
def test_what_is_no_gateway_is_not_asked_for(mesh, waypoint, key):
    before = mesh.replica.filters()
    mesh.replica.want_gateway(key)
    assert mesh.replica.filters() == before
    assert mesh.replica.gateway_status(key) is Status.WAITING
    with pytest.raises(ValueError, match="no Gateway"):
        waypoint.replica.want_waypoint(key)


def test_a_waypoint_s_gateway_is_of_its_own_namespace(mesh):
    with pytest.raises(ValueError, match="'infra/wp' is no Gateway of this workload's namespace"):
        mesh.replica.want_waypoint("infra/wp")


def test_a_caller_starts_from_its_snapshot_alone(mesh):
    mesh.put(service(binding=Binding("infra/wp", Via.WAYPOINT)), endpoint(), gateway(key="infra/wp"))
    mesh.up().want("shop/reviews")
    held = dict(mesh.proxy.held)
    mesh.restart()
    assert mesh.proxy.held == held
    assert mesh.replica.service_status("shop/reviews") is Status.KNOWN
    assert mesh.replica.gateways() == ("infra/wp",)
    mesh.up()
    assert mesh.replica.whole
    assert mesh.proxy.held == held


def test_an_altered_gateway_is_refused(mesh):
    mesh.put(service(binding=TO_WP), endpoint(), gateway("shop/reviews"))
    mesh.up().want("shop/reviews")
    held = dict(mesh.proxy.held)
    payload = mesh.broker.retained[name(GatewayTopic("shop", "wp"))]
    envelope = messages.decode(payload)
    thief = dataclasses.replace(gateway(), instances=(Instance("shop/thief", IpAddress("10.6.6.6")),))
    for forged, how in (
        (dataclasses.replace(envelope, body=records.write(thief)), "altered"),
        (dataclasses.replace(envelope, body={**envelope.body, "x": 1}), "malformed"),
        (dataclasses.replace(envelope, version=0, epoch=1), "replayed"),
    ):
        mesh.proxy.queue.append((name(GatewayTopic("shop", "wp")), messages.encode(forged)))
        mesh.settle()
        assert mesh.proxy.held == held
        assert any(text.startswith("gw/shop/wp") and how in text for text in mesh.replica.problems()), how
    assert mesh.replica.whole


# A waypoint


def serve_two_namespaces(mesh):
    mesh.put(
        gateway("shop/reviews", "bank/db"),
        *(service(key) for key in ("shop/reviews", "shop/v2", "shop/other", "bank/db", "bank/x")),
        *(endpoint(key) for key in ("shop/reviews", "shop/v2", "shop/other", "bank/db")),
        route("canary", "reviews", "reviews", "v2"),
        route("elsewhere", "other", "x"),
        route("r", "x", "x", namespace="bank"),
        policy("a", targets=(Target("Gateway", "shop/wp"),)),
        policy("b", "bank", targets=(Target("Service", "bank/db"),)),
        policy("c", plane.ROOT_NAMESPACE),
        policy("d", "infra"),
    )


def test_a_waypoint_follows_its_gateway(waypoint):
    serve_two_namespaces(waypoint)
    waypoint.up()
    assert waypoint.held("gw") == {"shop/wp"}
    assert waypoint.held("svc") == {"shop/reviews", "shop/v2", "bank/db"}
    assert waypoint.held("ep") == {"shop/reviews/web-1", "shop/v2/web-1", "bank/db/web-1"}
    assert waypoint.held("route") == {"shop/canary", "shop/elsewhere", "bank/r"}
    assert waypoint.held("policy") == {"shop/a", "bank/b", f"{plane.ROOT_NAMESPACE}/c"}
    assert waypoint.held("wl") == {f"{proxy_hash(WP)}/wp-1"}
    assert waypoint.replica.whole
    state = waypoint.proxy.state
    assert [one.name for one in state.routes_for("shop/reviews")] == ["canary"]
    assert [one.name for one in state.policies_targeting("Gateway", "shop/wp")] == ["a"]
    assert [one.name for one in state.policies_targeting("Service", "bank/db")] == ["b"]


def test_a_waypoint_is_not_whole_before_all_of_it_is_there(waypoint):
    serve_two_namespaces(waypoint)
    waypoint.put(route("r", "db", "x", namespace="bank"))
    needed = [
        name(topic)
        for topic in (
            GatewayTopic("shop", "wp"),
            ServiceTopic("bank", "db"),
            ManifestTopic("bank", "db"),
            RootTopic("bank"),
            RouteTopic("bank", "r"),
            ServiceTopic("bank", "x"),
        )
    ]
    everything = dict(waypoint.broker.retained)
    for one in needed:
        waypoint.proxy.restart(None)
        waypoint.replica = waypoint.proxy.replica
        waypoint.broker.retained = {topic: payload for topic, payload in everything.items() if topic != one}
        waypoint.up()
        assert not waypoint.replica.whole, one
        waypoint.proxy.queue.append((one, everything[one]))
        waypoint.broker.retained = everything
        waypoint.settle()
        assert waypoint.replica.whole, (one, waypoint.replica.waiting())


def test_a_service_that_the_gateway_takes_on_unsettles_it_at_once(waypoint):
    """Whoever reports this root as applied, and everything as whole, has the service too."""
    waypoint.put(gateway(), service(), endpoint())
    waypoint.up()
    waypoint.put(gateway("shop/reviews"))
    while waypoint.proxy.queue:
        waypoint.proxy.deliver(NOW)
        waypoint.proxy.idle(NOW)
        served = waypoint.proxy.state.gateway("shop/wp").services
        assert waypoint.replica.whole <= all(waypoint.proxy.state.service(one) is not None for one in served)
    assert waypoint.proxy.state.gateway("shop/wp").services == ("shop/reviews",)
    assert not waypoint.replica.whole
    waypoint.settle()
    assert waypoint.replica.whole


def test_a_waypoint_lets_go_of_what_it_no_longer_serves(waypoint):
    serve_two_namespaces(waypoint)
    waypoint.up()
    waypoint.put(route("canary", "reviews", "reviews"))
    waypoint.settle()
    assert waypoint.held("svc") == {"shop/reviews", "bank/db"}
    waypoint.put(gateway("shop/reviews"))
    waypoint.settle()
    assert waypoint.held("svc") == {"shop/reviews"}
    assert waypoint.held("route") == {"shop/canary", "shop/elsewhere"}
    assert waypoint.held("policy") == {"shop/a", f"{plane.ROOT_NAMESPACE}/c"}
    assert not any("bank" in one for one in waypoint.filters())
    waypoint.remove(GatewayTopic("shop", "wp"))
    waypoint.settle()
    assert waypoint.held("gw") == waypoint.held("svc") == waypoint.held("ep") == set()
    assert waypoint.replica.gateway_status("shop/wp") is Status.ABSENT
    assert waypoint.replica.whole
    serve_two_namespaces(waypoint)
    waypoint.settle()
    assert waypoint.held("svc") == {"shop/reviews", "shop/v2", "bank/db"}


def test_a_waypoint_starts_from_its_snapshot_alone_and_goes_on_following(waypoint):
    serve_two_namespaces(waypoint)
    waypoint.up()
    held = dict(waypoint.proxy.held)
    waypoint.restart()
    assert waypoint.proxy.held == held
    assert waypoint.replica.whole
    waypoint.proxy.restart(waypoint.replica.dump())
    waypoint.replica = waypoint.proxy.replica
    waypoint.put(gateway("shop/reviews"))
    waypoint.up()
    assert waypoint.held("svc") == {"shop/reviews", "shop/v2"}
    assert waypoint.replica.whole


def test_a_service_that_is_served_and_bound_needs_no_other_gateway(waypoint):
    waypoint.put(gateway("shop/reviews"), service(binding=TO_WP), endpoint())
    waypoint.up()
    assert waypoint.replica.service_status("shop/reviews") is Status.KNOWN
    assert waypoint.replica.gateways() == ()
    waypoint.replica.want_gateway("shop/wp")
    assert waypoint.replica.gateways() == ()


def test_a_waypoint_follows_its_routes_to_mirrors_too():
    waypoint = GatewayTopic("shop", "wp")
    following = Following(waypoint)
    following.note(waypoint, gateway("shop/reviews"))
    made = route("r", "reviews", "v2")
    copied = dataclasses.replace(made.rules[0], filters=Filters(mirrors=(Mirror("shop/copy", 80, 1, 1),)))
    following.note(RouteTopic("shop", "r"), dataclasses.replace(made, rules=(copied,)))
    assert following.wanted() == {ServiceTopic("shop", one) for one in ("reviews", "v2", "copy")}


def test_a_waypoint_has_whom_it_asks(waypoint):
    def held_with(*targets):
        waypoint.put(policy("p", targets=targets, asked="bank/authz"))
        waypoint.settle()
        return waypoint.held("svc"), waypoint.held("ep")

    waypoint.put(gateway("shop/reviews"), service(), service("bank/authz"), endpoint("bank/authz"))
    waypoint.up()
    both = {"shop/reviews", "bank/authz"}, {"bank/authz/web-1"}
    assert held_with(Target("Service", "shop/reviews")) == both
    assert held_with(Target("Service", "shop/db")) == ({"shop/reviews"}, set()), "nobody asks that here"
    assert held_with(Target("Gateway", "shop/wp"), Target("Service", "shop/db")) == both
    assert waypoint.replica.whole
    waypoint.put(policy("p", targets=(Target("Gateway", "shop/wp"),)))
    waypoint.settle()
    assert waypoint.held("svc") == {"shop/reviews"}
