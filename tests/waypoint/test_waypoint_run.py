"""The `waypoint run` process, between two real `uproxy run` processes, configured by files."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from control.api.identity import SpiffeId
from tests.support.certificates import identity_dir
from tests.support.site import Site, eventually, get

NETWORK = "127.0.82"
WP = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/wp")
WP_ADDRESS = f"{NETWORK}.3"

WAYPOINT = f"""
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: wp, namespace: shop, labels: {{istio.io/waypoint-for: service}}}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: wp-1, namespace: shop, labels: {{gateway.networking.k8s.io/gateway-name: wp}}}}
spec: {{address: {WP_ADDRESS}, serviceAccount: wp}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: no-delete, namespace: shop}}
spec:
  action: DENY
  targetRefs: [{{group: "", kind: Service, name: db}}]
  rules: [{{to: [{{operation: {{methods: [DELETE]}}}}]}}]
"""


class Told(http.server.BaseHTTPRequestHandler):
    """Answers with the headers that it got."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = json.dumps({name.lower(): value for name, value in self.headers.items()}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site.create(tmp_path, NETWORK)
    identity_dir(site.authority, tmp_path / "wp", WP)
    labelled = site.resources.replace("{name: db, namespace: shop}\nspec: {selector", LABELLED, 1)
    labelled = labelled.replace("ports: [{port: 6379,", "ports: [{port: 6379, appProtocol: http,")
    site.mesh.write_text(labelled + WAYPOINT)
    return site


LABELLED = "{name: db, namespace: shop, labels: {istio.io/use-waypoint: wp}}\nspec: {selector"


@contextmanager
def waypoint(site: Site, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """From ready to its end; killed if it has not ended by itself."""
    ready, theirs = os.pipe()
    command = [sys.executable, "-m", "waypoint", "run", "--config", str(site.mesh), "--workload", "shop/wp-1"]
    command += ["--identity-dir", str(site.path / "wp"), f"--ready-fd={theirs}", "--log-format", "json", *more]
    with (site.path / "wp.log").open("a") as log:
        process = subprocess.Popen(command, pass_fds=[theirs], stdout=log, stderr=log)
    os.close(theirs)
    try:
        with os.fdopen(ready) as pipe:
            assert pipe.read() == "ready\n", site.log("wp")
        yield process
    finally:
        process.kill()
        process.wait()


def asked(method: str, site: Site) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(*site.forward, timeout=8)
    connection.request(method, "/path?query")
    response = connection.getresponse()
    response.text = response.read()  # type: ignore[attr-defined]
    connection.close()
    return response


def test_requests_metrics_logs_and_a_drain(site: Site) -> None:
    server = http.server.ThreadingHTTPServer(site.application, Told)
    server.daemon_threads = True
    with ExitStack() as stack:
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        stack.enter_context(site.running("db"))
        stack.enter_context(site.running("web"))
        process = stack.enter_context(waypoint(site))
        response = asked("GET", site)
        assert response.status == 200
        told = json.loads(response.text)  # type: ignore[attr-defined]
        assert told["x-forwarded-client-cert"] == "URI=spiffe://cluster.local/ns/shop/sa/web"
        assert told["x-forwarded-for"] == f"{NETWORK}.1"
        denied = asked("DELETE", site)
        assert (denied.status, denied.getheader("x-uproxy-policy")) == (403, "shop/no-delete[0]")

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
