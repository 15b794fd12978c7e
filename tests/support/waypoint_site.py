"""A waypoint process before db, on a `site` or `member_site`."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

from control.api.identity import SpiffeId
from tests.support.certificates import DB, WEB, identity_dir
from tests.support.http_app import telling
from tests.support.member_site import MemberSite, controlled
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


@contextmanager
def members(directory: Path, network: str, first: Callable[[str, str], str] | None = None) -> Iterator[MemberSite]:
    """web and db, running, members of a mesh that a waypoint may join.

    `first` makes what is applied to begin with of the site's resources and the waypoint's. None: db is behind it.
    """
    with ExitStack() as stack:
        broker, control = stack.enter_context(controlled(directory, [WEB, DB, WP]))
        broker.waypoints = {WP}
        broker.admit([WEB, DB, WP])
        site = MemberSite(directory, control.plane.authority, network, broker, control)
        own, of_waypoint = site.resources, resources(network)
        control.apply(first(own, of_waypoint) if first is not None else labelled(own) + of_waypoint)
        stack.enter_context(telling(site.application))
        for name in ("db", "web", "wp-1"):
            site.token_file(name)
        stack.enter_context(site.running("db"))
        stack.enter_context(site.running("web"))
        yield site


def joining(site: MemberSite) -> tuple[str, str]:
    """The waypoint's options."""
    return "--join", str(site.path / "wp-1.token")


def labelled(resources: str) -> str:
    """db behind the waypoint, and its port HTTP."""
    named = "{name: db, namespace: shop, labels: {istio.io/use-waypoint: wp}}\nspec: {selector"
    resources = resources.replace("{name: db, namespace: shop}\nspec: {selector", named, 1)
    return resources.replace("ports: [{port: 6379,", "ports: [{port: 6379, appProtocol: http,")


@contextmanager
def waypoint(site: Site, *options: str, name: str = "wp") -> Iterator[subprocess.Popen[bytes]]:
    """From ready to its end; killed if it has not ended by itself. `name`: of its directory and its log."""
    ready, theirs = os.pipe()
    command = [sys.executable, "-m", "waypoint", "run", "--state", str(site.path / name), *options]
    command += [f"--ready-fd={theirs}", "--log-format", "json"]
    with (site.path / f"{name}.log").open("a") as log:
        process = subprocess.Popen(command, pass_fds=[theirs], stdout=log, stderr=log)
    os.close(theirs)
    try:
        with os.fdopen(ready) as pipe:
            assert pipe.read() == "ready\n", site.log(name)
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
    connection = http.client.HTTPConnection(*site.forward, timeout=30)
    connection.request(method, "/path?query")
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return Answer(response.status, response.headers, body)
