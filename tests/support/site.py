"""A mesh of two real `uproxy run` processes on loopback addresses, without capture, without root.

`web` (NETWORK.1) reaches `db` (NETWORK.2) through a forward at NETWORK.1:9079; db's application listens on port 7379.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from control.server.ca import Authority
from tests.support.certificates import DB, WEB, identity_dir

APP_PORT, FORWARD_PORT = 7379, 9079

_MESH = """
apiVersion: v1
kind: Service
metadata: {{name: db, namespace: shop}}
spec: {{selector: {{app: db}}, ports: [{{port: 6379, targetPort: {port}}}]}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: web, namespace: shop}}
spec: {{address: {network}.1, serviceAccount: web, labels: {{app: web}}}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: db, namespace: shop}}
spec: {{address: {network}.2, serviceAccount: db, labels: {{app: db}}}}
"""


@dataclass
class Site:
    """A directory with a mesh, a CA and two identities. Tests that may run together take different networks."""

    path: Path
    authority: Authority
    network: str

    @classmethod
    def create(cls, path: Path, network: str) -> Site:
        """`network` is the first three parts of an IPv4 loopback address."""
        site = cls(path, Authority.create(path / "ca", "cluster.local"), network)
        for name, identity in (("web", WEB), ("db", DB)):
            identity_dir(site.authority, path / name, identity)
        site.mesh.write_text(site.resources)
        return site

    @property
    def mesh(self) -> Path:
        return self.path / "mesh.yaml"

    @property
    def resources(self) -> str:
        return _MESH.format(network=self.network, port=APP_PORT)

    @property
    def forward(self) -> tuple[str, int]:
        """Where web's application dials db."""
        return f"{self.network}.1", FORWARD_PORT

    @property
    def application(self) -> tuple[str, int]:
        """Where db's application listens."""
        return f"{self.network}.2", APP_PORT

    def command(self, name: str, *more: str) -> list[str]:
        address = f"{self.network}.{('web', 'db').index(name) + 1}"
        forward = [f"--forward={self.network}.1:{FORWARD_PORT}=db.shop:6379"] if name == "web" else []
        return [
            *(sys.executable, "-m", "uproxy", "run", "--workload", name, "--namespace", "shop"),
            *("--service-account", name, "--address", address, "--config", str(self.mesh)),
            *("--identity-dir", str(self.path / name), "--capture", "none", *forward, *more),
        ]

    @contextmanager
    def running(
        self, name: str, *more: str, before_exec: Callable[[], None] | None = None
    ) -> Iterator[subprocess.Popen[str]]:
        """One proxy, from ready to its end; it is killed if it has not ended by itself."""
        ready, theirs = os.pipe()
        log = (self.path / f"{name}.log").open("a")
        process = subprocess.Popen(
            self.command(name, f"--ready-fd={theirs}", *more),
            pass_fds=[theirs],
            stdout=log,
            stderr=log,
            text=True,
            preexec_fn=before_exec,
        )
        os.close(theirs)
        try:
            with os.fdopen(ready) as pipe:
                assert pipe.read() == "ready\n", (self.path / f"{name}.log").read_text()
            yield process
        finally:
            log.close()
            process.kill()
            process.wait()

    def log(self, name: str) -> str:
        return (self.path / f"{name}.log").read_text()

    def refusal(self, name: str, *more: str) -> str:
        """What it says when it does not start; it must not take long over it."""
        ended = subprocess.run(self.command(name, *more), capture_output=True, text=True, timeout=30, check=False)
        assert ended.returncode == 1, ended.stderr
        assert "Traceback" not in ended.stderr
        return ended.stderr


@contextmanager
def echo_server(address: tuple[str, int]) -> Iterator[None]:
    """An application that gives back what it gets."""

    def serve(connection: socket.socket) -> None:
        with connection, suppress(ConnectionError):
            while data := connection.recv(65536):
                connection.sendall(data)

    def accept(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(address) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield
        listener.shutdown(socket.SHUT_RDWR)


def dial(address: tuple[str, int], message: bytes = b"hello") -> bytes:
    """What comes back of a message; empty when nothing does."""
    with socket.create_connection(address, timeout=30) as app:
        app.sendall(message)
        return app.recv(len(message))


def eventually(check: Callable[[], object], seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def get(address: str, port: int, path: str) -> tuple[int, str]:
    """Status and body of a page."""
    connection = http.client.HTTPConnection(address, port, timeout=30)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()
