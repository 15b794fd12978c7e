"""The settings of `waypoint run`, from its command line: checked once, then frozen."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from control.api.identity import IdentityError, TrustDomain, parse_trust_domain
from control.api.names import wrong_dns_label, wrong_subdomain
from uproxy.config import (
    DEFAULT_TRUST_DOMAIN,
    Collector,
    add_log_options,
    add_span_options,
    add_upgrade_options,
    check_ranges,
    collector,
)

MAX_WORKERS = 64

_DESCRIPTION = """\
Run one process of a waypoint: the L7 proxy that the label istio.io/use-waypoint puts before a service.

It takes HBONE on port 15008 of its mesh address, needs no privileges and no capture, and is of the Gateway that its
service account names. `meshctl waypoint apply` makes the Gateway and prints the command to run here.

A waypoint that has joined a mesh (--join, once) needs no more than its --state. Without a control plane, --config names
files, and --workload says which WorkloadEntry of them this is. @FILE stands for the options that are in it, which
SIGHUP and `waypoint upgrade` read again."""

_EPILOG = """\
examples:
  waypoint run --state ./wp-1 --join wp-1.token
  waypoint run --config mesh.yaml --workload shop/wp-1 --identity-dir ./wp-1
  waypoint run @/etc/uproxy/wp-1.options

exit status: 0 after a drain (SIGTERM), 1 if it cannot start, 2 for a wrong option"""


@dataclass(frozen=True, slots=True)
class Settings:
    """How one waypoint process runs."""

    config: tuple[Path, ...]
    """Empty: mesh.json of the identity directory says who this is, and the control plane gives the configuration."""
    workload: str
    """Key of its WorkloadEntry; empty exactly when `config` is."""
    trust_domain: TrustDomain
    identity_dir: Path
    gateway: str
    """Name of its Gateway; empty: its service account says."""
    join: Path | None
    """The token file to join with, should the identity directory hold no usable identity."""
    ready_fd: int | None
    admin_port: int
    workers: int
    """Processes that serve; with 1 it is this one."""
    access_log: str
    log_json: bool
    drain_timeout_s: float
    take_over: bool
    """From the one that runs with this identity directory, if one does."""
    upgrade_drain_timeout_s: float
    otlp: Collector | None


class _Parser(argparse.ArgumentParser):
    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """What stands in a line of @FILE."""
        return shlex.split(arg_line, comments=True)


def parse(argv: Sequence[str]) -> Settings:
    """Read the command line. Exits with status 2 and a usage message when it is wrong."""
    parser = _Parser(
        "waypoint run",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )
    member = parser.add_argument_group("a member of a mesh")
    member.add_argument(
        "--state",
        "--identity-dir",
        dest="identity_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="holds key.pem, chain.pem and bundle.pem; of a member also mesh.json and the last good configuration",
    )
    member.add_argument(
        "--join", type=Path, metavar="FILE", help="join with this token first, if DIR holds no usable identity"
    )
    alone = parser.add_argument_group("without a control plane")
    alone.add_argument("--config", action="append", type=Path, default=[], metavar="FILE", help="resources in YAML")
    alone.add_argument("--workload", metavar="NAMESPACE/NAME", help="its WorkloadEntry")
    alone.add_argument("--trust-domain", metavar="NAME", help=f"default: {DEFAULT_TRUST_DOMAIN}")
    parser.add_argument(
        "--gateway",
        default="",
        metavar="NAME",
        help="its Gateway, of placement service-account; of any other, its service account says which",
    )
    parser.add_argument("--ready-fd", type=int, metavar="FD", help="write `ready` to this descriptor, then close it")
    parser.add_argument("--admin-port", type=int, default=15000, metavar="PORT", help="default: %(default)s")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that share port 15008, up to one a core; default: %(default)s, which is this process",
    )
    add_upgrade_options(parser)
    add_log_options(parser)
    add_span_options(parser, "an address on loopback")
    options = parser.parse_args(argv)
    wrong = _wrong_mode(options)
    if wrong:
        parser.error(wrong)
    try:
        trust_domain = parse_trust_domain(options.trust_domain or DEFAULT_TRUST_DOMAIN)
    except IdentityError as error:
        parser.error(str(error))
    if options.gateway and (problem := wrong_subdomain(options.gateway)):
        parser.error(f"--gateway: {problem}")
    if not 1 <= options.workers <= MAX_WORKERS:
        parser.error(f"--workers is between 1 and {MAX_WORKERS}")
    check_ranges(parser, options)
    return Settings(
        config=tuple(options.config),
        workload=options.workload or "",
        trust_domain=trust_domain,
        identity_dir=options.identity_dir,
        gateway=options.gateway,
        join=options.join,
        ready_fd=options.ready_fd,
        admin_port=options.admin_port,
        workers=options.workers,
        access_log=options.access_log,
        log_json=options.log_format == "json",
        drain_timeout_s=options.drain_timeout_s,
        take_over=options.take_over,
        upgrade_drain_timeout_s=options.upgrade_drain_timeout_s,
        otlp=collector(parser, options, mesh=False),
    )


def _wrong_mode(options: argparse.Namespace) -> str:
    """What is missing without a control plane, or said twice with one; empty when nothing is."""
    if options.config:
        if options.join:
            return "--join belongs to a mesh with a control plane, which gives the configuration"
        namespace, slash, name = (options.workload or "").partition("/")
        if not slash or wrong_dns_label(namespace) or wrong_subdomain(name):
            return "--config needs --workload NAMESPACE/NAME too: files do not say which workload this is"
        return ""
    if options.workload or options.trust_domain:
        return "--workload, --trust-domain: without --config, mesh.json in --state says who this is"
    return ""
