"""What a proxy reports of itself: which configuration it has applied, and what it waits for.

The control plane reads it from proxies it does not trust, and shows it to people: everything is bounded, and text is
printable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from control.api.fields import Fields, RecordError, checked, number_in, typed
from control.api.messages import Body, Value
from control.api.names import wrong_dns_label, wrong_subdomain
from control.api.topics import StatusTopic

ADDRESSES: Final = "addr/"
"""What the root of the addresses is called where namespaces' roots go by the namespace, as none can be called so."""

LEASE_S: Final = 60
"""A proxy that has said nothing for so long is taken for gone; it reports every 20 s."""

MAX_TEXTS: Final = 16  # problems, or things waited for; more than anybody reads of one proxy
MAX_TEXT: Final = 200  # characters of one
MAX_ROOTS: Final = 1024  # namespaces that one proxy dials
_MAX_SECONDS: Final = 2**40  # some 35,000 years: any clock, and nothing that arithmetic could trip over
_MAX_NUMBER: Final = 2**63 - 1
_SERIAL: Final = re.compile(r"[0-9a-f]{1,40}")  # RFC 5280 section 4.1.2.2: at most 20 octets


class Kind(Enum):
    """What a proxy is."""

    UPROXY = "uproxy"
    NODE = "node"
    WAYPOINT = "waypoint"


RootStamp = tuple[int, int, int]
"""epoch, version and time of issue (Unix seconds) of a root that is applied."""


@dataclass(frozen=True, slots=True)
class Knowledge:
    """How much a proxy has of what the control plane tells; the fields are those of a `ProxyStatus`."""

    whole: bool
    waiting: tuple[str, ...]
    roots: Mapping[str, RootStamp]


@dataclass(frozen=True, slots=True)
class ProxyStatus:
    """One report. Its envelope's epoch is the process's start (Unix seconds), its version a count of reports."""

    kind: Kind
    workload: str
    """Key of the workload, or of the node agent: `mesh-system/node-<name>`."""
    version: str
    """Of the software."""
    online: bool
    """False only in the last will."""
    whole: bool
    """Whether all that the proxy wants to know is known."""
    waiting: tuple[str, ...]
    """What is not known yet."""
    roots: Mapping[str, RootStamp] = field(hash=False)
    """Namespace, or `ADDRESSES`, -> the root that is applied."""
    applied_at: int
    """Unix time of the last change; 0 before the first."""
    serial: str
    """Of the proxy's certificate, in hex."""
    not_after: int
    """Unix time at which that certificate ends."""
    problems: tuple[str, ...]
    """What was refused lately and why, newest last."""
    lease_s: int = LEASE_S


def root_title(owner: str) -> str:
    """How people are told of a root: by its namespace, or as `addr`."""
    return "addr" if owner == ADDRESSES else owner


def write(status: ProxyStatus) -> Body:
    """The body. Long lists and texts are cut, since a report must never fail."""
    return {
        "kind": status.kind.value,
        "workload": status.workload,
        "version": _printable(status.version),
        "online": status.online,
        "whole": status.whole,
        "waiting": [_printable(text) for text in status.waiting[:MAX_TEXTS]],
        "roots": {name: list(status.roots[name]) for name in sorted(status.roots)[:MAX_ROOTS]},
        "applied_at": status.applied_at,
        "certificate": {"serial": status.serial, "not_after": status.not_after},
        "problems": [_printable(text) for text in status.problems[-MAX_TEXTS:]],
        "lease_s": status.lease_s,
    }


def read(topic: StatusTopic, body: Body) -> ProxyStatus:
    """The report in a body. Raises RecordError."""
    fields = Fields(body)
    certificate = Fields(fields.take("certificate", dict), "certificate")
    status = ProxyStatus(
        kind=_kind(fields.take("kind", str)),
        workload=_workload(fields.take("workload", str), topic),
        version=_text(fields.take("version", str), "version"),
        online=fields.take("online", bool),
        whole=fields.take("whole", bool),
        waiting=_texts(fields.take("waiting", list), "waiting"),
        roots=_roots(fields.take("roots", dict)),
        applied_at=fields.number("applied_at", 0, _MAX_SECONDS),
        serial=_serial(certificate.take("serial", str)),
        not_after=certificate.number("not_after", 0, _MAX_SECONDS),
        problems=_texts(fields.take("problems", list), "problems"),
        lease_s=fields.number("lease_s", 1, 24 * 3600),
    )
    certificate.finish()
    fields.finish()
    return status


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[:MAX_TEXT])


def _text(value: Value, name: str) -> str:
    text = typed(value, str, name)
    if len(text) > MAX_TEXT or not text.isprintable():
        raise RecordError(f"{name} has text that is not printable or longer than {MAX_TEXT} characters")
    return text


def _texts(values: list[Value], name: str) -> tuple[str, ...]:
    if len(values) > MAX_TEXTS:
        raise RecordError(f"{name} has {len(values)} texts; at most {MAX_TEXTS}")
    return tuple(_text(value, name) for value in values)


def _kind(text: str) -> Kind:
    try:
        return Kind(text)
    except ValueError:
        raise RecordError(f"kind is {text[:40]!r}; it must be {' or '.join(kind.value for kind in Kind)}") from None


def _workload(text: str, topic: StatusTopic) -> str:
    namespace, _, name = text.partition("/")
    checked(namespace, wrong_dns_label, "workload")
    checked(name, wrong_subdomain, "workload")
    if name != topic.instance:
        raise RecordError(f"workload is {text}, but the topic is {topic.instance}'s")
    return text


def _roots(body: dict[str, Value]) -> dict[str, RootStamp]:
    if len(body) > MAX_ROOTS:
        raise RecordError(f"roots has {len(body)} entries; at most {MAX_ROOTS}")
    return {_owner(name): _root(value) for name, value in body.items()}


def _owner(name: str) -> str:
    return name if name == ADDRESSES else checked(name, wrong_dns_label, "roots")


def _root(value: Value) -> RootStamp:
    match value:
        case [epoch, version, issued_at]:
            return (
                number_in(epoch, 0, _MAX_NUMBER, "roots"),
                number_in(version, 0, _MAX_NUMBER, "roots"),
                number_in(issued_at, 0, _MAX_NUMBER, "roots"),
            )
    raise RecordError("roots: each must be [epoch, version, issued_at]")


def _serial(text: str) -> str:
    if not _SERIAL.fullmatch(text):
        raise RecordError("certificate: serial must be 1-40 hex digits in lower case")
    return text
