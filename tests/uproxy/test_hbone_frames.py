"""One codec against raw frames: what RFC 9113 forbids, what it allows, and what is merely too much."""

from __future__ import annotations

import struct
import tracemalloc
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import hbone as raw
from tests.support.examples import examples
from tests.support.hbone import (
    CLIENT_HELLO,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    OK,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PRIORITY_FLAG,
    PUSH_PROMISE,
    REQUEST_BLOCK,
    RESPONSE_BLOCK,
    RST_STREAM,
    SERVER_HELLO,
    SETTINGS,
    WINDOW_UPDATE,
    connected,
    data_of,
    drain,
    feed,
    frame,
    frames_of,
    literal_block,
    request,
    u32,
)
from uproxy import hbone
from uproxy.hbone import Connection, DataReceived, ErrorCode, ProtocolError, RequestReceived, StreamEnded, StreamReset

E = ErrorCode
END = END_HEADERS | END_STREAM
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_STREAMS, INITIAL_WINDOW, MAX_FRAME, MAX_LIST = range(1, 7)

# What a client must not do to our server: (name, frames after the hello, the code of the GOAWAY).
FORBIDDEN_TO_CLIENTS = [
    ("DATA on stream 0", frame(DATA, 0, 0, b"x"), E.PROTOCOL_ERROR),
    ("DATA on an idle stream", frame(DATA, 0, 1, b"x"), E.PROTOCOL_ERROR),
    ("empty DATA on an idle stream", frame(DATA, END_STREAM, 1), E.PROTOCOL_ERROR),
    ("DATA on a stream of ours", request() + frame(DATA, 0, 2, b"x"), E.PROTOCOL_ERROR),
    ("DATA after END_STREAM", request(flags=END) + frame(DATA, 0, 1, b"x"), E.STREAM_CLOSED),
    ("empty DATA after END_STREAM", request(flags=END) + frame(DATA, 0, 1), E.STREAM_CLOSED),
    ("DATA after a reset", request() + frame(RST_STREAM, 0, 1, u32(8)) + frame(DATA, 0, 1, b"x"), E.STREAM_CLOSED),
    ("padding as long as the DATA frame", request() + frame(DATA, PADDED, 1, b"\x05abcd"), E.PROTOCOL_ERROR),
    ("padding far longer than DATA", request() + frame(DATA, PADDED, 1, b"\xffabcd"), E.PROTOCOL_ERROR),
    ("padded DATA without a length", request() + frame(DATA, PADDED, 1), E.FRAME_SIZE_ERROR),
    ("a DATA frame over our limit", request() + frame(DATA, 0, 1, length=hbone.MAX_FRAME_SIZE + 1), E.FRAME_SIZE_ERROR),
    ("HEADERS on stream 0", frame(HEADERS, END_HEADERS, 0, REQUEST_BLOCK), E.PROTOCOL_ERROR),
    ("HEADERS on an even stream", request(2), E.PROTOCOL_ERROR),
    ("HEADERS on an id that was skipped", request(5) + request(3), E.PROTOCOL_ERROR),
    ("HEADERS after END_STREAM", request(flags=END) + request(flags=END), E.STREAM_CLOSED),
    ("HEADERS after a reset", request() + frame(RST_STREAM, 0, 1, u32(8)) + request(), E.STREAM_CLOSED),
    (
        "padding longer than HEADERS",
        frame(HEADERS, END_HEADERS | PADDED, 1, b"\xff" + REQUEST_BLOCK),
        E.PROTOCOL_ERROR,
    ),
    ("padded HEADERS without a length", frame(HEADERS, END_HEADERS | PADDED, 1), E.FRAME_SIZE_ERROR),
    (
        "HEADERS that depend on themselves",
        frame(HEADERS, END_HEADERS | PRIORITY_FLAG, 1, u32(1) + b"\x10" + REQUEST_BLOCK),
        E.PROTOCOL_ERROR,
    ),
    ("HEADERS too short for their priority", frame(HEADERS, END_HEADERS | PRIORITY_FLAG, 1, b"abc"), None),
    ("a frame amid a header block", request(flags=0) + frame(PING, 0, 0, bytes(8)), E.PROTOCOL_ERROR),
    ("DATA amid a header block", request() + request(3, flags=0) + frame(DATA, 0, 1, b"x"), E.PROTOCOL_ERROR),
    ("HEADERS amid a header block", request(flags=0) + request(3), E.PROTOCOL_ERROR),
    ("PRIORITY amid a header block", request(flags=0) + frame(PRIORITY, 0, 1, u32(0) + b"a"), E.PROTOCOL_ERROR),
    ("an unknown frame amid a header block", request(flags=0) + frame(0x42, 0, 0, b"x"), E.PROTOCOL_ERROR),
    (
        "CONTINUATION of another stream",
        request(flags=0) + frame(CONTINUATION, END_HEADERS, 3, b""),
        E.PROTOCOL_ERROR,
    ),
    ("CONTINUATION on stream 0", request(flags=0) + frame(CONTINUATION, END_HEADERS, 0), E.PROTOCOL_ERROR),
    ("CONTINUATION without HEADERS", frame(CONTINUATION, END_HEADERS, 1, REQUEST_BLOCK), E.PROTOCOL_ERROR),
    ("CONTINUATION after END_HEADERS", request() + frame(CONTINUATION, END_HEADERS, 1), E.PROTOCOL_ERROR),
    ("a HEADERS frame over our limit", frame(HEADERS, 0, 1, length=hbone.MAX_FRAME_SIZE + 1), E.FRAME_SIZE_ERROR),
    ("a header block over our limit", frame(HEADERS, 0, 1, length=hbone.MAX_HEADER_LIST + 1), E.ENHANCE_YOUR_CALM),
    ("PRIORITY on stream 0", frame(PRIORITY, 0, 0, u32(1) + b"a"), E.PROTOCOL_ERROR),
    ("PRIORITY of the wrong size", frame(PRIORITY, 0, 1, u32(0)), E.FRAME_SIZE_ERROR),
    ("PRIORITY on itself", frame(PRIORITY, 0, 1, u32(1) + b"a"), E.PROTOCOL_ERROR),
    ("RST_STREAM on stream 0", frame(RST_STREAM, 0, 0, u32(8)), E.PROTOCOL_ERROR),
    ("RST_STREAM on an idle stream", frame(RST_STREAM, 0, 1, u32(8)), E.PROTOCOL_ERROR),
    ("RST_STREAM of the wrong size", request() + frame(RST_STREAM, 0, 1, b"abc"), E.FRAME_SIZE_ERROR),
    ("SETTINGS on a stream", frame(SETTINGS, 0, 1), E.PROTOCOL_ERROR),
    ("SETTINGS of an odd size", frame(SETTINGS, 0, 0, b"abc"), E.FRAME_SIZE_ERROR),
    ("an ACK with a payload", frame(SETTINGS, 1, 0, bytes(6)), E.FRAME_SIZE_ERROR),
    ("ENABLE_PUSH of 2", raw.settings([(ENABLE_PUSH, 2)]), E.PROTOCOL_ERROR),
    ("a window over 2^31-1", raw.settings([(INITIAL_WINDOW, 1 << 31)]), E.FLOW_CONTROL_ERROR),
    ("a frame size under 2^14", raw.settings([(MAX_FRAME, 16383)]), E.PROTOCOL_ERROR),
    ("a frame size over 2^24-1", raw.settings([(MAX_FRAME, 1 << 24)]), E.PROTOCOL_ERROR),
    ("SETTINGS without end", frame(SETTINGS, 0, 0, length=60_000), E.FRAME_SIZE_ERROR),
    ("PUSH_PROMISE", frame(PUSH_PROMISE, END_HEADERS, 1, u32(2) + REQUEST_BLOCK), E.PROTOCOL_ERROR),
    ("PING on a stream", frame(PING, 0, 1, bytes(8)), E.PROTOCOL_ERROR),
    ("PING of the wrong size", frame(PING, 0, 0, bytes(7)), E.FRAME_SIZE_ERROR),
    ("GOAWAY on a stream", frame(GOAWAY, 0, 1, bytes(8)), E.PROTOCOL_ERROR),
    ("GOAWAY too short", frame(GOAWAY, 0, 0, bytes(7)), E.FRAME_SIZE_ERROR),
    ("WINDOW_UPDATE of 0", frame(WINDOW_UPDATE, 0, 0, u32(0)), E.PROTOCOL_ERROR),
    ("WINDOW_UPDATE of 0 on a stream", request() + frame(WINDOW_UPDATE, 0, 1, u32(0)), E.PROTOCOL_ERROR),
    ("WINDOW_UPDATE of the wrong size", frame(WINDOW_UPDATE, 0, 0, b"abc"), E.FRAME_SIZE_ERROR),
    ("WINDOW_UPDATE on an idle stream", frame(WINDOW_UPDATE, 0, 1, u32(1)), E.PROTOCOL_ERROR),
    ("a connection window over 2^31-1", frame(WINDOW_UPDATE, 0, 0, u32(0x7FFFFFFF)), E.FLOW_CONTROL_ERROR),
    (
        "SETTINGS that overflow a stream's window",
        request() + frame(WINDOW_UPDATE, 0, 1, u32(1)) + raw.settings([(INITIAL_WINDOW, 0x7FFFFFFF)]),
        E.FLOW_CONTROL_ERROR,
    ),
    ("HPACK index 0", frame(HEADERS, END_HEADERS, 1, b"\x80"), E.COMPRESSION_ERROR),
    ("HPACK index 62 of an empty table", frame(HEADERS, END_HEADERS, 1, b"\xbe"), E.COMPRESSION_ERROR),
    ("HPACK name index out of range", frame(HEADERS, END_HEADERS, 1, b"\x0f\x40\x01x"), E.COMPRESSION_ERROR),
    ("an HPACK literal that is cut short", frame(HEADERS, END_HEADERS, 1, REQUEST_BLOCK[:-1]), E.COMPRESSION_ERROR),
    ("an HPACK integer without end", frame(HEADERS, END_HEADERS, 1, b"\x00\x7f" + b"\xff" * 20), E.COMPRESSION_ERROR),
    ("an HPACK table over the limit", frame(HEADERS, END_HEADERS, 1, b"\x3f\xff\xff\x03"), E.COMPRESSION_ERROR),
    ("Huffman padding of zeros", frame(HEADERS, END_HEADERS, 1, b"\x00\x81\x18\x01v"), E.COMPRESSION_ERROR),
    ("Huffman EOS", frame(HEADERS, END_HEADERS, 1, b"\x00\x84\xff\xff\xff\xff\x01v"), E.COMPRESSION_ERROR),
]


def cases(table):
    """The arguments of a parametrization: all but the first column, which is the id."""
    return {"argvalues": [row[1:] for row in table], "ids": [row[0] for row in table]}


def error_of(connection: Connection, data: bytes, step: int | None) -> ErrorCode | None:
    try:
        feed(connection, data, step)
    except ProtocolError as error:
        return error.code
    return None


@pytest.mark.parametrize("step", [None, 1], ids=["whole", "byte-by-byte"])
@pytest.mark.parametrize(("data", "code"), **cases(FORBIDDEN_TO_CLIENTS))
def test_a_server_answers_a_forbidden_frame_with_its_code(data, code, step):
    got = error_of(connected(client=False, step=step), data, step)
    assert got is not None, "nothing was wrong with that"
    assert got == code or code is None, got


FORBIDDEN_TO_SERVERS = [
    ("DATA on stream 0", frame(DATA, 0, 0, b"x"), E.PROTOCOL_ERROR),
    ("DATA on a stream nobody opened", frame(DATA, 0, 3, b"x"), E.PROTOCOL_ERROR),
    ("DATA on an even stream", frame(DATA, 0, 2, b"x"), E.PROTOCOL_ERROR),
    ("a response on a stream nobody opened", frame(HEADERS, END_HEADERS, 3, RESPONSE_BLOCK), E.PROTOCOL_ERROR),
    ("a pushed response", frame(HEADERS, END_HEADERS, 2, RESPONSE_BLOCK), E.PROTOCOL_ERROR),
    ("PUSH_PROMISE", frame(PUSH_PROMISE, END_HEADERS, 1, u32(2) + REQUEST_BLOCK), E.PROTOCOL_ERROR),
    ("RST_STREAM of a stream nobody opened", frame(RST_STREAM, 0, 3, u32(8)), E.PROTOCOL_ERROR),
    ("WINDOW_UPDATE of a stream nobody opened", frame(WINDOW_UPDATE, 0, 3, u32(8)), E.PROTOCOL_ERROR),
    ("DATA after END_STREAM", frame(HEADERS, END, 1, RESPONSE_BLOCK) + frame(DATA, 0, 1, b"x"), E.STREAM_CLOSED),
    (
        "DATA after a reset",
        frame(RST_STREAM, 0, 1, u32(8)) + frame(DATA, 0, 1, b"x"),
        E.STREAM_CLOSED,
    ),
]


@pytest.mark.parametrize("step", [None, 1], ids=["whole", "byte-by-byte"])
@pytest.mark.parametrize(("data", "code"), **cases(FORBIDDEN_TO_SERVERS))
def test_a_client_answers_a_forbidden_frame_with_its_code(data, code, step):
    client = connected(client=True, step=step)
    client.open(raw.CONNECT)
    assert error_of(client, data, step) == code


@pytest.mark.parametrize("step", [None, 1], ids=["whole", "byte-by-byte"])
@pytest.mark.parametrize(
    ("hello", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", E.PROTOCOL_ERROR),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r ", E.PROTOCOL_ERROR),
        (bytes(24), E.PROTOCOL_ERROR),
        (PREFACE + request(), E.PROTOCOL_ERROR),
        (PREFACE + frame(PING, 0, 0, bytes(8)), E.PROTOCOL_ERROR),
        (PREFACE + frame(DATA, 0, 1, b"x"), E.PROTOCOL_ERROR),
        (PREFACE + raw.settings(ack=True), E.PROTOCOL_ERROR),
    ],
)
def test_a_connection_that_starts_otherwise_than_http2_is_ended(hello, code, step):
    assert error_of(Connection(client=False), hello, step) == code


def test_our_own_hello_says_what_we_hold_to():
    for client in (True, False):
        sent = frames_of(drain(Connection(client=client)))
        kind, _, _, payload = sent[0]
        assert kind == SETTINGS
        told = dict(struct.iter_unpack(">HI", payload))
        assert told[HEADER_TABLE_SIZE] == 0
        assert told[INITIAL_WINDOW] == hbone.INITIAL_STREAM_WINDOW
        assert 16384 <= told[MAX_FRAME] <= 1 << 20
        assert told[MAX_LIST] == hbone.MAX_HEADER_LIST
        assert told[ENABLE_PUSH] == 0
        if not client:
            assert told[MAX_STREAMS] >= 100
        assert (WINDOW_UPDATE, 0, 0, u32(hbone.CONNECTION_WINDOW - 65535)) in sent


# -- what is allowed


def test_reserved_bits_unknown_flags_and_unknown_frames_are_ignored():
    server = connected(client=False)
    block = frame(HEADERS, END_HEADERS | 0xC2, 0x80000001, REQUEST_BLOCK)
    events = feed(
        server,
        frame(0x42, 0xFF, 0, b"?" * 5000) + block + frame(0x99, 0, 77) + frame(DATA, 0xF2 & ~PADDED, 1, b"hi"),
        3,
    )
    (received,) = [e for e in events if isinstance(e, RequestReceived)]
    assert data_of(events, received.stream) == b"hi"


def test_unknown_settings_and_error_codes_are_ignored():
    server = connected(client=False)
    feed(server, raw.settings([(0x4242, 7), (8, 1), (9, 1)]) + request() + frame(RST_STREAM, 0, 1, u32(0xFFFF)))
    assert (SETTINGS, 1, 0, b"") in frames_of(drain(server))
    assert server.streams == {}


def test_priority_is_accepted_on_any_stream_and_changes_nothing():
    server = connected(client=False)
    assert feed(server, frame(PRIORITY, 0, 7, u32(3) + b"\x20")) == []
    assert [type(e) for e in feed(server, request())] == [RequestReceived]


@pytest.mark.parametrize("step", [None, 1, 5])
@pytest.mark.parametrize("padding", [0, 1, 255])
def test_padding_is_removed_counted_and_credited(step, padding):
    server = connected(client=False)
    (received,) = feed(server, request())
    stream = received.stream
    payload = bytes([padding]) + b"payload" + bytes(padding)
    events = feed(server, frame(DATA, PADDED, 1, payload) * 3 + frame(DATA, PADDED | END_STREAM, 1, payload), step)
    assert data_of(events, stream) == b"payload" * 4
    assert events[-1] == StreamEnded(stream)
    spent = hbone.INITIAL_STREAM_WINDOW - stream.recv_window
    assert spent == 4 * len(payload)
    # Padding reaches no application: its share is credited without one (but only the payload is waiting for it).
    assert stream.unacknowledged == 4 * (1 + padding)


def test_only_padding_ever_is_credited_too():
    """1 MiB of pure padding passes through a window of 256 KiB, though the application reads nothing."""
    server = connected(client=False)
    feed(server, request())
    for _ in range(4200):
        feed(server, frame(DATA, PADDED, 1, b"\xf9" + bytes(249)))
    assert server.streams[1].recv_window > 0


@pytest.mark.parametrize("step", [None, 1])
def test_a_header_block_may_come_in_pieces(step):
    server = connected(client=False)
    pieces = [REQUEST_BLOCK[i : i + 5] for i in range(0, len(REQUEST_BLOCK), 5)]
    data = frame(HEADERS, END_STREAM | PADDED | PRIORITY_FLAG, 1, b"\x02" + u32(0) + b"\x10" + pieces[0] + bytes(2))
    for piece in pieces[1:-1]:
        data += frame(CONTINUATION, 0, 1, piece)
    data += frame(CONTINUATION, END_HEADERS, 1, pieces[-1])
    (received,) = feed(server, data, step)
    assert isinstance(received, RequestReceived)
    assert list(received.headers) == raw.CONNECT
    assert received.ended


def test_a_peer_may_use_its_dynamic_table_until_it_has_seen_our_settings():
    from hpack import Encoder

    server = Connection(client=False)
    drain(server)
    encoder = Encoder()
    headers = [*raw.CONNECT, (b"baggage", b"k8s.cluster.name=one")]
    data = PREFACE + raw.settings()
    for stream_id in (1, 3):  # the second block is indices into the table
        data += frame(HEADERS, END_HEADERS, stream_id, encoder.encode(headers))
    encoder.header_table_size = 0  # it has our SETTINGS: it shrinks its table, says so, and acknowledges
    data += raw.settings(ack=True)
    for stream_id in (5, 7):
        data += frame(HEADERS, END_HEADERS, stream_id, encoder.encode(headers))
    requests = [e for e in feed(server, data, 11) if isinstance(e, RequestReceived)]
    assert [list(e.headers) for e in requests] == [headers] * 4


def test_a_peer_that_keeps_a_table_after_acknowledging_ours_of_zero_is_refused():
    from hpack import Encoder

    server = connected(client=False)
    block = Encoder().encode([*raw.CONNECT, (b"x", b"y")])
    assert error_of(server, frame(HEADERS, END_HEADERS, 1, block), None) == E.COMPRESSION_ERROR


def test_a_peer_with_a_small_table_is_told_that_ours_is_empty():
    """nghttp2 ends a connection whose encoder does not answer a reduced HEADER_TABLE_SIZE (RFC 7541 4.2)."""
    from hpack import Decoder

    client = Connection(client=True)
    feed(client, raw.settings([(HEADER_TABLE_SIZE, 0)]))
    drain(client)
    client.open(raw.CONNECT)
    client.open(raw.CONNECT)
    decoder = Decoder()
    decoder.max_allowed_table_size = 0
    for _, _, _, block in frames_of(drain(client)):
        assert [(bytes(n), bytes(v)) for n, v in decoder.decode(block, raw=True)] == raw.CONNECT


def test_interim_answers_come_before_the_answer():
    client = connected(client=True)
    stream = client.open(raw.CONNECT)
    early = frame(HEADERS, END_HEADERS, 1, literal_block([(b":status", b"103")]))
    events = feed(client, early + early + frame(HEADERS, END_HEADERS, 1, RESPONSE_BLOCK))
    assert [type(e).__name__ for e in events] == ["InterimReceived", "InterimReceived", "ResponseReceived"]
    assert stream.answered


def test_trailers_end_the_stream():
    server = connected(client=False)
    (received,) = feed(server, request())
    server.respond(received.stream, OK)
    trailers = frame(HEADERS, END, 1, literal_block([(b"x-checksum", b"1")]))
    assert feed(server, trailers) == [StreamEnded(received.stream, ((b"x-checksum", b"1"),))]


@pytest.mark.parametrize("header", [(b":path", b"/"), (b"connection", b"close"), (b"te", b"gzip"), (b"A", b"b")])
def test_malformed_trailers_reset_the_stream(header):
    server = connected(client=False)
    (received,) = feed(server, request())
    server.respond(received.stream, OK)
    trailers = frame(HEADERS, END, 1, literal_block([(b"x-checksum", b"1"), header]))
    assert feed(server, trailers) == [StreamReset(received.stream, E.PROTOCOL_ERROR)]


# -- malformed requests end their stream, not the connection

MALFORMED = [
    ("an upper-case name", [*raw.CONNECT, (b"Baggage", b"x")]),
    ("an empty name", [*raw.CONNECT, (b"", b"x")]),
    ("a space in a name", [*raw.CONNECT, (b"a b", b"x")]),
    ("a newline in a value", [*raw.CONNECT, (b"a", b"x\r\nb: c")]),
    ("a NUL in a value", [*raw.CONNECT, (b"a", b"x\0y")]),
    ("a NUL in the authority", [(b":method", b"CONNECT"), (b":authority", b"10.0.0.2\0:80")]),
    ("a leading space in a value", [*raw.CONNECT, (b"a", b" x")]),
    ("a trailing tab in a value", [*raw.CONNECT, (b"a", b"x\t")]),
    ("no method", [(b":authority", b"10.0.0.2:8080")]),
    ("two methods", [(b":method", b"CONNECT"), *raw.CONNECT]),
    ("two authorities", [*raw.CONNECT, (b":authority", b"10.0.0.3:8080")]),
    ("a pseudo-header after a header", [(b":method", b"CONNECT"), (b"a", b"b"), (b":authority", b"10.0.0.2:80")]),
    ("a response's pseudo-header", [*raw.CONNECT, (b":status", b"200")]),
    ("an unknown pseudo-header", [*raw.CONNECT, (b":teapot", b"1")]),
    ("a connection header", [*raw.CONNECT, (b"connection", b"keep-alive")]),
    ("transfer-encoding", [*raw.CONNECT, (b"transfer-encoding", b"chunked")]),
    ("te other than trailers", [*raw.CONNECT, (b"te", b"gzip")]),
    ("no header at all", []),
    ("more headers than anybody needs", [*raw.CONNECT, *[(b"a", b"b")] * 200]),
]


@pytest.mark.parametrize("headers", [c[1] for c in MALFORMED], ids=[c[0] for c in MALFORMED])
def test_a_malformed_request_ends_its_own_stream_only(headers):
    server = connected(client=False)
    assert feed(server, frame(HEADERS, END_HEADERS, 1, literal_block(headers))) == []
    assert frames_of(drain(server)) == [(RST_STREAM, 0, 1, u32(E.PROTOCOL_ERROR))]
    assert feed(server, frame(DATA, END_STREAM, 1, b"in flight")) == []
    assert [type(e) for e in feed(server, request(3))] == [RequestReceived]


MALFORMED_ANSWERS = [
    ("no status", [(b"a", b"b")]),
    ("a status of two digits", [(b":status", b"20")]),
    ("a status of letters", [(b":status", b"abc")]),
    ("two statuses", [*OK, *OK]),
    ("a request's pseudo-header", [*OK, (b":path", b"/")]),
    ("status after a header", [(b"a", b"b"), *OK]),
]


@pytest.mark.parametrize("headers", [c[1] for c in MALFORMED_ANSWERS], ids=[c[0] for c in MALFORMED_ANSWERS])
def test_a_malformed_answer_ends_its_own_stream_only(headers):
    client = connected(client=True)
    stream, other = client.open(raw.CONNECT), client.open(raw.CONNECT)
    drain(client)
    assert feed(client, frame(HEADERS, END_HEADERS, 1, literal_block(headers))) == [
        StreamReset(stream, E.PROTOCOL_ERROR)
    ]
    assert frames_of(drain(client)) == [(RST_STREAM, 0, 1, u32(E.PROTOCOL_ERROR))]
    feed(client, frame(HEADERS, END_HEADERS, 3, RESPONSE_BLOCK))
    assert other.answered


def test_a_second_header_block_that_does_not_end_the_stream_is_malformed():
    server = connected(client=False)
    (received,) = feed(server, request())
    assert feed(server, request()) == [StreamReset(received.stream, E.PROTOCOL_ERROR)]


# -- flow control


def test_data_beyond_a_streams_window_ends_the_connection():
    server = connected(client=False)
    feed(server, request())
    full = frame(DATA, 0, 1, bytes(hbone.INITIAL_STREAM_WINDOW))
    feed(server, full)
    assert error_of(server, frame(DATA, 0, 1, b"x"), None) == E.FLOW_CONTROL_ERROR


def test_data_beyond_the_connection_window_ends_the_connection():
    """Credit is given back on receipt in quarters, so only one frame larger than what is left can exceed it."""
    server = connected(client=False)
    server._recv_window = 10
    feed(server, request())
    assert error_of(server, frame(DATA, 0, 1, bytes(11)), None) == E.FLOW_CONTROL_ERROR


def test_a_stream_window_over_its_maximum_resets_the_stream():
    server = connected(client=False)
    (received,) = feed(server, request())
    drain(server)
    assert feed(server, frame(WINDOW_UPDATE, 0, 1, u32(0x7FFFFFFF))) == [
        StreamReset(received.stream, E.FLOW_CONTROL_ERROR)
    ]
    assert frames_of(drain(server)) == [(RST_STREAM, 0, 1, u32(E.FLOW_CONTROL_ERROR))]


def test_settings_shift_the_windows_of_streams_that_exist_also_below_zero():
    server = connected(client=False)
    (received,) = feed(server, request())
    stream = received.stream
    server.respond(stream, OK)
    assert raw.put(server, stream, bytes(60_000)) == 60_000
    drain(server)
    feed(server, raw.settings([(INITIAL_WINDOW, 1000)]))
    assert stream.send_window == 1000 - 60_000
    assert len(server.reserve(stream)) == 0
    feed(server, frame(WINDOW_UPDATE, 0, 1, u32(59_000)))
    assert len(server.reserve(stream)) == 0
    feed(server, frame(WINDOW_UPDATE, 0, 1, u32(5)))
    assert len(server.reserve(stream)) == 5
    feed(server, request(3))
    assert server.streams[3].send_window == 1000


def test_the_last_quarter_of_a_large_window_is_left_unused():
    server = connected(client=False)
    feed(server, request())
    feed(server, raw.settings([(INITIAL_WINDOW, 16 << 20)]))
    assert server.streams[1].send_window == 12 << 20
    feed(server, request(3))
    assert server.streams[3].send_window == 12 << 20
    feed(server, raw.settings([(INITIAL_WINDOW, (1 << 20) - 1)]))
    assert server.streams[1].send_window == server.streams[3].send_window == (1 << 20) - 1
    feed(server, raw.settings([(INITIAL_WINDOW, 0x7FFFFFFF)]))
    # What is left unused counts in the peer's arithmetic.
    assert feed(server, frame(WINDOW_UPDATE, 0, 3, u32(1))) == [StreamReset(mock.ANY, E.FLOW_CONTROL_ERROR)]


def test_a_smaller_frame_size_holds_for_the_next_frame():
    server = connected(client=False)
    feed(
        server,
        raw.settings([(MAX_FRAME, 1 << 20), (INITIAL_WINDOW, 1 << 20)]) + frame(WINDOW_UPDATE, 0, 0, u32(1 << 20)),
    )
    (received,) = feed(server, request())
    drain(server)
    raw.put(server, received.stream, bytes(40_000))
    assert max(len(f[3]) for f in frames_of(drain(server))) > 16384
    feed(server, raw.settings([(MAX_FRAME, 16384)]))
    drain(server)
    raw.put(server, received.stream, bytes(40_000))
    assert max(len(f[3]) for f in frames_of(drain(server))) <= 16384


# -- floods: work for us, nothing moved. Each ends with ENHANCE_YOUR_CALM, soon, and within little memory.


def _endless_continuations() -> bytes:
    return request(flags=0) + frame(CONTINUATION, 0, 1) * 1000


def _rapid_resets() -> bytes:
    return b"".join(request(i) + frame(RST_STREAM, 0, i, u32(8)) for i in range(1, 4001, 2))


def _malformed_requests() -> bytes:
    return b"".join(
        frame(HEADERS, END, i, literal_block([(b":method", b"CONNECT"), (b"A", b"b")])) for i in range(1, 4001, 2)
    )


FLOODS = {
    "PING": frame(PING, 0, 0, bytes(8)) * 12_000,
    "PING without reading": frame(PING, 0, 0, bytes(8)) * 12_000,
    "SETTINGS": raw.settings([(INITIAL_WINDOW, 70_000)]) * 12_000,
    "PRIORITY": frame(PRIORITY, 0, 1, u32(0) + b"a") * 12_000,
    "WINDOW_UPDATE": frame(WINDOW_UPDATE, 0, 0, u32(1)) * 12_000,
    "empty DATA": request() + frame(DATA, 0, 1) * 12_000,
    "padded empty DATA": request() + frame(DATA, PADDED, 1, b"\0") * 12_000,
    "unknown frames": frame(0x42, 0, 0) * 12_000,
    "RST_STREAM of a closed stream": request() + frame(RST_STREAM, 0, 1, u32(8)) * 12_000,
    "CONTINUATION": _endless_continuations(),
    "rapid resets": _rapid_resets(),
    "malformed requests": _malformed_requests(),
    "GOAWAY": frame(GOAWAY, 0, 0, bytes(8)) * 12_000,
    "headers by index": request(flags=0)
    + frame(CONTINUATION, 0, 1, b"\x90" * 16_000) * 3
    + frame(CONTINUATION, 4, 1, b"\x90" * 16_000),
}


def receive_reading(server: Connection, flood: bytes, *, reads: bool) -> None:
    for start in range(0, len(flood), 60_000):
        feed(server, flood[start : start + 60_000])
        if reads:
            drain(server)


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_ends_the_connection_with_enhance_your_calm(name):
    server = connected(client=False)
    flood = FLOODS[name]
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError) as caught:
            receive_reading(server, flood, reads="without reading" not in name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.code == E.ENHANCE_YOUR_CALM
    assert peak < 8 << 20


@pytest.mark.parametrize(
    "last",
    [
        frame(HEADERS, END, 1, literal_block([(b"a", b"b")])) + frame(DATA, 0, 0),
        frame(RST_STREAM, 0, 1, u32(8)) + frame(DATA, 0, 0),
        frame(DATA, END_STREAM, 1, b"the last") + frame(PING, 0, 1, bytes(8)),
    ],
    ids=["trailers without an end", "a reset", "an end"],
)
def test_a_stream_that_ended_just_before_a_broken_frame_is_told_of(last):
    """The connection no longer has it, so nobody else would end what hangs on it."""
    server = connected(client=False)
    (received,) = feed(server, request())
    server.respond(received.stream, OK)
    server.end(received.stream)
    with pytest.raises(ProtocolError) as caught:
        feed(server, last)
    assert server.streams == {}
    assert isinstance(caught.value.events[-1], StreamReset | StreamEnded)
    assert caught.value.events[-1].stream is received.stream


def test_the_reset_that_is_one_too_many_is_told_of():
    server = connected(client=False)
    opened = {e.stream.id for e in feed(server, b"".join(request(i) for i in range(1, 1201, 2)))}
    resets = b"".join(frame(RST_STREAM, 0, i, u32(8)) for i in range(1, 1201, 2))
    ended = set()
    code = None
    while code is None:
        try:
            events = server.receive(memoryview(resets))
        except ProtocolError as error:
            events, code = error.events, error.code
        ended |= {e.stream.id for e in events}
        resets = resets[len(resets) - server.unread :]
    assert code == E.ENHANCE_YOUR_CALM
    assert opened == ended | set(server.streams)
    assert not ended & set(server.streams)


@pytest.mark.parametrize(
    ("one", "at_most"),
    [
        (lambda i: request(i), hbone.WORK_AT_ONCE // 32),
        (lambda i: frame(PING, 0, 0, bytes(8)), hbone.WORK_AT_ONCE // 10),
        (lambda i: frame(PRIORITY, 0, i, u32(0) + b"a"), hbone.WORK_AT_ONCE),
        (lambda i: frame(0x42, PADDED, i, b"unknown"), hbone.WORK_AT_ONCE),
    ],
    ids=["requests", "PING", "PRIORITY", "unknown frames"],
)
def test_one_call_does_a_turns_work_and_leaves_the_rest(one, at_most):
    server = connected(client=False)
    frames = [one(i) for i in range(1, 401, 2)]
    left = b"".join(frames)
    calls = 0
    while left:
        server.receive(memoryview(left))
        done = len(left) - server.unread
        assert 0 < done <= (at_most + 1) * len(frames[0])
        left = left[done:]
        calls += 1
    assert calls >= len(frames) / (at_most + 1)


def test_bulk_is_one_calls_work():
    server = connected(client=False)
    feed(server, request())
    server.receive(memoryview(frame(DATA, 0, 1, bytes(16_375)) * 8))
    assert server.unread == 0


TRICKLES = {
    "no preface": b"PRI * HT",
    "no SETTINGS": PREFACE,
    "a frame header": raw.CLIENT_HELLO + frame(PING, 0, 0, bytes(8))[:5],
    "a frame": raw.CLIENT_HELLO + frame(PING, 0, 0, bytes(8))[:-1],
    "a header block": raw.CLIENT_HELLO + request(flags=0),
}


@pytest.mark.parametrize("name", TRICKLES)
def test_what_is_begun_and_never_ended_ends_the_connection(name):
    server = Connection(client=False)
    feed(server, TRICKLES[name])
    for number in range(hbone.MAX_TICKS_UNFINISHED):
        server.tick()
        if name == "a header block":
            feed(server, frame(CONTINUATION, 0, 1, bytes([number])))
    with pytest.raises(ProtocolError) as caught:
        server.tick()
    assert caught.value.code == E.ENHANCE_YOUR_CALM


def test_a_busy_connection_that_is_cut_amid_a_frame_at_every_tick_is_not_slow():
    server = connected(client=False)
    ping = frame(PING, 0, 0, bytes(8))
    feed(server, ping[:4])
    for _ in range(3 * hbone.MAX_TICKS_UNFINISHED):
        server.tick()
        feed(server, ping[4:] + ping[:4])
        drain(server)


def test_a_server_cannot_flood_a_client_with_interim_answers():
    client = connected(client=True)
    client.open(raw.CONNECT)
    early = frame(HEADERS, END_HEADERS, 1, literal_block([(b":status", b"103")]))
    assert error_of(client, early * 12_000, None) == E.ENHANCE_YOUR_CALM


@pytest.mark.parametrize("every", [1024, 4096])
def test_a_peer_that_updates_both_windows_with_each_small_read_is_no_flood(every):
    """Some peers (Go's net/http2 among them) send two WINDOW_UPDATEs per read of a few KiB."""
    server = connected(client=False)
    (received,) = feed(server, request())
    server.respond(received.stream, OK)
    total = 0
    while total < 64 << 20:
        done = raw.put(server, received.stream, bytes(60_000))
        drain(server)
        assert done
        total += done
        credit = b"".join(
            frame(WINDOW_UPDATE, 0, 0, u32(part)) + frame(WINDOW_UPDATE, 0, 1, u32(part))
            for part in [every] * (done // every) + [done % every]
            if part
        )
        feed(server, credit)


def test_resetting_streams_that_were_answered_is_no_flood():
    """Every connection that an application aborts ends this way."""
    server = connected(client=False)
    for stream_id in range(1, 40_001, 2):
        (received,) = feed(server, request(stream_id))
        server.respond(received.stream, OK)
        feed(server, frame(RST_STREAM, 0, stream_id, u32(8)))
        drain(server)


def test_time_gives_the_control_frames_back():
    server = connected(client=False)
    for _ in range(15):
        feed(server, frame(PRIORITY, 0, 1, u32(0) + b"a") * 900 + frame(PING, 0, 0, bytes(8)) * 9)
        drain(server)
        server.tick()


# -- any bytes at all

BLOCKS = st.one_of(
    st.just(REQUEST_BLOCK),
    st.just(RESPONSE_BLOCK),
    st.just(b"\x88"),
    st.just(b"\x20" + REQUEST_BLOCK),
    st.binary(max_size=40),
)
IDS = st.sampled_from([0, 1, 1, 1, 2, 3, 3, 5, 7, 0x7FFFFFFF, 0x80000001])
FRAMES = st.one_of(
    st.builds(frame, st.integers(0, 11), st.integers(0, 255), IDS, st.binary(max_size=40)),
    st.builds(frame, st.just(DATA), st.sampled_from([0, 0, END_STREAM, PADDED]), IDS, st.binary(max_size=400)),
    st.builds(frame, st.just(HEADERS), st.sampled_from([4, 4, 4, 5, 0, 0x2C, 12]), IDS, BLOCKS),
    st.builds(frame, st.just(CONTINUATION), st.sampled_from([0, 4]), IDS, BLOCKS),
    st.builds(frame, st.just(RST_STREAM), st.just(0), IDS, st.binary(min_size=4, max_size=4)),
    st.builds(frame, st.just(WINDOW_UPDATE), st.just(0), IDS, st.binary(min_size=4, max_size=4)),
    st.builds(frame, st.just(PING), st.integers(0, 1), st.just(0), st.binary(min_size=8, max_size=8)),
    st.builds(frame, st.just(GOAWAY), st.just(0), st.just(0), st.binary(min_size=8, max_size=20)),
    st.builds(raw.settings, st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1 << 32 - 1)), max_size=4)),
)


def outcome(client: bool, data: bytes, step: int | None) -> tuple[list[tuple[object, ...]], ErrorCode | None, bytes]:
    """Events (DATA joined), the error, and what was sent: all that a tunnel can see of a codec."""
    connection = Connection(client=client)
    if client:
        for _ in range(3):
            connection.open(raw.CONNECT)
    seen: list[tuple[object, ...]] = []
    code: ErrorCode | None = None
    for start in range(0, len(data), step or len(data) or 1):
        try:
            events = feed(connection, data[start : start + (step or len(data))])
        except ProtocolError as error:
            code = error.code
            break
        for event in events:
            if isinstance(event, DataReceived):
                payload = bytes(event.data)
                if seen and seen[-1][:2] == ("DataReceived", event.stream.id):
                    payload = seen.pop()[2] + payload
                seen.append(("DataReceived", event.stream.id, payload))
            else:
                seen.append((type(event).__name__, *(v.id if isinstance(v, hbone.Stream) else v for v in event)))
    return seen, code, drain(connection)


@given(hello=st.booleans(), client=st.booleans(), soup=st.lists(FRAMES, max_size=12), cut=st.integers(1, 30))
@settings(max_examples=examples(500))
def test_any_frames_give_the_same_whole_and_in_pieces(hello, client, soup, cut):
    data = (SERVER_HELLO if client else CLIENT_HELLO) * hello + b"".join(soup)
    whole, code, sent = outcome(client, data, None)
    pieces, piecewise_code, piecewise_sent = outcome(client, data, cut)
    assert code == piecewise_code
    if code is None:
        assert whole == pieces
        assert sent == piecewise_sent


@given(client=st.booleans(), noise=st.binary(max_size=300))
@settings(max_examples=examples(200))
def test_any_bytes_give_events_or_the_one_protocol_error(client, noise):
    outcome(client, noise, None)
    outcome(client, (SERVER_HELLO if client else CLIENT_HELLO) + noise, None)


@given(soup=st.lists(FRAMES, max_size=15))
@settings(max_examples=examples(200))
def test_a_stream_says_nothing_after_its_end(soup):
    server = connected(client=False)
    over: set[int] = set()
    try:
        for event in feed(server, b"".join(soup)):
            if isinstance(event, (RequestReceived, DataReceived, StreamEnded, StreamReset)):
                key = id(event.stream)
                assert key not in over
                if isinstance(event, StreamReset):
                    over.add(key)
                if isinstance(event, DataReceived):
                    assert event.data
    except ProtocolError:
        pass
