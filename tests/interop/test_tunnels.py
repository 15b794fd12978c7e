"""The same conversations through every mix of uProxy and Envoy 1.40: what the application sees must not differ.

Envoy with Envoy is the control: it shows what the wire does, and that the test can tell.
"""

from __future__ import annotations

import selectors
import socket
import time

import pytest

from tests.support.envoy import (
    PATIENCE_S,
    Sender,
    Tunnel,
    ended_how,
    fill,
    pattern,
    read_exactly,
    read_to_end,
    reset,
    silent,
    tunnel,
)

pytestmark = pytest.mark.root
MIXES = [("envoy", "envoy"), ("uproxy", "envoy"), ("envoy", "uproxy"), ("uproxy", "uproxy")]
LARGE = 24 << 20


@pytest.fixture(scope="module", params=MIXES, ids=[f"{c}-to-{s}" for c, s in MIXES])
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    with tunnel(*request.param, tmp_path_factory.mktemp("way")) as made:
        yield made


def test_a_small_exchange(way: Tunnel):
    with way.connected() as (near, far):
        near.sendall(b"question")
        assert read_exactly(far, 8) == b"question"
        far.sendall(b"answer")
        assert read_exactly(near, 6) == b"answer"
        near.close()
        assert ended_how(far) == "fin"


def test_the_server_may_speak_first(way: Tunnel):
    with way.connected() as (near, far):
        far.sendall(b"220 hello")
        assert read_exactly(near, 9) == b"220 hello"


def test_bytes_that_are_sent_before_the_tunnel_is_up_arrive(way: Tunnel):
    with way.dial() as near:
        near.sendall(b"early")
        near.shutdown(socket.SHUT_WR)
        with way.accept() as far:
            assert read_to_end(far) == b"early"
            far.sendall(b"late")
            far.close()
            assert read_to_end(near) == b"late"


def test_tens_of_megabytes_both_ways_at_once(way: Tunnel):
    there, back = pattern(LARGE, 1), pattern(LARGE, 2)
    with way.connected() as (near, far):
        senders = [Sender(near, there), Sender(far, back, finish=False)]
        got: dict[socket.socket, bytearray] = {near: bytearray(), far: bytearray()}
        with selectors.DefaultSelector() as selector:
            for end in got:
                selector.register(end, selectors.EVENT_READ)
            while len(got[near]) < LARGE or far in {key.fileobj for key in selector.get_map().values()}:
                ready = selector.select(PATIENCE_S)
                assert ready, f"nothing moves any more: {[len(part) for part in got.values()]}"
                for key, _ in ready:
                    part = key.fileobj.recv(1 << 20)
                    got[key.fileobj] += part
                    if not part:
                        selector.unregister(key.fileobj)
        for sender in senders:
            sender.done()
        far.shutdown(socket.SHUT_WR)
        assert read_to_end(near) == b""
        assert got[far] == there
        assert got[near] == back


@pytest.mark.parametrize("first", ["client", "server"])
def test_half_close_in_either_order(way: Tunnel, first: str):
    data = pattern(3 << 20, 3)
    with way.connected() as ends:
        early, late = ends if first == "client" else ends[::-1]
        early.sendall(b"all I have to say")
        early.shutdown(socket.SHUT_WR)
        assert read_to_end(late) == b"all I have to say"
        if way.server == "envoy" and first == "server":
            # To Envoy's server that is a finished response: it ends the request too (RST_STREAM with NO_ERROR).
            assert ended_how(early) == "fin"
            return
        assert silent(early), "the other direction must stay open"
        sender = Sender(late, data)
        assert read_to_end(early) == data
        sender.done()


def test_a_connection_without_a_byte_may_close_from_either_side(way: Tunnel):
    for first in (0, 1):
        with way.connected() as ends:
            ends[first].shutdown(socket.SHUT_WR)
            assert read_to_end(ends[1 - first]) == b""
            ends[1 - first].close()
            assert read_to_end(ends[first]) == b""


def test_a_reset_by_the_client_ends_the_applications_connection(way: Tunnel):
    with way.connected() as (near, far):
        near.sendall(b"half a mess")
        assert read_exactly(far, 11) == b"half a mess"
        reset(near)
        how = ended_how(far)
    # Envoy as a server ends its own upstream with FIN; as a client it sends RST_STREAM, which we turn back to a reset.
    assert how == "reset" if way.server == "uproxy" else how in ("fin", "reset")


def test_a_reset_by_the_application_ends_the_clients_connection(way: Tunnel):
    with way.connected() as (near, far):
        far.sendall(b"half an answ")
        assert read_exactly(near, 12) == b"half an answ"
        reset(far)
        how = ended_how(near)
    assert how == "reset" if way.client == "uproxy" else how in ("fin", "reset")


def test_a_reset_after_a_half_close_is_still_a_reset(way: Tunnel):
    with way.connected() as (near, far):
        near.sendall(b"question")
        near.shutdown(socket.SHUT_WR)
        assert read_to_end(far) == b"question"
        far.sendall(b"half an answ")
        assert read_exactly(near, 12) == b"half an answ"
        reset(far)
        how = ended_how(near)
    assert how == "reset" if way.client == "uproxy" else how in ("fin", "reset")


def test_more_than_a_hundred_connections_at_once(way: Tunnel):
    """Envoy's server allows 100 streams a tunnel: more connections need more tunnels."""
    ends: list[tuple[socket.socket, socket.socket]] = []
    try:
        for number in range(150):
            near = way.dial()
            near.sendall(number.to_bytes(4, "big"))
            ends.append((near, way.accept()))
        by_number = {int.from_bytes(read_exactly(far, 4), "big"): far for _, far in ends}
        assert sorted(by_number) == list(range(150))
        for number, (near, _) in enumerate(ends):
            by_number[number].sendall(pattern(5000, number))
            near.sendall(b"x" * number)
        for number, (near, _) in enumerate(ends):
            near.shutdown(socket.SHUT_WR)
            assert read_to_end(by_number[number]) == b"x" * number
            by_number[number].shutdown(socket.SHUT_WR)
            assert read_to_end(near) == pattern(5000, number)
    finally:
        for near, far in ends:
            near.close()
            far.close()


def test_a_reader_that_stops_holds_up_nobody_else_and_loses_nothing(way: Tunnel):
    with way.connected() as (slow, stuck), way.connected() as (near, far):
        held = fill(slow)
        assert held < 64 << 20
        for size in (10, 1 << 20):
            sender = Sender(near, pattern(size, size), finish=False)
            try:
                assert read_exactly(far, size) == pattern(size, size)
            except TimeoutError:
                pytest.fail(f"{size} bytes beside a stopped reader that holds {held} do not arrive: {way.tunnels()}")
            sender.done()
        far.sendall(b"back")
        assert read_exactly(near, 4) == b"back"
        slow.shutdown(socket.SHUT_WR)
        assert len(read_to_end(stuck)) == held


def test_hundreds_of_short_connections_one_after_the_other(way: Tunnel):
    for number in range(200):
        with way.connected() as (near, far):
            near.sendall(number.to_bytes(2, "big"))
            assert read_exactly(far, 2) == number.to_bytes(2, "big")
            far.sendall(b"ok")
            far.close()
            assert read_to_end(near) == b"ok"


def test_an_application_that_refuses_is_reported_by_closing(way: Tunnel):
    """Envoy answers 200 or 503 (docs/hbone.md 2.4); either way web's connection ends, by reset from a uProxy."""
    started = time.monotonic()
    with way.without_application():
        how = way.refused_how()
    assert time.monotonic() - started < PATIENCE_S / 2
    assert how == "reset" if way.client == "uproxy" else how in ("fin", "reset")
