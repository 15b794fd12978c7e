"""Join tokens as text: what a new workload needs to get its first certificate, and to know whom it gets it from.

`ujt1.` and base64url (RFC 4648 section 5, no padding) of msgpack {url, root, id, secret}.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from typing import Final

import msgpack

_PREFIX: Final = "ujt1."
_DIGEST_BYTES: Final = 32
SECRET_BYTES: Final = 32
_MAX_TEXT: Final = 1024  # twice the longest: a host name has at most 253 characters
_MAX_URL: Final = 300
_URL: Final = re.compile(r"https://(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}")
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


class TokenError(ValueError):
    """Text that is no join token; says what is wrong, and nothing of the secret."""


@dataclass(frozen=True, slots=True)
class JoinToken:
    """One right to one certificate. Made by the control plane, used once."""

    url: str
    """Where certificates are given out: `https://host:15012`."""
    root_sha256: bytes
    """Of the CA's root certificate (DER): what the new workload trusts before it trusts anything else."""
    id: str
    """What the control plane knows it by."""
    secret: bytes = field(repr=False)

    def encode(self) -> str:
        """The token's text. Raises TokenError for what `decode` would not take back."""
        _check(self)
        packed = msgpack.packb({"url": self.url, "root": self.root_sha256, "id": self.id, "secret": self.secret})
        return _PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> JoinToken:
        """The token in a text; space around it is ignored. Raises TokenError."""
        text = text.strip()
        if len(text) > _MAX_TEXT:
            raise TokenError(f"{len(text)} characters are no join token; one has at most {_MAX_TEXT}")
        if not text.startswith(_PREFIX):
            raise TokenError(f"a join token begins with {_PREFIX!r}; write what `meshctl token create` printed")
        token = _unpacked(text.removeprefix(_PREFIX))
        if token.encode() != text:
            raise TokenError(f"{_DAMAGED}: it is not written as we write it")
        return token


_DAMAGED: Final = "the join token is damaged (copied in part, perhaps); create another"


def _unpacked(text: str) -> JoinToken:
    try:
        packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        content = msgpack.unpackb(packed, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, TypeError, RecursionError, binascii.Error, msgpack.UnpackException):
        raise TokenError(_DAMAGED) from None
    match content:
        case {"url": str(url), "root": bytes(root), "id": str(name), "secret": bytes(secret)} if len(content) == 4:
            return JoinToken(url, root, name, secret)
    raise TokenError(_DAMAGED)


def _check(token: JoinToken) -> None:
    if len(token.url) > _MAX_URL or not _URL.fullmatch(token.url) or not 0 < int(token.url.rpartition(":")[2]) < 65536:
        raise TokenError(f"the token's URL must be https://host:port, not {token.url[:_MAX_URL]!r}")
    if len(token.root_sha256) != _DIGEST_BYTES:
        raise TokenError(f"the token's root digest must have {_DIGEST_BYTES} bytes, not {len(token.root_sha256)}")
    if not _ID.fullmatch(token.id):
        raise TokenError("the token's id must be 1-64 letters, digits, '-' and '_'")
    if len(token.secret) != SECRET_BYTES:
        raise TokenError(f"the token's secret must have {SECRET_BYTES} bytes, not {len(token.secret)}")
