"""HTTP/1.1 in whatever pieces it comes: what is written is read back, and pieces change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tests.support.http1_vectors import REFUSED, TAKEN
from waypoint.http1 import (
    CHUNKED,
    END,
    NO_BODY,
    UNTIL_CLOSE,
    Body,
    Ending,
    Framing,
    MessageError,
    RequestHead,
    RequestReader,
    RequestWriter,
    ResponseHead,
    ResponseReader,
    ResponseWriter,
    length,
)

NAMES = st.sampled_from([b"a", b"b-c", b"x-request-id", b"cookie", b"!#$%&'*+-.^`|~"])
VALUES = st.sampled_from([b"", b"x", b"a  b", b"caf\xc3\xa9", b"a:b, c", b"0" * 300])
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=4)
BODIES = st.lists(st.binary(max_size=40), max_size=4)
CUTS = st.lists(st.integers(0, 2000), max_size=6)


def pieces(data: bytes, cuts: Iterable[int]) -> Sequence[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[begin:end] for begin, end in pairwise(places)]


def joined(events: Iterable[object]) -> list[object]:
    """Bodies that were cut up, in one piece."""
    whole: list[object] = []
    for event in events:
        if isinstance(event, Body) and whole and isinstance(whole[-1], Body):
            whole[-1] = Body(whole[-1].data + event.data)
        else:
            whole.append(event)
    return whole


@st.composite
def requests(draw: st.DrawFn) -> tuple[RequestHead, list[bytes]]:
    parts = draw(BODIES)
    total = sum(map(len, parts))
    framing = draw(st.sampled_from([CHUNKED, length(total), *([NO_BODY] if not total else [])]))
    head = RequestHead(
        draw(st.sampled_from(["GET", "POST", "HEAD", "M-SEARCH"])),
        draw(st.sampled_from(["/", "/a/b?c=d", "/%20?{}", "/" + "x" * 500])),
        [(b"host", draw(st.sampled_from([b"a", b"a.b:80", b"[::1]:1"]))), *draw(FIELDS)],
        framing,
    )
    return head, parts


@given(st.lists(requests(), min_size=1, max_size=3), CUTS)
def test_requests_one_after_the_other(messages: list[tuple[RequestHead, list[bytes]]], cuts: list[int]) -> None:
    sent, expected = b"", []
    for head, parts in messages:
        writer = RequestWriter()
        sent += writer.head(head) + b"".join(map(writer.body, parts)) + writer.end()
        body = b"".join(parts)
        expected += [head, *([Body(body)] if body else []), END]
    reader = RequestReader(b"dialled:1")
    events: list[object] = []
    for piece in pieces(sent, cuts):
        new = reader.feed(piece)
        while new:
            events += new
            new = reader.proceed() if new[-1] is END else []
    assert joined(events) == expected
    assert reader.idle
    reader.eof()


@given(requests(), BODIES, FIELDS, st.sampled_from([200, 204, 304, 404]), st.data(), CUTS)
def test_responses(
    request: tuple[RequestHead, list[bytes]],
    parts: list[bytes],
    fields: list[tuple[bytes, bytes]],
    status: int,
    data: st.DataObject,
    cuts: list[int],
) -> None:
    asked, body = request[0], b"".join(parts)
    framings = [NO_BODY] if status in (204, 304) else [CHUNKED, UNTIL_CLOSE, length(len(body))]
    framing = data.draw(st.sampled_from(framings))
    interim = ResponseHead(103, b"Early Hints", [(b"link", b"</a>")])
    response = ResponseHead(status, b"Fine", fields, framing)
    writer = ResponseWriter(asked)
    sent = writer.head(interim) + writer.head(response)
    if framing is not NO_BODY:
        sent += b"".join(map(writer.body, parts))
    sent += writer.end()

    reader = ResponseReader()
    reader.expect(asked.method)
    events: list[object] = []
    for piece in pieces(sent, cuts):
        events += reader.feed(piece)
    assert reader.reusable
    if asked.method == "HEAD":
        read = Framing(Ending.NONE, framing.length)
    else:
        read = CHUNKED if framing is UNTIL_CLOSE else framing
    head = ResponseHead(status, b"Fine", fields, read)
    content = [Body(body)] if body and read.ending is not Ending.NONE else []
    assert joined(events) == [interim, head, *content, END]


def outcome(reader: RequestReader | ResponseReader, parts: Iterable[bytes]) -> tuple[list[object], int]:
    """The events, and the status of the refusal or 0."""
    events: list[object] = []
    try:
        for part in parts:
            events += reader.feed(part)
    except MessageError as error:
        return joined(events), error.status
    return joined(events), 0


def _request_reader() -> RequestReader:
    return RequestReader(b"dialled:1")


def _response_reader() -> ResponseReader:
    reader = ResponseReader()
    reader.expect("GET")
    return reader


PARTS = (
    b"GET / HTTP/1.1", b"HTTP/1.1 200 OK", b"HTTP/1.1 100 Continue", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\0", b": ",
    b"Host: a", b"Content-Length: 3", b"Transfer-Encoding: chunked", b"3", b"0", b"abc", b";x",
)  # fmt: skip
ANYTHING = (
    st.binary(max_size=200)
    | st.sampled_from([*REFUSED.values(), *TAKEN.values()])
    | st.lists(st.sampled_from(PARTS), max_size=16).map(b"".join)
)


@given(ANYTHING, CUTS, st.sampled_from([_request_reader, _response_reader]))
def test_pieces_change_nothing(data: bytes, cuts: list[int], new: Callable[[], RequestReader | ResponseReader]) -> None:
    at_once, refused = outcome(new(), [data])
    in_pieces, refused_in_pieces = outcome(new(), pieces(data, cuts))
    assert refused == refused_in_pieces
    # Of what is refused, more was read before the piece in which it showed.
    assert refused or at_once == in_pieces
