"""Record bodies: what is written is read, and what was changed on the way is refused or still a right record."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api import messages
from control.api.address import IpAddress
from control.api.gateway import Gateway, Placement, Traffic
from control.api.identity import make_id
from control.api.messages import Envelope
from control.api.policy import Action, AuthorizationPolicy
from control.api.records import RecordError, read, topic_of, write
from control.api.revocations import Revocations
from control.api.route import (
    NO_MODIFIER,
    Backend,
    HeaderModifier,
    HTTPRoute,
    Match,
    Parent,
    PathKind,
    PathMatch,
    RouteRule,
)
from control.api.workload import Endpoint, Service, Workload
from tests.support.records import TRUST_DOMAIN, records

_WEB = make_id(TRUST_DOMAIN, "shop", "web")
_SERVICE = Service("shop", "web", (IpAddress("240.240.0.1"),), (), {}, (_WEB,))
_WORKLOAD = Workload("shop", "web-1", "web", _WEB, (IpAddress("10.0.0.1"),), {}, {}, "", 1)
_ENDPOINT = Endpoint("shop/web", "shop/web-1", IpAddress("10.0.0.1"), _WEB, {80: 8080}, 1, True, {})
_POLICY = AuthorizationPolicy("shop", "web", Action.ALLOW, None, ())
_GATEWAY = Gateway("shop", "wp", Traffic.SERVICE, (), (), ())
_PLACED = replace(_GATEWAY, placement=Placement.NODE)
_BACKEND = Backend("shop/web", 80, 1, NO_MODIFIER, NO_MODIFIER)
_MATCH = Match(PathMatch(PathKind.PREFIX, "/"), (), (), "")
_RULE = RouteRule("", (_MATCH,), NO_MODIFIER, NO_MODIFIER, (_BACKEND,), 0, 0)
_ROUTE = HTTPRoute("shop", "web", (Parent("shop/web", 0),), (), (_RULE,))
_REVOCATIONS = Revocations("mesh-system", (b"crl",))
_OPTIONAL = {
    *("authorizer", "trustedProxies", "binding", "bounds", "callers", "connections", "direct", "dryRun", "filters"),
    *(
        "loadBalancing",
        "locality",
        "outlierDetection",
        "placement",
        "plaintext",
        "prefersZone",
        "proxyProtocol",
        "targets",
        "upgrades",
    ),
}


_items = st.integers() | st.text(max_size=5) | st.binary(max_size=5)
_lists = st.lists(_items | st.lists(_items, max_size=4), max_size=4) | st.dictionaries(st.text(max_size=5), _items)


@given(records())
def test_a_record_survives_the_wire(record):
    payload = messages.encode(Envelope(1, 1, 0, write(record)))
    assert read(topic_of(record), messages.decode(payload).body, TRUST_DOMAIN) == record


@given(records(), st.data())
def test_a_body_with_a_field_missing_or_added_or_replaced_is_refused_or_canonical(record, data):
    body = write(record)
    field = data.draw(st.sampled_from(sorted(body)))
    without = {name: value for name, value in body.items() if name != field}
    if field not in _OPTIONAL and not (isinstance(record, Endpoint) and field == "node"):
        with pytest.raises(RecordError, match="lacks"):
            read(topic_of(record), without, TRUST_DOMAIN)
    with pytest.raises(RecordError, match="unknown fields: more"):
        read(topic_of(record), {**body, "more": 1}, TRUST_DOMAIN)
    replaced = {
        **body,
        field: data.draw(st.none() | st.booleans() | st.integers() | st.text() | st.binary() | _lists),
    }
    try:
        found = read(topic_of(record), replaced, TRUST_DOMAIN)
    except RecordError:
        return
    assert write(found) == replaced


@given(records(), records())
def test_a_body_on_a_topic_of_another_kind_is_refused(record, other):
    if type(record) is not type(other):
        with pytest.raises(RecordError):
            read(topic_of(other), write(record), TRUST_DOMAIN)


@pytest.mark.parametrize(
    ("record", "field", "value", "problem"),
    [
        (_SERVICE, "vips", ["10.0.0.01"], "not an IP"),
        (_SERVICE, "vips", ["10.0.0.1", "10.0.0.1"], "vips names one twice"),
        (_SERVICE, "ports", [["a", 80, 80, ""], ["b", 80, 81, ""]], "ports names one twice"),
        (_WORKLOAD, "addresses", ["10.0.0.1", "10.0.0.1"], "addresses names one twice"),
        (_ENDPOINT, "ports", [[80, 1], [80, 2]], "ports names one twice"),
        (_SERVICE, "vips", ["::ffff:10.0.0.1"], "must be written '10.0.0.1'"),
        (_SERVICE, "ports", [["http", 0, 80, ""]], "from 1 to 65535"),
        (_SERVICE, "ports", [["http", 80, 65536, ""]], "from 1 to 65535"),
        (_SERVICE, "ports", [["http", True, 80, ""]], "must be int"),
        (_SERVICE, "ports", [["http", 80]], "each must be"),
        (_SERVICE, "labels", {"-": "x"}, "label"),
        (_SERVICE, "labels", {"x": "-"}, "label"),
        (_SERVICE, "labels", {f"l{n}": "" for n in range(65)}, "at most 64"),
        (_SERVICE, "identities", [str(_WEB), str(_WEB)], "in order, each once"),
        (_SERVICE, "identities", [str(_WEB), "spiffe://cluster.local/ns/shop/sa/db"], "in order, each once"),
        (_SERVICE, "identities", ["spiffe://cluster.local/ns/bank/sa/web"], "another namespace"),
        (_SERVICE, "identities", ["spiffe://other.example/ns/shop/sa/web"], "another trust domain"),
        (_SERVICE, "identities", [1], "must be str"),
        (_ENDPOINT, "labels", {"-": "x"}, "label"),
        (_WORKLOAD, "addresses", [], "empty"),
        (_WORKLOAD, "namespace", "Shop", "must be"),
        (_WORKLOAD, "namespace", "elsewhere", "proxy hash"),
        (_WORKLOAD, "service_account", "thief", "proxy hash"),
        (_WORKLOAD, "weight", 0, "from 1"),
        (_WORKLOAD, "ports", {"http": 70000}, "from 1 to 65535"),
        (_ENDPOINT, "identity", "spiffe://other.example/ns/shop/sa/web", "another trust domain"),
        (_ENDPOINT, "identity", "spiffe://cluster.local/ns/elsewhere/sa/web", "another namespace"),
        (_ENDPOINT, "identity", "web", "identity"),
        (_ENDPOINT, "ports", [[80]], "each must be"),
        (_ENDPOINT, "ready", 1, "must be bool"),
        (_POLICY, "action", "LOG", "one of ALLOW, DENY, AUDIT, CUSTOM"),
        (_POLICY, "rules", [{"sources": []}], "must then be absent"),
        (_POLICY, "rules", [{"sources": [{"principals": []}]}], "must then be absent"),
        (_POLICY, "rules", [{"sources": [{"methods": ["GET"]}]}], "unknown fields: methods"),
        (
            _POLICY,
            "rules",
            [{"sources": [{"principals": ["spiffe://a/ns/b/sa/c"]}]}],
            "must be written 'a/ns/b/sa/c'",
        ),
        (_POLICY, "rules", [{"sources": [{"principals": ["web"]}]}], "no principal"),
        (_POLICY, "rules", [{"sources": [{"namespaces": ["a*b"]}]}], "at the beginning or at the end"),
        (_POLICY, "rules", [{"sources": [{"ip_blocks": ["10.0.0.1/8"]}]}], "beyond its prefix"),
        (_POLICY, "rules", [{"sources": [{"ip_blocks": ["10.0.0.1"]}]}], "must be written"),
        (_POLICY, "rules", [{"operations": [{"ports": ["80"]}]}], "must be int"),
        (_POLICY, "rules", [{"conditions": [{"key": "source.ip"}]}], "neither"),
        (_POLICY, "rules", [{"conditions": [{"key": "request.headers[x]", "values": ["y"]}]}], "one of"),
        (_POLICY, "rules", [{"operations": [{"methods": ["GET"]}]}], "there are no targets"),
        (
            _POLICY,
            "rules",
            [{"conditions": [{"key": "request.headers", "name": "x", "values": ["y"]}]}],
            "there are no targets",
        ),
        (_POLICY, "rules", [{"conditions": [{"key": "request.headers", "values": ["y"]}]}], "lacks 'name'"),
        (_POLICY, "rules", [{"conditions": [{"key": "source.ip", "name": "x", "values": ["10.0.0.0/8"]}]}], "name"),
        (_POLICY, "rules", [{"operations": [{"methods": ["get"]}]}], "upper case"),
        (_POLICY, "rules", [{"operations": [{"hosts": ["Shop"]}]}], "must be written 'shop'"),
        (_POLICY, "rules", [{"operations": [{"paths": ["/%41"]}]}], "must be written '/A'"),
        (_POLICY, "targets", [], "must then be absent"),
        (_POLICY, "targets", [["Service", "web"], ["Gateway", "wp"]], "in order, each once"),
        (_POLICY, "targets", [["Service", "a/b"]], "must be 1-63"),
        (_POLICY, "targets", [["Workload", "web"]], "Gateway or Service"),
        (replace(_POLICY, selector={"app": "web"}), "targets", [["Service", "web"]], "beside targets"),
        (_SERVICE, "binding", None, "must be list"),
        (_SERVICE, "binding", ["wp", "waypoint"], "must be namespace/name"),
        (_SERVICE, "binding", ["shop/wp", "direct"], "one of waypoint, preferred, refuse"),
        (_SERVICE, "binding", ["shop/wp"], r"must be \[gateway, via\]"),
        (_WORKLOAD, "bounds", [], "must then be absent"),
        (_WORKLOAD, "direct", False, "must then be absent"),
        (_WORKLOAD, "direct", 1, "direct"),
        (_WORKLOAD, "plaintext", [False, []], "plaintext must be"),
        (_WORKLOAD, "plaintext", [1, [80]], "plaintext must be"),
        (_WORKLOAD, "plaintext", [False, [80, 80]], "in order, each once"),
        (_WORKLOAD, "plaintext", [False, [0]], "from 1 to 65535"),
        (_WORKLOAD, "plaintext", [False, list(range(1, 66))], "at most 64"),
        (_REVOCATIONS, "lists", [], "from 1 to 4"),
        (_REVOCATIONS, "lists", [b"x"] * 5, "from 1 to 4"),
        (_REVOCATIONS, "lists", ["x"], "must be bytes"),
        (_WORKLOAD, "proxyProtocol", [], "must then be absent"),
        (_WORKLOAD, "proxyProtocol", [81, 80], "in order, each once"),
        (_WORKLOAD, "proxyProtocol", [0], "from 1 to 65535"),
        (_WORKLOAD, "bounds", [[80, ["shop/wp"], [], 1]], "must be bool"),
        (_WORKLOAD, "bounds", [[-1, ["shop/wp"], [], True]], "from 0 to 65535"),
        (_WORKLOAD, "bounds", [[80, ["shop/wp"], [], True]] * 2, "in order, each once"),
        (_WORKLOAD, "bounds", [[80, ["shop/wp", "shop/a"], [], True]], "in order, each once"),
        (_WORKLOAD, "bounds", [[80, ["shop/wp"], ["spiffe://other.example/ns/a/sa/b"], True]], "trust domain"),
        (_WORKLOAD, "bounds", [[80, ["shop/wp"], []]], "each must be"),
        (_WORKLOAD, "bounds", [[80, ["shop/wp"], [], True, False]], "each must be"),
        (_WORKLOAD, "bounds", [[80, ["shop/wp"], [], True, 1]], "each must be"),
        (_WORKLOAD, "bounds", [[80, ["shop/wp"], [], True, True, True]], "must be list"),
        (_WORKLOAD, "bounds", [[80, ["shop/wp"], [], True, True, []]], "must then be absent"),
        (_WORKLOAD, "bounds", [[80, ["shop/wp"], [], True, True, [[str(_WEB)]]]], "identity, addresses"),
        (_WORKLOAD, "bounds", [[80, ["shop/wp"], [], True, True, [[str(_WEB), "10.0.0.01"]]]], "not an IP"),
        (_WORKLOAD, "bounds", [[80, ["shop/wp"], [], True, 1, [[str(_WEB), "10.0.0.1"]]]], "must be bool"),
        (_ENDPOINT, "node", "", "must then be absent"),
        (_SERVICE, "binding", ["shop/wp", "waypoint", "a"], "of a workload's own address"),
        (_GATEWAY, "traffic", "everything", "one of service, workload, all, none"),
        (_GATEWAY, "instances", [["wp-1"]], "each must be"),
        (_GATEWAY, "instances", [["wp-1", "10.0.0.1"]] * 2, "in order, each once"),
        (_GATEWAY, "instances", [["wp-1", "10.0.0.1", "", "a", []]], "each must be"),
        (_PLACED, "instances", [["wp-1", "10.0.0.1"]], "each must be"),
        (_PLACED, "instances", [["wp-1", "10.0.0.1", "", "", []]], "node is empty"),
        (_PLACED, "instances", [["wp-1", "10.0.0.1", "web", "a", []]], "an account of its own"),
        (_PLACED, "instances", [["wp-1", "10.0.0.1", "", "a", ["10.0.0.1"]]], "twice"),
        (_PLACED, "placement", "remote", "must then be absent"),
        (_PLACED, "placement", "everywhere", "one of remote, node, service-account"),
        (_GATEWAY, "services", ["shop/web", "shop/db"], "in order, each once"),
        (_GATEWAY, "services", ["shop/1"], "services: '1' must be"),
        (_GATEWAY, "workloads", ["web-1"], "must be namespace/name"),
        (_ROUTE, "parents", [], "empty"),
        (_ROUTE, "parents", [["web", 0], ["web", 0]], "twice"),
        (_ROUTE, "parents", [["web"]], "each must be"),
        (_ROUTE, "hostnames", ["10.0.0.1"], "is an address"),
        (_ROUTE, "hostnames", ["a", "a"], "twice"),
        (_ROUTE, "rules", [], "empty"),
        (
            _POLICY,
            "rules",
            [{"conditions": [{"key": "destination.port", "values": ["080"]}]}],
            "must be written '80'",
        ),
        (_POLICY, "rules", [1], "must be a mapping"),
    ],
)
def test_each_wrong_value_is_refused_by_name(record, field, value, problem):
    with pytest.raises(RecordError, match=problem):
        read(topic_of(record), {**write(record), field: value}, TRUST_DOMAIN)


def _rule_with(**changed):
    return [{**write(_ROUTE)["rules"][0], **changed}]


def _match_with(**changed):
    return _rule_with(matches=[{"path": ["PathPrefix", "/"], **changed}])


def _backend_with(**changed):
    return _rule_with(backends=[{"service": "web", "port": 80, "weight": 1, **changed}])


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        (_rule_with(matches=[]), "matches is empty"),
        (_rule_with(timeout_ms=-1), "from 0"),
        (_rule_with(more=1), "unknown fields: more"),
        (_match_with(path=["Regex", "/"]), "one of Exact, PathPrefix"),
        (_match_with(path=["Exact", "v2"]), "begin with '/'"),
        (_match_with(path=["Exact", "/a//b"]), "empty element"),
        (_match_with(path=["Exact", "/a/../b"]), "segment"),
        (_match_with(path=["Exact", "/a%2fb"]), "%2F"),
        (_match_with(path=["PathPrefix", "/v2/"]), "must be written '/v2'"),
        (_match_with(path=["Exact", "/%7e"]), "must be written '/~'"),
        (_match_with(method=""), "must be one of"),
        (_match_with(method="get"), "must be one of"),
        (_match_with(headers=[]), "must then be absent"),
        (_match_with(headers=[["X", "y"]]), "lower case"),
        (_match_with(headers=[["x", "y\r\n"]]), "no header's value"),
        (_match_with(headers=[["x", "y"], ["x", "z"]]), "twice"),
        (_match_with(query=[["a", "1"], ["a", "2"]]), "twice"),
        (_match_with(query=[["a", ""]]), "1 to 1024"),
        (_match_with(query=[["a"]]), "each must be"),
        (_backend_with(service="Web"), "must be 1-63"),
        (_backend_with(port=0), "from 1"),
        (_backend_with(weight=1_000_001), "from 0 to 1000000"),
        (_backend_with(request={}), "must then be absent"),
        (_backend_with(request={"set": [["host", "x"]]}), "the waypoint's own"),
        (_backend_with(response={"remove": ["x-uproxy-reason"]}), "the waypoint's own"),
        (_backend_with(request={"set": [["x", "1"]], "remove": ["x"]}), "twice"),
        (_rule_with(request={"add": [["x", "1"], ["x", "2"]]}), "twice"),
        ([1], "must be a mapping"),
    ],
)
def test_each_wrong_value_of_a_route_is_refused_by_name(rules, problem):
    with pytest.raises(RecordError, match=problem):
        read(topic_of(_ROUTE), {**write(_ROUTE), "rules": rules}, TRUST_DOMAIN)


def test_the_largest_nesting_fits_in_an_envelope():
    modifier = HeaderModifier(set=(("x", "1"),))
    deep = replace(_ROUTE, rules=(replace(_RULE, backends=(replace(_BACKEND, request=modifier),)),))
    payload = messages.encode(Envelope(1, 1, 0, write(deep)))
    assert read(topic_of(deep), messages.decode(payload).body, TRUST_DOMAIN) == deep


def test_what_is_bound_to_nothing_is_written_as_before_there_were_waypoints():
    assert not _OPTIONAL & (write(_SERVICE).keys() | write(_WORKLOAD).keys() | write(_POLICY).keys())
