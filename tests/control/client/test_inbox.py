"""What waits to be listed is bounded, whatever arrives."""

from __future__ import annotations

import pytest

from control.api.messages import digest
from control.api.topics import PolicyTopic
from control.client import inbox as inbox_module
from control.client.inbox import MAX_VERSIONS, Arrival, Inbox


def put(inbox, topic, payload, owner="shop"):
    return inbox.put(topic, digest(payload), Arrival(PolicyTopic(owner, topic), owner, (1, 1), 0, payload))


def there(inbox, topic, payload):
    found = inbox.get(topic, digest(payload))
    assert found is None or found.payload == payload
    return found is not None


def test_an_arrival_is_found_by_topic_and_digest():
    inbox = Inbox()
    assert not put(inbox, "a", b"1")
    assert not put(inbox, "a", b"1")
    put(inbox, "b", b"2", owner="bank")
    assert there(inbox, "a", b"1")
    assert not there(inbox, "a", b"2")
    assert not there(inbox, "b", b"1")
    assert [(topic, arrival.payload) for topic, _, arrival in inbox.of("bank")] == [("b", b"2")]
    inbox.discard("a", digest(b"1"))
    inbox.discard("a", digest(b"1"))
    inbox.discard("c", digest(b"1"))
    assert not there(inbox, "a", b"1")
    assert inbox.of("shop") == []
    inbox.forget("b")
    inbox.forget("b")
    assert inbox._bytes == 0
    assert inbox._topics == {}


def test_a_topic_keeps_its_last_versions():
    inbox = Inbox()
    payloads = [bytes([number]) for number in range(MAX_VERSIONS + 2)]
    for payload in payloads:
        put(inbox, "a", payload)
    put(inbox, "a", payloads[2])  # the oldest that is left arrives again: now it is the latest
    put(inbox, "a", b"new")
    assert [payload for payload in payloads if there(inbox, "a", payload)] == [payloads[2], *payloads[4:]]
    assert there(inbox, "a", b"new")


def test_too_much_pushes_out_what_came_first(monkeypatch):
    monkeypatch.setattr(inbox_module, "MAX_BYTES", 3 * (100 + inbox_module._OVERHEAD_BYTES))
    inbox = Inbox()
    for number in range(3):
        assert not put(inbox, str(number), bytes([number]) * 100)
    assert not put(inbox, "0", bytes(100))  # arrived again: it is not the first any more
    assert put(inbox, "3", b"3" * 100)
    assert [topic for topic in "0123" if inbox._topics.get(topic)] == ["0", "2", "3"]


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_the_account_of_memory_is_right(size, monkeypatch):
    monkeypatch.setattr(inbox_module, "MAX_BYTES", 20_000)
    inbox = Inbox()
    for number in range(300):
        put(inbox, str(number % 70), number.to_bytes(2) + bytes(size))
        kept = [arrival for topics in inbox._topics.values() for arrival in topics.values()]
        assert inbox._bytes == sum(len(one.payload) + inbox_module._OVERHEAD_BYTES for one in kept) <= 20_000
