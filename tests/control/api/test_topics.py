"""Topics: built and parsed alike, and nothing else is taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.records import topic_of
from control.api.topics import TopicError, format_topic, parse_topic
from tests.support.records import TRUST_DOMAIN, records

_HASH = "0123456789abcdef" * 2


@given(records())
def test_a_topic_survives_its_text(record):
    topic = topic_of(record)
    assert parse_topic(TRUST_DOMAIN, format_topic(TRUST_DOMAIN, topic)) == topic


@given(st.text(max_size=60).map(lambda text: f"mesh/v1/cluster.local/{text}") | st.text(max_size=60))
def test_any_text_is_a_topic_with_that_very_text_or_refused(text):
    try:
        topic = parse_topic(TRUST_DOMAIN, text)
    except TopicError:
        return
    assert format_topic(TRUST_DOMAIN, topic) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mesh/v1/cluster.local/",
        "mesh/v1/cluster.local/svc/shop",
        "mesh/v1/cluster.local/svc/shop/web/more",
        "mesh/v1/cluster.local/svc/shop/+",
        "mesh/v1/cluster.local/svc/#",
        "mesh/v1/cluster.local/svc/Shop/web",
        "mesh/v1/cluster.local/svc//web",
        "mesh/v1/cluster.local/secret/shop/web",
        "mesh/v1/other.example/svc/shop/web",
        "mesh/v2/cluster.local/svc/shop/web",
        "mesh/v1/cluster.local/ep/shop/web",
        f"mesh/v1/cluster.local/wl/{_HASH.upper()}/web",
        f"mesh/v1/cluster.local/wl/{_HASH}0/web",
        f"mesh/v1/cluster.local/wl/{_HASH}/WEB",
        "mesh/v1/cluster.local/policy/shop/-",
    ],
)
def test_other_topics_are_refused(text):
    with pytest.raises(TopicError):
        parse_topic(TRUST_DOMAIN, text)
