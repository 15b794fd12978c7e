"""Two workloads on one wire, `web` and `db`, with a proxy on either side: a real uProxy or a real Envoy.

web's side has an entry port on loopback; what connects there comes out at db's application, through HBONE between the
two proxies. The tests use this to mix the proxies; the benchmarks compare them in the lab (benchmarks/peers).
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.netns import Namespace, joined, stop
from benchmarks.peers import envoy
from control.api.address import HBONE_PORT
from control.api.identity import SpiffeId
from control.client.csr import make_request
from control.server.ca import Authority, write_identity

TRUST_DOMAIN = "cluster.local"
WEB_ADDRESS, DB_ADDRESS = "10.77.0.1", "10.77.0.2"
APP_PORT = 8080
ENTRY = ("127.0.0.1", 9000)
APP = (DB_ADDRESS, APP_PORT)
READY_TIMEOUT_S = 15.0

MESH = f"""\
apiVersion: v1
kind: Service
metadata: {{name: db, namespace: shop}}
spec:
  selector: {{app: db}}
  ports:
  - {{name: tcp, port: {APP_PORT}}}
  - {{name: tcp-sink, port: {APP_PORT + 1}}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: db, namespace: shop, labels: {{app: db}}}}
spec: {{address: {DB_ADDRESS}, serviceAccount: db, labels: {{app: db}}}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: web, namespace: shop, labels: {{app: web}}}}
spec: {{address: {WEB_ADDRESS}, serviceAccount: web, labels: {{app: web}}}}
"""


Running = AbstractContextManager[subprocess.Popen[bytes]]


@dataclass(frozen=True, slots=True)
class Wire:
    """The two namespaces and what the proxies in them need."""

    web: Namespace
    db: Namespace
    web_address: str
    db_address: str
    directory: Path

    def identity(self, name: str) -> Path:
        return self.directory / "identity" / name


@contextmanager
def wire(
    directory: Path,
    *,
    extra: tuple[str, ...] = (),
    addresses: tuple[str, str] = (WEB_ADDRESS, DB_ADDRESS),
) -> Iterator[Wire]:
    """Two joined namespaces, and an identity for each workload in them and each `extra` service account."""
    directory.mkdir(parents=True, exist_ok=True)
    authority = Authority.create(directory / "ca", TRUST_DOMAIN)
    with joined(*(f"{address}/{64 if ':' in address else 24}" for address in addresses)) as (web, db):
        made = Wire(web, db, *addresses, directory)
        for name in ("web", "db", *extra):
            identity = SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/{name}")
            request = make_request(made.identity(name), identity).read_bytes()
            write_identity(made.identity(name), authority.issue(request, identity), authority.bundle_pem)
        yield made


@contextmanager
def uproxy(
    wire: Wire, name: str, *, mesh: str = MESH, forwards: tuple[str, ...] = (), identity: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A uProxy for `web` or `db`; its access log is `<name>/access.log`, its own log `<name>/uproxy.log`."""
    namespace, address = (wire.web, wire.web_address) if name == "web" else (wire.db, wire.db_address)
    directory = wire.directory / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "mesh.yaml").write_text(mesh)
    arguments = [
        *("uproxy", "run", "--workload", name, "--namespace", "shop", "--service-account", identity or name),
        *("--address", address, "--identity-dir", str(wire.identity(identity or name)), "--capture", "none"),
        *(part for forward in forwards for part in ("--forward", forward)),
    ]
    with _started(wire, namespace, directory, arguments) as process:
        yield process


@contextmanager
def waypoint(wire: Wire, name: str, mesh: str) -> Iterator[subprocess.Popen[bytes]]:
    """A waypoint process on db's machine: workload `shop/<name>`, with the identity of that name; logs as above."""
    directory = wire.directory / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "mesh.yaml").write_text(mesh)
    arguments = ["waypoint", "run", "--workload", f"shop/{name}", "--identity-dir", str(wire.identity(name))]
    with _started(wire, wire.db, directory, arguments) as process:
        yield process


@contextmanager
def _started(
    wire: Wire, namespace: Namespace, directory: Path, arguments: list[str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A proxy with the configuration in `directory`, once it is ready."""
    ready, told = os.pipe()
    try:
        with (directory / "uproxy.log").open("wb") as log:
            process = namespace.start(
                [
                    *(sys.executable, "-m", *arguments, "--trust-domain", TRUST_DOMAIN),
                    *("--config", str(directory / "mesh.yaml"), "--ready-fd", str(told), "--log-format", "json"),
                    *("--access-log", str(directory / "access.log"), "--drain-timeout-s", "1"),
                ],
                stdout=log,
                stderr=log,
                pass_fds=[told],
            )
        os.close(told)
        told = -1
        try:
            if not select.select([ready], [], [], READY_TIMEOUT_S)[0] or not os.read(ready, 16).startswith(b"ready"):
                text = (directory / "uproxy.log").read_text()
                raise RuntimeError(f"{directory.name} did not become ready (exit status {process.poll()}):\n{text}")
            yield process
        finally:
            stop(process)
    finally:
        os.close(ready)
        if told >= 0:
            os.close(told)


def uproxy_client(wire: Wire, *, mesh: str = MESH) -> Running:
    """web's uProxy: the entry port leads to db.shop's service port, the next one to its sink."""
    forwards = tuple(f"{ENTRY[0]}:{ENTRY[1] + i}=db.shop:{APP_PORT + i}" for i in range(2))
    return uproxy(wire, "web", mesh=mesh, forwards=forwards)


def uproxy_server(wire: Wire, *, mesh: str = MESH) -> Running:
    """db's uProxy: policy and identity checks, then db's application."""
    return uproxy(wire, "db", mesh=mesh)


def envoy_client(wire: Wire, *, authority: str | None = None, stream_window: int | None = None) -> Running:
    """An Envoy as web's proxy; `authority` replaces what it asks for."""
    entries = {(ENTRY[0], ENTRY[1] + i): authority or _authority(wire, APP_PORT + i) for i in range(2)}
    config = envoy.client_config(
        wire.identity("web"), TRUST_DOMAIN, (wire.db_address, HBONE_PORT), entries, stream_window=stream_window
    )
    return envoy.running(config, wire.web, wire.directory / "web")


def envoy_server(wire: Wire, *, stream_window: int | None = None) -> Running:
    """An Envoy as db's proxy."""
    applications = {_authority(wire, APP_PORT + i): (wire.db_address, APP_PORT + i) for i in range(2)}
    config = envoy.server_config(
        wire.identity("db"), TRUST_DOMAIN, (wire.db_address, HBONE_PORT), applications, stream_window=stream_window
    )
    return envoy.running(config, wire.db, wire.directory / "db")


def _authority(wire: Wire, port: int) -> str:
    host = wire.db_address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
