"""`meshctl ca`: make a certificate authority, and certify workloads' keys with it."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from cryptography import x509

from control.api.identity import SpiffeId
from control.cli.output import CommandError, add_output_option, show_fields
from control.server.ca import (
    DEFAULT_TTL_S,
    MAX_TTL_S,
    PASSPHRASE_FILE,
    Authority,
    CaError,
    write_identity,
    write_revocations,
)

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_CSR_BYTES = 64 * 1024

_INIT_EXAMPLES = """\
example:
  meshctl ca init --dir /etc/uproxy/ca --trust-domain cluster.local

The directory is made whole or not at all, and never overwritten. It holds root.pem and intermediate.pem, their keys
(encrypted), and, unless --passphrase-file names one that is kept elsewhere, the passphrase (mode 0600). Whoever has
the directory can issue any identity of the mesh.
"""

_ISSUE_EXAMPLES = """\
example, with key and CSR made where the workload runs:
  python -m control.client.csr --dir /var/lib/uproxy/web --id spiffe://cluster.local/ns/shop/sa/web
  meshctl ca issue --dir /etc/uproxy/ca --csr /var/lib/uproxy/web/csr.pem \\
      --id spiffe://cluster.local/ns/shop/sa/web --out /var/lib/uproxy/web

Writes chain.pem (the certificate, then the intermediate) and bundle.pem (the roots) to --out, each by rename.
"""

_REVOKE_EXAMPLES = """\
example:
  meshctl ca revoke --dir /etc/uproxy/ca --certificate /var/lib/uproxy/web/chain.pem
  install -m 0644 /etc/uproxy/ca/crl.pem /var/lib/uproxy/db/crl.pem     (in every identity directory)

Adds to crl.pem in the CA's directory. A control plane that runs from this directory hands it out by itself; without
one, copy it. A proxy reads the copy in its identity directory within a second: it refuses those certificates from then
on, and ends the connections that were made with them.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `ca` and its commands to the parser."""
    ca = commands.add_parser("ca", help="the certificate authority of a mesh", description=__doc__)
    actions = ca.add_subparsers(metavar="COMMAND", required=True)

    init = actions.add_parser(
        "init",
        help="make a CA: root, intermediate, encrypted keys",
        description="Make the certificate authority of a trust domain in a new directory.",
        epilog=_INIT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_ca_options(init, "directory to make; it must not exist, or be empty")
    init.add_argument("--trust-domain", required=True, metavar="NAME", help="such as cluster.local")
    add_output_option(init)
    init.set_defaults(run=_init)

    issue = actions.add_parser(
        "issue",
        help="certify a workload's key",
        description="Issue an X.509-SVID for the key of a CSR.",
        epilog=_ISSUE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_ca_options(issue, "the CA's directory")
    issue.add_argument(
        "--csr", required=True, type=Path, metavar="FILE", help="certificate request in PEM; - for stdin"
    )
    issue.add_argument(
        "--id", required=True, type=_identity, metavar="SPIFFE_ID", help="spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT"
    )
    issue.add_argument(
        "--ttl",
        type=duration_s,
        default=DEFAULT_TTL_S,
        metavar="TIME",
        help=f"life of the certificate, such as 90m or 12h (default 24h, at most {MAX_TTL_S // 86400}d)",
    )
    issue.add_argument("--out", required=True, type=Path, metavar="DIR", help="the workload's identity directory")
    add_output_option(issue)
    issue.set_defaults(run=_issue)

    revoke = actions.add_parser(
        "revoke",
        help="put certificates on the revocation list",
        description="Sign a revocation list with these certificates, and those that were revoked before.",
        epilog=_REVOKE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_ca_options(revoke, "the CA's directory")
    revoke.add_argument(
        "--serial", action="append", default=[], type=_serial, metavar="HEX", help="as `meshctl ca issue` showed it"
    )
    revoke.add_argument(
        "--certificate",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="the certificate, or its chain.pem",
    )
    add_output_option(revoke)
    revoke.set_defaults(run=_revoke)


def _add_ca_options(parser: argparse.ArgumentParser, directory_help: str) -> None:
    parser.add_argument("--dir", required=True, type=Path, metavar="DIR", help=directory_help)
    parser.add_argument(
        "--passphrase-file",
        type=Path,
        metavar="FILE",
        help=f"holds the passphrase of the keys (mode 0600; default: {PASSPHRASE_FILE} in the CA's directory)",
    )


def _init(arguments: argparse.Namespace) -> int:
    try:
        authority = Authority.create(arguments.dir, arguments.trust_domain, arguments.passphrase_file)
    except CaError as error:
        raise CommandError(str(error)) from None
    show_fields(
        {
            "trust domain": authority.trust_domain,
            "directory": str(arguments.dir),
            "root sha256": authority.root_fingerprint,
            "root until": authority.root.not_valid_after_utc.isoformat(),
            "intermediate until": authority.intermediate.not_valid_after_utc.isoformat(),
            "passphrase": str(arguments.passphrase_file or arguments.dir / PASSPHRASE_FILE),
        },
        arguments.output,
    )
    return 0


def _issue(arguments: argparse.Namespace) -> int:
    try:
        csr = _read_csr(arguments.csr)
        authority = Authority.open(arguments.dir, arguments.passphrase_file)
        chain = authority.issue(csr, arguments.id, arguments.ttl)
        write_identity(arguments.out, chain, authority.bundle_pem)
    except CaError as error:
        raise CommandError(str(error)) from None
    leaf = x509.load_pem_x509_certificate(chain)
    show_fields(
        {
            "identity": str(arguments.id),
            "directory": str(arguments.out),
            "serial": f"{leaf.serial_number:x}",
            "not before": leaf.not_valid_before_utc.isoformat(),
            "not after": leaf.not_valid_after_utc.isoformat(),
        },
        arguments.output,
    )
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    if not arguments.serial and not arguments.certificate:
        raise CommandError("say what to revoke: --serial HEX or --certificate FILE")
    try:
        authority = Authority.open(arguments.dir, arguments.passphrase_file)
        serials = [*arguments.serial, *(_serial_of(path, authority) for path in arguments.certificate)]
        path, count = write_revocations(arguments.dir, authority, serials)
    except CaError as error:
        raise CommandError(str(error)) from None
    show_fields({"file": str(path), "revoked": count}, arguments.output)
    return 0


def _serial_of(path: Path, authority: Authority) -> int:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"{path} is no certificate in PEM: {error}") from None
    if certificate.issuer != authority.intermediate.subject:
        raise CommandError(f"the certificate in {path} is not of this CA, but of {certificate.issuer.rfc4514_string()}")
    return certificate.serial_number


def _serial(text: str) -> int:
    if not re.fullmatch(r"[0-9a-fA-F]{1,40}", text) or not int(text, 16):
        raise argparse.ArgumentTypeError(f"{text!r} is no serial number in hexadecimal")
    return int(text, 16)


def _read_csr(path: Path) -> bytes:
    try:
        if str(path) == "-":
            return sys.stdin.buffer.read(_MAX_CSR_BYTES)
        with path.open("rb") as file:
            return file.read(_MAX_CSR_BYTES)
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from None


def _identity(text: str) -> SpiffeId:
    try:
        return SpiffeId.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def duration_s(text: str) -> int:
    """Seconds of a time with its unit, such as 30s, 90m, 24h or 7d."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 30s, 90m, 24h or 7d")
    return int(match[1]) * _UNITS_S[match[2]]
