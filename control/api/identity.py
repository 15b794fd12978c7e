"""SPIFFE IDs in the one shape this mesh uses: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.

Grammar: SPIFFE ID specification, sections 2.1 to 2.4. Identities are compared as values, never by pattern.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final, NewType

TrustDomain = NewType("TrustDomain", str)
"""A checked trust domain name, such as `cluster.local`."""

MAX_TRUST_DOMAIN_BYTES: Final = 255  # SPIFFE ID 2.1
MAX_ID_BYTES: Final = 2048  # SPIFFE ID 2.3: implementations must support this much; we take no more

SCHEME: Final = "spiffe://"
_TRUST_DOMAIN: Final = re.compile(r"[a-z0-9._-]+")
_SEGMENT: Final = re.compile(r"[A-Za-z0-9._-]+")


class IdentityError(ValueError):
    """Text that is no identity of this mesh; the message names the rule it breaks."""


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """One workload identity. Made by `parse` or `make_id`, which check the parts."""

    trust_domain: TrustDomain
    namespace: str
    service_account: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.principal}"

    @property
    def principal(self) -> str:
        """The ID without its scheme, which is how policies write it: `cluster.local/ns/shop/sa/web`."""
        return f"{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """The identity in a URI. Raises IdentityError; nothing is normalised: two spellings are two IDs."""
        if len(text) > MAX_ID_BYTES:
            raise IdentityError(f"a SPIFFE ID has at most {MAX_ID_BYTES} bytes")
        if not text.isascii():
            raise IdentityError(f"{text!r}: a SPIFFE ID is plain ASCII")
        if not text.startswith(SCHEME):
            raise IdentityError(f"{text!r} does not begin with {SCHEME!r} (in lower case)")
        for mark, name in (("%", "percent-encoding"), ("?", "a query"), ("#", "a fragment")):
            if mark in text:
                raise IdentityError(f"{text!r}: a SPIFFE ID has no {name}")
        authority, _, path = text.removeprefix(SCHEME).partition("/")
        for mark, name in (("@", "user information"), (":", "port")):
            if mark in authority:
                raise IdentityError(f"{text!r}: the trust domain of a SPIFFE ID has no {name}")
        segments = path.split("/")
        for segment in segments:
            _check_segment(segment, text)
        match segments:
            case ["ns", namespace, "sa", service_account]:
                return cls(parse_trust_domain(authority), namespace, service_account)
        raise IdentityError(f"{text!r} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<account>")


def parse_trust_domain(text: str) -> TrustDomain:
    """Checks a trust domain name. Raises IdentityError."""
    if not text:
        raise IdentityError("the trust domain is empty")
    if len(text) > MAX_TRUST_DOMAIN_BYTES:
        raise IdentityError(f"a trust domain has at most {MAX_TRUST_DOMAIN_BYTES} bytes")
    if not _TRUST_DOMAIN.fullmatch(text):
        raise IdentityError(f"{text!r}: a trust domain has only a-z, 0-9, '.', '-' and '_', in lower case")
    return TrustDomain(text)


def make_id(trust_domain: TrustDomain, namespace: str, service_account: str) -> SpiffeId:
    """The identity of a service account. Raises IdentityError when a part cannot stand in a SPIFFE ID."""
    for segment in (namespace, service_account):
        _check_segment(segment, segment)
    identity = SpiffeId(trust_domain, namespace, service_account)
    if len(str(identity)) > MAX_ID_BYTES:
        raise IdentityError(f"a SPIFFE ID has at most {MAX_ID_BYTES} bytes")
    return identity


def proxy_hash(identity: SpiffeId) -> str:
    """32 hex digits that stand for an identity in a certificate's CN and in topics."""
    return hashlib.sha256(str(identity).encode("ascii")).hexdigest()[:32]


def _check_segment(segment: str, text: str) -> None:
    if not segment:
        raise IdentityError(f"{text!r}: a SPIFFE ID's path has no empty segment and no trailing '/'")
    if segment in (".", ".."):
        raise IdentityError(f"{text!r}: a SPIFFE ID's path has no {segment!r} segment")
    if not _SEGMENT.fullmatch(segment):
        raise IdentityError(f"{text!r}: a SPIFFE ID's path has only letters, digits, '.', '-' and '_'")
