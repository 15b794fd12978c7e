"""The `waypoint run` process, between two real `uproxy run` processes, configured by files."""

from __future__ import annotations

import http.client
import http.server
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from control.api.address import HBONE_PORT
from control.server.bindings import Phase
from tests.support.certificates import WEB
from tests.support.http_app import running, telling
from tests.support.site import Site, eventually, get
from tests.support.waypoint_site import asked, bound_site, joining, labelled, members, waypoint

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
        assert process.wait(60) == 0, site.log("wp")
        assert "Traceback" not in site.log("wp")
        with pytest.raises((OSError, http.client.HTTPException)):
            asked("GET", site)  # bound, and nobody there: refused, never past the waypoint


AWAY = """---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: db-away, namespace: shop}
spec: {address: NETWORK.9, serviceAccount: db, labels: {app: db}, locality: us/1}
---
apiVersion: mesh.uproxy.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: db, namespace: shop}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: wp}]
  loadBalancing: {localityLbSetting: {enabled: true}}
  outlierDetection: {consecutive5xxErrors: 1, baseEjectionTime: 1h}
""".replace("NETWORK", NETWORK)


def test_each_worker_prefers_its_own_zone_and_ejects_who_is_not_there(site: Site) -> None:
    text = site.mesh.read_text() + AWAY
    for account, locality in (("wp", "eu/1"), ("db, labels: {app: db}", "eu/1/rack")):
        text = text.replace(f"serviceAccount: {account}}}", f"serviceAccount: {account}, locality: {locality}}}")
    site.mesh.write_text(text)

    def counted() -> tuple[str, ...]:
        metrics = get(WP_ADDRESS, 15020, "/metrics")[1]
        names = ("uproxy_waypoint_ejected_endpoints", "uproxy_waypoint_ejections_total")
        return tuple(line.split(" ")[1] for name in names for line in metrics.splitlines() if line[: len(name)] == name)

    with ExitStack() as stack:
        stack.enter_context(telling(site.application))
        stack.enter_context(site.running("db"))
        stack.enter_context(site.running("web"))
        options = ("--config", str(site.mesh), "--workload", "shop/wp-1", "--workers", "2")
        stack.enter_context(waypoint(site, *options))
        assert {asked("GET", site).status for _ in range(20)} == {200}
        assert counted() == ("0", "0"), "nobody was sent to the other endpoint"
        site.mesh.write_text(text.replace("enabled: true", "enabled: false"))

        def ejected() -> bool:
            assert asked("GET", site).status == 200
            return counted() == ("1", "1")

        eventually(ejected)
        assert "endpoint shop/db-away (127.0.82.9:7379): 1 times in a row 5xx or no answer" in site.log("wp")


@pytest.mark.parametrize(
    ("workload", "named"), [("web", "no Gateway shop/web"), ("nobody", "WorkloadEntry shop/nobody")]
)
def test_what_cannot_start_says_why(site: Site, workload: str, named: str) -> None:
    command = [sys.executable, "-m", "waypoint", "run", "--config", str(site.mesh), "--workload", f"shop/{workload}"]
    command += ["--identity-dir", str(site.path / "web")]
    ended = subprocess.run(command, capture_output=True, timeout=30, text=True)
    assert ended.returncode == 1
    assert named in ended.stderr


JUDGE_PORT = 7381
ASKING = f"""
apiVersion: v1
kind: Service
metadata: {{name: authz, namespace: shop, labels: {{istio.io/use-waypoint: none}}}}
spec: {{selector: {{app: db}}, ports: [{{name: http, port: 80, targetPort: {JUDGE_PORT}}}]}}
---
apiVersion: mesh.uproxy.dev/v1alpha1
kind: Extension
metadata: {{name: sign-in, namespace: shop}}
spec:
  type: ExternalAuthorization
  externalAuthorization: {{service: authz, port: 80, pathPrefix: /check}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: ask, namespace: shop}}
spec:
  targetRefs: [{{group: "", kind: Service, name: db}}]
  action: CUSTOM
  provider: {{name: sign-in}}
  rules: [{{}}]
"""


class Judge:
    """What is asked whether requests may pass."""

    def __init__(self) -> None:
        self.status = 401
        self.paths: list[str] = []
        self.callers: list[str | None] = []


@contextmanager
def judging(address: tuple[str, int]) -> Iterator[Judge]:
    judge = Judge()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            judge.paths.append(self.path)
            judge.callers.append(self.headers["x-forwarded-client-cert"])
            self.send_response(judge.status)
            self.send_header("content-length", "12")
            self.end_headers()
            self.wfile.write(b"who are you?")

        def log_message(self, *_: object) -> None: ...

    with running(address, Handler):
        yield judge


def unbound(resources: str) -> str:
    return labelled(resources).replace(", labels: {istio.io/use-waypoint: wp}", "")


def test_a_member_takes_a_service_by_its_label_and_gives_it_back(tmp_path: Path) -> None:
    with ExitStack() as stack:
        # The policy comes with the Gateway: nothing else may carry it before the service is bound.
        site = stack.enter_context(
            members(
                tmp_path,
                NETWORK,
                lambda own, wp: unbound(own) + wp.replace('[{group: "", kind: Service, name: db}]', GATEWAY_TARGET),
            )
        )
        control = site.control
        stack.enter_context(waypoint(site, *joining(site)))

        def through() -> bool:
            answer = asked("GET", site)
            assert answer.status == 200, answer
            return "x-forwarded-client-cert" in json.loads(answer.body)

        assert not through()
        control.apply(labelled(site.resources))
        eventually(through)
        eventually(lambda: [one.state.phase for one in control.plane.core.progress()] == [Phase.ENFORCED])
        assert asked("DELETE", site).status == 403

        # Whom a policy has asked the waypoint subscribes to by itself.
        judge = stack.enter_context(judging((f"{NETWORK}.2", JUDGE_PORT)))
        control.apply(ASKING)
        eventually(lambda: asked("GET", site).status == 401)
        refused = asked("GET", site)
        assert (refused.body, refused.headers["x-uproxy-policy"]) == (b"who are you?", "shop/ask[0]")
        judge.status = 200
        assert asked("GET", site).status == 200
        assert judge.paths[-1] == "/check/path?query"
        assert judge.callers[-1] == f"URI={WEB}"
        control.delete("AuthorizationPolicy", "shop", "ask")
        judge.status = 401
        eventually(through)

        control.apply(unbound(site.resources))
        eventually(lambda: not through())
        control.revoke(tmp_path / "web")
        eventually(lambda: "others revoked: 1" in site.log("wp"))
        assert "Traceback" not in site.log("wp")


def test_nothing_is_enforced_before_an_envoy_serves(tmp_path: Path) -> None:
    engine = "namespace: shop, annotations: {mesh.uproxy.dev/engine: envoy}, labels: {istio.io/waypoint-for"
    with ExitStack() as stack:
        wanted: list[str] = []

        def without_gateway(own: str, wp: str) -> str:
            gateway, _, rest = wp.lstrip("-\n").partition("---")
            wanted.extend(
                (labelled(own), gateway.replace("namespace: shop, labels: {istio.io/waypoint-for", engine), rest)
            )
            process, _, _ = rest.partition("---")
            return f"{unbound(own)}\n---\n{process}"

        site = stack.enter_context(members(tmp_path, NETWORK, without_gateway))
        control, answers = site.control, list[int]()

        def bind_and_dial_when_enforced() -> None:
            eventually(lambda: any(one.status.workload == "shop/wp-1" for one in control.plane.core.proxies().values()))
            time.sleep(0.5)  # it has nothing to tell any more
            control.apply("\n---\n".join(wanted))
            eventually(lambda: [one.state.phase for one in control.plane.core.progress()] == [Phase.ENFORCED], 30)
            with socket.socket() as dialling:
                answers.append(dialling.connect_ex((WP_ADDRESS, HBONE_PORT)))

        watching = threading.Thread(target=bind_and_dial_when_enforced)
        watching.start()
        stack.enter_context(waypoint(site, *joining(site)))
        watching.join()
        assert answers == [0]
        assert asked("GET", site).status == 200
