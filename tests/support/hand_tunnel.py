"""A caller by hand: one CONNECT stream over mTLS, with h2 and ssl alone, and HTTP/1.1 requests on it."""

from __future__ import annotations

import socket
from pathlib import Path

import h2.config
import h2.connection
import h2.events

from benchmarks.lab.connect import tls_context

_TIMEOUT_S = 20.0
_ENDS = (h2.events.StreamReset, h2.events.StreamEnded, h2.events.ConnectionTerminated)


class HandTunnel:
    """Open until `close`. Raises AssertionError when it is refused, and ConnectionError when it ends too soon."""

    def __init__(self, made: socket.socket, identity_dir: Path, authority: str, *more: tuple[str, str]) -> None:
        """`more`: further fields of the CONNECT."""
        made.settimeout(_TIMEOUT_S)
        self._tls = tls_context(identity_dir).wrap_socket(made)
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self._http.initiate_connection()
        self._http.send_headers(1, [(":method", "CONNECT"), (":authority", authority), *more])
        self._received = bytearray()
        self.status = ""
        try:
            self._flush()
            while not self.status:
                self._turn()
        except BaseException:
            self._tls.close()
            raise
        if self.status != "200":
            self._tls.close()
            raise AssertionError(f"CONNECT {authority} was answered {self.status}")

    def send(self, path: str, host: str = "reviews") -> None:
        """A GET, without waiting for the answer."""
        self._http.send_data(1, f"GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
        self._flush()

    def receive(self) -> tuple[int, bytes]:
        """Status and body of the next answer, which has a Content-Length."""
        while b"\r\n\r\n" not in self._received:
            self._turn()
        head, _, body = bytes(self._received).partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        length = int(fields[b"content-length"])
        while len(body) < length:
            self._turn()
            body = bytes(self._received).partition(b"\r\n\r\n")[2]
        del self._received[: len(head) + 4 + length]
        return int(head.split(b" ")[1]), body[:length]

    def close(self) -> None:
        self._tls.close()

    def _turn(self) -> None:
        received = self._tls.recv(65536)
        if not received:
            raise ConnectionError("the tunnel ended")
        for event in self._http.receive_data(received):
            if isinstance(event, h2.events.ResponseReceived):
                self.status = dict(event.headers or [])[":status"]  # type: ignore[index]
            elif isinstance(event, h2.events.DataReceived):
                self._received += event.data or b""
                self._http.acknowledge_received_data(event.flow_controlled_length or 0, 1)
            elif self.status in ("", "200") and isinstance(event, _ENDS):
                raise ConnectionError(f"the stream ended: {event}, after {bytes(self._received)!r}")
        self._flush()

    def _flush(self) -> None:
        data = self._http.data_to_send()
        if data:
            self._tls.sendall(data)
