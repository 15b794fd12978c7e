"""What two ends of a TLS connection agreed upon, read from a capture: the ServerHello crosses in plaintext.

RFC 8446 section 4.1.3; the numbers' names are those of IANA's registry "TLS Parameters".
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from benchmarks.lab.capture import Flow

_CHANGE_CIPHER_SPEC, _HANDSHAKE = 20, 22
_SERVER_HELLO: Final = 2
_RETRY: Final = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
"""The random of a ServerHello that is a HelloRetryRequest: another one follows."""
_PRE_SHARED_KEY, _SUPPORTED_VERSIONS, _KEY_SHARE = 41, 43, 51
_VERSIONS: Final = {0x0303: "TLS 1.2", 0x0304: "TLS 1.3"}
_CIPHERS: Final = {0x1301: "AES-128-GCM", 0x1302: "AES-256-GCM", 0x1303: "ChaCha20-Poly1305"}
_GROUPS: Final = {0x0017: "P-256", 0x0018: "P-384", 0x001D: "X25519", 0x001E: "X448", 0x11EC: "X25519MLKEM768"}


@dataclass(frozen=True, slots=True, order=True)
class Agreed:
    """One handshake's outcome, in words."""

    version: str
    cipher: str
    group: str
    """Of the key exchange; empty where none was made."""
    resumed: bool

    def __str__(self) -> str:
        words = ", ".join(word for word in (self.version, self.cipher, self.group) if word)
        return f"{words}, resumed" if self.resumed else words


def agreed(streams: Mapping[Flow, bytes], server: bytes) -> set[Agreed]:
    """Of all connections to this address, packed; `streams` as `capture.streams` gives them."""
    found = (_server_hello(stream) for flow, stream in streams.items() if flow[0] == server)
    return {one for one in found if one is not None}


def _server_hello(stream: bytes) -> Agreed | None:
    """The last of a server's stream, from its beginning on; None when that is not TLS, or not whole."""
    found = None
    at = 0
    while at + 5 <= len(stream) and stream[at] in (_CHANGE_CIPHER_SPEC, _HANDSHAKE):
        size = int.from_bytes(stream[at + 3 : at + 5], "big")
        message = stream[at + 5 : at + 5 + size]
        at += 5 + size
        # A change of ciphers, which means nothing any more, is a single byte: 1.
        if message[:1] == bytes([_SERVER_HELLO]) and message[6:38] != _RETRY:
            try:
                found = _read(message)
            except (struct.error, IndexError):
                return None
    return found


def _read(message: bytes) -> Agreed:
    version, cipher, group, resumed = struct.unpack_from(">H", message, 4)[0], 0, 0, False
    at = 39 + message[38]  # after the session id
    cipher, extensions_end = struct.unpack_from(">HxH", message, at)
    at += 5
    extensions_end += at
    while at < extensions_end:
        kind, size = struct.unpack_from(">HH", message, at)
        if kind == _SUPPORTED_VERSIONS:
            version = struct.unpack_from(">H", message, at + 4)[0]
        elif kind == _KEY_SHARE:
            group = struct.unpack_from(">H", message, at + 4)[0]
        elif kind == _PRE_SHARED_KEY:
            resumed = True
        at += 4 + size
    return Agreed(
        _VERSIONS.get(version, f"version {version:#06x}"),
        _CIPHERS.get(cipher, f"cipher suite {cipher:#06x}"),
        _GROUPS.get(group, f"group {group:#06x}") if group else "",
        resumed,
    )
