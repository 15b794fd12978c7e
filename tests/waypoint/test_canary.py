"""A canary of a waypoint: a second one that serves a share of the callers, between real processes."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

from control.api.identity import SpiffeId
from control.server.bindings import Phase, Step
from tests.support.certificates import DB, WEB
from tests.support.http_app import telling
from tests.support.member_site import MemberSite, controlled
from tests.support.request_load import RequestLoad
from tests.support.site import eventually, get
from tests.support.waypoint_site import WP, asked, labelled, resources, waypoint

NETWORK = "127.0.67"
V2 = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/v2")


def test_callers_go_to_a_canary_and_back_and_no_request_fails(tmp_path: Path) -> None:
    def served(address: str) -> int:
        text = get(address, 15020, "/metrics")[1]
        return sum(int(count) for count in re.findall(r"^istio_requests_total{.*} (\d+)$", text, re.MULTILINE))

    def step() -> tuple[Phase, Step | None]:
        (one,) = control.plane.core.progress()
        return one.state.phase, one.state.trial.step if one.state.trial is not None else None

    def annotate(share: str | None) -> None:
        control.annotate("Service", "shop", "db", {"mesh.uproxy.dev/waypoint-canary": share})

    with ExitStack() as stack:
        broker, control = stack.enter_context(controlled(tmp_path, [WEB, DB, WP, V2]))
        broker.waypoints = {WP, V2}
        broker.admit([WEB, DB, WP, V2])
        site = MemberSite(tmp_path, control.plane.authority, NETWORK, broker, control)
        gateway, process, _ = resources(NETWORK).removeprefix("\n---\n").split("---\n")
        second = f"{gateway}---\n{process}".replace("wp", "v2").replace(f"{NETWORK}.3", f"{NETWORK}.4")
        control.apply(f"{labelled(site.resources)}{resources(NETWORK)}---\n{second}")
        stack.enter_context(telling(site.application))
        for name in ("db", "web", "wp-1", "v2-1"):
            site.token_file(name)
        stack.enter_context(site.running("db"))
        stack.enter_context(site.running("web"))
        stack.enter_context(waypoint(site, "--join", str(tmp_path / "wp-1.token"), "--access-log=off"))
        eventually(lambda: step() == (Phase.ENFORCED, None))
        annotate("v2=100")
        assert asked("GET", site).status == 200
        assert step() == (Phase.ENFORCED, Step.PREPARING), "no process of it is there"
        with RequestLoad(site.forward) as load:
            stack.enter_context(waypoint(site, "--join", str(tmp_path / "v2-1.token"), "--access-log=off", name="v2"))
            eventually(lambda: step() == (Phase.ENFORCED, Step.SHARING))
            eventually(lambda: served(f"{NETWORK}.4") > 20)
            assert asked("DELETE", site).status == 403, "the policy of the Service holds there, too"
            annotate(None)
            eventually(lambda: control.plane.core.progress()[0].settled)
            before = served(f"{NETWORK}.3")
            eventually(lambda: served(f"{NETWORK}.3") > before + 20)
        assert load.failed == []
        assert step() == (Phase.ENFORCED, Step.LEAVING)
        assert "Traceback" not in site.log("wp") + site.log("v2")
