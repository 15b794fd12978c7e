"""Which filters are asked for, and for which again."""

from hypothesis import given
from hypothesis import strategies as st

from control.client.subscriptions import Subscriptions

NAMES = st.sampled_from(["a/1", "a/2", "a/#", "b/1/#", "c"])
SETS = st.frozensets(NAMES)
TOPICS = ["a", "a/1", "a/2", "b/1", "b/1/x", "c"]


def matches(topic: str, name: str) -> bool:
    """MQTT 3.1.1 section 4.7.1.2."""
    return topic == name or (name.endswith("/#") and f"{topic}/".startswith(name.removesuffix("#")))


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


@given(SETS, st.lists(st.sampled_from(TOPICS)))
def test_what_no_topic_matched_is_in_doubt(wanted, heard):
    subscriptions = Subscriptions()
    subscriptions.want(wanted)
    ask(subscriptions)
    for topic in heard:
        subscriptions.heard(topic)
    subscriptions.doubt_silent()
    assert subscriptions.missing == sorted(name for name in wanted if not any(matches(topic, name) for topic in heard))
    ask(subscriptions)
    subscriptions.doubt_all()
    assert subscriptions.missing == sorted(wanted)


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
