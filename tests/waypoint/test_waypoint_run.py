"""The `waypoint run` process, between two real `uproxy run` processes, configured by files."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from control.server.bindings import Phase
from tests.support.certificates import DB, WEB
from tests.support.http_app import telling
from tests.support.member_site import MemberSite, controlled
from tests.support.site import Site, eventually, get
from tests.support.waypoint_site import WP, asked, bound_site, labelled, resources, waypoint

NETWORK = "127.0.82"
WP_ADDRESS = f"{NETWORK}.3"
GATEWAY_TARGET = "[{group: gateway.networking.k8s.io, kind: Gateway, name: wp}]"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return bound_site(tmp_path, NETWORK)


def test_requests_metrics_logs_and_a_drain(site: Site) -> None:
    with ExitStack() as stack:
        stack.enter_context(telling(site.application))
        stack.enter_context(site.running("db"))
        stack.enter_context(site.running("web"))
        process = stack.enter_context(waypoint(site, "--config", str(site.mesh), "--workload", "shop/wp-1"))
        response = asked("GET", site)
        assert response.status == 200
        told = json.loads(response.body)
        assert told["x-forwarded-client-cert"] == "URI=spiffe://cluster.local/ns/shop/sa/web"
        assert told["x-forwarded-for"] == f"{NETWORK}.1"
        denied = asked("DELETE", site)
        assert (denied.status, denied.headers["x-uproxy-policy"]) == (403, "shop/no-delete[0]")

        assert get(WP_ADDRESS, 15021, "/healthz/ready") == (200, "ready\n")
        metrics = get(WP_ADDRESS, 15020, "/metrics")[1]
        counted = [line for line in metrics.splitlines() if line.startswith("istio_requests_total{")]
        assert sorted(line.rpartition(" ")[2] for line in counted) == ["1", "1"]
        assert all('reporter="waypoint"' in line and 'source_workload="web"' in line for line in counted)
        assert json.loads(get(WP_ADDRESS, 15000, "/config_dump")[1])["services"] == ["shop/db"]
        eventually(lambda: site.log("wp").count("request complete") == 2)
        lines = [json.loads(line) for line in site.log("wp").splitlines() if line.startswith("{")]
        requests = [line for line in lines if line["message"] == "request complete"]
        assert [(r["method"], r["path"], r["response_code"]) for r in requests] == [
            ("GET", "/path?query", 200),
            ("DELETE", "/path?query", 403),
        ]
        assert requests[1]["policy"] == "shop/no-delete[0]"

        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0, site.log("wp")
        assert "Traceback" not in site.log("wp")
        with pytest.raises((OSError, http.client.HTTPException)):
            asked("GET", site)  # bound, and nobody there: refused, never past the waypoint


@pytest.mark.parametrize(
    ("workload", "named"), [("web", "no Gateway shop/web"), ("nobody", "WorkloadEntry shop/nobody")]
)
def test_what_cannot_start_says_why(site: Site, workload: str, named: str) -> None:
    command = [sys.executable, "-m", "waypoint", "run", "--config", str(site.mesh), "--workload", f"shop/{workload}"]
    command += ["--identity-dir", str(site.path / "web")]
    ended = subprocess.run(command, capture_output=True, timeout=20, text=True)
    assert ended.returncode == 1
    assert named in ended.stderr


def test_a_member_takes_a_service_by_its_label_and_gives_it_back(tmp_path: Path) -> None:
    with ExitStack() as stack:
        broker, control = stack.enter_context(controlled(tmp_path, [WEB, DB, WP]))
        broker.waypoints = {WP}
        broker.admit([WEB, DB, WP])
        site = MemberSite(tmp_path, control.plane.authority, NETWORK, broker, control)
        bound = labelled(site.resources)
        unbound = bound.replace(", labels: {istio.io/use-waypoint: wp}", "")
        # The policy comes with the Gateway: nothing else may carry it before the service is bound.
        control.apply(unbound + resources(NETWORK).replace('[{group: "", kind: Service, name: db}]', GATEWAY_TARGET))
        stack.enter_context(telling(site.application))
        for name in ("db", "web", "wp-1"):
            site.token_file(name)
        stack.enter_context(site.running("db"))
        stack.enter_context(site.running("web"))
        stack.enter_context(waypoint(site, "--join", str(tmp_path / "wp-1.token")))

        def through() -> bool:
            answer = asked("GET", site)
            assert answer.status == 200, answer
            return "x-forwarded-client-cert" in json.loads(answer.body)

        assert not through()
        control.apply(bound)
        eventually(through, 15)
        eventually(lambda: [one.state.phase for one in control.plane.core.progress()] == [Phase.ENFORCED], 15)
        assert asked("DELETE", site).status == 403
        control.apply(unbound)
        eventually(lambda: not through(), 15)
        control.revoke(tmp_path / "web")
        eventually(lambda: "others revoked: 1" in site.log("wp"), 15)
        assert "Traceback" not in site.log("wp")
