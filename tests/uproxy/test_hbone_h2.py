"""Our codec against h2, an implementation by other hands, in both roles."""

from __future__ import annotations

from collections import defaultdict

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("open")),
        st.tuples(st.just("ours writes"), st.integers(0, 5), st.sampled_from([1, 100, 16_384, 200_000])),
        st.tuples(
            st.just("h2 writes"),
            st.integers(0, 5),
            st.sampled_from([1, 100, 16_000]),
            st.sampled_from([None, 0, 1, 255]),
        ),
        st.tuples(st.just("ours reads"), st.integers(0, 5)),
        st.tuples(st.just("h2 reads"), st.integers(0, 5)),
        st.tuples(st.just("ours ends"), st.integers(0, 5)),
        st.tuples(st.just("h2 ends"), st.integers(0, 5)),
        st.tuples(st.just("h2 window"), st.sampled_from([0, 1, 1000, 65_535, 1 << 20])),
        st.tuples(st.just("h2 frame size"), st.sampled_from([16_384, 20_000, 1 << 20])),
        st.tuples(st.just("ping")),
    ),
    max_size=30,
)


@given(ours_is_client=st.booleans(), actions=ACTIONS, step=st.sampled_from([None, 13]))
@settings(deadline=None, max_examples=150)
def test_any_exchange_with_h2_delivers_everything_in_order(ours_is_client, actions, step):
    peer = Reference(ours_is_client=ours_is_client, step=step)
    written: dict[tuple[str, int], bytes] = defaultdict(bytes)
    unread: dict[int, int] = defaultdict(int)
    ended: set[tuple[str, int]] = set()
    ids: list[int] = []
    streams: dict[int, hbone.Stream] = {}

    def unread_by_h2() -> dict[int, int]:
        totals: dict[int, int] = defaultdict(int)
        for event in peer.seen(h2.events.DataReceived):
            totals[event.stream_id] += event.flow_controlled_length
        return totals

    acknowledged: dict[int, int] = defaultdict(int)
    for counter, (action, *arguments) in enumerate(actions, start=1):
        stream_id = (
            ids[arguments[0] % len(ids)]
            if arguments and ids and "window" not in action and "size" not in action
            else None
        )
        if action == "open" and len(ids) < 6:
            if ours_is_client:
                stream = peer.ours.open(CONNECT)
                ids.append(stream.id)
                streams[stream.id] = stream
                peer.exchange()
                peer.h2.send_headers(stream.id, OK)
            else:
                new = peer.h2.get_next_available_stream_id()
                peer.h2.send_headers(new, CONNECT)
                peer.exchange()
                ids.append(new)
                streams[new] = peer.ours.streams[new]
                peer.ours.respond(streams[new], OK)
        elif action == "ours writes" and stream_id and ("ours", stream_id) not in ended:
            payload = bytes([counter]) * arguments[1]
            done = put(peer.ours, streams[stream_id], payload)
            written["ours", stream_id] += payload[:done]
        elif action == "h2 writes" and stream_id and ("h2", stream_id) not in ended:
            room = peer.h2.local_flow_control_window(stream_id) - 256
            payload = bytes([counter]) * min(arguments[1], max(room, 0), peer.h2.max_outbound_frame_size - 256)
            if payload:
                peer.h2.send_data(stream_id, payload, pad_length=arguments[2])
                written["h2", stream_id] += payload
        elif action == "ours reads" and stream_id:
            total = sum(len(e.data) for e in peer.ours_seen(DataReceived) if e.stream.id == stream_id)
            if total > unread[stream_id]:
                peer.ours.consumed(streams[stream_id], total - unread[stream_id], keeps_up=True)
                unread[stream_id] = total
        elif action == "h2 reads" and stream_id:
            amount = unread_by_h2()[stream_id] - acknowledged[stream_id]
            if amount:
                peer.h2.acknowledge_received_data(amount, stream_id)
                acknowledged[stream_id] += amount
        elif action == "ours ends" and stream_id and ("ours", stream_id) not in ended:
            peer.ours.end(streams[stream_id])
            ended.add(("ours", stream_id))
        elif action == "h2 ends" and stream_id and ("h2", stream_id) not in ended:
            peer.h2.end_stream(stream_id)
            ended.add(("h2", stream_id))
        elif action == "h2 window":
            peer.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: arguments[0]})
        elif action == "h2 frame size":
            peer.h2.update_settings({h2.settings.SettingCodes.MAX_FRAME_SIZE: arguments[0]})
        elif action == "ping":
            peer.ours.ping(b"12345678")
            peer.h2.ping(b"abcdefgh")
        peer.exchange()
    for stream_id in ids:
        arrived = b"".join(bytes(e.data) for e in peer.ours_seen(DataReceived) if e.stream.id == stream_id)
        assert arrived == written["h2", stream_id]
        arrived = b"".join(e.data for e in peer.seen(h2.events.DataReceived) if e.stream_id == stream_id)
        assert arrived == written["ours", stream_id]
        assert (("h2", stream_id) in ended) == any(e.stream.id == stream_id for e in peer.ours_seen(StreamEnded))
        assert (("ours", stream_id) in ended) == any(e.stream_id == stream_id for e in peer.seen(h2.events.StreamEnded))
    both = {i for i in ids if {("ours", i), ("h2", i)} <= ended}
    assert set(peer.ours.streams) == set(ids) - both
