"""What the config key signs, and how its certificate is known. Signing is `control.server.signing`'s, verifying
`control.client.libcrypto`'s.
"""

from __future__ import annotations

from typing import Final

import msgpack

from control.api.messages import Envelope

SIGNATURE: Final = "signature"
"""The field of a signed body that holds the signature of the rest."""
SIGNATURE_BYTES: Final = 64  # Ed25519, RFC 8032 section 5.1.6

CONFIG_KEY_OID: Final = "2.25.302477607620106884145373699674096765486"
"""The one extended key usage of the config key's certificate, so that no TLS certificate can sign configuration and
the config key can serve no TLS.

An arc under 2.25 is a UUID's number and needs no registration (ITU-T X.667); this one is the version 5 UUID of
https://mesh.uproxy.dev/config-key.
"""

_CONTEXT: Final = b"uproxy-mesh config v1\0"  # so that nothing else this key may ever sign can pass for configuration


def signed_bytes(topic: str, envelope: Envelope) -> bytes:
    """What is signed of a message: the topic too, so that the root of one namespace cannot pass for another's.

    A body already signed gives the same bytes. Raises ValueError for a tombstone: what is signed is never deleted.
    """
    if envelope.body is None:
        raise ValueError(f"{topic}: a tombstone is never signed")
    rest = {name: value for name, value in envelope.body.items() if name != SIGNATURE}
    packed: bytes = msgpack.packb([topic, envelope.epoch, envelope.version, envelope.issued_at, rest])
    return _CONTEXT + packed
