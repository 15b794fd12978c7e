"""A waypoint process before db, on a `site` or `member_site`."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

from control.api.identity import SpiffeId
from tests.support.certificates import identity_dir
from tests.support.site import Site

WP = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/wp")

_WAYPOINT = """
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
spec: {{address: {network}.3, serviceAccount: wp}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: no-delete, namespace: shop}}
spec:
  action: DENY
  targetRefs: [{{group: "", kind: Service, name: db}}]
  rules: [{{to: [{{operation: {{methods: [DELETE]}}}}]}}]
"""


def resources(network: str) -> str:
    """The Gateway, its process at NETWORK.3, and a policy that refuses DELETE of db."""
    return _WAYPOINT.format(network=network)


def bound_site(directory: Path, network: str) -> Site:
    """A site whose db is behind the waypoint, which has a certificate."""
    site = Site.create(directory, network)
    identity_dir(site.authority, directory / "wp", WP)
    site.mesh.write_text(labelled(site.resources) + resources(network))
    return site


def labelled(resources: str) -> str:
    """db behind the waypoint, and its port HTTP."""
    named = "{name: db, namespace: shop, labels: {istio.io/use-waypoint: wp}}\nspec: {selector"
    resources = resources.replace("{name: db, namespace: shop}\nspec: {selector", named, 1)
    return resources.replace("ports: [{port: 6379,", "ports: [{port: 6379, appProtocol: http,")


@contextmanager
def waypoint(site: Site, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """From ready to its end; killed if it has not ended by itself."""
    ready, theirs = os.pipe()
    command = [sys.executable, "-m", "waypoint", "run", "--state", str(site.path / "wp"), *options]
    command += [f"--ready-fd={theirs}", "--log-format", "json"]
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


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Message
    body: bytes


def asked(method: str, site: Site) -> Answer:
    connection = http.client.HTTPConnection(*site.forward, timeout=8)
    connection.request(method, "/path?query")
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return Answer(response.status, response.headers, body)
