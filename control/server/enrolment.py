"""Who gets a certificate: workloads with a join token once, and from then on with the certificate they have.

A token is a right to one certificate, of one identity, for one workload at given addresses, within ten minutes. The
transaction that records the certificate burns it, so of two that race one is served. A workload whose answer was lost
asks again with the same key within a minute, and gets the same certificate. The store holds a digest of the secret.

Rules of renewal: TLS has verified the certificate that was shown; the new one is of that identity and no other, and a
workload must be declared still, and what was shown not revoked. Deleting a WorkloadEntry thus ends what its holder may
do, within a certificate's life.

A node agent gets tokens for the processes of waypoints that are declared for its node, and for nobody else.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from control.api.address import IpAddress
from control.api.identity import SpiffeId
from control.api.policy import DEFAULT_ROOT_NAMESPACE
from control.api.token import SECRET_BYTES, JoinToken
from control.server.ca import CONTROL_PLANE_ACCOUNT, DEFAULT_TTL_S, Authority, CaError, requested_key
from control.server.rights import NODE_PREFIX, is_node
from control.server.store import Store

CERTIFICATES_PORT: Final = 15012
"""Where tokens are taken, over HTTPS."""

TOKEN_TTL_S: Final = 600
MAX_TOKEN_TTL_S: Final = 24 * 3600
RETRY_S: Final = 60
"""How long after its use a token still answers the same key, with the same certificate."""

RESERVED_ACCOUNTS: Final = frozenset({CONTROL_PLANE_ACCOUNT, "broker"})
"""Of the root namespace: identities that the control plane gives out to itself alone."""

_ID_BYTES: Final = 9
_KEPT_CERTIFICATES: Final = 32
"""Of one workload: a client that renews in a loop does not fill the store."""
_MAX_LIVE_TOKENS: Final = 8
"""Of one process that a node agent starts: an agent that asks in a loop does not fill the store."""
_TOKENS_KEPT_S: Final = 24 * 3600
"""After their end, so that `used already` is told from `unknown`."""


class EnrolmentError(Exception):
    """No certificate is given. The text says why and what to do; it goes to whoever asked, and holds no secret."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        """Of HTTP: 4xx is for good."""


@dataclass(frozen=True, slots=True)
class Member:
    """Whom a certificate is for."""

    identity: SpiffeId
    workload: str
    """Name of the workload, in the identity's namespace."""
    addresses: tuple[IpAddress, ...]


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate, and what its owner is."""

    member: Member
    chain_pem: bytes
    """Leaf, then intermediate."""


class Enrolment:
    """Makes tokens and takes them for certificates. All of its state is in the store."""

    def __init__(
        self,
        store: Store,
        authority: Authority,
        declared: Callable[[str, str], Member | None],
        clock: Callable[[], float],
        certificate_ttl_s: int = DEFAULT_TTL_S,
        revoked: Callable[[int], bool] = lambda serial: False,
        placed: Callable[[str, str, str], Member | None] = lambda node, namespace, name: None,
    ) -> None:
        """`declared`: the workload of a namespace and name, if resources declare it; node agents always are. `revoked`:
        whether the certificate of a serial number is. `placed`: the waypoint's process of a node, namespace and name,
        if resources declare it.
        """
        self._store = store
        self._authority = authority
        self._declared = declared
        self._clock = clock
        self._ttl_s = certificate_ttl_s
        self._revoked = revoked
        self._placed = placed

    @property
    def bundle_pem(self) -> bytes:
        return self._authority.bundle_pem

    def create_token(self, url: str, member: Member, ttl_s: int = TOKEN_TTL_S) -> JoinToken:
        """A new token. Raises EnrolmentError for an identity that no workload may have.

        `url` is where the workload finds the certificate server.
        """
        self._check_identity(member.identity)
        if not 1 <= ttl_s <= MAX_TOKEN_TTL_S:
            raise EnrolmentError(
                400, f"a token lives between one second and {MAX_TOKEN_TTL_S // 3600} h, not {ttl_s} s"
            )
        now = int(self._clock())
        token = JoinToken(
            url=url,
            root_sha256=self._authority.root.fingerprint(hashes.SHA256()),
            id=secrets.token_urlsafe(_ID_BYTES),
            secret=secrets.token_bytes(SECRET_BYTES),
        )
        token.encode()
        with self._store.transaction() as rows:
            rows.execute("DELETE FROM tokens WHERE expires_at < ?", (now - _TOKENS_KEPT_S,))
            rows.execute(
                "INSERT INTO tokens (id, secret_sha256, identity, workload, addresses, expires_at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (
                    token.id,
                    hashlib.sha256(token.secret).digest(),
                    str(member.identity),
                    member.workload,
                    json.dumps(member.addresses),
                    now + ttl_s,
                ),
            )
        return token

    def join(self, token_id: str, secret: bytes, csr_pem: bytes) -> Issued:
        """The certificate that a token is good for. Raises EnrolmentError."""
        now = int(self._clock())
        with self._store.transaction() as rows:
            found = rows.execute(
                "SELECT secret_sha256, identity, workload, addresses, expires_at, used_at, key_sha256, chain"
                " FROM tokens WHERE id = ?",
                (token_id,),
            ).fetchone()
            # An unknown id and a wrong secret look the same to whoever guesses.
            stored = found[0] if found else bytes(hashlib.sha256().digest_size)
            if not hmac.compare_digest(hashlib.sha256(secret).digest(), stored):
                raise EnrolmentError(403, "the token is not known here; create another with `meshctl token create`")
            _, identity, workload, addresses, expires_at, used_at, key_sha256, chain = found
            member = self._joining(Member(SpiffeId.parse(identity), workload, tuple(json.loads(addresses))))
            key = self._key(csr_pem, member.identity)
            if used_at is not None:
                if now - used_at < RETRY_S and hmac.compare_digest(key, key_sha256):
                    return Issued(member, chain)
                raise EnrolmentError(
                    403,
                    "the token was used already; it is good for one certificate. Create another, and ask who used it",
                )
            if now >= expires_at:
                raise EnrolmentError(403, f"the token ended {now - expires_at} s ago; create another")
            issued = self._issue(rows, member, csr_pem, now)
            rows.execute(
                "UPDATE tokens SET used_at = ?, key_sha256 = ?, chain = ? WHERE id = ?",
                (now, key, issued.chain_pem, token_id),
            )
        return issued

    def renew(self, certificate_der: bytes, workload: str, csr_pem: bytes) -> Issued:
        """A new certificate for whoever holds this one, which TLS has verified. Raises EnrolmentError.

        `workload` is what its owner calls itself, for when the store was restored from before it joined.
        """
        certificate = x509.load_der_x509_certificate(certificate_der)
        identity = self._identity(certificate)
        if self._revoked(certificate.serial_number):
            raise EnrolmentError(403, "the certificate is revoked; join with a new token, and a new key")
        self._key(csr_pem, identity)
        with self._store.transaction() as rows:
            found = rows.execute(
                "SELECT workload FROM certificates WHERE serial = ?", (f"{certificate.serial_number:x}",)
            ).fetchone()
            if found is not None:
                (workload,) = found
            member = self._declared(identity.namespace, workload)
            if member is None or member.identity != identity:
                raise EnrolmentError(
                    403,
                    f"no workload {workload!r} of {identity} is declared any more; "
                    "declare it again, or join with a new token",
                )
            return self._issue(rows, member, csr_pem, int(self._clock()))

    def token_for_placed(self, certificate_der: bytes, url: str, namespace: str, workload: str) -> JoinToken:
        """A token for a waypoint's process, for the agent of its node: whoever holds this certificate, which TLS has
        verified. Raises EnrolmentError.
        """
        certificate = x509.load_der_x509_certificate(certificate_der)
        agent = self._identity(certificate)
        if self._revoked(certificate.serial_number):
            raise EnrolmentError(403, "the certificate is revoked; join with a new token, and a new key")
        node = agent.service_account.removeprefix(NODE_PREFIX)
        member = self._placed(node, namespace, workload) if is_node(agent) else None
        if member is None:
            raise EnrolmentError(403, f"no waypoint's process {namespace}/{workload} is declared for {agent} to start")
        with self._store.transaction() as rows:
            (live,) = rows.execute(
                "SELECT count(*) FROM tokens"
                " WHERE identity = ? AND workload = ? AND used_at IS NULL AND expires_at > ?",
                (str(member.identity), workload, int(self._clock())),
            ).fetchone()
        if live >= _MAX_LIVE_TOKENS:
            raise EnrolmentError(429, f"{live} tokens for {namespace}/{workload} are unused; use one of them, or wait")
        return self.create_token(url, member)

    def identities(self) -> frozenset[SpiffeId]:
        """Those with a certificate or a token that has not ended."""
        now = int(self._clock())
        with self._store.transaction() as rows:
            found = rows.execute(
                "SELECT identity FROM certificates WHERE not_after > ?"
                " UNION SELECT identity FROM tokens WHERE expires_at > ?",
                (now, now),
            ).fetchall()
        return frozenset(SpiffeId.parse(identity) for (identity,) in found)

    def _joining(self, vouched: Member) -> Member:
        """Whom a token is for, as resources declare it now. One that nobody declares may join ahead of that."""
        declared = self._declared(vouched.identity.namespace, vouched.workload)
        if declared is None:
            return vouched
        if declared.identity != vouched.identity:
            raise EnrolmentError(
                403, f"workload {vouched.workload!r} is declared to be {declared.identity} now; create another token"
            )
        if set(declared.addresses) != set(vouched.addresses):
            raise EnrolmentError(
                403,
                f"workload {vouched.workload!r} is declared with {', '.join(declared.addresses)} now, and the token is "
                f"for {', '.join(vouched.addresses) or 'no address'}; create another token",
            )
        return declared

    def _issue(self, rows: sqlite3.Connection, member: Member, csr_pem: bytes, now: int) -> Issued:
        try:
            chain = self._authority.issue(csr_pem, member.identity, self._ttl_s)
        except CaError as error:
            raise EnrolmentError(400, str(error)) from None
        leaf = x509.load_pem_x509_certificate(chain)
        named = (str(member.identity), member.workload)
        rows.execute("DELETE FROM certificates WHERE not_after < ?", (now,))
        rows.execute(
            "DELETE FROM certificates WHERE serial IN (SELECT serial FROM certificates"
            " WHERE identity = ? AND workload = ? ORDER BY rowid DESC LIMIT -1 OFFSET ?)",
            (*named, _KEPT_CERTIFICATES - 1),
        )
        rows.execute(
            "INSERT INTO certificates (serial, identity, workload, addresses, not_after) VALUES (?, ?, ?, ?, ?)",
            (
                f"{leaf.serial_number:x}",
                *named,
                json.dumps(member.addresses),
                int(leaf.not_valid_after_utc.timestamp()),
            ),
        )
        return Issued(member, chain)

    def _key(self, csr_pem: bytes, identity: SpiffeId) -> bytes:
        """SHA-256 of the public key that a CSR proves possession of."""
        try:
            key = requested_key(csr_pem, identity)
        except CaError as error:
            raise EnrolmentError(400, str(error)) from None
        return hashlib.sha256(
            key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        ).digest()

    def _identity(self, certificate: x509.Certificate) -> SpiffeId:
        """Whose certificate it is. TLS has checked chain, times and purpose."""
        try:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            uris = names.get_values_for_type(x509.UniformResourceIdentifier)
            if len(uris) != 1:
                raise EnrolmentError(403, f"the certificate has {len(uris)} URI SANs; an SVID has one")
            identity = SpiffeId.parse(uris[0])
        except (ValueError, x509.ExtensionNotFound):
            raise EnrolmentError(403, "the certificate names no workload of this mesh; join with a token") from None
        self._check_identity(identity)
        return identity

    def _check_identity(self, identity: SpiffeId) -> None:
        if identity.trust_domain != self._authority.trust_domain:
            raise EnrolmentError(403, f"{identity} is of another trust domain than {self._authority.trust_domain}")
        if identity.namespace == DEFAULT_ROOT_NAMESPACE and identity.service_account in RESERVED_ACCOUNTS:
            raise EnrolmentError(403, f"{identity} is the control plane's own; no workload gets it")
