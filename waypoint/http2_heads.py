"""The heads of HTTP/2 messages (RFC 9113 section 8), from and to header lists. No I/O.

A head is the same as if it had come by HTTP/1.1, and as much is refused: what one side says is written for the other
in whatever that speaks. `uproxy.header_block` has refused what is no list of fields at all.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Final

from uproxy.header_block import Headers, well_formed, well_formed_trailers
from waypoint import websocket
from waypoint.http1_head import (
    HOST,
    MAX_START_LINE,
    METHOD,
    OF_CONNECTION,
    TARGET,
    expects_continue,
    read_length,
    refuse_lookalikes,
)
from waypoint.messages import (
    CHUNKED,
    HTTP2,
    NO_BODY,
    Ending,
    Fields,
    Framing,
    MessageError,
    RequestHead,
    ResponseHead,
    length,
)
from waypoint.remembered import Known, remembered

# HTTP/2 has no reason phrases, and there are clients of HTTP/1.1 that take no response without one for a response.
_REASONS: Final = {int(status): status.phrase.encode() for status in HTTPStatus}
_METHOD: Final = re.compile(METHOD)
_TARGET: Final = re.compile(TARGET)
_WITH_CONTENT: Final = frozenset({b"POST", b"PUT", b"PATCH"})
_Special = dict[bytes, list[bytes]]


@remembered
def read_request(headers: Headers, *, ended: bool) -> RequestHead:
    """`ended`: there is no body. Raises MessageError."""
    pseudo, fields, special = _split(headers)
    method, target = pseudo[b":method"], pseudo.get(b":path", b"")
    protocol = pseudo.get(b":protocol")
    if method == b"CONNECT":
        if protocol != websocket.PROTOCOL:
            raise MessageError(501, "CONNECT inside a tunnel, but for WebSockets, is not supported")
        if ended or b"content-length" in special:
            raise MessageError(400, "a WebSocket that ends with its head, or has a length")
        websocket.key_of(fields)
        method = b"GET"  # as policies and HTTP/1.1 know it
    elif protocol is not None:
        raise MessageError(400, "a :protocol without CONNECT")
    if _METHOD.fullmatch(method) is None:
        raise MessageError(400, "malformed :method")
    if len(target) > MAX_START_LINE:
        raise MessageError(414, f"a :path of more than {MAX_START_LINE} bytes")
    if target[:1] != b"/" or _TARGET.fullmatch(target) is None:
        raise MessageError(400, "malformed :path")
    if pseudo.get(b":scheme") not in (b"http", b"https"):
        raise MessageError(400, "a :scheme other than http and https")
    refuse_lookalikes(fields)
    hosts = special.get(b"host", [])
    if b":authority" in pseudo:
        if hosts and [host.lower() for host in hosts] != [pseudo[b":authority"].lower()]:
            raise MessageError(400, "the host in :authority is not the one in Host")
        hosts = [pseudo[b":authority"]]
    if len(hosts) != 1 or HOST.fullmatch(hosts[0]) is None:
        raise MessageError(400, "malformed :authority, or none")
    fields.insert(0, (b"host", hosts[0]))
    if b"cookie" in special:  # which may come in crumbs (RFC 9113 section 8.2.3)
        fields.append((b"cookie", b"; ".join(filter(None, special[b"cookie"]))))
    framing = _request_framing(special, method, ended=ended or protocol is not None)
    expects = expects_continue(special.get(b"expect", ()), framing)
    if expects:
        fields.append((b"expect", b"100-continue"))
    return RequestHead(
        method.decode(),
        target.decode(),
        _kept(headers, fields),
        framing,
        protocol=HTTP2,
        expects_continue=expects,
        takes_trailers=b"te" in special,
        upgrades=protocol or b"",
    )


@remembered
def read_response(headers: Headers, method: str, *, ended: bool, upgrades: bool = False) -> ResponseHead:
    """What answers `method`; `upgrades`: a WebSocket was asked for, so that 2xx begins it. Raises MessageError."""
    pseudo, fields, special = _split(headers)
    status = int(pseudo[b":status"])
    if status < 100 or status == 101:
        raise MessageError(502, f"a response with status {status}")
    fields += [(b"cookie", value) for value in special.get(b"cookie", ())]
    lengths = special.get(b"content-length")
    if upgrades and 200 <= status < 300:
        if lengths:
            raise MessageError(502, "a WebSocket with a Content-Length")
        return ResponseHead(101, _REASONS[101], websocket.without_accept(fields))
    try:
        said = read_length(lengths) if lengths else None
    except MessageError as error:
        error.status = 502
        raise
    if status < 200 or status == 204:
        framing = NO_BODY
    elif method == "HEAD" or status == 304:
        framing = Framing(Ending.NONE, said.length if said else None)
    elif ended and not (said and said.length):
        framing = said or NO_BODY
    else:
        framing = said or CHUNKED
    return ResponseHead(status, _REASONS.get(status, b""), _kept(headers, fields), framing)


def _kept(headers: Headers, fields: list[tuple[bytes, bytes]]) -> Fields:
    return Known(fields) if isinstance(headers, tuple) else fields


def written_request(head: RequestHead) -> Headers:
    """Raises ValueError for a head that no reader of ours would take."""
    (name, host), *others = head.fields
    if name != b"host":
        host = next(value for name, value in others if name == b"host")
        others = [field for field in head.fields if field[0] != b"host"]
    headers = [
        (b":method", head.method.encode()),
        (b":scheme", b"http"),
        (b":authority", host),
        (b":path", head.target.encode()),
        *others,
    ]
    if head.upgrades:
        headers[:1] = [(b":method", b"CONNECT"), (b":protocol", websocket.PROTOCOL)]
    if head.takes_trailers:
        headers.append((b"te", b"trailers"))
    return _written(headers, head.framing, request=True)


def written_response(head: ResponseHead) -> Headers:
    """Raises ValueError for a head that no reader of ours would take."""
    if head.switches:
        return _written([(b":status", b"200"), *head.fields], NO_BODY, request=False)
    return _written_response(head.fields, head.status, head.framing)


@remembered
def _written_response(fields: Fields, status: int, framing: Framing) -> Headers:
    return _written([(b":status", b"%d" % status), *fields], framing, request=False)


@remembered
def written_trailers(trailers: Fields) -> Headers:
    """Raises ValueError for what is none."""
    if not well_formed_trailers(trailers):
        raise ValueError(f"refused to write malformed trailers: {trailers!r:.200}")
    return trailers


def _split(headers: Headers) -> tuple[dict[bytes, bytes], list[tuple[bytes, bytes]], _Special]:
    """Pseudo-header fields, the fields that go on as they are, and those that are about this connection or framing."""
    pseudo: dict[bytes, bytes] = {}
    fields: list[tuple[bytes, bytes]] = []
    special: _Special = {}
    for name, value in headers:
        if name[:1] == b":":
            pseudo[name] = value
        elif name in OF_CONNECTION or name in (b"cookie", b"expect", b"host"):
            special.setdefault(name, []).append(value)
        else:
            fields.append((name, value))
    return pseudo, fields, special


def _request_framing(special: _Special, method: bytes, *, ended: bool) -> Framing:
    lengths = special.get(b"content-length")
    said = read_length(lengths) if lengths else None
    if not ended:
        return said or CHUNKED
    if said is not None and said.length:
        raise MessageError(400, "a request without the body that its Content-Length says")
    return said or (length(0) if method in _WITH_CONTENT else NO_BODY)


def _written(headers: list[tuple[bytes, bytes]], framing: Framing, *, request: bool) -> Headers:
    if framing.length is not None:
        headers.append((b"content-length", b"%d" % framing.length))
    if not well_formed(headers, request=request):
        raise ValueError(f"refused to write a malformed head: {headers!r:.200}")
    return headers
