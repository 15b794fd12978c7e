"""Reports of proxies: read as written, bounded, printable, and on the reporter's own topic only."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api import messages, status
from control.api.fields import RecordError
from control.api.messages import Envelope
from control.api.status import ADDRESSES, MAX_ROOTS, MAX_TEXT, MAX_TEXTS, Kind, ProxyStatus
from control.api.topics import StatusTopic

TOPIC = StatusTopic("0" * 32, "web-1")
seconds = st.integers(0, 2**40)
numbers = st.integers(0, 2**63 - 1)
texts = st.text(st.characters(exclude_categories=("C", "Z")), max_size=MAX_TEXT)
statuses = st.builds(
    ProxyStatus,
    kind=st.sampled_from(Kind),
    workload=st.sampled_from(["shop/web-1", "bank/web-1"]),
    version=texts,
    online=st.booleans(),
    whole=st.booleans(),
    waiting=st.lists(texts, max_size=MAX_TEXTS).map(tuple),
    roots=st.dictionaries(st.sampled_from([ADDRESSES, "addr", "shop", "bank"]), st.tuples(numbers, numbers, numbers)),
    applied_at=seconds,
    serial=st.text("0123456789abcdef", min_size=1, max_size=40),
    not_after=seconds,
    problems=st.lists(texts, max_size=MAX_TEXTS).map(tuple),
    lease_s=st.integers(1, 86_400),
)
STATUS = ProxyStatus(Kind.UPROXY, "shop/web-1", "1.0", True, True, (), {ADDRESSES: (1, 2, 3)}, 9, "0f", 10, ())


@given(statuses)
def test_a_report_survives_the_wire(found):
    payload = messages.encode(Envelope(1, 1, 0, status.write(found)))
    assert status.read(TOPIC, messages.decode(payload).body) == found


@given(statuses, st.data())
def test_a_body_with_a_field_missing_or_added_or_replaced_is_refused_or_canonical(found, data):
    body = status.write(found)
    field = data.draw(st.sampled_from(sorted(body)))
    with pytest.raises(RecordError, match="lacks"):
        status.read(TOPIC, {name: value for name, value in body.items() if name != field})
    with pytest.raises(RecordError, match="unknown fields: more"):
        status.read(TOPIC, {**body, "more": 1})
    value = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()) | st.just({})
    replaced = {**body, field: data.draw(value)}
    try:
        again = status.read(TOPIC, replaced)
    except RecordError:
        return
    assert status.write(again) == replaced


@given(st.lists(st.text(max_size=300), max_size=30), st.integers(0, 2000))
def test_whatever_a_proxy_has_to_say_is_cut_to_what_is_read(said, roots):
    many = dataclasses.replace(
        STATUS,
        version="\x1b[31m",
        waiting=tuple(said),
        problems=tuple(said),
        roots={f"n{number}": (1, 1, 1) for number in range(roots)},
    )
    found = status.read(TOPIC, status.write(many))
    assert (len(found.problems), len(found.roots)) == (min(len(said), MAX_TEXTS), min(roots, MAX_ROOTS))
    assert found.version == "\N{REPLACEMENT CHARACTER}[31m"
    if said and said[-1].isprintable():
        assert found.problems[-1] == said[-1][:MAX_TEXT]  # the newest is kept


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("kind", "broker", "uproxy or node or waypoint"),
        ("workload", "shop/web-2", "the topic is web-1's"),
        ("workload", "web-1", "must be 1-253"),
        ("workload", "Shop/web-1", "must be 1-63"),
        ("version", "a\nb", "not printable"),
        ("waiting", ["x" * 201], "longer than 200"),
        ("problems", ["x"] * 17, "at most 16"),
        ("problems", ["\x1b[2J"], "not printable"),
        ("roots", {"Shop": [1, 1, 1]}, "must be 1-63"),
        ("roots", {"shop": [1, 1]}, "each must be"),
        ("roots", {"shop": [1, 1, -1]}, "from 0"),
        ("roots", {f"n{number}": [1, 1, 1] for number in range(1025)}, "at most 1024"),
        ("applied_at", -1, "from 0"),
        ("certificate", {"serial": "0F", "not_after": 1}, "hex digits"),
        ("certificate", {"serial": "0f", "not_after": 1, "x": 1}, "certificate has unknown fields: x"),
        ("certificate", {"serial": "0f"}, "certificate lacks 'not_after'"),
        ("lease_s", 0, "from 1"),
    ],
)
def test_each_wrong_value_is_refused_by_name(field, value, problem):
    with pytest.raises(RecordError, match=problem):
        status.read(TOPIC, {**status.write(STATUS), field: value})
