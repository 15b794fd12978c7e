"""Name queries, and what nameservers answer (`uproxy.dns_messages`), beside a reader of one plain question."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import dns.flags
import dns.message
import dns.rcode

from control.api.address import parse_address
from uproxy import dns_messages
from uproxy.dns_messages import MeshName, UnansweredError

MAX_BYTES = 600
WORDS = (
    b"\x03svc\x07cluster\x05local\x00", b"\x03web\x04shop", b"\xc0\x0c", b"\x00\x01\x00\x01", b"\x00\x1c\x00\x01",
    b"\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x00", b"\x00\xff\x00\xff", b"\x3f" + b"x" * 63, b"\x00\xfa\x00\xff",
)  # fmt: skip
_ADDRESSES = [parse_address(text) for text in ("240.240.0.1", "240.240.0.2", "fd75::1")]
_MOST = 512
"""Bytes that every resolver takes (RFC 1035 section 2.3.4)."""


def seeds() -> Iterable[bytes]:
    for name in ("web.shop.svc.cluster.local", "WEB.shop", "www.example.com", "svc", "a.b.c.svc."):
        for kind in ("A", "AAAA", "HTTPS"):
            yield dns.message.make_query(name, kind).to_wire()
    query = dns.message.make_query("web.shop", "A", use_edns=0, payload=4096, want_dnssec=True)
    yield query.to_wire()
    yield dns_messages.answer(query.to_wire(), dns_messages.SERVICE_ZONES[0], _ADDRESSES)
    yield dns.message.make_query("web.shop", "A", use_edns=1).to_wire()


def check(data: bytes) -> None:
    try:
        question = dns_messages.read_question(data)
    except UnansweredError:
        _check_failure(data, dns.rcode.FORMERR)
        return
    if (plain := _plain_question(data)) is not None:
        labels, record_type, record_class = plain
        assert [label.lower() for label in question.name.labels] == [label.lower() for label in labels]
        assert (int(question.record_type), int(question.record_class)) == (record_type, record_class)
    meant = dns_messages.mesh_name(question)
    if not data[2] & 0x80:
        _check_failure(data, dns.rcode.SERVFAIL)
        _check_answers(data, meant)
    assert dns_messages.answers(data, question) == bool(data[2] & 0x80)


def _check_failure(query: bytes, rcode: dns.rcode.Rcode) -> None:
    failure = dns_messages.failure(query, rcode)
    if failure is None:
        assert len(query) < 12 or query[2] & 0x80
        return
    assert failure[:2] == query[:2]
    assert failure[2] & 0x80
    assert failure[3] & 0x0F == rcode or dns.message.from_wire(failure).rcode() == rcode
    assert len(failure) <= max(_MOST, len(query))


def _check_answers(query: bytes, meant: MeshName | None) -> None:
    zone = meant.zone if meant is not None else dns_messages.SERVICE_ZONES[0]
    for addresses in (None, (), _ADDRESSES):
        try:
            wire = dns_messages.answer(query, zone, addresses)
        except UnansweredError:
            continue
        asked, found = dns.message.from_wire(query), dns.message.from_wire(wire)
        assert asked.is_response(found)
        assert found.flags & dns.flags.AA
        assert len(wire) <= _MOST
        assert (found.rcode() == dns.rcode.NXDOMAIN) == (addresses is None)
        assert addresses or not found.answer


def _plain_question(data: bytes) -> tuple[Sequence[bytes], int, int] | None:
    """Labels, type and class of the one question of a message, if its name is not compressed."""
    if len(data) < 12 or data[4:6] != b"\0\1":
        return None
    labels, at = [], 12
    while at < len(data) and data[at] < 64:
        labels.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
        if not labels[-1]:
            return labels, *struct.unpack_from(">HH", data, at)
    return None
