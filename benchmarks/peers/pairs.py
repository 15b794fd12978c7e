"""The peers by name: each sets up its two processes in two places of a lab, with the application behind the second.

The load goes to `entry`, and the ports after it, as it would go to the application's own. Where a proxy cannot capture
by itself, the load generator dials it on loopback; the uProxies' connections are captured by eBPF, which costs them a
few microseconds for each connection and nothing for each message.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.harness.results import Subject
from benchmarks.lab.sources import TRUST_DOMAIN
from benchmarks.load import PORTS
from benchmarks.peers import control, envoy, haproxy, linkerd, wireguard, ztunnel
from benchmarks.peers.control import Control
from benchmarks.peers.place import Address, Place
from control.api.address import HBONE_PORT

APP_PORT = 8080
_PORTS = range(APP_PORT, APP_PORT + PORTS)
ENTRY_PORT = 9000
TLS_PORT = 15440


@dataclass(frozen=True, slots=True)
class Started:
    """A pair that takes connections."""

    entry: Address
    """Stands for the application's first port, as dialled in the client's namespace."""
    proxies: Mapping[str, Sequence[int]]
    """Role -> process ids."""
    version: str = ""
    """Of the program, as it says itself."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A kind of pair. `start` takes the client's place and the server's, and raises LabError."""

    subject: Subject
    start: Callable[[Place, Place], Started]
    own_tls: bool = False
    """Load generator and application speak mTLS themselves."""
    listens: str = ""
    """Where the application does, if not at the server's own address."""


def peers(named: Mapping[str, Path]) -> list[Peer]:
    """All that can be had here, and what `named` gives the program of, by the names in NAMED."""
    made = [
        Peer(_TCP, _start_tcp),
        Peer(_HBONE, _start_hbone),
        Peer(_TLS, _start_envoy_tls),
        Peer(_HAPROXY, _start_haproxy),
        Peer(_OWN_TLS, _start_own_tls, own_tls=True),
        *([] if wireguard.why_not() else [Peer(_WIREGUARD, _start_wireguard, listens="0.0.0.0")]),
    ]
    return made + [Peer(NAMED[name][0], partial(NAMED[name][1], program)) for name, program in named.items()]


_TCP = Subject(
    "tcp", "plain TCP", "No proxy: the load generator dials the application on the other host.", reference=True
)
_HBONE = Subject(
    "envoy-hbone",
    "Envoy pair, HBONE",
    "An Envoy beside each end, with one worker: TCP into an HTTP/2 CONNECT in mTLS (TLS 1.3), and back; connections "
    "share tunnels. Access logs on. Dialled on loopback, HTTP/2 windows as Envoy has them by itself.",
)
_TLS = Subject(
    "envoy-tls",
    "Envoy pair, TCP in mTLS",
    "An Envoy beside each end, with one worker: each connection is a TLS 1.3 connection of its own, with certificates "
    "of both sides. Access logs on. Dialled on loopback.",
)
_HAPROXY = Subject(
    "haproxy-tls",
    "HAProxy pair, TCP in mTLS",
    "A HAProxy beside each end, with one thread: each connection is a TLS 1.3 connection of its own, with certificates "
    "of both sides, of which only the CA is checked. Access logs on. Dialled on loopback.",
)
_OWN_TLS = Subject(
    "application-tls",
    "applications with mTLS of their own",
    "No proxy: load generator and application speak TLS 1.3 by libssl, with certificates of both sides whose SPIFFE "
    "ids they check, a full handshake for each connection. What that takes is in the application's processor time and "
    "the generator's, which are not counted.",
)
_WIREGUARD = Subject(
    "wireguard",
    "WireGuard",
    "No proxy: the kernel encrypts packets between the two namespaces, in threads of its own, whose processor time is "
    "counted to nobody.",
)
_ZTUNNEL = Subject(
    "ztunnel",
    "ztunnel pair",
    "A ztunnel beside each end, in dedicated mode with one worker thread, configured by a file and certified by the "
    "lab's CA; captured by a redirect in the client's namespace. HBONE between them.",
)
_LINKERD = Subject(
    "linkerd",
    "linkerd2-proxy pair",
    "A linkerd2-proxy beside each end, with one core, certified with a name of Linkerd's by the lab's CA; captured by "
    "a redirect at both ends. The ports are declared opaque: each connection is a TLS 1.3 connection of its own.",
)


def _entries(address: str, first: int) -> dict[Address, Address]:
    """Each entry of the client's -> the server's port that stands for the same port of the application."""
    return {("127.0.0.1", ENTRY_PORT + i): (address, first + i) for i in range(PORTS)}


def _applications(address: str, first: int) -> dict[Address, Address]:
    return {(address, first + i): (address, APP_PORT + i) for i in range(PORTS)}


def _start_tcp(client: Place, server: Place) -> Started:
    return Started((server.address, APP_PORT), {})


def _start_own_tls(client: Place, server: Place) -> Started:
    return replace(_start_tcp(client, server), version=" ".join(ssl.OPENSSL_VERSION.split()[:2]))


def _start_wireguard(client: Place, server: Place) -> Started:
    version = wireguard.start(client, server)
    return Started((wireguard.SERVER, APP_PORT), {}, version)


def _start_hbone(client: Place, server: Place) -> Started:
    hbone = (server.address, HBONE_PORT)
    authorities = {f"{server.address}:{APP_PORT + i}": (server.address, APP_PORT + i) for i in range(PORTS)}
    entries = {("127.0.0.1", ENTRY_PORT + i): authority for i, authority in enumerate(authorities)}
    return Started(
        ("127.0.0.1", ENTRY_PORT),
        {
            "server proxy": [
                _envoy(
                    server,
                    envoy.server_config(server.identity_dir, TRUST_DOMAIN, hbone, authorities, log=server.access_log),
                    [hbone],
                )
            ],
            "client proxy": [
                _envoy(
                    client,
                    envoy.client_config(client.identity_dir, TRUST_DOMAIN, hbone, entries, log=client.access_log),
                    list(entries),
                )
            ],
        },
        envoy.version(),
    )


def _start_envoy_tls(client: Place, server: Place) -> Started:
    ports, entries = _applications(server.address, TLS_PORT), _entries(server.address, TLS_PORT)
    return Started(
        ("127.0.0.1", ENTRY_PORT),
        {
            "server proxy": [
                _envoy(
                    server,
                    envoy.tls_server_config(server.identity_dir, TRUST_DOMAIN, ports, log=server.access_log),
                    list(ports),
                )
            ],
            "client proxy": [
                _envoy(
                    client,
                    envoy.tls_client_config(client.identity_dir, TRUST_DOMAIN, entries, log=client.access_log),
                    list(entries),
                )
            ],
        },
        envoy.version(),
    )


def _envoy(place: Place, config: Mapping[str, object], listens: Sequence[Address]) -> int:
    written = place.directory / "envoy.json"
    written.write_text(json.dumps(config, indent=1))
    return place.start(envoy.argv(written), listens).pid


def _start_haproxy(client: Place, server: Place) -> Started:
    version = haproxy.version()
    ports, entries = _applications(server.address, TLS_PORT), _entries(server.address, TLS_PORT)
    return Started(
        ("127.0.0.1", ENTRY_PORT),
        {
            "server proxy": [_haproxy(server, haproxy.server_config(server, ports), list(ports))],
            "client proxy": [_haproxy(client, haproxy.client_config(client, entries), list(entries))],
        },
        version,
    )


def _haproxy(place: Place, config: str, listens: Sequence[Address]) -> int:
    written = place.directory / "haproxy.cfg"
    written.write_text(config)
    return place.start(haproxy.argv(written), listens).pid


def _start_ztunnel(program: Path, client: Place, server: Place) -> Started:
    version = ztunnel.version(program)
    _start_control("istio", client, server)
    behind = ztunnel.start(program, server, client, server).pid
    before = ztunnel.start(program, client, client, server).pid
    ztunnel.capture(client, server.address, _PORTS)
    return Started((server.address, APP_PORT), {"server proxy": [behind], "client proxy": [before]}, version)


def _start_linkerd(program: Path, client: Place, server: Place) -> Started:
    _start_control("linkerd", client, server)
    behind = linkerd.start(program, server, _PORTS).pid
    before = linkerd.start(program, client, _PORTS).pid
    linkerd.capture(client, server, _PORTS)
    proxies = {"server proxy": [behind], "client proxy": [before]}
    return Started((server.address, APP_PORT), proxies, linkerd.version(server))


def _start_control(whose: str, client: Place, server: Place) -> None:
    """What stands for the control plane of `whose` proxies, beside both. Raises LabError."""
    for place in (client, server):
        told = Control(
            directory=str(place.directory),
            # Of a lab whose identities are files.
            ca_directory=str(place.lab.directory / "ca"),
            identity=str(place.identity),
            server=server.address,
            ports=list(_PORTS),
            server_identity=str(server.identity),
            client_identity=str(client.identity),
        )
        file = place.directory / "control.json"
        told.write(file)
        place.start(control.argv(whose, file), [("127.0.0.1", control.PORT)], log=place.control_log)


PEERS_OF_FULL_RUNS: Final = frozenset({_OWN_TLS.name, _WIREGUARD.name})
NAMED: Final = {"ztunnel": (_ZTUNNEL, _start_ztunnel), "linkerd": (_LINKERD, _start_linkerd)}
"""What no package brings: the subject, and how it is started with a program."""
