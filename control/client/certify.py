"""Gets this workload's certificate from the control plane: the first with a join token, each later one with the last.

    python -m control.client.certify join --token-file FILE --dir DIR
    python -m control.client.certify renew --dir DIR

Or a token for somebody else, a process of a waypoint that the agent of its node starts, with the agent's certificate:

    python -m control.client.certify token --dir DIR --for NAMESPACE/NAME --out FILE

A process of its own and short-lived, for the reasons of `csr`.

Invariant: after a crash at any moment the directory holds the key of its chain. A new key is key.next.pem first, then
its chain is put into place, then it becomes key.pem; whoever reads the directory takes key.next.pem where that is
the key of the chain. What is left in key.next.pem is asked for again, so that a control plane that has burnt the token
already, and whose answer was lost, gives the same certificate.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import errno
import fcntl
import http.client
import json
import os
import signal
import ssl
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from control import durable
from control.api.identity import SCHEME, SpiffeId, TrustDomain, make_id, parse_trust_domain
from control.api.policy import DEFAULT_ROOT_NAMESPACE
from control.api.token import JoinToken, TokenError
from control.client import csr
from control.client.csr import CsrError
from control.client.dialling import dial
from control.client.membership import (
    BUNDLE_FILE,
    CHAIN_FILE,
    CONTROL_SCHEME,
    KEY_FILE,
    MEMBERSHIP_FILE,
    NEXT_KEY_FILE,
    Membership,
    MembershipError,
    host_and_port,
)
from control.client.x509 import X509Error, check_svid, read_leaf

DONE: Final = 0
TRY_LATER: Final = 1
REFUSED: Final = 2

DEADLINE_S: Final = 60
"""Of the whole process. Each step has its own bound; this one ends a server that sends a byte at a time."""

_STEP_TIMEOUT_S: Final = 10.0
_MAX_ANSWER_BYTES: Final = 256 * 1024
_MAX_TOKEN_BYTES: Final = 4096
_MAX_CHAIN: Final = 4
# 4xx answers that are not for good (RFC 9110 section 15.5.9, RFC 6585 section 4).
_PASSING: Final = frozenset((408, 429))


class CertifyError(Exception):
    """No certificate now, and perhaps later; the text says why."""


class RefusedError(CertifyError):
    """No certificate, and asking again in the same way is of no use; the text says what to do."""


def join(token: JoinToken, directory: Path) -> Membership:
    """Get the first certificate of this workload into an identity directory. Raises CertifyError."""
    with _alone_in(directory):
        key = csr.own_key(directory / NEXT_KEY_FILE)
        root = _pinned_root(token)
        server = _control_plane(_trust_domain(root))
        body = {
            "id": token.id,
            "secret": base64.urlsafe_b64encode(token.secret).decode().rstrip("="),
            "csr": csr.request(key, None).decode(),
        }
        answer = _Answer.parse(_ask(token.url, _context(_pem(root)), server, "POST", "/v1/join", body))
        identity = answer.membership.identity
        if identity.trust_domain != server.trust_domain:
            raise RefusedError(f"{token.url} gave a certificate of another mesh than its own: {identity}")
        answer.check(key, identity)
        answer.install(directory)
        return answer.membership


def renew(directory: Path) -> Membership:
    """Replace a certificate by a new one of the same identity, with a new key. Raises CertifyError."""
    with _alone_in(directory):
        try:
            own = Membership.load(directory)
        except MembershipError as error:
            raise RefusedError(str(error)) from None
        context = _own_context(directory)
        key = csr.own_key(directory / NEXT_KEY_FILE)
        body = {"workload": own.workload, "csr": csr.request(key, own.identity).decode()}
        server = _control_plane(own.identity.trust_domain)
        answer = _Answer.parse(_ask(own.control, context, server, "POST", "/v1/renew", body))
        if answer.membership.workload != own.workload:
            raise CertifyError(f"{own.control} answered for {answer.membership.key}, not for {own.key}")
        answer.check(key, own.identity)
        answer.install(directory)
        return answer.membership


def token(directory: Path, namespace: str, workload: str) -> JoinToken:
    """A token for a process of a waypoint that is declared for the node whose agent's directory this is.

    Raises CertifyError.
    """
    try:
        own = Membership.load(directory)
    except MembershipError as error:
        raise RefusedError(str(error)) from None
    server = _control_plane(own.identity.trust_domain)
    body = {"namespace": namespace, "workload": workload}
    content = _ask(own.control, _own_context(directory), server, "POST", "/v1/token", body)
    try:
        return JoinToken.decode(json.loads(content)["token"])
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CertifyError(f"the control plane's answer cannot be read: {error!r}") from None


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the control plane gives out."""

    chain: bytes
    """PEM: the leaf, then its intermediates."""
    bundle: bytes
    """PEM: the roots."""
    membership: Membership

    @classmethod
    def parse(cls, content: bytes) -> _Answer:
        try:
            document = json.loads(content)
            chain, bundle = (document[name].encode("ascii") for name in ("chain", "bundle"))
            return cls(chain, bundle, Membership.parse(document["membership"]))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError, MembershipError) as error:
            raise CertifyError(f"the control plane's answer cannot be read: {error!r}") from None

    def check(self, key: ec.EllipticCurvePrivateKey, identity: SpiffeId) -> None:
        """That this certifies our key for `identity`, and that its own roots accept it: it will replace what works.

        Raises CertifyError.
        """
        try:
            chain = x509.load_pem_x509_certificates(self.chain)
            roots = x509.load_pem_x509_certificates(self.bundle)
            if len(chain) > _MAX_CHAIN:
                raise ValueError(f"its chain has {len(chain)} certificates")
            certified = check_svid(read_leaf(_der(chain[0])), identity.trust_domain)
            PolicyBuilder().store(Store(roots)).build_client_verifier().verify(chain[0], chain[1:])
        except (ValueError, X509Error, VerificationError, x509.UnsupportedGeneralNameType) as error:
            raise CertifyError(f"the control plane gave a certificate that cannot be used: {error}") from None
        if chain[0].public_key() != key.public_key():
            raise CertifyError("the control plane gave a certificate of another key than this workload's")
        if certified != identity or self.membership.identity != identity:
            raise CertifyError(f"the control plane gave a certificate of {certified}, not of {identity}")

    def install(self, directory: Path) -> None:
        """Write it all. Where it is interrupted, what was there before is still good, or this is."""
        # The roots first: a proxy that loads between two writes trusts at least what its chain needs.
        durable.write(directory / BUNDLE_FILE, self.bundle)
        durable.write(directory / MEMBERSHIP_FILE, self.membership.encode())
        durable.write(directory / CHAIN_FILE, self.chain)
        _promote_next_key(directory)


def _ask(
    url: str,
    context: ssl.SSLContext,
    server: SpiffeId | None,
    method: str,
    path: str,
    body: Mapping[str, str] | None = None,
) -> bytes:
    """The content of a good answer. `server`: who must have proved itself before it is told anything.

    Raises CertifyError.
    """
    host, port = host_and_port(url, CONTROL_SCHEME)
    connection = http.client.HTTPSConnection(host, port, timeout=_STEP_TIMEOUT_S, context=context)
    try:
        connection.sock = context.wrap_socket(dial(host, port, _STEP_TIMEOUT_S), server_hostname=host)
        if server is not None:
            _check_server(connection.sock, server, url)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        response = connection.getresponse()
        content = response.read(_MAX_ANSWER_BYTES + 1)
    except ssl.SSLCertVerificationError as error:
        raise CertifyError(f"the certificate of {url} is not accepted: {error.verify_message}") from None
    except (OSError, http.client.HTTPException) as error:
        raise CertifyError(f"no answer from {url}: {str(error) or type(error).__name__}") from None
    finally:
        connection.close()
    if len(content) > _MAX_ANSWER_BYTES:
        raise CertifyError(f"{url} answers with more than {_MAX_ANSWER_BYTES} bytes")
    if response.status == http.client.OK:
        return content
    text = f"{url} refuses ({response.status}): {_told(content)}"
    if 400 <= response.status < 500 and response.status not in _PASSING:
        raise RefusedError(text)
    raise CertifyError(text)


def _check_server(connection: ssl.SSLSocket, server: SpiffeId, url: str) -> None:
    der = connection.getpeercert(binary_form=True)
    assert der is not None, "the context requires a certificate"
    try:
        peer = check_svid(read_leaf(der), server.trust_domain)
    except X509Error as error:
        raise RefusedError(f"{url} is not the control plane: {error.detail}") from None
    if peer != server:
        raise RefusedError(f"{url} is {peer}, not the control plane")


def _told(content: bytes) -> str:
    """The error in a refusal, fit for one line of a terminal."""
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(content)
        if type(document) is dict and type(document.get("error")) is str:
            return "".join(letter if letter.isprintable() else " " for letter in document["error"][:500])
    return "it does not say why"


def _pinned_root(token: JoinToken) -> x509.Certificate:
    """The root that the token names. Who answers is not known yet, and is told nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        offered = x509.load_pem_x509_certificates(_ask(token.url, context, None, "GET", "/v1/bundle"))
    except ValueError as error:
        raise CertifyError(f"{token.url} does not answer with a trust bundle: {error}") from None
    for root in offered:
        if root.fingerprint(hashes.SHA256()) == token.root_sha256:
            return root
    raise RefusedError(
        f"{token.url} has another root than the token names (SHA-256 {token.root_sha256.hex()}): the token is of "
        "another mesh, or somebody stands between. Create a token where the control plane runs, and compare the URL"
    )


def _trust_domain(root: x509.Certificate) -> TrustDomain:
    """The mesh that a root is of: its one URI SAN (SPIFFE X.509-SVID 3.1)."""
    try:
        names = root.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        return parse_trust_domain(uri.removeprefix(SCHEME))
    except (ValueError, x509.ExtensionNotFound) as error:
        raise RefusedError(f"the root that the token names is not a mesh's: {error}") from None


def _control_plane(trust_domain: TrustDomain) -> SpiffeId:
    return make_id(trust_domain, DEFAULT_ROOT_NAMESPACE, "control-plane")


def _context(roots_pem: str) -> ssl.SSLContext:
    """TLS 1.3 to a server under these roots. Who it is, its SPIFFE ID says, not its host name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        context.load_verify_locations(cadata=roots_pem)
    except (ssl.SSLError, ValueError) as error:
        raise RefusedError(f"the trust bundle cannot be used: {error}. Join again with a new token") from None
    return context


def _own_context(directory: Path) -> ssl.SSLContext:
    """As `_context`, and with this workload's certificate. Raises RefusedError."""
    context = _context(_text(directory / BUNDLE_FILE))
    try:
        leaf = x509.load_pem_x509_certificate(_text(directory / CHAIN_FILE).encode())
        context.load_cert_chain(directory / CHAIN_FILE, directory / KEY_FILE, password=_no_passphrase)
    except (OSError, ValueError) as error:
        raise RefusedError(f"the certificate in {directory} cannot be used: {error}. Join again") from None
    if leaf.not_valid_after_utc < datetime.now(UTC):
        raise RefusedError(
            f"the certificate in {directory} ended at {leaf.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC, and renews "
            "nothing any more: join again with a new token"
        )
    return context


def _no_passphrase() -> str:
    # Without this callback OpenSSL would ask on the terminal, and wait.
    raise RefusedError(f"{KEY_FILE} is encrypted; a workload's key is kept plain, with mode 0600. Join again")


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """In a directory that is there and that nobody else certifies, after ending what a crash interrupted.

    Of two at once, one could certify the other's key. Raises CertifyError, also for the errors of files within.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _finish_installation(directory)
            yield
        finally:
            os.close(descriptor)
    except BlockingIOError:
        raise CertifyError(f"another process certifies {directory} at this moment") from None
    except CsrError as error:
        raise RefusedError(str(error)) from None
    except OSError as error:
        text = f"cannot use {directory}: {error.strerror}"
        raise (CertifyError if error.errno == errno.ENOSPC else RefusedError)(text) from None


def _finish_installation(directory: Path) -> None:
    """Where the next key is that of the chain, it is the key."""
    if not (directory / NEXT_KEY_FILE).exists() or not (directory / CHAIN_FILE).exists():
        return
    with contextlib.suppress(ValueError):  # what is no certificate is nobody's
        leaf = x509.load_pem_x509_certificate(_text(directory / CHAIN_FILE).encode())
        if leaf.public_key() == csr.own_key(directory / NEXT_KEY_FILE).public_key():
            _promote_next_key(directory)


def _promote_next_key(directory: Path) -> None:
    os.replace(directory / NEXT_KEY_FILE, directory / KEY_FILE)
    durable.sync_directory(directory)


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_MAX_ANSWER_BYTES).decode("ascii", "replace")


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _token(path: Path) -> JoinToken:
    try:
        with path.open("rb") as file:
            return JoinToken.decode(file.read(_MAX_TOKEN_BYTES).decode("ascii", "replace"))
    except OSError as error:
        raise RefusedError(f"the token file {path} cannot be read: {error.strerror}") from None
    except TokenError as error:
        raise RefusedError(f"{path}: {error}") from None


def _write(path: Path, found: JoinToken) -> None:
    try:
        durable.write(path, found.encode().encode() + b"\n", 0o600)
    except OSError as error:
        raise RefusedError(f"cannot write the token to {path}: {error.strerror}") from None


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 done, 1 try again later, 2 refused for good or wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m control.client.certify",
        description="Get or renew a workload's certificate. Exit status: 0 done, 1 try again later, 2 refused.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("join", help="get the first certificate, with a join token")
    first.add_argument("--token-file", required=True, type=Path, help="holds what `meshctl token create` printed")
    later = commands.add_parser("renew", help="get the next certificate, with the one in the directory")
    other = commands.add_parser("token", help="get a token for a waypoint's process of this node")
    other.add_argument("--for", dest="workload", required=True, metavar="NAMESPACE/NAME", help="its WorkloadEntry")
    other.add_argument("--out", required=True, type=Path, metavar="FILE", help="where the token goes, mode 0600")
    for command in (first, later, other):
        command.add_argument("--dir", required=True, type=Path, help="the identity directory of who asks")
    options = parser.parse_args(argv)
    signal.alarm(DEADLINE_S)
    try:
        if options.command == "join":
            join(_token(options.token_file), options.dir)
        elif options.command == "renew":
            renew(options.dir)
        else:
            namespace, _, workload = options.workload.partition("/")
            _write(options.out, token(options.dir, namespace, workload))
    except CertifyError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED if isinstance(error, RefusedError) else TRY_LATER
    finally:
        signal.alarm(0)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
