"""A pair of HAProxies: TCP in mTLS between them, one TLS connection for each connection of the application.

HAProxy 2.6 proves that a certificate is of the CA, and cannot look for a SPIFFE id in it (a URI is no host name). So
this pair checks less than the others: everybody of the mesh may be the other end.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import PATH
from benchmarks.peers.place import Address, Place

_TLS = "ssl-min-ver TLSv1.3 ssl-max-ver TLSv1.3"
_HEAD = """\
global
    maxconn 8000
    nbthread 1
    log stderr format raw local0 info

defaults
    mode tcp
    log global
    option tcplog
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    timeout tunnel 1h
"""


def argv(config: Path) -> list[str]:
    """The command that runs one, in the foreground and as one process."""
    return ["haproxy", "-db", "-f", str(config)]


def server_config(place: Place, ports: Mapping[Address, Address]) -> str:
    """End mTLS at each listening address, and go on as TCP to its application."""
    identity = _pem(place)
    proxies = [
        f"""
listen tls-{listen[1]}
    bind {_text(listen)} ssl crt {identity} ca-file {place.identity_dir}/bundle.pem verify required {_TLS}
    server application {_text(application)}
"""
        for listen, application in ports.items()
    ]
    return _HEAD + "".join(proxies)


def client_config(place: Place, entries: Mapping[Address, Address]) -> str:
    """Listen for TCP on each entry; a connection goes on in mTLS to the entry's server."""
    identity = _pem(place)
    proxies = [
        f"""
listen entry-{listen[1]}
    bind {_text(listen)}
    server peer {_text(server)} ssl crt {identity} ca-file {place.identity_dir}/bundle.pem verify required {_TLS}
"""
        for listen, server in entries.items()
    ]
    return _HEAD + "".join(proxies)


def version() -> str:
    """As it says itself: "HAProxy 2.6.12". Raises LabError when it is not installed."""
    try:
        told = subprocess.run(
            ["haproxy", "-v"], env={"PATH": PATH}, capture_output=True, text=True, check=True, timeout=10
        ).stdout
    except FileNotFoundError:
        raise LabError("HAProxy is not installed: apt-get install haproxy") from None
    return f"HAProxy {told.split()[2].partition('-')[0]}"


def _pem(place: Place) -> Path:
    """Certificate chain and key in one file, as HAProxy wants them."""
    made = place.directory / "identity.pem"
    made.touch(mode=0o600)
    made.write_text("".join((place.identity_dir / name).read_text() for name in ("chain.pem", "key.pem")))
    return made


def _text(address: Address) -> str:
    return f"{address[0]}:{address[1]}"
