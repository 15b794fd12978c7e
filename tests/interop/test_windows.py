"""Flow control between implementations whose windows differ."""

from __future__ import annotations

import pytest

from tests.support.envoy import Sender, pattern, read_to_end, tunnel

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
