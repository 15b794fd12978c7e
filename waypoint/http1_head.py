"""The heads of HTTP/1.1 messages, from bytes: the grammar, and what fields say about framing. See `waypoint.http1`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from waypoint import trailers, websocket
from waypoint.messages import (
    CHUNKED,
    NO_BODY,
    UNTIL_CLOSE,
    Ending,
    Fields,
    Framing,
    MessageError,
    RequestHead,
    ResponseHead,
    length,
)
from waypoint.remembered import MAX_KNOWN, Known, remembered

MAX_HEAD: Final = 65536
"""Bytes of a head, and of the trailers of a chunked body."""
MAX_FIELDS: Final = 100  # Envoy's
MAX_START_LINE: Final = 16384

# Possessive throughout: a head is read in one pass, whatever it holds.
_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_TEXT: Final = rb"[\t -~\x80-\xff]*+"
_FIELDS: Final = rb"((?:" + _TOKEN + rb":" + _TEXT + rb"\r\n)*+)"
# Some clients end a body with a line feed too many (RFC 9112 section 2.2).
# Methods in lower case are nobody's, but some applications take `delete` for DELETE where a policy does not.
# At most 32 characters, so that what begins a connection can be told from other protocols.
METHOD: Final = rb"[A-Z](?:[A-Z]|-(?=[A-Z])){0,31}+"
TARGET: Final = rb"[!\x22$-~]++"
REQUEST_LINE: Final = rb"(?:\r\n)?+(" + METHOD + rb") (" + TARGET + rb") HTTP/1\.([01])\r\n"
# Some servers send no reason, and then no space before it.
_STATUS_LINE: Final = rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: (" + _TEXT + rb"))?+\r\n"
_START: Final = re.compile(REQUEST_LINE)
_REQUEST: Final = re.compile(REQUEST_LINE + _FIELDS + rb"\r\n")
_RESPONSE: Final = re.compile(_STATUS_LINE + _FIELDS + rb"\r\n")
_TRAILERS: Final = re.compile(_FIELDS + rb"\r\n")
_OPTION: Final = re.compile(_TOKEN)
_PROTOCOL: Final = re.compile(_TOKEN + rb"(?:/" + _TOKEN + rb")?")
_LENGTH: Final = re.compile(rb"0|[1-9][0-9]{0,17}")
HOST: Final = re.compile(rb"(?:[0-9A-Za-z._-]++|\[[0-9A-Fa-f]*+:[0-9A-Fa-f:.]++\])(?::[0-9]{0,5})?")
_ABSOLUTE: Final = re.compile(rb"http://([^/?]++)(.*)", re.IGNORECASE)

OLD: Final = "HTTP/1.0"
OF_CONNECTION: Final = frozenset(
    (
        b"connection",
        b"content-length",
        b"http2-settings",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
"""Fields that hold between two peers only, and that writers write themselves."""
_SPECIAL: Final = OF_CONNECTION | {b"expect", b"host"}
_TRUSTED: Final = _SPECIAL | {b"x-forwarded-client-cert", b"x-forwarded-for", b"x-forwarded-proto", b"x-request-id"}
_OURS: Final = b"x-uproxy-"

_Lines = list[tuple[bytes, bytes]]
_Special = dict[bytes, list[bytes]]


@remembered
def read_request(head: bytes, default_host: bytes) -> RequestHead:
    """A whole head, with its empty line. Raises MessageError."""
    found = _REQUEST.fullmatch(head)
    if found is None:
        raise MessageError(400, _fault(head, _START))
    method, target, version, lines = found.groups()
    if found.start(4) > MAX_START_LINE:
        raise MessageError(414, f"a request line of more than {MAX_START_LINE} bytes")
    if method == b"CONNECT":
        raise MessageError(501, "CONNECT inside a tunnel is not supported")
    fields, special = _split(lines)
    if b"_" in lines:
        refuse_lookalikes(fields)
    hosts = special.pop(b"host", [])
    if target[:1] != b"/":
        target = _origin_form(target, hosts)
    if len(hosts) == 1:
        if HOST.fullmatch(hosts[0]) is None:
            raise MessageError(400, "malformed Host")
    elif hosts or version == b"1":
        raise MessageError(400, f"{len(hosts)} Host fields instead of one")
    else:
        hosts.append(default_host)
    fields.insert(0, (b"host", hosts[0]))
    minor = 1 if version == b"1" else 0
    if not special and minor:
        return RequestHead(method.decode(), target.decode(), _kept(head, fields))
    options = _options(special)
    framing = _framing(special, minor) or NO_BODY
    upgrades = _upgrades(special, options, method if minor and not framing.length and framing is not CHUNKED else b"")
    if upgrades == websocket.PROTOCOL:
        websocket.key_of(fields)
    expects = expects_continue(special.get(b"expect", ()), framing) and minor == 1  # RFC 9110 section 10.1.1
    fields = [field for field in fields if field[0] not in options or field[0] == b"host"]
    if expects:
        fields.append((b"expect", b"100-continue"))
    return RequestHead(
        method.decode(),
        target.decode(),
        _kept(head, fields),
        framing,
        keep_alive=minor == 1 and b"close" not in options,
        protocol="HTTP/1.1" if minor else OLD,
        expects_continue=expects,
        takes_trailers=_takes_trailers(special),
        upgrades=upgrades,
    )


def _kept(head: bytes, fields: _Lines) -> Fields:
    return Known(fields) if len(head) <= MAX_KNOWN else fields


def check_start(head: bytearray) -> bool:
    """Whether the start line of an unfinished request is there, and well formed. Raises MessageError."""
    end = head.find(b"\r\n", 2, MAX_START_LINE + 4)
    if end < 0:
        if len(head) > MAX_START_LINE:
            raise MessageError(414, f"a request line of more than {MAX_START_LINE} bytes")
        return False
    if _START.match(head) is None:
        raise MessageError(400, "malformed request line")
    return True


@remembered
def read_response(head: bytes, method: str, *, upgrades: bytes) -> tuple[ResponseHead, bool]:
    """A whole head that answers `method`; and whether the connection stays after it. Raises MessageError.

    `upgrades`: the protocol that was asked for, if one was.
    """
    found = _RESPONSE.fullmatch(head)
    if found is None:
        raise MessageError(502, _fault(head, re.compile(_STATUS_LINE)))
    version, code, reason, lines = found.groups()
    fields, special = _split(lines)
    status, minor = int(code), 1 if version == b"1" else 0
    options = _options(special)
    if status == 101 and not (upgrades and _upgrades(special, options, b"GET") == upgrades):
        raise MessageError(502, "101 (Switching Protocols) to something for which nobody has asked")
    framing = _framing(special, minor)
    if status < 200 or status == 204:
        framing = NO_BODY
    elif method == "HEAD" or status == 304:
        framing = Framing(Ending.NONE, framing.length if framing else None)
    elif framing is None:
        framing = UNTIL_CLOSE
    stays = minor == 1 and b"close" not in options
    fields = [field for field in fields if field[0] not in options]
    return ResponseHead(status, reason or b"", _kept(head, fields), framing), stays


def read_trailers(lines: bytes) -> Fields:
    """Trailers with their empty line, as far as they go on. Raises MessageError."""
    found = _TRAILERS.fullmatch(lines)
    if found is None:
        raise MessageError(400, "malformed trailers")
    if found[1].count(b"\r\n") > MAX_FIELDS:
        raise MessageError(431, f"more than {MAX_FIELDS} trailers")
    fields, _ = _split(found[1])
    return trailers.kept(fields)


def check_written(head: bytes, lines: int, *, request: bool) -> None:
    """Raises ValueError for a head that would not be read here as so many lines, the start line and the empty one too.

    What is written need not come from a peer: some is configuration.
    """
    if (_REQUEST if request else _RESPONSE).fullmatch(head) is None or head.count(b"\r\n") != lines:
        raise ValueError(f"refused to write a malformed head: {head[:200]!r}")


def _split(lines: bytes) -> tuple[_Lines, _Special]:
    """The fields, and those among them that the connection or its framing is about, apart."""
    fields: _Lines = []
    special: _Special = {}
    if lines:
        split = lines[:-2].split(b"\r\n")
        if len(split) > MAX_FIELDS:
            raise MessageError(431, f"{len(split)} header fields; {MAX_FIELDS} are taken")
        for line in split:
            name, _, value = line.partition(b":")
            name = name.lower()
            if name in _SPECIAL:
                special.setdefault(name, []).append(value.strip(b" \t"))
            else:
                fields.append((name, value.strip(b" \t")))
    return fields, special


def _origin_form(target: bytes, hosts: list[bytes]) -> bytes:
    """RFC 9112 section 3.2.2 lets a target carry a host, and that one holds. Taken only where Host says the same."""
    found = _ABSOLUTE.fullmatch(target)
    if found is None:
        raise MessageError(400, "the target is neither a path nor an http:// URL")
    if [host.lower() for host in hosts] != [found[1].lower()]:
        raise MessageError(400, "the host in the target is not the one in Host")
    return bytes(found[2]) if found[2][:1] == b"/" else b"/" + found[2]


def refuse_lookalikes(fields: _Lines) -> None:
    """CGI, WSGI and their like take `x_forwarded_for` for x-forwarded-for. Other names may have underscores."""
    for name, _ in fields:
        if b"_" in name:
            dashed = name.replace(b"_", b"-")
            if dashed in _TRUSTED or dashed.startswith(_OURS):
                raise MessageError(400, f"the field {name.decode()} could be taken for {dashed.decode()}")


def _upgrades(special: _Special, options: set[bytes], method: bytes) -> bytes:
    """The protocol that is asked for, or agreed to, in lower case; empty: none. Raises MessageError for anything else.

    `method`: the request's; empty where no upgrade is possible. Java's client offers h2c with each request, and does
    well without.
    """
    wanted = [value.lower() for value in special.get(b"upgrade", ())]
    if all(value == b"h2c" for value in wanted):
        return b""
    asked = wanted[0]
    possible = method == b"GET" if asked == websocket.PROTOCOL else method
    if len(wanted) == 1 and possible and b"upgrade" in options and _PROTOCOL.fullmatch(asked):
        return asked
    raise MessageError(501, "an upgrade to several protocols, with a body, or without the Connection option")


def _options(special: _Special) -> set[bytes]:
    """What Connection lists: options, and names of fields that go no further."""
    options: set[bytes] = set()
    for value in special.get(b"connection", ()):
        for option in value.split(b","):
            option = option.strip(b" \t").lower()
            if option and _OPTION.fullmatch(option) is None:
                raise MessageError(400, "malformed Connection")
            options.add(option)
    return options


def _framing(special: _Special, minor: int) -> Framing | None:
    """RFC 9112 section 6.3, where whatever is not plain is refused. None when nothing is said."""
    lengths, codings = special.get(b"content-length"), special.get(b"transfer-encoding")
    if codings:
        if lengths:
            raise MessageError(400, "Content-Length and Transfer-Encoding in one message")
        if len(codings) > 1 or codings[0].lower() != b"chunked":
            raise MessageError(400, "a Transfer-Encoding other than chunked")
        if not minor:
            raise MessageError(400, "Transfer-Encoding in HTTP/1.0")
        return CHUNKED
    return read_length(lengths) if lengths else None


def read_length(values: Sequence[bytes]) -> Framing:
    """What Content-Length fields say. Raises MessageError."""
    if len(values) > 1 or _LENGTH.fullmatch(values[0]) is None:
        raise MessageError(400, "Content-Length is not one decimal number")
    return length(int(values[0]))


def expects_continue(values: Sequence[bytes], framing: Framing) -> bool:
    """What Expect fields say: whether the client waits for 100 (Continue). Raises MessageError."""
    for value in values:
        if value.lower() != b"100-continue":
            raise MessageError(417, "an expectation other than 100-continue")
    # RFC 9110 section 10.1.1: nothing to a request without content.
    return bool(values) and framing is not NO_BODY


def _takes_trailers(special: _Special) -> bool:
    return any(
        option.strip(b" \t").lower() == b"trailers" for value in special.get(b"te", ()) for option in value.split(b",")
    )


def _fault(head: bytes, start_line: re.Pattern[bytes]) -> str:
    """What is wrong with a malformed head, for the log."""
    found = start_line.match(head)
    if found is None:
        return "malformed start line"
    read = re.compile(_FIELDS).match(head, found.end())
    number = read[1].count(b"\r\n") + 1 if read else 1
    return f"malformed header field, the line {number} after the start line"
