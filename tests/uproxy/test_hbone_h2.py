"""Our codec against h2, an implementation by other hands, in both roles."""

from __future__ import annotations

from collections import defaultdict

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.hbone import CONNECT, OK, drain, feed, frames_of, put
from uproxy import hbone
from uproxy.hbone import (
    Connection,
    DataReceived,
    ErrorCode,
    GoawayReceived,
    PongReceived,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)

STEPS = [None, 1, 100]
INDEX = st.integers(0, 5)


class Reference:
    """h2 at one end, our codec at the other, and a full history of what each saw."""

    def __init__(self, *, ours_is_client: bool, step: int | None = None) -> None:
        self.step = step
        config = h2.config.H2Configuration(client_side=not ours_is_client, header_encoding=None)
        self.h2 = h2.connection.H2Connection(config)
        self.ours = Connection(client=ours_is_client)
        self.theirs_saw: list[h2.events.Event] = []
        self.ours_saw: list[hbone.Event] = []
        self.h2.initiate_connection()
        self.exchange()

    def exchange(self) -> None:
        while True:
            out, back = drain(self.ours), self.h2.data_to_send()
            if not out and not back:
                return
            step = self.step or max(len(out), 1)
            for start in range(0, len(out), step):
                self.theirs_saw += self.h2.receive_data(out[start : start + step])
            self.ours_saw += feed(self.ours, back, self.step)

    def seen(self, kind):
        return [e for e in self.theirs_saw if isinstance(e, kind)]

    def ours_seen(self, kind):
        return [e for e in self.ours_saw if isinstance(e, kind)]


@pytest.mark.parametrize("step", STEPS)
def test_h2_as_client_opens_streams_and_both_sides_talk(step):
    peer = Reference(ours_is_client=False, step=step)
    headers = [*CONNECT, (b"baggage", b"k8s.cluster.name=" + b"c" * 400), (b"x-long", b"v" * 20_000)]
    for stream_id in (1, 3):  # 20 KB of headers need a CONTINUATION; the second block would use h2's table if it could
        peer.h2.send_headers(stream_id, headers)
        peer.exchange()
    requests = peer.ours_seen(RequestReceived)
    assert [[(bytes(n), bytes(v)) for n, v in r.headers] for r in requests] == [headers] * 2
    stream = requests[0].stream
    peer.ours.respond(stream, [*OK, (b"baggage", b"b" * 300)])
    peer.h2.send_data(1, b"hello", pad_length=9)
    peer.h2.send_data(1, b"", end_stream=True)
    peer.exchange()
    (answer,) = peer.seen(h2.events.ResponseReceived)
    assert [(bytes(n), bytes(v)) for n, v in answer.headers] == [*OK, (b"baggage", b"b" * 300)]
    assert b"".join(bytes(e.data) for e in peer.ours_seen(DataReceived)) == b"hello"
    assert peer.ours_seen(StreamEnded) == [StreamEnded(stream)]
    put(peer.ours, stream, b"bye")
    peer.ours.end(stream)
    peer.exchange()
    assert b"".join(e.data for e in peer.seen(h2.events.DataReceived)) == b"bye"
    assert peer.seen(h2.events.StreamEnded)
    assert list(peer.ours.streams) == [3]


@pytest.mark.parametrize("step", STEPS)
def test_h2_as_server_answers_our_requests(step):
    peer = Reference(ours_is_client=True, step=step)
    streams = [peer.ours.open([*CONNECT, (b"baggage", b"b" * length)]) for length in (0, 126, 127, 300, 9000)]
    peer.exchange()
    requests = peer.seen(h2.events.RequestReceived)
    assert [e.stream_id for e in requests] == [s.id for s in streams]
    for stream in streams:
        peer.h2.send_headers(stream.id, [*OK, (b"x-reason", b"r" * 200)])
        peer.h2.send_data(stream.id, b"data", pad_length=3)
        peer.h2.end_stream(stream.id)
    peer.exchange()
    assert len(peer.ours_seen(ResponseReceived)) == len(streams)
    assert len(peer.ours_seen(StreamEnded)) == len(streams)
    for stream in streams:
        put(peer.ours, stream, b"x" * 1000)
        peer.ours.end(stream)
    peer.exchange()
    assert sum(len(e.data) for e in peer.seen(h2.events.DataReceived)) == 1000 * len(streams)
    assert peer.ours.streams == {}


@pytest.mark.parametrize("ours_is_client", [True, False])
def test_resets_pings_and_goaway_are_understood_both_ways(ours_is_client):
    peer = Reference(ours_is_client=ours_is_client)
    for _ in range(2):
        if ours_is_client:
            peer.ours.open(CONNECT)
        else:
            peer.h2.send_headers(peer.h2.get_next_available_stream_id(), CONNECT)
        peer.exchange()
    peer.ours.reset(peer.ours.streams[1], ErrorCode.CONNECT_ERROR)
    peer.h2.reset_stream(3, ErrorCode.CANCEL)
    peer.h2.ping(b"12345678")
    peer.ours.ping(b"abcdefgh")
    peer.exchange()
    (reset,) = peer.seen(h2.events.StreamReset)
    assert (reset.stream_id, reset.error_code) == (1, ErrorCode.CONNECT_ERROR)
    (event,) = peer.ours_seen(StreamReset)
    assert (event.stream.id, event.code) == (3, ErrorCode.CANCEL)
    assert [e.ping_data for e in peer.seen(h2.events.PingAckReceived)] == [b"12345678"]
    assert peer.ours_seen(PongReceived) == [PongReceived(b"abcdefgh")]
    peer.h2.close_connection(error_code=ErrorCode.NO_ERROR, last_stream_id=3)
    peer.exchange()
    assert peer.ours_seen(GoawayReceived) == [GoawayReceived(3, 0)]
    other = Reference(ours_is_client=ours_is_client)
    other.ours.goaway(ErrorCode.ENHANCE_YOUR_CALM, text="calm down")
    other.exchange()
    (ended,) = other.seen(h2.events.ConnectionTerminated)
    assert ended.error_code == ErrorCode.ENHANCE_YOUR_CALM
    assert ended.additional_data == b"calm down"


def test_h2_accepts_that_we_go_on_after_a_first_graceful_goaway():
    peer = Reference(ours_is_client=False)
    peer.h2.send_headers(1, CONNECT)
    peer.exchange()
    peer.ours.goaway(final=False)
    sent = frames_of(drain(peer.ours))
    assert [f[0] for f in sent] == [hbone.GOAWAY]
    assert sent[0][3] == (hbone.MAX_WINDOW).to_bytes(4, "big") + bytes(4)


def test_settings_of_h2_change_midstream():
    peer = Reference(ours_is_client=True)
    stream = peer.ours.open(CONNECT)
    peer.exchange()
    peer.h2.send_headers(1, OK)
    sent = put(peer.ours, stream, bytes(100_000))
    assert sent == 65535
    peer.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 70_000})
    peer.exchange()
    assert stream.send_window == 70_000 - 65535
    assert put(peer.ours, stream, bytes(10_000)) == 0  # the connection window, which SETTINGS do not move
    peer.h2.increment_flow_control_window(20_000)
    peer.exchange()
    assert put(peer.ours, stream, bytes(10_000)) == 70_000 - 65535
    peer.h2.update_settings(
        {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 10, h2.settings.SettingCodes.MAX_FRAME_SIZE: 1 << 20}
    )
    peer.exchange()
    assert stream.send_window == 10 - 70_000
    peer.h2.acknowledge_received_data(70_000, 1)
    peer.exchange()
    assert put(peer.ours, stream, b"x" * 100) == 10
    peer.exchange()
    assert sum(len(e.data) for e in peer.seen(h2.events.DataReceived)) == 70_010


class WithH2(RuleBasedStateMachine):
    """Any order of writes, reads, ends and SETTINGS, on up to six streams, with nothing held back on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.peer: Reference
        self.streams: dict[int, hbone.Stream] = {}
        self.written_by_us: dict[int, bytes] = defaultdict(bytes)
        self.written_by_h2: dict[int, bytes] = defaultdict(bytes)
        self.read_by_us: dict[int, int] = defaultdict(int)
        self.read_by_h2: dict[int, int] = defaultdict(int)
        self.ended_by_us: set[int] = set()
        self.ended_by_h2: set[int] = set()
        self.counter = 0

    @initialize(ours_is_client=st.booleans(), step=st.sampled_from([None, 13]))
    def connect(self, ours_is_client: bool, step: int | None) -> None:
        self.peer = Reference(ours_is_client=ours_is_client, step=step)

    def stream(self, index: int) -> hbone.Stream:
        return list(self.streams.values())[index % len(self.streams)]

    def payload(self, length: int) -> bytes:
        self.counter = (self.counter + 1) % 256
        return bytes([self.counter]) * length

    @precondition(lambda self: len(self.streams) < 6)
    @rule()
    def open(self) -> None:
        peer = self.peer
        if peer.ours.client:
            stream = peer.ours.open(CONNECT)
            peer.exchange()
            peer.h2.send_headers(stream.id, OK)
        else:
            new = peer.h2.get_next_available_stream_id()
            peer.h2.send_headers(new, CONNECT)
            peer.exchange()
            stream = peer.ours.streams[new]
            peer.ours.respond(stream, OK)
        self.streams[stream.id] = stream
        peer.exchange()

    @precondition(lambda self: self.streams)
    @rule(index=INDEX, length=st.sampled_from([1, 100, 16_384, 200_000]))
    def we_write(self, index: int, length: int) -> None:
        stream = self.stream(index)
        if stream.id not in self.ended_by_us:
            payload = self.payload(length)
            self.written_by_us[stream.id] += payload[: put(self.peer.ours, stream, payload)]
            self.peer.exchange()

    @precondition(lambda self: self.streams)
    @rule(index=INDEX, length=st.sampled_from([1, 100, 16_000]), padding=st.sampled_from([None, 0, 1, 255]))
    def h2_writes(self, index: int, length: int, padding: int | None) -> None:
        stream_id, h2_end = self.stream(index).id, self.peer.h2
        if stream_id not in self.ended_by_h2:
            room = min(h2_end.local_flow_control_window(stream_id), h2_end.max_outbound_frame_size) - 256
            if payload := self.payload(max(min(length, room), 0)):
                h2_end.send_data(stream_id, payload, pad_length=padding)
                self.written_by_h2[stream_id] += payload
                self.peer.exchange()

    @precondition(lambda self: self.streams)
    @rule(index=INDEX)
    def we_read(self, index: int) -> None:
        stream = self.stream(index)
        new = len(self.arrived_at_ours(stream.id)) - self.read_by_us[stream.id]
        if new:
            self.peer.ours.consumed(stream, new, keeps_up=True)
            self.read_by_us[stream.id] += new
            self.peer.exchange()

    @precondition(lambda self: self.streams)
    @rule(index=INDEX)
    def h2_reads(self, index: int) -> None:
        stream_id = self.stream(index).id
        arrived = [e for e in self.peer.seen(h2.events.DataReceived) if e.stream_id == stream_id]
        new = sum(e.flow_controlled_length for e in arrived) - self.read_by_h2[stream_id]
        if new:
            self.peer.h2.acknowledge_received_data(new, stream_id)
            self.read_by_h2[stream_id] += new
            self.peer.exchange()

    @precondition(lambda self: self.streams)
    @rule(index=INDEX)
    def we_end(self, index: int) -> None:
        stream = self.stream(index)
        # h2 4.4 counts even an empty frame against a window that SETTINGS made negative (RFC 9113 6.9.1 does not).
        if stream.send_window >= 0:
            self.peer.ours.end(stream)
            self.ended_by_us.add(stream.id)
            self.peer.exchange()

    @precondition(lambda self: self.streams)
    @rule(index=INDEX)
    def h2_ends(self, index: int) -> None:
        stream_id = self.stream(index).id
        if stream_id not in self.ended_by_h2:
            self.peer.h2.end_stream(stream_id)
            self.ended_by_h2.add(stream_id)
            self.peer.exchange()

    @rule(window=st.sampled_from([0, 1, 1000, 65_535, 1 << 20]))
    def h2_changes_its_window(self, window: int) -> None:
        self.peer.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.peer.exchange()

    @rule(size=st.sampled_from([16_384, 20_000, 1 << 20]))
    def h2_changes_its_frame_size(self, size: int) -> None:
        self.peer.h2.update_settings({h2.settings.SettingCodes.MAX_FRAME_SIZE: size})
        self.peer.exchange()

    @rule()
    def both_ping(self) -> None:
        self.peer.ours.ping(b"12345678")
        self.peer.h2.ping(b"abcdefgh")
        self.peer.exchange()

    def arrived_at_ours(self, stream_id: int) -> bytes:
        return b"".join(bytes(e.data) for e in self.peer.ours_seen(DataReceived) if e.stream.id == stream_id)

    @invariant()
    def each_saw_what_the_other_did(self) -> None:
        for stream_id in self.streams:
            assert self.arrived_at_ours(stream_id) == self.written_by_h2[stream_id]
            arrived = (e.data for e in self.peer.seen(h2.events.DataReceived) if e.stream_id == stream_id)
            assert b"".join(arrived) == self.written_by_us[stream_id]
        if self.streams:
            assert {e.stream.id for e in self.peer.ours_seen(StreamEnded)} == self.ended_by_h2
            assert {e.stream_id for e in self.peer.seen(h2.events.StreamEnded)} == self.ended_by_us
            assert set(self.peer.ours.streams) == set(self.streams) - (self.ended_by_us & self.ended_by_h2)


TestWithH2 = WithH2.TestCase
TestWithH2.settings = settings(stateful_step_count=30)
