"""The chain of decisions, for a mesh with one service behind a waypoint and one that is not."""

from dataclasses import replace

import pytest

from control.api import index, messages, topics
from control.api.address import parse_address
from control.api.balancing import ConsistentHash, HashOf, LoadBalancing, OutlierDetection
from control.api.extension import ExternalAuthorization
from control.api.filters import Filters, Redirect
from control.api.gateway import Binding, Bound, Gateway, Instance, Traffic, Via
from control.api.identity import SpiffeId
from control.api.index import AddressShard, ResidentWorkload
from control.api.jwt import JwtRule, RequestAuthentication
from control.api.messages import Envelope
from control.api.policy import Action, AuthorizationPolicy, Operation, Rule, Source, Target
from control.api.route import (
    NO_MODIFIER,
    Backend,
    HeaderMatch,
    HTTPRoute,
    Match,
    Parent,
    PathKind,
    PathMatch,
    RouteRule,
)
from control.api.topics import AddressesTopic, address_shard
from control.api.traffic import TrafficPolicy
from control.api.workload import Endpoint, Service, ServicePort, Workload
from control.client.state import State
from tests.support.pair import published
from waypoint.why import Question, QuestionError, explain

GATEWAY = "shop/wp"
VIP, DB_VIP = parse_address("240.240.0.1"), parse_address("240.240.0.2")
ADDRESSES = {
    name: parse_address(f"10.0.0.{n}") for n, name in enumerate(["web", "reviews-1", "reviews-2", "db", "wp-1"], 1)
}


def identity(account):
    return SpiffeId.parse(f"spiffe://cluster.local/ns/shop/sa/{account}")


def workload(name, account, bounds=()):
    labels = {"app": account}
    return Workload("shop", name, account, identity(account), (ADDRESSES[name],), labels, {}, "", 1, tuple(bounds))


def service(name, vip, port, **fields):
    return Service("shop", name, (vip,), (port,), {}, (identity(name),), **fields)


def endpoint(service_name, name, ports):
    return Endpoint(f"shop/{service_name}", f"shop/{name}", ADDRESSES[name], identity(service_name), ports, 1, True, {})


def policy(name, action, *rules, **fields):
    return AuthorizationPolicy("shop", name, Action(action), fields.pop("selector", None), rules, **fields)


def route_rule(match, to, name):
    backend = Backend(f"shop/{to}", 80, 1, NO_MODIFIER, NO_MODIFIER)
    return RouteRule(name, (match,), NO_MODIFIER, NO_MODIFIER, (backend,), 0, 0)


BOUND = Bound(8080, (GATEWAY,), (identity("prometheus"),), True)
ROUTE = HTTPRoute(
    "shop",
    "split",
    (Parent("shop/reviews", 0),),
    (),
    (
        route_rule(Match(PathMatch(PathKind.PREFIX, "/v2"), (), (), ""), "reviews-v2", "second"),
        route_rule(Match(PathMatch(PathKind.PREFIX, "/"), (HeaderMatch("x-team", "blue"),), (), ""), "reviews", "blue"),
    ),
)
NO_DELETE = policy(
    "no-delete",
    "DENY",
    Rule(operations=(Operation(methods=("DELETE",)),)),
    targets=(Target("Service", "shop/reviews"),),
)
HTTP = ServicePort("http", 80, 8080, "")


def mesh(*more, via=Via.WAYPOINT, instances=("wp-1",), without=()):
    records = {
        "web": workload("web", "web"),
        "reviews-1": workload("reviews-1", "reviews", [BOUND]),
        "reviews-2": workload("reviews-2", "reviews-v2", [BOUND]),
        "db": workload("db", "db"),
        "wp-1": workload("wp-1", "wp"),
        "reviews": service("reviews", VIP, HTTP, binding=Binding(GATEWAY, via)),
        "reviews-v2": service("reviews-v2", parse_address("240.240.0.3"), HTTP),
        "db-service": service("db", DB_VIP, ServicePort("tcp", 6379, 7000, "")),
        "e1": endpoint("reviews", "reviews-1", {80: 8080}),
        "e2": endpoint("reviews-v2", "reviews-2", {80: 8080}),
        "e3": endpoint("db", "db", {6379: 7000}),
        "gateway": Gateway(
            "shop",
            "wp",
            Traffic.ALL,
            tuple(Instance(f"shop/{name}", ADDRESSES[name]) for name in instances),
            ("shop/reviews",),
            (),
        ),
        "route": ROUTE,
        "no-delete": NO_DELETE,
    }
    state = State("cluster.local")
    kept = [record for name, record in records.items() if name not in without]
    state.apply([published(record, 1) for record in (*kept, *more)])
    return state


def test_a_head_that_the_waypoint_would_not_read_is_refused_as_there():
    for request, said in (
        ({"method": "delete"}, "400: malformed start line"),
        ({"target": "/a b"}, "400: malformed start line"),
        ({"target": "/" + "a" * 20000}, "414: "),
        ({"fields": ((b"host", b"a/b"),)}, "400: malformed Host"),
        ({"fields": ((b"host", b"a"), (b"host", b"b"))}, "400: 2 Host fields"),
        ({"fields": ((b"x_forwarded_for", b"10.0.0.1"),)}, "400: the field x_forwarded_for"),
        ({"fields": ((b"upgrade", b"websocket"),)}, "501: "),
        ({"fields": ((b"x", b"a\r\nx-team: blue"),)}, "400: a line end"),
        ({"fields": ((b"x", b"a\nx-team: blue"),)}, "400: malformed header field"),
        ({"fields": ((b"transfer-encoding", b"gzip"),)}, "400: a Transfer-Encoding"),
    ):
        *_, last = ask(mesh(), **request)
        assert (last.stage, last.ok, last.reason) == ("waypoint", False, "bad-request")
        assert last.detail.startswith(said), last.detail


def test_what_holds_between_two_peers_only_is_not_seen_by_routes():
    one_hop = (b"connection", b"x-team"), (b"x-team", b"blue")
    assert stages(ask(mesh(), fields=one_hop[1:]))[4] == ("route", True)
    assert stages(ask(mesh(), fields=one_hop))[4] == ("route", "no-route")


def test_an_address_that_is_dialled_is_the_host():
    assert all(step.ok for step in ask(mesh(), host=str(VIP), target="/v2"))


def test_how_far_a_binding_is_is_said():
    pending = mesh(service("reviews", VIP, HTTP), without=("reviews",))
    told = {("Service", "shop/reviews"): "its binding to waypoint shop/wp is pending"}
    steps = explain(pending, Question("shop/web", "reviews", 80), told)
    assert steps[2].detail.startswith("directly")
    assert steps[2].detail.endswith("; its binding to waypoint shop/wp is pending")
    assert "pending" not in ask(pending)[2].detail
    through = explain(mesh(), Question("shop/web", "reviews", 80), told)
    assert through[2].detail.endswith("; its binding to waypoint shop/wp is pending")


def ask(state, host="reviews", port=80, caller="shop/web", **request):
    return explain(state, Question(caller, host, port, **request))


def stages(steps):
    return [(step.stage, step.reason or step.ok) for step in steps]


def test_a_service_without_binding_is_reached_directly():
    steps = ask(mesh(), "db", 6379)
    assert stages(steps) == [("capture", True), ("resolve", True), ("binding", True), ("destination", True)]
    assert "directly" in steps[2].detail
    assert "shop/db (10.0.0.4:7000)" in steps[3].detail


def test_the_destinations_policy_is_told():
    only_reviews = policy("only-reviews", "ALLOW", Rule((Source(namespaces=("other",)),)), selector={"app": "db"})
    steps = ask(mesh(only_reviews), "db", 6379)
    assert stages(steps)[-1] == ("destination", "policy")
    assert "no ALLOW policy matched (shop/only-reviews)" in steps[-1].detail


def test_a_bound_service_is_reached_through_its_waypoint():
    steps = ask(mesh(), target="/v2/items")
    assert stages(steps) == [
        (stage, True) for stage in ("capture", "resolve", "binding", "waypoint policy", "route", "destination")
    ]
    assert "through waypoint shop/wp, run by shop/wp-1" in steps[2].detail
    assert "GET /v2/items: rule second shop/reviews-v2:80 (100 %)" in steps[4].detail
    assert "shop/reviews-2 (10.0.0.3:8080)" in steps[5].detail


def test_a_header_takes_another_route():
    steps = ask(mesh(), fields=((b"x-team", b"blue"),))
    assert "rule blue shop/reviews:80" in steps[4].detail


def test_a_redirect_ends_at_the_waypoint():
    elsewhere = replace(
        ROUTE,
        name="elsewhere",
        rules=(
            RouteRule(
                "old",
                (Match(PathMatch(PathKind.PREFIX, "/old"), (), (), ""),),
                NO_MODIFIER,
                NO_MODIFIER,
                (),
                0,
                0,
                Filters(redirect=Redirect(hostname="example.org")),
            ),
        ),
    )
    last = explain(mesh(elsewhere), Question("shop/web", "reviews", 80, target="/old/x?q"))[-1]
    assert (last.ok, last.detail) == (True, "GET /old/x?q: rule old 302 http://example.org/old/x?q")


def test_a_backend_that_no_grant_lets_it_send_to():
    first, *rest = ROUTE.rules
    abroad = replace(first, backends=(replace(first.backends[0], service="bank/reviews", refused=True),))
    last = ask(mesh(replace(ROUTE, name="abroad", rules=(abroad, *rest))), target="/v2")[-1]
    assert (last.stage, last.ok, last.reason) == ("route", False, "no-backend")
    assert last.detail == "GET /v2: 500, no ReferenceGrant lets rule second send to bank/reviews"


def test_a_route_of_the_callers_namespace_stands_instead():
    theirs = replace(ROUTE, name="shop.theirs", callers="shop", rules=(replace(ROUTE.rules[0], name="theirs"),))
    others = replace(ROUTE, name="bank.theirs", callers="bank", rules=(replace(ROUTE.rules[0], name="others"),))
    assert "rule theirs shop/reviews-v2:80" in ask(mesh(theirs, others), target="/v2")[4].detail
    assert stages(ask(mesh(theirs), fields=((b"x-team", b"blue"),)))[-1] == ("route", "no-route")
    assert "rule second shop/reviews-v2:80" in ask(mesh(others), target="/v2")[4].detail


def test_no_route():
    assert stages(ask(mesh()))[-1] == ("route", "no-route")


def test_an_l7_policy():
    steps = ask(mesh(), method="DELETE", target="/v2")
    assert stages(steps)[-1] == ("waypoint policy", "policy")
    assert "DELETE /v2: denied by shop/no-delete[0]" in steps[-1].detail


def test_policies_in_dry_run_are_told_where_they_would_change_the_answer():
    at_waypoint = policy("dry", "DENY", Rule(), targets=(Target("Service", "shop/reviews"),), dry_run=True)
    at_destination = policy("dry-too", "DENY", Rule(), dry_run=True)
    steps = ask(mesh(at_waypoint, at_destination), target="/v2")
    assert all(step.ok for step in steps)
    told = {step.stage: step.detail for step in steps}
    for stage, name in (("waypoint policy", "dry"), ("destination", "dry-too")):
        assert told[stage].endswith(f"; with policies in dry run it would be denied: denied by shop/{name}[0]")
    assert "dry run" not in str(ask(mesh(), target="/v2"))


def test_who_else_is_asked():
    post = Rule(operations=(Operation(methods=("POST",)),))
    custom = policy("ask", "CUSTOM", post, targets=(Target("Service", "shop/reviews"),))
    named = replace(custom, authorizer=ExternalAuthorization("shop/authz", 8000, 100))
    steps = ask(mesh(named), method="POST", target="/v2")
    (told,) = [step.detail for step in steps if step.stage == "waypoint external authorization"]
    assert told == "POST /v2: by shop/ask[0] Service shop/authz:8000 is asked, and must answer 200"
    assert stages(steps)[-1] == ("destination", True)
    assert "external" not in str(ask(mesh(named), target="/v2"))
    steps = ask(mesh(custom), method="POST", target="/v2")
    assert stages(steps)[-1] == ("waypoint external authorization", "policy")
    assert "nobody can be asked" in steps[-1].detail


def test_an_end_users_token():
    of_reviews = (Target("Service", "shop/reviews"),)
    tokens = RequestAuthentication("shop", "tokens", of_reviews, (JwtRule("accounts", '{"keys":[]}'),))
    anybody = Rule((Source(request_principals=("*",)),))
    steps = ask(mesh(tokens), target="/v2", fields=((b"authorization", b"Bearer nonsense"),))
    assert stages(steps)[-1] == ("waypoint token", "token")
    assert "Header.Payload.Signature" in steps[-1].detail
    assert stages(ask(mesh(tokens), target="/v2"))[-1] == ("destination", True)
    steps = ask(mesh(tokens, policy("users", "ALLOW", anybody, targets=of_reviews)), target="/v2")
    assert stages(steps)[-1] == ("waypoint policy", "policy")


def test_a_policy_of_the_whole_waypoint():
    nobody = policy("nobody", "ALLOW", targets=(Target("Gateway", GATEWAY),))
    steps = ask(mesh(nobody), target="/v2")
    assert stages(steps)[-1] == ("waypoint policy", "policy")
    assert "no ALLOW policy matched (shop/nobody)" in steps[-1].detail


def test_what_would_be_answered_with_400():
    assert stages(ask(mesh(), target="/a%2fb"))[-1] == ("waypoint", "bad-request")


def test_the_caller_is_judged_at_the_destination_too():
    not_web = policy("not-web", "DENY", Rule((Source(principals=("*/sa/web",)),)), selector={"app": "reviews-v2"})
    steps = ask(mesh(not_web), target="/v2")
    assert stages(steps)[-1] == ("destination", "policy")
    only_web = policy("only-web", "ALLOW", Rule((Source(principals=("*/sa/web",)),)), selector={"app": "reviews-v2"})
    assert all(step.ok for step in ask(mesh(only_web), target="/v2"))


@pytest.mark.parametrize(
    ("via", "instances", "last"),
    [
        (Via.REFUSE, ("wp-1",), ("binding", "waypoint-not-ready")),
        (Via.WAYPOINT, (), ("binding", "no-waypoint")),
        (Via.PREFERRED, (), ("destination", "waypoint-required")),  # its destination still demands it
    ],
)
def test_a_waypoint_that_is_not_there(via, instances, last):
    assert stages(ask(mesh(via=via, instances=instances)))[-1] == last


def test_a_caller_whose_configuration_is_old():
    """Without its binding the service is dialled directly, and the destination refuses by its own name."""
    state = mesh(without=("reviews",))
    state.apply([published(service("reviews", VIP, HTTP), 2)])
    assert stages(ask(state))[-1] == ("destination", "waypoint-required")
    exempt = replace(workload("web", "web"), service_account="prometheus", identity=identity("prometheus"))
    state.apply([published(exempt, 3)])
    assert stages(ask(state))[-1] == ("destination", True)


def test_the_address_of_a_workload_that_is_bound():
    state = mesh()
    address = ADDRESSES["reviews-1"]
    resident = ResidentWorkload("shop", "reviews-1", "reviews", {}, ((8080, Binding(GATEWAY, Via.WAYPOINT)),))
    shard = AddressesTopic(address_shard(address))
    body = index.write(AddressShard({address: resident}))
    state.apply([(topics.format_topic("cluster.local", shard), messages.encode(Envelope(1, 1, 1_800_000_000, body)))])
    assert stages(ask(state, "shop/reviews-1", 8080))[-2:] == [("waypoint policy", True), ("destination", True)]
    assert stages(ask(state, address, 8080, method="DELETE"))[-1] == ("waypoint policy", "policy")


@pytest.mark.parametrize(
    ("host", "port", "last"),
    [
        ("10.9.9.9", 80, ("capture", "no-config")),
        ("reviews", 81, ("resolve", "no-config")),
        ("db.shop.svc.cluster.local", 6379, ("destination", True)),
        ("DB.shop", 6379, ("destination", True)),
        ("shop/db", 7000, ("destination", True)),
        ("shop/db", 15000, ("destination", "port-forbidden")),
    ],
)
def test_destinations(host, port, last):
    assert stages(ask(mesh(), host, port))[-1] == last


def test_a_service_without_endpoints():
    assert stages(ask(mesh(without=("e3",)), "db", 6379))[-1] == ("resolve", "no-endpoint")
    assert stages(ask(mesh(without=("e2",)), target="/v2"))[-1] == ("destination", "no-endpoint")


@pytest.mark.parametrize(("caller", "host"), [("shop/nobody", "reviews"), ("shop/web", "nobody"), ("shop/web", "a/b")])
def test_what_is_not_there_is_named(caller, host):
    with pytest.raises(QuestionError, match=r"nobody|a/b"):
        ask(mesh(), host, caller=caller)


def test_how_endpoints_are_chosen_is_told_where_something_says_it():
    target = (Target("Gateway", GATEWAY),)
    near = LoadBalancing(hash=ConsistentHash(HashOf.HEADER, "x-user"), local=True)
    blue = {"fields": ((b"x-team", b"blue"),)}

    def told(*more):
        return [step.detail for step in ask(mesh(*more), **blue) if step.stage == "balancing"]

    assert not told()
    assert told(TrafficPolicy("shop", "a", target, load_balancing=near)) == [
        "shop/reviews: by httpHeaderName x-user, the nearest first"
    ]
    assert told(TrafficPolicy("shop", "a", target, outlier_detection=OutlierDetection())) == [
        "shop/reviews: at random, without those that fail"
    ]
    own = TrafficPolicy("shop", "b", (Target("Service", "shop/reviews"),), load_balancing=LoadBalancing())
    assert told(TrafficPolicy("shop", "a", target, load_balancing=near), own) == ["shop/reviews: LEAST_REQUEST"]
