"""Which filters are asked for, and for which again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.client.subscriptions import Subscriptions

SETS = st.frozensets(st.sampled_from(["a/1", "a/2", "a/#", "b/1/#", "c"]))


def ask(subscriptions: Subscriptions, refused: frozenset[str] = frozenset()) -> list[str]:
    asked = subscriptions.missing
    subscriptions.asked(asked, refused & frozenset(asked))
    return asked


def test_a_filter_is_asked_for_once():
    subscriptions = Subscriptions()
    subscriptions.want(frozenset({"b", "a"}))
    assert ask(subscriptions) == ["a", "b"]
    assert ask(subscriptions) == []
    subscriptions.want(frozenset({"b", "c"}))
    assert subscriptions.surplus == ["a"]
    assert ask(subscriptions) == ["c"]
    subscriptions.dropped(["a"])
    assert subscriptions.surplus == []


def test_everything_is_asked_for_a_second_time_and_no_third():
    subscriptions = Subscriptions()
    subscriptions.want(frozenset({"a", "b", "refused"}))
    ask(subscriptions, frozenset({"refused"}))
    subscriptions.want(frozenset({"b", "c"}))
    subscriptions.dropped(["a"])
    assert ask(subscriptions) == ["c"]
    subscriptions.look_again()
    assert ask(subscriptions) == ["b", "c"]
    subscriptions.want(frozenset({"a", "b", "c"}))
    subscriptions.look_again()
    assert ask(subscriptions) == ["a"]
    subscriptions.look_again()
    assert ask(subscriptions) == ["a"]
    subscriptions.look_again()
    assert ask(subscriptions) == []


def test_what_is_refused_is_asked_for_until_it_is_granted():
    subscriptions = Subscriptions()
    subscriptions.want(frozenset({"a", "b"}))
    ask(subscriptions, frozenset({"a"}))
    assert subscriptions.refused == {"a"}
    assert ask(subscriptions) == ["a"]
    assert subscriptions.refused == frozenset()
    assert ask(subscriptions) == []


def test_what_is_refused_and_not_wanted_any_more_is_no_problem():
    subscriptions = Subscriptions()
    subscriptions.want(frozenset({"a"}))
    ask(subscriptions, frozenset({"a"}))
    subscriptions.want(frozenset())
    assert subscriptions.refused == frozenset()
    assert subscriptions.missing == []


ROOT = "mesh/v1/cluster.local"
POLICIES, ENDPOINTS = f"{ROOT}/policy/shop/#", f"{ROOT}/ep/shop/web/#"
OWN = f"{ROOT}/root/shop"


@pytest.mark.parametrize(
    ("topic", "answered"),
    [
        ("root/shop", OWN),
        ("root/bank", None),
        ("policy/shop/deny", POLICIES),
        ("policy/bank/deny", None),
        ("ep/shop/web", ENDPOINTS),
        ("ep/shop/web/web-1", None),  # without its manifest
        ("ep/shop", None),
    ],
)
def test_what_brought_nothing_is_in_doubt(topic, answered):
    wanted = {POLICIES, ENDPOINTS, OWN}
    subscriptions = Subscriptions()
    subscriptions.want(frozenset(wanted))
    ask(subscriptions)
    subscriptions.heard(f"{ROOT}/{topic}")
    subscriptions.doubt_silent()
    assert subscriptions.missing == sorted(wanted - {answered})
    ask(subscriptions)
    subscriptions.doubt_all()
    assert subscriptions.missing == sorted(wanted)


@given(st.text(alphabet="ab/#", max_size=10))
def test_any_topic_may_come(topic):
    subscriptions = Subscriptions()
    subscriptions.want(frozenset({OWN}))
    ask(subscriptions)
    subscriptions.heard(topic)
    subscriptions.doubt_silent()
    assert subscriptions.missing == [OWN]


@given(st.lists(st.tuples(SETS, SETS, st.booleans())))
def test_what_is_held_becomes_what_is_wanted(steps):
    """Whatever was wanted, refused and doubted before."""
    subscriptions, at_broker = Subscriptions(), set()
    for wanted, refused, doubted in steps:
        subscriptions.want(wanted)
        asked = set(ask(subscriptions, refused))
        at_broker = (at_broker | asked) - (asked & refused)
        surplus = subscriptions.surplus
        at_broker -= set(surplus)
        subscriptions.dropped(surplus)
        assert at_broker <= wanted
        assert wanted - at_broker == subscriptions.refused
        if doubted:
            subscriptions.doubt_silent()
