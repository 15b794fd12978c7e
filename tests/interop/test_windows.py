"""Flow control between implementations whose windows differ."""

from __future__ import annotations

import socket

import pytest

from tests.support.envoy import Sender, fill, pattern, read_exactly, read_to_end, tunnel

pytestmark = pytest.mark.root


@pytest.mark.parametrize(("client", "server"), [("uproxy", "envoy"), ("envoy", "uproxy")])
def test_windows_of_64_kib_slow_nothing_to_a_stop(tmp_path, client: str, server: str):
    """HTTP/2's default window, far below ours: credit must come in small steps, both ways."""
    data = pattern(6 << 20, 9)
    side = "server" if server == "envoy" else "client"
    with tunnel(client, server, tmp_path, **{f"{side}_stream_window": 65535}) as way, way.connected() as (near, far):
        sender = Sender(near, data)
        assert read_to_end(far) == data
        sender.done()
        sender = Sender(far, data)
        assert read_to_end(near) == data
        sender.done()


def test_one_stopped_reader_behind_envoy_leaves_the_tunnel_its_credit(tmp_path):
    """Envoy credits its 24 MiB of connection window in halves. With 8 MiB taken and not yet credited, a stream that
    holds 16 MiB leaves nothing, and Envoy never gives more: two Envoys stall here. We leave a quarter of the 16 MiB.
    """
    before = pattern(8 << 20, 3)
    with tunnel("uproxy", "envoy", tmp_path) as way:
        with way.connected() as (near, far):
            sender = Sender(near, before)
            assert read_to_end(far) == before
            sender.done()
        with way.connected() as (slow, stuck), way.connected() as (near, far):
            held = fill(slow)
            near.sendall(b"small")
            try:
                assert read_exactly(far, 5) == b"small"
            except TimeoutError:
                pytest.fail(f"5 bytes beside a stopped reader that holds {held} do not arrive: {way.tunnels()}")
            slow.shutdown(socket.SHUT_WR)
            assert len(read_to_end(stuck)) == held
