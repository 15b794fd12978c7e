"""IPv6 between the proxies: bracketed authorities, and a policy that names an address."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.pairs import DB_ADDRESS, MESH, WEB_ADDRESS
from tests.support.envoy import Sender, pattern, read_to_end, tunnel

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this kernel has no IPv6"),
]
WEB6, DB6 = "fd77::1", "fd77::2"
POLICY = """\
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web-by-address, namespace: shop}
spec:
  selector: {matchLabels: {app: db}}
  rules: [{from: [{source: {ipBlocks: ["fd77::1/128"], principals: [cluster.local/ns/shop/sa/web]}}]}]
"""


@pytest.mark.parametrize(("client", "server"), [("uproxy", "uproxy"), ("uproxy", "envoy"), ("envoy", "uproxy")])
def test_a_tunnel_over_ipv6(tmp_path, client: str, server: str):
    mesh = MESH.replace(WEB_ADDRESS, f'"{WEB6}"').replace(DB_ADDRESS, f'"{DB6}"') + POLICY
    options = {f"{side}_mesh": mesh for side, proxy in (("client", client), ("server", server)) if proxy == "uproxy"}
    data = pattern(1 << 20, 6)
    with tunnel(client, server, tmp_path, (WEB6, DB6), **options) as way, way.connected() as (near, far):
        sender = Sender(near, data)
        assert read_to_end(far) == data
        sender.done()
        far.close()
        assert read_to_end(near) == b""
