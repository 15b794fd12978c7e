"""What a broker can send (`control.api`: messages, topics, records, index, status): read as written, or refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from control.api import index, messages, records, status
from control.api.fields import RecordError
from control.api.messages import Body, Envelope, MessageError
from control.api.topics import (
    AddressesRootTopic,
    AddressesTopic,
    IndexTopic,
    ManifestTopic,
    NamespacesTopic,
    RootTopic,
    StatusTopic,
    Topic,
    TopicError,
    TrustTopic,
    format_topic,
    parse_topic,
)
from tests.fuzz import pure_msgpack
from tests.support.records import TRUST_DOMAIN, address_shards
from tests.support.records import records as any_record

_T = TypeVar("_T")

MAX_BYTES = 2048
WORDS = (
    b"mesh/v1/cluster.local/", b"svc/shop/web\n", b"ep/shop/web/web-1\n", b"policy/shop/web\n", b"gw/shop/wp\n",
    b"route/shop/web\n", b"index/shop/00\n", b"root/shop\n", b"root\n", b"addr\n", b"addr/00\n", b"trust\n",
    b"\xa4vips", b"\xa5ports", b"\xa6labels", b"\xaaidentities", b"\xa7binding", b"\xa7address", b"\xa8identity",
    b"\xa6weight", b"\xa5ready", b"\xa6bounds", b"\xa6direct", b"\xa9plaintext", b"\xa6action", b"\xa8selector",
    b"\xa5rules", b"\xa7targets", b"\xa6dryRun", b"\xa7sources", b"\xaaoperations", b"\xaaconditions", b"\xa7traffic",
    b"\xa9instances", b"\xa8services", b"\xa9workloads", b"\xa7parents", b"\xa9hostnames", b"\xa7matches",
    b"\xa8backends", b"\xaatimeout_ms", b"\xa7request", b"\xa8response", b"\xa3set", b"\xa3add", b"\xa6remove",
    b"\xadloadBalancing", b"\xa4hash", b"\xa6warmup", b"\xa8failover", b"\xb0outlierDetection", b"\xa8locality",
    b"\xa6method", b"\xa5query", b"\xa7headers", b"\xa4path", b"\xc0", b"\xc2", b"\xc3", b"\x90", b"\x80", b"\xa0",
)  # fmt: skip


def seeds() -> Iterable[bytes]:
    for record in _drawn(any_record(), 150):
        yield _message(records.topic_of(record), records.write(record))
    for topic, shard in _drawn(address_shards(), 20):
        yield _message(topic, index.write(shard))
    for topic, content in (
        (RootTopic("shop"), index.Root({1: bytes(32)}, bytes(64))),
        (AddressesRootTopic(), index.Root({200: bytes(32)}, b"")),
        (NamespacesTopic(), index.Namespaces(frozenset({"bank", "shop"}), bytes(64))),
        (ManifestTopic("shop", "web"), index.Manifest(3, bytes(32))),
        (TrustTopic(), index.Trust((b"der", b"der"))),
    ):
        yield _message(topic, index.write(content))
    report = status.ProxyStatus(
        status.Kind.UPROXY, "shop/web-1", "1", True, False, ("shop",), {"shop": (1, 2, 3)}, 4, "0a", 5, ("no",)
    )
    yield _message(StatusTopic("0" * 32, "web-1"), status.write(report))


def _message(topic: Topic, body: Body) -> bytes:
    return format_topic(TRUST_DOMAIN, topic).encode() + b"\n" + messages.encode(Envelope(1, 1, 0, body))


def _drawn(strategy: st.SearchStrategy[_T], count: int) -> list[_T]:
    """Some values of a strategy, the same every time."""
    drawn: list[_T] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),  # fuzzing may be given what others leave of a processor
    )
    @given(strategy)
    def draw(value: _T) -> None:
        drawn.append(value)

    draw()
    return drawn


def check(data: bytes) -> None:
    """A topic, a line feed, and a payload."""
    text, _, payload = data.partition(b"\n")
    pure_msgpack.agrees(payload)
    try:
        envelope = messages.decode(payload)
    except MessageError:
        envelope = None
    else:
        assert messages.decode(messages.encode(envelope)) == envelope
    try:
        topic = parse_topic(TRUST_DOMAIN, text.decode("utf-8", "replace"))
    except TopicError:
        return
    assert format_topic(TRUST_DOMAIN, topic) == text.decode()
    if envelope is None or envelope.body is None:
        return
    try:
        again = _written(topic, envelope.body)
    except RecordError:
        return
    # What was read is all that was there, in the one way to write it: digests are of bytes.
    assert again == envelope.body


def _written(topic: Topic, body: Body) -> Body:
    """What was read, written again. Raises RecordError."""
    match topic:
        case StatusTopic():
            return status.write(status.read(topic, body))
        case IndexTopic():
            return index.write(index.read_index_shard(topic, body))
        case RootTopic() | AddressesRootTopic():
            return index.write(index.read_root(topic, body))
        case NamespacesTopic():
            return index.write(index.read_namespaces(body))
        case AddressesTopic():
            return index.write(index.read_address_shard(topic, body))
        case ManifestTopic():
            return index.write(index.read_manifest(body))
        case TrustTopic():
            return index.write(index.read_trust(body))
    record = records.read(topic, body, TRUST_DOMAIN)
    assert records.topic_of(record) == topic
    return records.write(record)
