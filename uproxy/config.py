"""The settings of `uproxy run`, from its command line: checked once, then frozen."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from control.api.address import AddressError, IpAddress, parse_address
from control.api.identity import IdentityError, SpiffeId, make_id, parse_trust_domain
from control.api.workload import key, key_of_host
from uproxy.explicit import Forward, split_host_port
from uproxy.resolve import host_port

DEFAULT_TRUST_DOMAIN = "cluster.local"
DEFAULT_SHARE = 0.01
DEFAULT_UPGRADE_DRAIN_TIMEOUT_S = 600.0  # Envoy's --drain-time-s
MAX_UPGRADE_DRAIN_TIMEOUT_S = 86400
"""Istio's."""

_DESCRIPTION = """\
Run the micro proxy of one workload: mTLS to and from the mesh over HBONE, and nothing else.

A workload that has joined a mesh (--join, once) needs no more than its --identity-dir: who it is stands there, and its
configuration comes from the control plane. Without a control plane, --config names files, and the options of the
workload say who it is.

With --capture ebpf (the default) connections come from eBPF, with nft from nftables; `uproxy exec` starts it that way.
With --capture none it needs no privileges: the application dials the --forward ports or the SOCKS5 port."""

_EPILOG = """\
examples, without privileges:
  uproxy run --identity-dir ./web --join web.token --capture none --forward 127.0.0.1:9080=reviews.shop:80
  uproxy run --workload web --namespace shop --service-account web --address 127.0.0.1 --config mesh.yaml \\
      --identity-dir ./web --capture none --forward 127.0.0.1:9080=reviews.shop:80 --socks5 127.0.0.1:1080

exit status: 0 after a drain (SIGTERM), 1 if it cannot start, 2 for a wrong option"""


@dataclass(frozen=True, slots=True)
class Who:
    """The workload that a uProxy acts for."""

    workload: str
    identity: SpiffeId
    addresses: tuple[IpAddress, ...]

    @property
    def key(self) -> str:
        return key(self.identity.namespace, self.workload)


@dataclass(frozen=True, slots=True)
class Collector:
    """Where spans go: a service of the mesh, or an address on loopback."""

    host: str
    port: int
    share: float
    """Of the connections that begin here, how many are recorded."""

    @property
    def authority(self) -> str:
        return host_port(self.host, self.port)

    @property
    def is_nearby(self) -> bool:
        """Whether it is on loopback."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class Settings:
    """How one uProxy runs."""

    who: Who | None
    """None: mesh.json of the identity directory says it, and the control plane gives the configuration."""
    config: tuple[Path, ...]
    """Empty exactly when `who` is None."""
    identity_dir: Path
    join: Path | None
    """The token file to join with, should the identity directory hold no usable identity."""
    capture: str
    """`ebpf`, `nft` or `none`."""
    dns: bool
    """Whether it answers the application's name queries, which capture then brings."""
    probe_fds: tuple[int, ...]
    ready_fd: int | None
    direct_socket: Path | None
    """Where the node agent may be asked for the direct path; None: nowhere."""
    forwards: tuple[Forward, ...]
    socks5: tuple[str, int] | None
    admin_port: int
    access_log: str
    log_json: bool
    drain_timeout_s: float
    take_over: bool
    """From the one that runs with this identity directory, if one does."""
    upgrade_drain_timeout_s: float
    otlp: Collector | None

    @property
    def captured(self) -> bool:
        return self.capture != "none"


def parse(argv: Sequence[str]) -> Settings:
    """Read the command line. Exits with status 2 and a usage message when it is wrong."""
    parser = argparse.ArgumentParser(
        "uproxy run", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    member = parser.add_argument_group("a member of a mesh")
    member.add_argument(
        "--identity-dir",
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
    alone.add_argument("--workload", metavar="NAME", help="name of its WorkloadEntry")
    alone.add_argument("--namespace")
    alone.add_argument("--service-account", metavar="NAME")
    alone.add_argument("--trust-domain", metavar="NAME", help=f"default: {DEFAULT_TRUST_DOMAIN}")
    alone.add_argument("--address", action="append", metavar="IP", help="its mesh address; may be repeated")
    capture = parser.add_argument_group("the application's connections")
    capture.add_argument("--capture", choices=("ebpf", "nft", "none"), default="ebpf")
    capture.add_argument("--forward", action="append", default=[], metavar="LOCALIP:PORT=SERVICE.NS:PORT")
    capture.add_argument("--socks5", metavar="IP:PORT")
    capture.add_argument("--dns", action="store_true", help="answer the application's name queries")
    capture.add_argument("--probe-fd", action="append", type=int, default=[], help=argparse.SUPPRESS)
    capture.add_argument("--direct-socket", type=Path, help=argparse.SUPPRESS)
    capture.add_argument("--ready-fd", type=int, metavar="FD", help="write `ready` to this descriptor, then close it")
    capture.add_argument("--admin-port", type=int, default=15000, metavar="PORT", help="default: %(default)s")
    add_upgrade_options(parser)
    add_log_options(parser)
    add_span_options(parser, "a service of the mesh, or an address on loopback")
    options = parser.parse_args(argv)
    wrong = _wrong_mode(options)
    if wrong:
        parser.error(wrong)
    try:
        who = _who(options) if options.config else None
        forwards = tuple(Forward.parse(text) for text in options.forward)
        socks5 = split_host_port(options.socks5) if options.socks5 else None
        for host in [f.local_host for f in forwards] + ([socks5[0]] if socks5 else []):
            if not ipaddress.ip_address(host).is_loopback:
                raise ValueError(
                    f"{host}: forwards and SOCKS5 listen on loopback only, or they would lend out this identity"
                )
    except (AddressError, IdentityError, ValueError) as error:
        parser.error(str(error))
    if options.capture != "none" and (forwards or socks5):
        parser.error("--forward and --socks5 belong to --capture none")
    if options.dns and options.capture != "ebpf":
        parser.error("--dns belongs to --capture ebpf: nothing else brings name queries here")
    check_ranges(parser, options)
    return Settings(
        who=who,
        config=tuple(options.config),
        identity_dir=options.identity_dir,
        join=options.join,
        capture=options.capture,
        dns=options.dns,
        probe_fds=tuple(options.probe_fd),
        ready_fd=options.ready_fd,
        direct_socket=options.direct_socket,
        forwards=forwards,
        socks5=socks5,
        admin_port=options.admin_port,
        access_log=options.access_log,
        log_json=options.log_format == "json",
        drain_timeout_s=options.drain_timeout_s,
        take_over=options.take_over,
        upgrade_drain_timeout_s=options.upgrade_drain_timeout_s,
        otlp=collector(parser, options),
    )


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Those that every proxy has."""
    logs = parser.add_argument_group("logs and the end")
    logs.add_argument("--access-log", default="-", metavar="FILE", help="- for standard output (default), or off")
    logs.add_argument("--log-format", choices=("json", "text"), default="text")
    logs.add_argument("--drain-timeout-s", type=float, default=5.0, metavar="S", help="default: %(default)s")


def add_upgrade_options(parser: argparse.ArgumentParser) -> None:
    """Those that every proxy has."""
    upgrade = parser.add_argument_group("an upgrade")
    upgrade.add_argument(
        "--take-over",
        action="store_true",
        help="take over from the one that runs with this identity directory, if one does; it drains and ends",
    )
    upgrade.add_argument(
        "--upgrade-drain-timeout-s",
        type=float,
        default=DEFAULT_UPGRADE_DRAIN_TIMEOUT_S,
        metavar="S",
        help="how long connections live on in this process when another one takes over; default: %(default)s",
    )


def add_span_options(parser: argparse.ArgumentParser, where: str) -> None:
    """Those that every proxy has. `where`: what --otlp may name."""
    spans = parser.add_argument_group("spans")
    spans.add_argument("--otlp", metavar="HOST:PORT", help=f"post spans to this OpenTelemetry collector: {where}")
    spans.add_argument(
        "--otlp-share",
        type=float,
        default=DEFAULT_SHARE,
        metavar="SHARE",
        help="of the traces that begin here, how many are recorded, from 0 to 1; default: %(default)s",
    )


def collector(parser: argparse.ArgumentParser, options: argparse.Namespace, *, mesh: bool = True) -> Collector | None:
    """What --otlp names. Exits with status 2 when it is neither on loopback nor, with `mesh`, a service."""
    if not 0 <= options.otlp_share <= 1:
        parser.error("--otlp-share is between 0 and 1")
    if not options.otlp:
        return None
    try:
        found = Collector(*split_host_port(options.otlp), options.otlp_share)
    except ValueError as error:
        parser.error(f"--otlp: {error}")
    if not found.is_nearby and not (mesh and key_of_host(found.host) is not None):
        service = ", or a service of the mesh, as in collector.observability:4318" if mesh else ""
        parser.error(f"--otlp {options.otlp}: name an address on loopback{service}: spans would leave in the clear")
    return found


def check_ranges(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exits with status 2 for an --admin-port or a drain time that cannot be."""
    if not 0 < options.admin_port < 65536:
        parser.error("--admin-port is between 1 and 65535")
    if not 0 <= options.drain_timeout_s <= 3600:
        parser.error("--drain-timeout-s is between 0 and 3600")
    if not 0 <= options.upgrade_drain_timeout_s <= MAX_UPGRADE_DRAIN_TIMEOUT_S:
        parser.error(f"--upgrade-drain-timeout-s is between 0 and {MAX_UPGRADE_DRAIN_TIMEOUT_S}")


def _wrong_mode(options: argparse.Namespace) -> str:
    """What is missing without a control plane, or said twice with one; empty when nothing is."""
    declared = {
        "--workload": options.workload,
        "--namespace": options.namespace,
        "--service-account": options.service_account,
        "--address": options.address,
    }
    if options.config:
        missing = [option for option, value in declared.items() if value is None]
        if missing:
            return f"--config needs {', '.join(missing)} too: files do not say which workload this is"
        return "--join belongs to a mesh with a control plane, which gives the configuration" if options.join else ""
    given = [option for option, value in {**declared, "--trust-domain": options.trust_domain}.items() if value]
    if given:
        return f"{', '.join(given)}: without --config, mesh.json in --identity-dir says who this workload is"
    return ""


def _who(options: argparse.Namespace) -> Who:
    """Raises AddressError or IdentityError."""
    trust_domain = parse_trust_domain(options.trust_domain or DEFAULT_TRUST_DOMAIN)
    identity = make_id(trust_domain, options.namespace, options.service_account)
    return Who(options.workload, identity, tuple(parse_address(text) for text in options.address))
