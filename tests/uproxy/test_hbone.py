"""Two real codecs, end to end: what one writes the other reads, under any interleaving that flow control allows."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support import hbone as raw
from tests.support.examples import examples
from tests.support.hbone import CONNECT, OK, Pair, data_of, drain, feed, frames_of, put
from uproxy import hbone, header_block
from uproxy.hbone import (
    CONNECTION_WINDOW,
    INITIAL_STREAM_WINDOW,
    MAX_STREAM_WINDOW,
    Connection,
    DataReceived,
    ErrorCode,
    GoawayReceived,
    PongReceived,
    ProtocolError,
    RequestReceived,
    ResponseReceived,
    SettingsReceived,
    Stream,
    StreamEnded,
    StreamReset,
    WindowOpened,
)

STEPS = [None, 1, 7]


@pytest.fixture(params=STEPS, ids=["whole", "byte-by-byte", "by-sevens"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def test_a_request_and_its_answer_arrive_with_their_headers(pair):
    mine = pair.client.open([*CONNECT, (b"traceparent", b"00-1-2-00"), (b"x-empty", b"")])
    pair.exchange()
    (received,) = pair.server_events
    assert isinstance(received, RequestReceived)
    assert list(received.headers) == [*CONNECT, (b"traceparent", b"00-1-2-00"), (b"x-empty", b"")]
    assert not received.ended
    pair.server.respond(received.stream, [*OK, (b"baggage", b"a=b")])
    pair.exchange()
    (answer,) = pair.client_events
    assert isinstance(answer, ResponseReceived)
    assert answer.stream is mine
    assert list(answer.headers) == [*OK, (b"baggage", b"a=b")]


@pytest.mark.parametrize("length", [0, 1, 126, 127, 128, 254, 255, 256, 1000, 7000])
@pytest.mark.parametrize("early", [True, False], ids=["before SETTINGS are acknowledged", "after"])
def test_headers_of_any_length_arrive(length, early):
    """A value of 255 bytes leaves the fast decoder; the general one must hold the same (empty) table."""
    client, server = Connection(client=True), Connection(client=False)
    if not early:
        for _ in range(2):
            feed(server, drain(client))
            feed(client, drain(server))
    headers = [*CONNECT, (b"baggage", b"k" * length), (b"n" * max(length, 1), b"v")]
    for _ in range(3):
        stream = client.open(headers)
        events = [e for e in feed(server, drain(client)) if isinstance(e, RequestReceived)]
        assert [list(e.headers) for e in events] == [headers]
        server.respond(events[0].stream, [*OK, (b"baggage", b"k" * length)])
        answers = [e for e in feed(client, drain(server)) if isinstance(e, ResponseReceived)]
        assert [list(e.headers) for e in answers] == [[*OK, (b"baggage", b"k" * length)]]
        assert answers[0].stream is stream


def test_a_header_block_that_fits_no_frame_goes_in_several(pair):
    client, server = pair.client, pair.server
    for length in (16_300, 16_384, 40_000):
        headers = [*CONNECT, (b"baggage", b"x" * length)]
        client.open(headers)
        events = [e for e in feed(server, drain(client)) if isinstance(e, RequestReceived)]
        assert [list(e.headers) for e in events] == [headers]


def test_a_header_block_that_no_peer_takes_is_refused_before_it_is_sent(pair):
    with pytest.raises(ValueError, match="does not fit"):
        pair.client.open([*CONNECT, (b"baggage", b"x" * (64 << 10))])
    assert pair.client.streams == {}
    mine, _ = pair.opened()
    assert mine.answered


def test_a_request_may_have_no_body_and_a_response_interim_heads_and_trailers(pair):
    client, server = pair.client, pair.server
    mine = client.open([(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/")], end=True)
    (request,) = [e for e in feed(server, drain(client)) if isinstance(e, RequestReceived)]
    assert request.ended
    early, trailers = [(b":status", b"103"), (b"link", b"</a>")], [(b"grpc-status", b"0")]
    server.inform(request.stream, early)
    server.respond(request.stream, OK)
    server.end(request.stream, trailers)
    interim, answer, end = feed(client, drain(server))
    assert (interim.stream, list(interim.headers)) == (mine, early)
    assert (answer.stream, answer.ended, list(answer.headers)) == (mine, False, list(OK))
    assert (end.stream, list(end.trailers)) == (mine, trailers)
    assert client.streams == server.streams == {}


def test_half_close_leaves_the_other_direction_open(pair):
    mine, theirs = pair.opened()
    put(pair.client, mine, b"question")
    pair.client.end(mine)
    pair.exchange()
    assert data_of(pair.server_events, theirs) == b"question"
    assert isinstance(pair.server_events[-1], StreamEnded)
    put(pair.server, theirs, b"answer")
    pair.server.end(theirs)
    pair.exchange()
    assert data_of(pair.client_events, mine) == b"answer"
    assert isinstance(pair.client_events[-1], StreamEnded)
    assert pair.client.streams == pair.server.streams == {}


def test_ending_twice_says_it_once(pair):
    mine, _ = pair.opened()
    pair.client.end(mine)
    pair.client.end(mine)
    assert [f[:3] for f in frames_of(drain(pair.client))] == [(raw.DATA, raw.END_STREAM, mine.id)]


def test_a_refusal_ends_the_servers_side_at_once(pair):
    mine = pair.client.open(CONNECT)
    pair.exchange()
    theirs = pair.server.streams[mine.id]
    pair.server.respond(theirs, [(b":status", b"401")], end=True)
    pair.exchange()
    (answer,) = pair.client_events
    assert isinstance(answer, ResponseReceived)
    assert answer.ended
    pair.client.end(mine)
    pair.exchange()
    assert pair.client.streams == pair.server.streams == {}


@pytest.mark.parametrize("code", [ErrorCode.CANCEL, ErrorCode.CONNECT_ERROR, ErrorCode.NO_ERROR])
@pytest.mark.parametrize("from_client", [True, False])
def test_a_reset_arrives_as_a_reset_with_its_code(pair, code, from_client):
    mine, theirs = pair.opened()
    pair.client_events.clear()
    pair.server_events.clear()
    if from_client:
        pair.client.reset(mine, code)
        pair.exchange()
        assert pair.server_events == [StreamReset(theirs, code)]
    else:
        pair.server.reset(theirs, code)
        pair.exchange()
        assert pair.client_events == [StreamReset(mine, code)]
    assert pair.client.streams == pair.server.streams == {}


def test_frames_in_flight_to_a_stream_that_was_reset_are_counted_and_dropped(pair):
    mine, theirs = pair.opened()
    pair.server_events.clear()
    put(pair.client, mine, b"late" * 1000)
    pair.client.end(mine)
    in_flight = drain(pair.client)
    pair.server.reset(theirs, ErrorCode.CANCEL)
    assert feed(pair.server, in_flight, pair.step) == []
    # The connection window counts the bytes of a stream that is gone (docs/hbone.md 2.5), or the tunnel slowly dies.
    assert pair.server._recv_window == CONNECTION_WINDOW - 4000


def test_no_data_is_passed_on_after_we_reset_the_stream_amid_a_frame():
    pair = Pair()
    mine, theirs = pair.opened()
    put(pair.client, mine, b"x" * 10_000)
    in_flight = drain(pair.client)
    assert len(data_of(feed(pair.server, in_flight[:5000]), theirs)) == 5000 - 9
    pair.server.reset(theirs, ErrorCode.CANCEL)
    assert feed(pair.server, in_flight[5000:]) == []
    other, _ = pair.opened()
    assert other.answered


def test_answering_a_stream_that_the_peer_has_reset_sends_nothing(pair):
    """Both frames arrive in one read, so the tunnel sees the request after the stream is gone (RFC 9113 5.1)."""
    mine = pair.client.open(CONNECT)
    pair.client.reset(mine, ErrorCode.CANCEL)
    pair.exchange()
    request, reset = pair.server_events
    assert isinstance(request, RequestReceived)
    assert isinstance(reset, StreamReset)
    pair.server.respond(request.stream, OK)
    pair.server.end(request.stream)
    pair.server.reset(request.stream, ErrorCode.CANCEL)
    assert drain(pair.server) == b""


def test_a_ping_is_answered_and_its_payload_comes_back(pair):
    pair.client.ping(b"12345678")
    pair.server.ping(b"abcdefgh")
    pair.exchange()
    assert PongReceived(b"12345678") in pair.client_events
    assert PongReceived(b"abcdefgh") in pair.server_events


def test_a_draining_server_finishes_its_streams_answers_pings_and_refuses_new_ones(pair):
    mine, theirs = pair.opened()
    pair.server.goaway(final=False)
    pair.exchange()
    assert pair.client_events[-1] == GoawayReceived(hbone.MAX_WINDOW, ErrorCode.NO_ERROR)
    assert not pair.client.can_open
    late = pair.client.open(CONNECT)  # was on its way when the GOAWAY came
    pair.exchange()
    assert late.id in pair.server.streams
    pair.server.goaway()
    crossing = pair.client.open(CONNECT)
    pair.exchange()
    assert StreamReset(crossing, ErrorCode.REFUSED_STREAM) in pair.client_events
    assert crossing.id not in pair.server.streams
    pair.client.ping(b"12345678")
    put(pair.client, mine, b"still here")
    pair.client.end(mine)
    pair.exchange()
    assert PongReceived(b"12345678") in pair.client_events
    assert data_of(pair.server_events, theirs) == b"still here"


def test_goaway_tells_the_client_which_streams_were_never_taken_up():
    pair = Pair()
    first = pair.client.open(CONNECT)
    pair.exchange()
    second = pair.client.open(CONNECT)  # not delivered
    pair.server.goaway(ErrorCode.NO_ERROR)
    events = feed(pair.client, drain(pair.server))
    assert StreamReset(second, ErrorCode.REFUSED_STREAM) in events
    assert first.id in pair.client.streams
    assert second.id not in pair.client.streams


def test_a_client_opens_no_more_than_either_side_allows():
    pair = Pair()
    while pair.client.can_open:
        pair.client.open(CONNECT)
    pair.exchange()
    assert len(pair.server.streams) == hbone.MAX_CONCURRENT_STREAMS
    excess = pair.client.open(CONNECT)
    pair.exchange()
    assert StreamReset(excess, ErrorCode.REFUSED_STREAM) in pair.client_events
    assert len(pair.server.streams) == hbone.MAX_CONCURRENT_STREAMS


def test_a_reader_that_stops_stops_its_own_sender_and_nobody_else():
    pair = Pair()
    slow, slow_end = pair.opened()
    quick, quick_end = pair.opened()
    sent = 0
    while done := put(pair.client, slow, bytes(1 << 16)):
        sent += done
        pair.exchange()
    assert sent == INITIAL_STREAM_WINDOW
    for _ in range(200):  # far more than the connection window would hold
        quick_sent = put(pair.client, quick, b"q" * 100_000)
        assert quick_sent > 0
        pair.exchange()
        pair.server.consumed(quick_end, quick_sent, keeps_up=True)
        pair.exchange()
    pair.client_events.clear()
    pair.server.consumed(slow_end, sent, keeps_up=False)
    pair.exchange()
    assert WindowOpened(slow) in pair.client_events
    assert put(pair.client, slow, b"more") == 4


def test_a_stream_that_keeps_up_is_given_the_large_window():
    pair = Pair()
    mine, theirs = pair.opened()
    sent = put(pair.client, mine, bytes(INITIAL_STREAM_WINDOW // 2))
    pair.exchange()
    pair.server.consumed(theirs, sent, keeps_up=True)
    pair.exchange()
    assert mine.send_window == MAX_STREAM_WINDOW
    assert theirs.recv_window == MAX_STREAM_WINDOW


def test_small_messages_beside_it_take_the_large_window_back():
    pair = Pair()
    (bulk, bulk_end), (small, small_end) = pair.opened(), pair.opened()

    def moves(stream, end, size):
        sent = put(pair.client, stream, bytes(size))
        pair.exchange()
        pair.server.consumed(end, sent, keeps_up=True)
        pair.exchange()
        assert end.recv_window + end.unacknowledged == end.recv_limit
        assert stream.send_window == end.recv_window
        return end.recv_limit

    assert moves(bulk, bulk_end, 100_000) == MAX_STREAM_WINDOW
    for _ in range(60):
        assert moves(small, small_end, 64) == INITIAL_STREAM_WINDOW
        moves(bulk, bulk_end, 100_000)
    assert bulk_end.recv_limit == INITIAL_STREAM_WINDOW
    for _ in range(hbone.UNDISTURBED // 100_000 - 1):
        assert moves(bulk, bulk_end, 100_000) == INITIAL_STREAM_WINDOW
    moves(bulk, bulk_end, 100_000)
    assert moves(bulk, bulk_end, 100_000) == MAX_STREAM_WINDOW


def test_who_is_alone_has_the_large_window_whatever_was_beside_it():
    pair = Pair()
    small, small_end = pair.opened()
    put(pair.client, small, b"small")
    pair.exchange()
    pair.server.consumed(small_end, 5, keeps_up=True)
    pair.server.reset(small_end, ErrorCode.CANCEL)
    pair.exchange()
    mine, theirs = pair.opened()
    sent = put(pair.client, mine, bytes(100_000))
    pair.exchange()
    pair.server.consumed(theirs, sent, keeps_up=True)
    assert theirs.recv_limit == MAX_STREAM_WINDOW


def test_streams_that_all_move_much_have_the_large_window_side_by_side():
    pair = Pair()
    streams = [pair.opened() for _ in range(4)]
    for _ in range(3):
        for mine, theirs in streams:
            sent = put(pair.client, mine, bytes(100_000))
            pair.exchange()
            pair.server.consumed(theirs, sent, keeps_up=True)
            pair.exchange()
    assert {theirs.recv_limit for _, theirs in streams} == {MAX_STREAM_WINDOW}


@pytest.mark.parametrize("keeps_up", [True, False])
def test_credit_is_given_once_for_each_byte(keeps_up):
    pair = Pair()
    mine, theirs = pair.opened()
    for _ in range(40):
        sent = put(pair.client, mine, bytes(90_000))
        pair.exchange()
        pair.server.consumed(theirs, sent, keeps_up=keeps_up)
        pair.exchange()
        assert theirs.recv_window + theirs.unacknowledged == theirs.recv_limit
        assert mine.send_window == theirs.recv_window
    assert theirs.recv_limit == (MAX_STREAM_WINDOW if keeps_up else INITIAL_STREAM_WINDOW)


def test_data_never_overtakes_a_frame_that_did_not_fit(pair):
    """A header block that is too long for what is left of the buffer waits; DATA that would fit waits behind it."""
    mine, _ = pair.opened()
    mine.send_window = pair.client.send_window = 1 << 30
    while len(pair.client.reserve(mine)) > 8000:
        put(pair.client, mine, bytes(5000))
    assert len(pair.client.reserve(mine)) >= hbone.MIN_DATA
    other = pair.client.open([*CONNECT, (b"baggage", b"b" * 9000)])
    other.send_window = 1 << 30
    assert len(pair.client.reserve(mine)) == len(pair.client.reserve(other)) == 0
    kinds = [(kind, stream_id) for kind, _, stream_id, _ in frames_of(drain(pair.client))]
    assert kinds[-1] == (raw.HEADERS, other.id)
    assert len(pair.client.reserve(other)) > 0


def test_room_is_never_more_than_the_smallest_limit(pair):
    mine, _ = pair.opened()
    other, _ = pair.opened()
    assert len(pair.client.reserve(mine)) == hbone.OUTPUT_SIZE - 9
    mine.send_window = 5
    assert len(pair.client.reserve(mine)) == 5
    pair.client.send_window = 3
    assert len(pair.client.reserve(mine)) == 3
    assert len(pair.client.reserve(other)) == 3
    pair.client.send_window = 0
    assert len(pair.client.reserve(mine)) == 0
    mine.send_window = -7
    assert len(pair.client.reserve(mine)) == 0


def fill(connection, streams, size):
    """One turn in which each stream has so much to send; what each got into its frame."""
    taken = []
    for stream in streams:
        stream.send_window = connection.send_window = 1 << 30
        if not len(connection.reserve(stream)):
            drain(connection)
        taken.append(put_once(connection, stream, bytes(size)))
    drain(connection)
    return taken


def put_once(connection, stream, data):
    room = connection.reserve(stream)
    length = min(len(room), len(data))
    room[:length] = data[:length]
    connection.commit(stream, length)
    return length


def test_one_stream_fills_the_output_and_many_get_about_a_record_each():
    pair = Pair()
    streams = [pair.opened()[0] for _ in range(100)]
    most = hbone.OUTPUT_SIZE
    assert fill(pair.client, streams[:1], most) == [most - 9]
    for _ in range(5):
        assert sum(fill(pair.client, streams, most)) < 1.5 * len(streams) * hbone.RECORD
    for _ in range(3):
        fill(pair.client, streams[:1], most)
    assert fill(pair.client, streams[:1], most) == [most - 9]


@pytest.mark.parametrize("allowed", [16384, 16400, 32767, 65536, 1 << 20])
def test_a_frame_fills_whole_records_whatever_the_peer_allows(allowed):
    pair = Pair()
    mine, _ = pair.opened()
    mine.send_window = 1 << 30
    feed(pair.client, raw.frame(raw.SETTINGS, 0, 0, struct.pack(">HL", 5, allowed)))
    drain(pair.client)
    taken = put_once(pair.client, mine, bytes(1 << 20))
    assert taken <= allowed
    assert (taken + 9) % hbone.RECORD == 0
    assert taken + 9 + hbone.RECORD > min(allowed, hbone.OUTPUT_SIZE)
    in_a_turn = pair.client.frames_at_once * (taken + 9)
    assert hbone.OUTPUT_SIZE // 2 < in_a_turn <= hbone.OUTPUT_SIZE


def test_so_many_streams_have_the_large_window_and_those_that_end_make_room():
    pair = Pair()
    streams = [pair.opened() for _ in range(hbone.MAX_LARGE_WINDOWS + 2)]

    def reads(mine, theirs):
        put(pair.client, mine, bytes(INITIAL_STREAM_WINDOW // 2))
        pair.exchange()
        pair.server.consumed(theirs, INITIAL_STREAM_WINDOW // 2, keeps_up=True)
        pair.exchange()
        return theirs.recv_limit

    limits = [reads(*stream) for stream in streams]
    assert limits[-3:] == [MAX_STREAM_WINDOW, INITIAL_STREAM_WINDOW, INITIAL_STREAM_WINDOW]
    pair.server.reset(streams[0][1], ErrorCode.CANCEL)
    pair.exchange()
    assert [reads(*stream) for stream in streams[-2:]] == [MAX_STREAM_WINDOW, INITIAL_STREAM_WINDOW]


def test_output_is_bounded_however_much_is_offered():
    pair = Pair()
    mine, _ = pair.opened()
    mine.send_window = pair.client.send_window = 1 << 30
    put(pair.client, mine, bytes(4 << 20))
    assert len(drain(pair.client)) <= hbone.OUTPUT_SIZE


def test_answers_that_nobody_reads_are_dropped_at_a_limit_and_end_the_connection():
    """Commands never raise for it, since they come from anywhere; the next bytes that arrive do."""
    pair = Pair()
    streams = [pair.opened()[1] for _ in range(40)]
    for _ in range(10):
        for stream in streams:
            pair.server.respond(stream, [*OK, (b"x-reason", b"r" * 2000)])
    assert pair.server.overflowed
    assert sum(len(part) for part in pair.server.output()) <= hbone.OUTPUT_SIZE + hbone.MAX_SPILL
    with pytest.raises(ProtocolError) as caught:
        feed(pair.server, raw.frame(raw.PING, 0, 0, bytes(8)))
    assert caught.value.code == ErrorCode.ENHANCE_YOUR_CALM


class Interleaving(RuleBasedStateMachine):
    """Any order of opens, writes, reads, half-closes, resets and partial deliveries between two codecs."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = {True: Connection(client=True), False: Connection(client=False)}
        self.wire = {True: bytearray(), False: bytearray()}  # by sender
        self.streams: dict[int, dict[bool, Stream]] = {}
        self.written: dict[tuple[int, bool], bytearray] = {}  # by stream and writer
        self.arrived: dict[tuple[int, bool], bytearray] = {}
        self.unread: dict[tuple[int, bool], int] = {}
        self.ended: set[tuple[int, bool]] = set()
        self.end_seen: set[tuple[int, bool]] = set()
        self.reset: set[int] = set()
        self.counter = 0

    @initialize()
    def say_hello(self) -> None:
        for _ in range(2):
            self.collect()
            for sender in (True, False):
                self.deliver_all(sender)

    def collect(self) -> None:
        for sender, end in self.ends.items():
            self.wire[sender] += drain(end)

    def deliver(self, sender: bool, amount: int) -> None:
        self.collect()
        chunk = bytes(self.wire[sender][:amount])
        del self.wire[sender][:amount]
        receiver = not sender
        for event in feed(self.ends[receiver], chunk):
            match event:
                case RequestReceived(stream):
                    self.streams[stream.id][False] = stream
                    self.ends[False].respond(stream, OK)
                case DataReceived(stream, data):
                    assert (stream.id, sender) not in self.end_seen
                    self.arrived[stream.id, sender] += data
                    self.unread[stream.id, sender] += len(data)
                case StreamEnded(stream):
                    assert (stream.id, sender) in self.ended
                    assert self.arrived[stream.id, sender] == self.written[stream.id, sender]
                    self.end_seen.add((stream.id, sender))
                case StreamReset(stream):
                    assert stream.id in self.reset
                case ResponseReceived() | WindowOpened() | SettingsReceived() | PongReceived():
                    pass
                case _:
                    raise AssertionError(event)

    def deliver_all(self, sender: bool) -> None:
        self.collect()
        self.deliver(sender, len(self.wire[sender]))

    def usable(self, stream_id: int, writer: bool) -> bool:
        stream = self.streams[stream_id].get(writer)
        return stream is not None and not stream.local_closed

    @precondition(lambda self: self.ends[True].can_open)
    @rule()
    def open(self) -> None:
        stream = self.ends[True].open(CONNECT)
        self.streams[stream.id] = {True: stream}
        for writer in (True, False):
            self.written[stream.id, writer] = bytearray()
            self.arrived[stream.id, writer] = bytearray()
            self.unread[stream.id, writer] = 0

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), writer=st.booleans(), amount=st.sampled_from([1, 3, 1000, 20_000, 70_000, 300_000]))
    def write(self, data: st.DataObject, writer: bool, amount: int) -> None:
        stream_id = data.draw(st.sampled_from(sorted(self.streams)))
        if self.usable(stream_id, writer):
            self.counter += 1
            payload = (self.counter.to_bytes(4, "big") * (amount // 4 + 1))[:amount]
            done = put(self.ends[writer], self.streams[stream_id][writer], payload)
            self.written[stream_id, writer] += payload[:done]

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), writer=st.booleans(), share=st.sampled_from([0.1, 0.5, 1.0]), keeps_up=st.booleans())
    def read(self, data: st.DataObject, writer: bool, share: float, keeps_up: bool) -> None:
        stream_id = data.draw(st.sampled_from(sorted(self.streams)))
        taken = int(self.unread[stream_id, writer] * share)
        if taken:
            self.unread[stream_id, writer] -= taken
            self.ends[not writer].consumed(self.streams[stream_id][not writer], taken, keeps_up=keeps_up)

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), writer=st.booleans())
    def half_close(self, data: st.DataObject, writer: bool) -> None:
        stream_id = data.draw(st.sampled_from(sorted(self.streams)))
        if self.usable(stream_id, writer):
            self.ends[writer].end(self.streams[stream_id][writer])
            self.ended.add((stream_id, writer))

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), by=st.booleans())
    def reset_one(self, data: st.DataObject, by: bool) -> None:
        stream_id = data.draw(st.sampled_from(sorted(self.streams)))
        stream = self.streams[stream_id].get(by)
        if stream is not None and stream.id in self.ends[by].streams:
            self.ends[by].reset(stream, ErrorCode.CANCEL)
            self.reset.add(stream_id)

    @rule(sender=st.booleans())
    def ping(self, sender: bool) -> None:
        self.ends[sender].ping(b"12345678")

    @rule(sender=st.booleans(), amount=st.sampled_from([1, 8, 10, 100, 5_000, 100_000, 1 << 30]))
    def part_arrives(self, sender: bool, amount: int) -> None:
        self.deliver(sender, amount)

    @invariant()
    def windows_hold(self) -> None:
        for end in self.ends.values():
            assert 0 <= end.send_window <= hbone.MAX_WINDOW
            assert 0 <= end._recv_window <= CONNECTION_WINDOW
            for stream in end.streams.values():
                assert stream.send_window >= 0
                assert 0 <= stream.recv_window <= stream.recv_limit

    @invariant()
    def what_arrived_is_a_prefix_of_what_was_written(self) -> None:
        for key, written in self.written.items():
            assert written.startswith(self.arrived[key])

    def teardown(self) -> None:
        """Let everything finish: nothing may be left over, and all credit must have come home."""
        for stream_id, ends in self.streams.items():
            for writer, stream in ends.items():
                if self.usable(stream_id, writer):
                    self.ends[writer].end(stream)
                    self.ended.add((stream_id, writer))
        for _ in range(6):
            for sender in (True, False):
                self.deliver_all(sender)
            for stream_id, ends in self.streams.items():  # those that the server saw only now
                if self.usable(stream_id, False):
                    self.ends[False].end(ends[False])
                    self.ended.add((stream_id, False))
        for stream_id in self.streams:
            if stream_id not in self.reset:
                for writer in (True, False):
                    assert self.arrived[stream_id, writer] == self.written[stream_id, writer]
                    assert (stream_id, writer) in self.end_seen
        for sender, end in self.ends.items():
            assert end.streams == {}
            other = self.ends[not sender]
            assert end.send_window == other._recv_window


TestInterleaving = Interleaving.TestCase
TestInterleaving.settings = settings(max_examples=examples(50), stateful_step_count=40)


@given(
    headers=st.lists(
        st.tuples(
            st.sampled_from([b"baggage", b"forwarded", b"x-uproxy-reason", b"accept", b":status", b"n" * 130]),
            st.binary(max_size=600),
        ),
        max_size=12,
    )
)
@settings(max_examples=examples(200))
def test_an_encoded_header_block_decodes_to_itself(headers):
    from hpack import Decoder

    block = header_block.encode_headers(headers)
    reference = [(bytes(n), bytes(v)) for n, v in Decoder().decode(block, raw=True)]
    assert reference == headers
    quick = header_block.decode_literals(block)
    assert quick is None or quick == headers


def own_request(authority: bytes = b"10.0.0.2:80", forwarded: bytes = b'for="10.0.0.1:40000";host=db.shop.svc'):
    traceparent = b"00-" + b"ab" * 16 + b"-" + b"cd" * 8 + b"-00"
    return (
        (b":method", b"CONNECT"),
        (b":authority", authority),
        (b"forwarded", forwarded),
        (b"traceparent", traceparent),
    )


@pytest.mark.parametrize("headers", [own_request(), ((b":status", b"200"),)])
def test_what_a_uproxy_writes_is_read_at_once(headers):
    assert header_block.read_own(header_block.encode_headers(headers)) == headers


_SPLICED = [b"", b"\0", b"\x7f", b"\x82", b"\0\x09forwarded", b"\0\x0btraceparent\x37", b" ", b"\t", b"\x80", b"\x88"]


@given(
    st.binary(max_size=200),
    st.binary(max_size=130),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3), st.sampled_from(_SPLICED) | st.binary(max_size=3))),
)
@example(authority=b"a", forwarded=b"x" * 126, splices=[])
@example(authority=b"a", forwarded=b"x" * 127, splices=[])
@example(authority=b"a", forwarded=b" x", splices=[])
@example(authority=b"\0\x09forwarded\x01x", forwarded=b"y", splices=[])
@example(authority=b"a", forwarded=b"y", splices=[(0, 2, b"")])
@settings(max_examples=examples(400))
def test_what_is_read_at_once_is_what_the_others_read(authority, forwarded, splices):
    block = header_block.encode_headers(own_request(authority, forwarded))
    for at, dropped, added in splices:
        block = block[:at] + added + block[at + dropped :]
    check_read_at_once(block)


def check_read_at_once(block: bytes) -> None:
    found = header_block.read_own(block)
    if found is not None:
        assert list(found) == header_block.decode_literals(block)
        assert header_block.well_formed(found, request=found[0][0] != b":status")


def test_no_other_byte_in_a_request_is_read_otherwise():
    block = header_block.encode_headers(own_request())
    for at in range(len(block)):
        for byte in range(256):
            check_read_at_once(block[:at] + bytes((byte,)) + block[at + 1 :])


def test_beginnings_of_requests_are_remembered_within_bounds():
    for number in range(2 * header_block.MAX_STEADY):
        block = header_block.encode_headers(own_request(b"10.0.0.2:%d" % number))
        assert dict(header_block.read_own(block))[b":authority"] == b"10.0.0.2:%d" % number
    assert len(header_block._steady_requests) <= header_block.MAX_STEADY


@given(block=st.binary(max_size=80))
@settings(max_examples=examples(400))
def test_the_quick_decoder_never_disagrees_with_the_general_one(block):
    """Where the quick decoder has an answer, the general one has the same: no two readings of one block."""
    from hpack import Decoder

    quick = header_block.decode_literals(block)
    if quick is not None:
        decoder = Decoder()
        decoder.max_allowed_table_size = decoder.header_table_size
        assert [(bytes(n), bytes(v)) for n, v in decoder.decode(block, raw=True)] == quick
