"""The 147 cases of h2spec 2.6 on raw frames, against a running uProxy: for a CONNECT where h2spec sends a GET.

h2spec itself cannot be used: it has no client certificate, and a uProxy answers requests that are no CONNECT with 400.
Sections are h2spec's: `generic`, RFC 7540 (`http2`) and RFC 7541 (`hpack`). A stream error may be answered with a
connection error of the same code, as there (RFC 9113 section 5.4.2). The application greets whoever connects, so that
there is DATA to wait for, and closes when its peer has.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from benchmarks import pairs
from benchmarks.pairs import APP, DB_ADDRESS
from tests.support.envoy import assert_no_bug_was_logged
from tests.support.hbone import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PRIORITY,
    PRIORITY_FLAG,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    literal_block,
    settings,
    u32,
)
from tests.support.raw_peer import PATIENCE_S, Peer, Server
from uproxy.hbone import MAX_CONCURRENT_STREAMS, MAX_FRAME_SIZE, ErrorCode

pytestmark = pytest.mark.root

GREETING = b"hello"
CONNECT = [(b":method", b"CONNECT"), (b":authority", f"{DB_ADDRESS}:{APP[1]}".encode())]
EMPTY_TABLE = b"\x20"
"""We have acknowledged a table of 0: each block says that we hold to it (RFC 7541 section 4.2)."""
BLOCK = EMPTY_TABLE + literal_block(CONNECT)
TABLE_SIZE, ENABLE_PUSH, INITIAL_WINDOW, MAX_FRAME = 1, 2, 4, 5
LARGEST_WINDOW = (1 << 31) - 1
PAYLOAD = b"h2spec!!"
ENDING = END_HEADERS | END_STREAM
PROTOCOL, CLOSED, SIZE = ErrorCode.PROTOCOL_ERROR, ErrorCode.STREAM_CLOSED, ErrorCode.FRAME_SIZE_ERROR
FLOW, COMPRESSION, REFUSED = ErrorCode.FLOW_CONTROL_ERROR, ErrorCode.COMPRESSION_ERROR, ErrorCode.REFUSED_STREAM

Case = Callable[[Peer], None]


def request(stream_id: int = 1, flags: int = END_HEADERS) -> bytes:
    return frame(HEADERS, flags, stream_id, BLOCK)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    with (
        pairs.wire(tmp_path_factory.mktemp("wire")) as wire,
        pairs.uproxy_server(wire) as process,
        wire.db.listen(APP, PATIENCE_S) as listener,
    ):
        over = threading.Event()
        serving = threading.Thread(target=greet, args=(listener, over))
        serving.start()
        try:
            yield Server(wire, process.pid, listener)
        finally:
            over.set()
            serving.join()
        assert_no_bug_was_logged(wire)


def greet(listener: socket.socket, over: threading.Event) -> None:
    """Greet whoever connects, and close when he has closed."""
    listener.settimeout(0.1)
    held: list[socket.socket] = []
    while not over.is_set():
        with suppress(OSError):  # nobody came, or he has gone already
            application, _ = listener.accept()
            held.append(application)
            application.sendall(GREETING)
            application.setblocking(False)
        for application in held.copy():
            with suppress(BlockingIOError):
                try:
                    while application.recv(1 << 16):
                        pass
                except ConnectionError:
                    pass
                application.close()
                held.remove(application)
    for application in held:
        application.close()


# -- what is expected


def answered(peer: Peer, stream_id: int = 1, status: bytes = b"200") -> None:
    peer.until(lambda: stream_id in peer.answers and peer.answers[stream_id].status)
    assert peer.answers[stream_id].status == status, peer.goaways


def greeted(peer: Peer, stream_id: int = 1, length: int = len(GREETING)) -> None:
    answered(peer, stream_id)
    peer.until(lambda: len(peer.answers[stream_id].data) >= length)
    assert peer.answers[stream_id].data == GREETING[:length], peer.goaways


def ponged(peer: Peer) -> None:
    peer.until(lambda: PAYLOAD in peer.pongs)
    assert PAYLOAD in peer.pongs, peer.goaways


def still_open(peer: Peer) -> None:
    peer.send(frame(PING, 0, 0, PAYLOAD))
    ponged(peer)


def stream_gone(peer: Peer, stream_id: int = 1) -> None:
    peer.until(lambda: stream_id in peer.answers and peer.answers[stream_id].ended)
    assert peer.answers[stream_id].ended, peer.goaways


def connection_error(peer: Peer, *codes: ErrorCode) -> None:
    peer.until(lambda: False)
    assert [code for _, code, _ in peer.goaways] == [peer.goaways[0][1]]
    assert peer.goaways[0][1] in codes


def stream_error(peer: Peer, *codes: ErrorCode, stream_id: int = 1) -> None:
    def ended() -> bool:
        return bool(peer.goaways) or (stream_id in peer.answers and peer.answers[stream_id].reset is not None)

    peer.until(ended)
    found = peer.goaways[0][1] if peer.goaways else peer.answers[stream_id].reset
    assert found in codes, found


def refused(*frames: bytes, by: Callable[..., None] = connection_error, codes: tuple[ErrorCode, ...]) -> Case:
    def run(peer: Peer) -> None:
        peer.send(b"".join(frames))
        by(peer, *codes)

    return run


def breaks(*frames: bytes, code: ErrorCode) -> Case:
    """A connection error of one code."""
    return refused(*frames, codes=(code,))


def incomplete(headers: list[tuple[bytes, bytes]]) -> Case:
    """A malformed request may be answered before its stream ends (RFC 9113 section 8.1.1); h2spec knows resets only."""

    def run(peer: Peer) -> None:
        peer.send(frame(HEADERS, ENDING, 1, EMPTY_TABLE + literal_block(headers)))
        answered(peer, status=b"400")
        stream_gone(peer)

    return run


def malformed(headers: list[tuple[bytes, bytes]], flags: int = ENDING) -> Case:
    return refused(frame(HEADERS, flags, 1, EMPTY_TABLE + literal_block(headers)), by=stream_error, codes=(PROTOCOL,))


def accepted(*frames: bytes) -> Case:
    """These, and then a PING is answered."""

    def run(peer: Peer) -> None:
        peer.send(b"".join(frames))
        still_open(peer)

    return run


def served(*frames: bytes) -> Case:
    """These hold a request, which is answered."""

    def run(peer: Peer) -> None:
        peer.send(b"".join(frames))
        answered(peer)

    return run


def after_close(*frames: bytes, codes: tuple[ErrorCode, ...] = ()) -> Case:
    """These come when the stream has ended on both sides. No code: they are accepted."""

    def run(peer: Peer) -> None:
        peer.send(request(flags=ENDING))
        stream_gone(peer)
        peer.send(b"".join(frames))
        if codes:
            connection_error(peer, *codes)
        else:
            still_open(peer)

    return run


def header(representation: bytes) -> Case:
    """A request with one more header field, in this representation."""
    return served(frame(HEADERS, END_HEADERS, 1, BLOCK + representation))


def priority(stream_id: int, depends_on: int = 0, weight: int = 255, *, exclusive: bool = False) -> bytes:
    return frame(PRIORITY, 0, stream_id, u32(depends_on | (1 << 31 if exclusive else 0)) + bytes([weight]))


# -- cases that take more than a line


def window_on_half_closed(*frames: bytes) -> Case:
    def run(peer: Peer) -> None:
        peer.send(settings([(INITIAL_WINDOW, 0)]) + request(flags=ENDING) + b"".join(frames))
        answered(peer)
        peer.send(frame(WINDOW_UPDATE, 0, 1, u32(1)))
        greeted(peer, length=1)

    return run


def data_of_two_frames(peer: Peer) -> None:
    peer.send(request() + frame(DATA, 0, 1, b"test") + frame(DATA, END_STREAM, 1, b"test"))
    answered(peer)


def connection_window(peer: Peer) -> None:
    peer.send(frame(WINDOW_UPDATE, 0, 0, u32(1)) + request())
    greeted(peer)


def invalid_preface(peer: Peer) -> None:
    with peer.server.tls() as end:
        end.sendall(b"INVALID CONNECTION PREFACE\r\n\r\n")
        with suppress(ConnectionError):
            while end.recv(4096):
                pass
    still_open(peer)


def too_many_streams(peer: Peer) -> None:
    count = MAX_CONCURRENT_STREAMS + 1
    for first in range(1, 2 * count, 128):
        peer.send(b"".join(request(stream_id) for stream_id in range(first, min(first + 128, 2 * count), 2)))
    last = 2 * count - 1
    stream_error(peer, PROTOCOL, REFUSED, stream_id=last)


def bad_ping_then_nothing_is_answered(peer: Peer) -> None:
    peer.send(frame(PING, 0, 0, b"\0" * 6) + frame(PING, 0, 0, PAYLOAD))
    peer.until(lambda: False)
    assert peer.closed
    assert not peer.pongs


def several_windows_in_one_frame(peer: Peer) -> None:
    peer.send(settings([(INITIAL_WINDOW, 100), (INITIAL_WINDOW, 1)]) + request())
    greeted(peer, length=1)
    still_open(peer)
    assert peer.answers[1].data == GREETING[:1]


def acknowledged(peer: Peer) -> None:
    before = peer.acknowledged
    peer.send(settings([(ENABLE_PUSH, 0)]))
    peer.until(lambda: peer.acknowledged > before)
    assert peer.acknowledged == before + 1


def unanswered_pong(peer: Peer) -> None:
    peer.send(frame(PING, ACK, 0, b"invalid!"))
    still_open(peer)
    assert peer.pongs == [PAYLOAD]


def window_of_one(peer: Peer) -> None:
    peer.send(settings([(INITIAL_WINDOW, 1)]) + request())
    greeted(peer, length=1)
    still_open(peer)
    assert peer.answers[1].data == GREETING[:1]


def window_changes_after_headers(peer: Peer) -> None:
    peer.send(settings([(INITIAL_WINDOW, 0)]) + request())
    answered(peer)
    peer.send(settings([(INITIAL_WINDOW, 1)]))
    greeted(peer, length=1)


def window_below_zero(peer: Peer) -> None:
    peer.send(settings([(INITIAL_WINDOW, 3)]) + request())
    greeted(peer, length=3)
    peer.send(settings([(INITIAL_WINDOW, 2)]) + frame(WINDOW_UPDATE, 0, 1, u32(1)))
    still_open(peer)
    assert peer.answers[1].data == GREETING[:3], "its window is 0"
    peer.send(frame(WINDOW_UPDATE, 0, 1, u32(1)))
    greeted(peer, length=4)


def stream_window_overflows(peer: Peer) -> None:
    peer.send(request() + frame(WINDOW_UPDATE, 0, 1, u32(LARGEST_WINDOW)) * 2)
    stream_error(peer, FLOW)


def goaway_of_an_unknown_code(peer: Peer) -> None:
    peer.send(frame(GOAWAY, 0, 0, u32(0) + u32(0xFF)) + frame(PING, 0, 0, PAYLOAD))
    peer.until(lambda: peer.pongs or peer.closed)


def a_content_length_is_no_business_of_a_tunnel(*data: bytes) -> Case:
    """h2spec wants an error. Our refusal comes before any content: a POST is no CONNECT."""
    headers = [(b":method", b"POST"), (b":scheme", b"https"), (b":path", b"/"), (b"content-length", b"1")]

    def run(peer: Peer) -> None:
        last = frame(DATA, END_STREAM, 1, data[-1])
        first = b"".join(frame(DATA, 0, 1, part) for part in data[:-1])
        peer.send(frame(HEADERS, END_HEADERS, 1, EMPTY_TABLE + literal_block(headers)) + first + last)
        answered(peer, status=b"400")

    return run


def another_method(method: bytes, *more: bytes, flags: int = ENDING, trailer: bool = False) -> Case:
    headers = [(b":method", method), (b":scheme", b"https"), (b":authority", b"db"), (b":path", b"/")]
    headers += [(b"trailer", b"x-test")] if trailer else []

    def run(peer: Peer) -> None:
        peer.send(frame(HEADERS, flags, 1, EMPTY_TABLE + literal_block(headers)) + b"".join(more))
        answered(peer, status=b"400")

    return run


GET = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"db"), (b":path", b"/")]


def without(name: bytes) -> list[tuple[bytes, bytes]]:
    return [pair for pair in GET if pair[0] != name]


CASES: dict[str, Case] = {
    "generic/1/1: Sends a client connection preface": still_open,
    "generic/2/1: Sends a PRIORITY frame on idle stream": accepted(priority(1)),
    "generic/2/2: Sends a WINDOW_UPDATE frame on half-closed (remote) stream": window_on_half_closed(),
    "generic/2/3: Sends a PRIORITY frame on half-closed (remote) stream": window_on_half_closed(priority(1)),
    "generic/2/4: Sends a RST_STREAM frame on half-closed (remote) stream": accepted(
        request(flags=ENDING), frame(RST_STREAM, 0, 1, u32(8))
    ),
    "generic/2/5: Sends a PRIORITY frame on closed stream": after_close(priority(1)),
    "generic/3.1/1: Sends a DATA frame": served(request(), frame(DATA, END_STREAM, 1, b"test")),
    "generic/3.1/2: Sends multiple DATA frames": data_of_two_frames,
    "generic/3.1/3: Sends a DATA frame with padding": served(
        request(), frame(DATA, END_STREAM | PADDED, 1, b"\x06test" + bytes(6))
    ),
    "generic/3.2/1: Sends a HEADERS frame": served(request(flags=ENDING)),
    "generic/3.2/2: Sends a HEADERS frame with padding": served(
        frame(HEADERS, ENDING | PADDED, 1, b"\x06" + BLOCK + bytes(6))
    ),
    "generic/3.2/3: Sends a HEADERS frame with priority": served(
        frame(HEADERS, ENDING | PRIORITY_FLAG, 1, u32(0) + b"\xff" + BLOCK)
    ),
    "generic/3.3/1: Sends a PRIORITY frame with priority 1": served(priority(1, weight=0), request()),
    "generic/3.3/2: Sends a PRIORITY frame with priority 256": served(priority(1), request()),
    "generic/3.3/3: Sends a PRIORITY frame with stream dependency": served(priority(3, 1, 0), request()),
    "generic/3.3/4: Sends a PRIORITY frame with exclusive": served(priority(1, exclusive=True), request()),
    "generic/3.3/5: Sends a PRIORITY frame for an idle stream, then send a HEADER frame for a lower stream ID": served(
        priority(3), request()
    ),
    "generic/3.4/1: Sends a RST_STREAM frame": accepted(request(), frame(RST_STREAM, 0, 1, u32(8))),
    "generic/3.5/1: Sends a SETTINGS frame": acknowledged,
    "generic/3.7/1: Sends a PING frame": still_open,
    "generic/3.8/1: Sends a GOAWAY frame": accepted(frame(GOAWAY, 0, 0, u32(0) + u32(0))),
    "generic/3.9/1: Sends a WINDOW_UPDATE frame with stream ID 0": connection_window,
    "generic/3.9/2: Sends a WINDOW_UPDATE frame with stream ID 1": window_on_half_closed(),
    "generic/3.10/1: Sends a CONTINUATION frame": served(
        frame(HEADERS, END_STREAM, 1, BLOCK[:10]), frame(CONTINUATION, END_HEADERS, 1, BLOCK[10:])
    ),
    "generic/3.10/2: Sends multiple CONTINUATION frames": served(
        frame(HEADERS, END_STREAM, 1, BLOCK[:10]),
        frame(CONTINUATION, 0, 1, BLOCK[10:13]),
        frame(CONTINUATION, END_HEADERS, 1, BLOCK[13:]),
    ),
    "generic/4/1: Sends a GET request": another_method(b"GET"),
    "generic/4/2: Sends a HEAD request": another_method(b"HEAD"),
    "generic/4/3: Sends a POST request": another_method(
        b"POST", frame(DATA, END_STREAM, 1, b"test"), flags=END_HEADERS
    ),
    "generic/4/4: Sends a POST request with trailers": another_method(
        b"POST",
        frame(DATA, 0, 1, b"test"),
        frame(HEADERS, ENDING, 1, literal_block([(b"x-test", b"ok")])),
        flags=END_HEADERS,
        trailer=True,
    ),
    "generic/5/1: Sends a indexed header field representation": header(b"\xba"),
    "generic/5/2: ... literal with incremental indexing - indexed name": header(b"\x7a\x06h2spec"),
    "generic/5/3: ... literal with incremental indexing - indexed name (with Huffman coding)": header(
        b"\x7a\x84\x9c\x48\xac\xa4"
    ),
    "generic/5/4: ... literal with incremental indexing - new name": header(b"\x40\x06x-test\x06h2spec"),
    "generic/5/5: ... literal with incremental indexing - new name (with Huffman coding)": header(
        b"\x40\x85\xf2\xb2\x4a\x84\xff\x84\x9c\x48\xac\xa4"
    ),
    "generic/5/6: ... literal without indexing - indexed name": header(b"\x0f\x2b\x06h2spec"),
    "generic/5/7: ... literal without indexing - indexed name (with Huffman coding)": header(
        b"\x0f\x2b\x84\x9c\x48\xac\xa4"
    ),
    "generic/5/8: ... literal without indexing - new name": header(b"\x00\x06x-test\x06h2spec"),
    "generic/5/9: ... literal without indexing - new name (huffman encoded)": header(
        b"\x00\x85\xf2\xb2\x4a\x84\xff\x84\x9c\x48\xac\xa4"
    ),
    "generic/5/10: ... literal never indexed - indexed name": header(b"\x1f\x2b\x06h2spec"),
    "generic/5/11: ... literal never indexed - indexed name (huffman encoded)": header(b"\x1f\x2b\x84\x9c\x48\xac\xa4"),
    "generic/5/12: ... literal never indexed - new name": header(b"\x10\x06x-test\x06h2spec"),
    "generic/5/13: ... literal never indexed - new name (huffman encoded)": header(
        b"\x10\x85\xf2\xb2\x4a\x84\xff\x84\x9c\x48\xac\xa4"
    ),
    "generic/5/14: Sends a dynamic table size update": served(frame(HEADERS, END_HEADERS, 1, BLOCK)),
    "generic/5/15: Sends multiple dynamic table size update": served(
        frame(HEADERS, END_HEADERS, 1, EMPTY_TABLE + BLOCK)
    ),
    "http2/3.5/1: Sends client connection preface": still_open,
    "http2/3.5/2: Sends invalid connection preface": invalid_preface,
    "http2/4.1/1: Sends a frame with unknown type": accepted(frame(0x16, 0, 0, bytes(8))),
    "http2/4.1/2: Sends a frame with undefined flag": served(request(flags=ENDING | 0x50)),
    "http2/4.1/3: Sends a frame with reserved field bit": accepted(frame(PING, 0, 1 << 31, b"reserved")),
    "http2/4.2/1: Sends a DATA frame with 2^14 octets in length": served(
        request(), frame(DATA, END_STREAM, 1, bytes(1 << 14))
    ),
    "http2/4.2/2: Sends a large size DATA frame that exceeds the SETTINGS_MAX_FRAME_SIZE": refused(
        request(), frame(DATA, 0, 1, length=MAX_FRAME_SIZE + 1), by=stream_error, codes=(SIZE,)
    ),
    "http2/4.2/3: Sends a large size HEADERS frame that exceeds the SETTINGS_MAX_FRAME_SIZE": breaks(
        frame(HEADERS, ENDING, 1, length=MAX_FRAME_SIZE + 1), code=SIZE
    ),
    "http2/4.3/1: Sends invalid header block fragment": breaks(
        frame(HEADERS, ENDING, 1, EMPTY_TABLE + b"\x40\x01\x41\x8f\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
        code=COMPRESSION,
    ),
    "http2/4.3/2: Sends a PRIORITY frame while sending the header blocks": breaks(
        request(flags=0), priority(1), code=PROTOCOL
    ),
    "http2/4.3/3: Sends a HEADERS frame to another stream while sending the header blocks": breaks(
        request(flags=0), request(3), code=PROTOCOL
    ),
    "http2/5.1/1: idle: Sends a DATA frame": breaks(frame(DATA, END_STREAM, 1, b"test"), code=PROTOCOL),
    "http2/5.1/2: idle: Sends a RST_STREAM frame": breaks(frame(RST_STREAM, 0, 1, u32(8)), code=PROTOCOL),
    "http2/5.1/3: idle: Sends a WINDOW_UPDATE frame": breaks(frame(WINDOW_UPDATE, 0, 1, u32(100)), code=PROTOCOL),
    "http2/5.1/4: idle: Sends a CONTINUATION frame": breaks(frame(CONTINUATION, END_HEADERS, 1, BLOCK), code=PROTOCOL),
    "http2/5.1/5: half closed (remote): Sends a DATA frame": refused(
        request(flags=ENDING), frame(DATA, END_STREAM, 1, b"test"), by=stream_error, codes=(CLOSED,)
    ),
    "http2/5.1/6: half closed (remote): Sends a HEADERS frame": refused(
        request(flags=ENDING), request(flags=ENDING), by=stream_error, codes=(CLOSED,)
    ),
    "http2/5.1/7: half closed (remote): Sends a CONTINUATION frame": refused(
        request(flags=ENDING), frame(CONTINUATION, END_HEADERS, 1, BLOCK), by=stream_error, codes=(CLOSED, PROTOCOL)
    ),
    "http2/5.1/8: closed: Sends a DATA frame after sending RST_STREAM frame": refused(
        request(),
        frame(RST_STREAM, 0, 1, u32(8)),
        frame(DATA, END_STREAM, 1, b"test"),
        by=stream_error,
        codes=(CLOSED,),
    ),
    "http2/5.1/9: closed: Sends a HEADERS frame after sending RST_STREAM frame": refused(
        request(), frame(RST_STREAM, 0, 1, u32(8)), request(flags=ENDING), by=stream_error, codes=(CLOSED,)
    ),
    "http2/5.1/10: closed: Sends a CONTINUATION frame after sending RST_STREAM frame": refused(
        request(),
        frame(RST_STREAM, 0, 1, u32(8)),
        frame(CONTINUATION, END_HEADERS, 1, BLOCK),
        by=stream_error,
        codes=(CLOSED, PROTOCOL),
    ),
    "http2/5.1/11: closed: Sends a DATA frame": after_close(frame(DATA, END_STREAM, 1, b"test"), codes=(CLOSED,)),
    "http2/5.1/12: closed: Sends a HEADERS frame": after_close(request(flags=ENDING), codes=(CLOSED,)),
    "http2/5.1/13: closed: Sends a CONTINUATION frame": after_close(
        frame(CONTINUATION, END_HEADERS, 1, BLOCK), codes=(CLOSED, PROTOCOL)
    ),
    "http2/5.1.1/1: Sends even-numbered stream identifier": breaks(request(2), code=PROTOCOL),
    "http2/5.1.1/2: Sends stream identifier that is numerically smaller than previous": breaks(
        request(5), request(3), code=PROTOCOL
    ),
    "http2/5.1.2/1: Sends HEADERS frames that causes their advertised concurrent stream limit to be exceeded": (
        too_many_streams
    ),
    "http2/5.3.1/1: Sends HEADERS frame that depends on itself": refused(
        frame(HEADERS, ENDING | PRIORITY_FLAG, 1, u32(1) + b"\xff" + BLOCK), by=stream_error, codes=(PROTOCOL,)
    ),
    "http2/5.3.1/2: Sends PRIORITY frame that depend on itself": refused(
        priority(2, 2), by=stream_error, codes=(PROTOCOL,)
    ),
    "http2/5.4.1/1: Sends an invalid PING frame for connection close": bad_ping_then_nothing_is_answered,
    "http2/5.4.1/2: Sends an invalid PING frame to receive GOAWAY frame": breaks(
        frame(PING, 0, 0, b"\0" * 6), code=SIZE
    ),
    "http2/5.5/1: Sends an unknown extension frame": accepted(frame(0xFF, 0, 0, bytes(8))),
    "http2/5.5/2: Sends an unknown extension frame in the middle of a header block": breaks(
        request(flags=0), frame(0xFF, 0, 1, bytes(8)), code=PROTOCOL
    ),
    "http2/6.1/1: Sends a DATA frame with 0x0 stream identifier": breaks(
        request(), frame(DATA, END_STREAM, 0, b"test"), code=PROTOCOL
    ),
    'http2/6.1/2: Sends a DATA frame on the stream that is not in "open" or "half-closed (local)" state': refused(
        request(flags=ENDING), frame(DATA, END_STREAM, 1, b"test"), by=stream_error, codes=(CLOSED,)
    ),
    "http2/6.1/3: Sends a DATA frame with invalid pad length": breaks(
        request(), frame(DATA, END_STREAM | PADDED, 1, b"\x06Test"), code=PROTOCOL
    ),
    "http2/6.2/1: Sends a HEADERS frame without the END_HEADERS flag, and a PRIORITY frame": breaks(
        request(flags=0), priority(1), code=PROTOCOL
    ),
    "http2/6.2/2: Sends a HEADERS frame to another stream while sending a HEADERS frame": breaks(
        request(flags=0), request(3), code=PROTOCOL
    ),
    "http2/6.2/3: Sends a HEADERS frame with 0x0 stream identifier": breaks(request(0), code=PROTOCOL),
    "http2/6.2/4: Sends a HEADERS frame with invalid pad length": breaks(
        frame(HEADERS, ENDING | PADDED, 1, bytes([len(BLOCK) + 1]) + BLOCK), code=PROTOCOL
    ),
    "http2/6.3/1: Sends a PRIORITY frame with 0x0 stream identifier": breaks(priority(0), code=PROTOCOL),
    "http2/6.3/2: Sends a PRIORITY frame with a length other than 5 octets": refused(
        request(), frame(PRIORITY, 0, 1, u32(1 << 31)), by=stream_error, codes=(SIZE,)
    ),
    "http2/6.4/1: Sends a RST_STREAM frame with 0x0 stream identifier": breaks(
        request(), frame(RST_STREAM, 0, 0, u32(8)), code=PROTOCOL
    ),
    "http2/6.4/2: Sends a RST_STREAM frame on a idle stream": breaks(frame(RST_STREAM, 0, 1, u32(8)), code=PROTOCOL),
    "http2/6.4/3: Sends a RST_STREAM frame with a length other than 4 octets": breaks(
        request(), frame(RST_STREAM, 0, 1, b"\0\0\0"), code=SIZE
    ),
    "http2/6.5/1: Sends a SETTINGS frame with ACK flag and payload": breaks(
        frame(SETTINGS, ACK, 0, bytes(6)), code=SIZE
    ),
    "http2/6.5/2: Sends a SETTINGS frame with a stream identifier other than 0x0": breaks(
        frame(SETTINGS, 0, 1, bytes(6)), code=PROTOCOL
    ),
    "http2/6.5/3: Sends a SETTINGS frame with a length other than a multiple of 6 octets": breaks(
        frame(SETTINGS, 0, 0, bytes(3)), code=SIZE
    ),
    "http2/6.5.2/1: SETTINGS_ENABLE_PUSH (0x2): Sends the value other than 0 or 1": breaks(
        settings([(ENABLE_PUSH, 2)]), code=PROTOCOL
    ),
    "http2/6.5.2/2: SETTINGS_INITIAL_WINDOW_SIZE (0x4): Sends the value above the maximum flow control window size": (
        breaks(settings([(INITIAL_WINDOW, 1 << 31)]), code=FLOW)
    ),
    "http2/6.5.2/3: SETTINGS_MAX_FRAME_SIZE (0x5): Sends the value below the initial value": breaks(
        settings([(MAX_FRAME, 16383)]), code=PROTOCOL
    ),
    "http2/6.5.2/4: SETTINGS_MAX_FRAME_SIZE (0x5): Sends the value above the maximum allowed frame size": breaks(
        settings([(MAX_FRAME, 1 << 24)]), code=PROTOCOL
    ),
    "http2/6.5.2/5: Sends a SETTINGS frame with unknown identifier": accepted(settings([(0xFF, 1)])),
    "http2/6.5.3/1: Sends multiple values of SETTINGS_INITIAL_WINDOW_SIZE": several_windows_in_one_frame,
    "http2/6.5.3/2: Sends a SETTINGS frame without ACK flag": acknowledged,
    "http2/6.7/1: Sends a PING frame": still_open,
    "http2/6.7/2: Sends a PING frame with ACK": unanswered_pong,
    "http2/6.7/3: Sends a PING frame with a stream identifier field value other than 0x0": breaks(
        frame(PING, 0, 1, bytes(8)), code=PROTOCOL
    ),
    "http2/6.7/4: Sends a PING frame with a length field value other than 8": breaks(
        frame(PING, 0, 0, b"\0" * 6), code=SIZE
    ),
    "http2/6.8/1: Sends a GOAWAY frame with a stream identifier other than 0x0": breaks(
        frame(GOAWAY, 0, 1, bytes(8)), code=PROTOCOL
    ),
    "http2/6.9/1: Sends a WINDOW_UPDATE frame with a flow control window increment of 0": breaks(
        frame(WINDOW_UPDATE, 0, 0, u32(0)), code=PROTOCOL
    ),
    "http2/6.9/2: Sends a WINDOW_UPDATE frame with a flow control window increment of 0 on a stream": refused(
        request(), frame(WINDOW_UPDATE, 0, 1, u32(0)), by=stream_error, codes=(PROTOCOL,)
    ),
    "http2/6.9/3: Sends a WINDOW_UPDATE frame with a length other than 4 octets": breaks(
        frame(WINDOW_UPDATE, 0, 0, b"\0\0\1"), code=SIZE
    ),
    "http2/6.9.1/1: Sends SETTINGS frame to set the initial window size to 1 and sends HEADERS frame": window_of_one,
    "http2/6.9.1/2: Sends multiple WINDOW_UPDATE frames increasing the flow control window to above 2^31-1": breaks(
        frame(WINDOW_UPDATE, 0, 0, u32(LARGEST_WINDOW)) * 2, code=FLOW
    ),
    "http2/6.9.1/3: Sends multiple WINDOW_UPDATE frames ... above 2^31-1 on a stream": stream_window_overflows,
    "http2/6.9.2/1: Changes SETTINGS_INITIAL_WINDOW_SIZE after sending HEADERS frame": window_changes_after_headers,
    "http2/6.9.2/2: Sends a SETTINGS frame for window size to be negative": window_below_zero,
    "http2/6.9.2/3: Sends a SETTINGS_INITIAL_WINDOW_SIZE settings with an exceeded maximum window size value": breaks(
        settings([(INITIAL_WINDOW, 1 << 31)]), code=FLOW
    ),
    "http2/6.10/1: Sends multiple CONTINUATION frames preceded by a HEADERS frame": served(
        frame(HEADERS, END_STREAM, 1, BLOCK[:10]),
        frame(CONTINUATION, 0, 1, BLOCK[10:13]),
        frame(CONTINUATION, END_HEADERS, 1, BLOCK[13:]),
    ),
    "http2/6.10/2: Sends a CONTINUATION frame followed by any frame other than CONTINUATION": breaks(
        frame(HEADERS, END_STREAM, 1, BLOCK[:10]),
        frame(CONTINUATION, 0, 1, BLOCK[10:]),
        frame(DATA, END_STREAM, 1, b"test"),
        code=PROTOCOL,
    ),
    "http2/6.10/3: Sends a CONTINUATION frame with 0x0 stream identifier": breaks(
        frame(HEADERS, END_STREAM, 1, BLOCK[:10]), frame(CONTINUATION, END_HEADERS, 0, BLOCK[10:]), code=PROTOCOL
    ),
    "http2/6.10/4: Sends a CONTINUATION frame preceded by a HEADERS frame with END_HEADERS flag": breaks(
        request(), frame(CONTINUATION, END_HEADERS, 1, BLOCK), code=PROTOCOL
    ),
    "http2/6.10/5: Sends a CONTINUATION frame preceded by a CONTINUATION frame with END_HEADERS flag": breaks(
        frame(HEADERS, 0, 1, BLOCK[:10]),
        frame(CONTINUATION, END_HEADERS, 1, BLOCK[10:]),
        frame(CONTINUATION, END_HEADERS, 1, BLOCK),
        code=PROTOCOL,
    ),
    "http2/6.10/6: Sends a CONTINUATION frame preceded by a DATA frame": breaks(
        request(), frame(DATA, 0, 1, b"test"), frame(CONTINUATION, END_HEADERS, 1, BLOCK), code=PROTOCOL
    ),
    "http2/7/1: Sends a GOAWAY frame with unknown error code": goaway_of_an_unknown_code,
    "http2/7/2: Sends a RST_STREAM frame with unknown error code": accepted(
        request(), frame(RST_STREAM, 0, 1, u32(0xFF))
    ),
    "http2/8.1/1: Sends a second HEADERS frame without the END_STREAM flag": refused(
        request(), request(), by=stream_error, codes=(PROTOCOL,)
    ),
    "http2/8.1.2/1: Sends a HEADERS frame that contains the header field name in uppercase letters": malformed(
        [*CONNECT, (b"X-TEST", b"ok")]
    ),
    "http2/8.1.2.1/1: Sends a HEADERS frame that contains a unknown pseudo-header field": malformed(
        [*CONNECT, (b":test", b"ok")]
    ),
    "http2/8.1.2.1/2: Sends a HEADERS frame that contains the pseudo-header field defined for response": malformed(
        [*CONNECT, (b":status", b"200")]
    ),
    "http2/8.1.2.1/3: Sends a HEADERS frame that contains a pseudo-header field as trailers": refused(
        request(), frame(HEADERS, ENDING, 1, literal_block([(b":method", b"x")])), by=stream_error, codes=(PROTOCOL,)
    ),
    "http2/8.1.2.1/4: Sends a HEADERS frame that contains a pseudo-header field that appears ... after a regular": (
        malformed([(b":method", b"CONNECT"), (b"x-test", b"ok"), (b":authority", b"10.77.0.2:8080")])
    ),
    "http2/8.1.2.2/1: Sends a HEADERS frame that contains the connection-specific header field": malformed(
        [*CONNECT, (b"connection", b"keep-alive")]
    ),
    "http2/8.1.2.2/2: Sends a HEADERS frame that contains the TE header field with any value other than trailers": (
        malformed([*CONNECT, (b"trailers", b"test"), (b"te", b"trailers, deflate")])
    ),
    'http2/8.1.2.3/1: Sends a HEADERS frame with empty ":path" pseudo-header field': incomplete(
        [*without(b":path"), (b":path", b"")]
    ),
    'http2/8.1.2.3/2: Sends a HEADERS frame that omits ":method" pseudo-header field': malformed(without(b":method")),
    'http2/8.1.2.3/3: Sends a HEADERS frame that omits ":scheme" pseudo-header field': incomplete(without(b":scheme")),
    'http2/8.1.2.3/4: Sends a HEADERS frame that omits ":path" pseudo-header field': incomplete(without(b":path")),
    'http2/8.1.2.3/5: Sends a HEADERS frame with duplicated ":method" pseudo-header field': malformed(
        [*GET, (b":method", b"GET")]
    ),
    'http2/8.1.2.3/6: Sends a HEADERS frame with duplicated ":scheme" pseudo-header field': malformed(
        [*GET, (b":scheme", b"https")]
    ),
    'http2/8.1.2.3/7: Sends a HEADERS frame with duplicated ":path" pseudo-header field': malformed(
        [*GET, (b":path", b"/")]
    ),
    'http2/8.1.2.6/1: Sends a HEADERS frame with the "content-length" header field which does not equal the DATA': (
        a_content_length_is_no_business_of_a_tunnel(b"test")
    ),
    'http2/8.1.2.6/2: Sends a HEADERS frame with the "content-length" ... of multiple DATA frames': (
        a_content_length_is_no_business_of_a_tunnel(b"test", b"test")
    ),
    "http2/8.2/1: Sends a PUSH_PROMISE frame": breaks(
        frame(PUSH_PROMISE, END_HEADERS, 1, u32(3) + BLOCK), code=PROTOCOL
    ),
    "hpack/2.3.3/1: Sends a indexed header field representation with invalid index": breaks(
        frame(HEADERS, ENDING, 1, BLOCK + b"\xff\x00"), code=COMPRESSION
    ),
    "hpack/2.3.3/2: Sends a literal header field representation with invalid index": breaks(
        frame(HEADERS, ENDING, 1, BLOCK + b"\x7f\x00\x05empty"), code=COMPRESSION
    ),
    "hpack/4.2/1: Sends a dynamic table size update at the end of header block": breaks(
        frame(HEADERS, ENDING, 1, BLOCK + b"\x20"), code=COMPRESSION
    ),
    "hpack/5.2/1: Sends a Huffman-encoded string literal representation with padding longer than 7 bits": breaks(
        frame(HEADERS, ENDING, 1, BLOCK + b"\x00\x85\xf2\xb2\x4a\x84\xff\x85\x9c\x48\xac\xa4\xff"), code=COMPRESSION
    ),
    "hpack/5.2/2: Sends a Huffman-encoded string literal representation padded by zero": breaks(
        frame(HEADERS, ENDING, 1, BLOCK + b"\x00\x85\xf2\xb2\x4a\x84\xff\x83\x9c\x48\xa0"), code=COMPRESSION
    ),
    "hpack/5.2/3: Sends a Huffman-encoded string literal representation containing the EOS symbol": breaks(
        frame(HEADERS, ENDING, 1, BLOCK + b"\x00\x85\xf2\xb2\x4a\x84\xff\x87\x9c\x48\xff\xff\xff\xff\xff"),
        code=COMPRESSION,
    ),
    "hpack/6.1/1: Sends a indexed header field representation with index 0": breaks(
        frame(HEADERS, ENDING, 1, BLOCK + b"\x80"), code=COMPRESSION
    ),
    "hpack/6.3/1: Sends a dynamic table size update larger than the value of SETTINGS_HEADER_TABLE_SIZE": breaks(
        frame(HEADERS, ENDING, 1, b"\x3f\xe1\xff\x03" + BLOCK), code=COMPRESSION
    ),
}


def test_there_are_as_many_cases_as_h2spec_has():
    assert len(CASES) == 147


@pytest.mark.parametrize("name", CASES)
def test_h2spec(server: Server, name: str):
    with server.peer() as peer:
        peer.until(lambda: peer.acknowledged)
        CASES[name](peer)
