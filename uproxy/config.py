"""The settings of `uproxy run`, from its command line: checked once, then frozen."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from control.api.address import AddressError, IpAddress, parse_address
from control.api.identity import IdentityError, SpiffeId, make_id, parse_trust_domain
from control.api.workload import key
from uproxy.explicit import Forward, split_host_port

_DESCRIPTION = """\
Run the micro proxy of one workload: mTLS to and from the mesh over HBONE, and nothing else.

With --capture ebpf (the default) connections come from eBPF; `uproxy exec` starts it that way. With --capture none it
needs no privileges: the application dials the --forward ports or the SOCKS5 port."""

_EPILOG = """\
example, without privileges:
  uproxy run --workload web --namespace shop --service-account web --address 127.0.0.1 --config mesh.yaml \\
      --identity-dir ./web --capture none --forward 127.0.0.1:9080=reviews.shop:80 --socks5 127.0.0.1:1080

exit status: 0 after a drain (SIGTERM), 1 if it cannot start, 2 for a wrong option"""


@dataclass(frozen=True, slots=True)
class Settings:
    """How one uProxy runs."""

    workload: str
    identity: SpiffeId
    addresses: tuple[IpAddress, ...]
    config: tuple[Path, ...]
    identity_dir: Path
    captured: bool
    probe_fds: tuple[int, ...]
    ready_fd: int | None
    forwards: tuple[Forward, ...]
    socks5: tuple[str, int] | None
    admin_port: int
    access_log: str
    log_json: bool
    drain_timeout_s: float

    @property
    def key(self) -> str:
        return key(self.identity.namespace, self.workload)


def parse(argv: Sequence[str]) -> Settings:
    """Read the command line. Exits with status 2 and a usage message when it is wrong."""
    parser = argparse.ArgumentParser(
        "uproxy run", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    who = parser.add_argument_group("the workload")
    who.add_argument("--workload", required=True, metavar="NAME", help="name of its WorkloadEntry")
    who.add_argument("--namespace", required=True)
    who.add_argument("--service-account", required=True)
    who.add_argument("--trust-domain", default="cluster.local", help="default: %(default)s")
    who.add_argument(
        "--address", action="append", required=True, metavar="IP", help="its mesh address; may be repeated"
    )
    who.add_argument("--identity-dir", type=Path, required=True, help="holds key.pem, chain.pem and bundle.pem")
    mesh = parser.add_argument_group("the mesh")
    mesh.add_argument("--config", action="append", type=Path, required=True, metavar="FILE", help="resources in YAML")
    capture = parser.add_argument_group("the application's connections")
    capture.add_argument("--capture", choices=("ebpf", "none"), default="ebpf")
    capture.add_argument("--forward", action="append", default=[], metavar="LOCALIP:PORT=SERVICE.NS:PORT")
    capture.add_argument("--socks5", metavar="IP:PORT")
    capture.add_argument("--probe-fd", action="append", type=int, default=[], help=argparse.SUPPRESS)
    capture.add_argument("--ready-fd", type=int, metavar="FD", help="write `ready` to this descriptor, then close it")
    capture.add_argument("--admin-port", type=int, default=15000, metavar="PORT", help="default: %(default)s")
    logs = parser.add_argument_group("logs and the end")
    logs.add_argument("--access-log", default="-", metavar="FILE", help="- for standard output (default), or off")
    logs.add_argument("--log-format", choices=("json", "text"), default="text")
    logs.add_argument("--drain-timeout-s", type=float, default=5.0, metavar="S", help="default: %(default)s")
    options = parser.parse_args(argv)
    try:
        identity = make_id(parse_trust_domain(options.trust_domain), options.namespace, options.service_account)
        addresses = tuple(parse_address(text) for text in options.address)
        forwards = tuple(Forward.parse(text) for text in options.forward)
        socks5 = split_host_port(options.socks5) if options.socks5 else None
        for host in [f.local_host for f in forwards] + ([socks5[0]] if socks5 else []):
            if not ipaddress.ip_address(host).is_loopback:
                raise ValueError(
                    f"{host}: forwards and SOCKS5 listen on loopback only, or they would lend out this identity"
                )
    except (AddressError, IdentityError, ValueError) as error:
        parser.error(str(error))
    captured = options.capture == "ebpf"
    if captured and (forwards or socks5):
        parser.error("--forward and --socks5 belong to --capture none")
    if not 0 < options.admin_port < 65536:
        parser.error("--admin-port is between 1 and 65535")
    if not 0 <= options.drain_timeout_s <= 3600:
        parser.error("--drain-timeout-s is between 0 and 3600")
    return Settings(
        workload=options.workload,
        identity=identity,
        addresses=addresses,
        config=tuple(options.config),
        identity_dir=options.identity_dir,
        captured=captured,
        probe_fds=tuple(options.probe_fd),
        ready_fd=options.ready_fd,
        forwards=forwards,
        socks5=socks5,
        admin_port=options.admin_port,
        access_log=options.access_log,
        log_json=options.log_format == "json",
        drain_timeout_s=options.drain_timeout_s,
    )
