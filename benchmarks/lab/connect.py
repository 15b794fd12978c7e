"""A CONNECT over mTLS by hand, with h2 and ssl alone: what somebody with a certificate and no uProxy can do."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h2.config
import h2.connection
import h2.events

_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """How the peer answered a CONNECT."""

    status: int
    reason: str
    """x-uproxy-reason"""
    policy: str
    """x-uproxy-policy"""


def tls_context(identity_dir: Path) -> ssl.SSLContext:
    """TLS 1.3 with ALPN h2, this identity, and its bundle as the only roots."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # a SPIFFE ID is no host name; who answers does not matter here
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(identity_dir / "bundle.pem")
    context.load_cert_chain(identity_dir / "chain.pem", identity_dir / "key.pem")
    return context


def connect(made: socket.socket, identity_dir: Path, authority: str) -> Answer:
    """Ask the uProxy behind a connected socket for a tunnel to `authority`."""
    return request(made, identity_dir, [(":method", "CONNECT"), (":authority", authority)])


def request(made: socket.socket, identity_dir: Path, headers: Sequence[tuple[str, str]]) -> Answer:
    """Send one request over mTLS and return the head of the answer.

    Raises ssl.SSLError or ConnectionError when it does not get as far as an answer.
    """
    made.settimeout(_TIMEOUT_S)
    with tls_context(identity_dir).wrap_socket(made) as secure:
        client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        client.initiate_connection()
        client.send_headers(1, headers)
        secure.sendall(client.data_to_send())
        while True:
            received = secure.recv(65536)
            if not received:
                raise ConnectionError("the peer ended the connection without an answer")
            for event in client.receive_data(received):
                if isinstance(event, h2.events.ResponseReceived):
                    return _answer({str(name): str(value) for name, value in event.headers or []})
                if isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                    raise ConnectionError(f"the peer refused the stream: {event}")
            secure.sendall(client.data_to_send())


def _answer(headers: dict[str, str]) -> Answer:
    return Answer(int(headers[":status"]), headers.get("x-uproxy-reason", ""), headers.get("x-uproxy-policy", ""))
