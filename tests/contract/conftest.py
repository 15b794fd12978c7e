"""A broker of each kind, and the proxies that are let in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from control.api.identity import SpiffeId
from control.client import subscriber
from control.server import publisher
from control.server.ca import Authority
from tests.contract.world import WP, Site, Who
from tests.support.brokers import BROKERS
from tests.support.certificates import DB, WEB, identity_dir

NODE = SpiffeId.parse("spiffe://cluster.local/ns/mesh-system/sa/node-a")
PROXIES = (Who(WEB, "web-1"), Who(DB, "db-1"), Who(WP, "wp-1"), Who(NODE, "node-a"))


@pytest.fixture(params=BROKERS)
def site(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    # The waits are made for machines that share a broker; nothing else shares this one.
    monkeypatch.setattr(subscriber, "_LAST_RETRY_S", 0.3)
    monkeypatch.setattr(publisher, "_LONGEST_PAUSE_S", 0.3)
    monkeypatch.setattr(publisher, "_QUIET_S", 0.1)
    authority = Authority.create(tmp_path / "ca", "cluster.local")
    with BROKERS[request.param](tmp_path / "broker", authority, [who.identity for who in PROXIES]) as broker:
        broker.stop()  # to reload it would end a Mosquitto that does not heed signals yet
        broker.waypoints = {WP}
        broker.configure([who.identity for who in PROXIES])
        broker.start()
        own = {who: identity_dir(authority, tmp_path / who.workload, who.identity) for who in PROXIES}
        yield Site(broker, tmp_path / "ca", own)
