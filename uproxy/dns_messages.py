"""Name queries and their answers (RFC 1035), and which names are the mesh's. No I/O; dnspython does the bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import Enum
from typing import Final

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rrset
from dns.name import Name
from dns.opcode import Opcode
from dns.rcode import Rcode
from dns.rdata import Rdata
from dns.rdataclass import RdataClass
from dns.rdatatype import RdataType

from control.api.address import IpAddress, is_ipv6, packed16
from control.api.names import key, wrong_dns_label, wrong_service_name
from control.api.workload import CLUSTER_DOMAIN

TTL_S: Final = 30
"""Of addresses, as Istio's DNS proxy has it. A service's virtual address outlives its endpoints."""
NEGATIVE_TTL_S: Final = 5
"""How long somebody may remember that there is no such name or address (RFC 2308)."""
MAX_ADDRESSES: Final = 8
"""In one answer: with the longest name there is, it stays below the 512 bytes that every resolver takes."""

SERVICE_ZONES: Final = (dns.name.from_text(f"svc.{CLUSTER_DOMAIN}"), dns.name.from_text("svc"))
"""All names in these are the mesh's, whether they exist or not: nobody else is asked for them."""

_EDNS_PAYLOAD: Final = 1232  # bytes of UDP that pass everywhere (dnsflagday.net/2020)
_HEADER_BYTES: Final = 12
_RESPONSE, _KEPT_FLAGS = 0x80, 0x79  # QR; opcode and RD


class UnansweredError(Exception):
    """Bytes that are no query, or one of a kind that is not answered; `failure` makes what is said to it."""

    def __init__(self, text: str, rcode: Rcode = Rcode.FORMERR) -> None:
        super().__init__(text)
        self.rcode = rcode


class Kind(Enum):
    """What a name in the mesh stands for, if there is such a one."""

    ZONE = "zone"
    NAMESPACE = "namespace"
    SERVICE = "service"
    NOTHING = "nothing"
    """No service can be called so."""


@dataclasses.dataclass(frozen=True, slots=True)
class MeshName:
    """A name that may be the mesh's."""

    zone: Name
    """What the answer says that it is part of."""
    kind: Kind
    namespace: str = ""
    service: str = ""
    """Key of the service."""
    is_short: bool = False
    """`name.namespace`: as many names of the world have the same form, it is the mesh's only if the namespace is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """What one query asks."""

    name: Name
    record_type: RdataType
    record_class: RdataClass


def read_question(wire: bytes) -> Question:
    """The question of a query. Raises UnansweredError."""
    query = _read(wire, question_only=True)
    if query.opcode() != Opcode.QUERY:
        raise UnansweredError(f"a message of kind {query.opcode().name}, which is not for resolvers", Rcode.NOTIMP)
    return _question_of(query)


def mesh_name(question: Question) -> MeshName | None:
    """What the mesh may have to say to this; None: nothing."""
    if question.record_class != RdataClass.IN:
        return None
    for zone in SERVICE_ZONES:
        if question.name.is_subdomain(zone):
            return _name_in(zone, question.name)
    labels = _labels(question.name.labels[:-1])
    if len(labels) != 2 or wrong_service_name(labels[0]) or wrong_dns_label(labels[1]):
        return None
    name, namespace = labels
    return MeshName(question.name, Kind.SERVICE, namespace, key(namespace, name), is_short=True)


def answer(wire: bytes, zone: Name, addresses: Sequence[IpAddress] | None) -> bytes:
    """The mesh's answer to a query. None: there is no such name; no address of the type that is asked for: no data.

    Raises UnansweredError.
    """
    query = _read(wire)
    if query.edns > 0:
        raise UnansweredError(f"version {query.edns} of EDNS", Rcode.BADVERS)  # RFC 6891 section 6.1.3
    question = _question_of(query)
    response = dns.message.make_response(query, recursion_available=True, our_payload=_EDNS_PAYLOAD, pad=0)
    response.flags |= dns.flags.AA
    found = [record for address in addresses or () if (record := _record(address)).rdtype == question.record_type]
    if addresses is None:
        response.set_rcode(dns.rcode.NXDOMAIN)
    if found:
        response.answer.append(dns.rrset.from_rdata(question.name, TTL_S, *found[:MAX_ADDRESSES]))
    else:
        # The last number of the start of authority is how long absence may be remembered.
        authority = f"{zone} {zone} 1 7200 1800 86400 {NEGATIVE_TTL_S}"
        response.authority.append(dns.rrset.from_text(zone, NEGATIVE_TTL_S, "IN", "SOA", authority))
    return response.to_wire()


def failure(wire: bytes, rcode: Rcode) -> bytes | None:
    """The answer to a query that gets none, with its question if that can be read; None: it is no query at all."""
    if len(wire) < _HEADER_BYTES or wire[2] & _RESPONSE:
        return None
    try:
        response = dns.message.make_response(_read(wire), recursion_available=True, our_payload=_EDNS_PAYLOAD, pad=0)
    except UnansweredError:
        return wire[:2] + bytes((_RESPONSE | wire[2] & _KEPT_FLAGS, _RESPONSE | rcode)) + bytes(8)
    response.set_rcode(rcode)
    return response.to_wire()


def answers(wire: bytes, question: Question) -> bool:
    """Whether what a nameserver sent answers this (RFC 5452 section 9.1); its number has been looked at."""
    if len(wire) < _HEADER_BYTES or not wire[2] & _RESPONSE:
        return False
    if wire[4:6] == bytes(2):  # an error may come without the question; it claims nothing about any name
        return wire[3] & 0x0F != 0 and wire[6:8] == bytes(2)
    try:
        return _question_of(_read(wire, question_only=True)) == question
    except UnansweredError:
        return False


def _read(wire: bytes, *, question_only: bool = False) -> dns.message.Message:
    try:
        return dns.message.from_wire(wire, question_only=question_only)
    except (dns.exception.DNSException, ValueError) as error:
        raise UnansweredError(str(error) or type(error).__name__) from None


def _question_of(message: dns.message.Message) -> Question:
    if len(message.question) != 1:
        raise UnansweredError(f"{len(message.question)} questions")
    (asked,) = message.question
    return Question(asked.name, asked.rdtype, asked.rdclass)


def _name_in(zone: Name, name: Name) -> MeshName:
    labels = _labels(name.relativize(zone).labels)
    match labels:
        case ():
            return MeshName(zone, Kind.ZONE)
        case (namespace,) if not wrong_dns_label(namespace):
            return MeshName(zone, Kind.NAMESPACE, namespace)
        case (service, namespace) if not wrong_service_name(service) and not wrong_dns_label(namespace):
            return MeshName(zone, Kind.SERVICE, namespace, key(namespace, service))
    return MeshName(zone, Kind.NOTHING)


def _labels(labels: Sequence[bytes]) -> tuple[str, ...]:
    """In lower case; what is not ASCII becomes what no name of ours has."""
    return tuple(label.decode("ascii", "replace").lower() for label in labels)


def _record(address: IpAddress) -> Rdata:
    if is_ipv6(address):
        record_type, packed = RdataType.AAAA, packed16(address)
    else:
        record_type, packed = RdataType.A, packed16(address)[-4:]
    return dns.rdata.from_wire(RdataClass.IN, record_type, packed, 0, len(packed))
