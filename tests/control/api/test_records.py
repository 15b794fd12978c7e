"""Record bodies: what is written is read, and what was changed on the way is refused or still a right record."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api import messages
from control.api.address import IpAddress
from control.api.identity import make_id
from control.api.messages import Envelope
from control.api.policy import Action, AuthorizationPolicy
from control.api.records import RecordError, read, topic_of, write
from control.api.workload import Endpoint, Service, Workload
from tests.support.records import TRUST_DOMAIN, records

_WEB = make_id(TRUST_DOMAIN, "shop", "web")
_SERVICE = Service("shop", "web", (IpAddress("240.240.0.1"),), (), {}, (_WEB,))
_WORKLOAD = Workload("shop", "web-1", "web", _WEB, (IpAddress("10.0.0.1"),), {}, {}, "", 1)
_ENDPOINT = Endpoint("shop/web", "shop/web-1", IpAddress("10.0.0.1"), _WEB, {80: 8080}, 1, True, {})
_POLICY = AuthorizationPolicy("shop", "web", Action.ALLOW, None, ())


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
    with pytest.raises(RecordError, match="lacks"):
        read(topic_of(record), {name: value for name, value in body.items() if name != field}, TRUST_DOMAIN)
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
        (_POLICY, "action", "AUDIT", "ALLOW or DENY"),
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
        (_POLICY, "rules", [{"conditions": [{"key": "request.headers[x]", "values": ["y"]}]}], "L4"),
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
