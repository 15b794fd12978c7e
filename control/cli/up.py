"""`meshctl up` and `serve`: run the control plane, with a broker of its own or beside one that is there."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import re
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from control.api.identity import TrustDomain, parse_trust_domain
from control.cli.ca import duration_s
from control.cli.client import add_socket_option
from control.cli.output import CommandError, add_output_option, show_fields
from control.client.membership import BROKER_SCHEME, MembershipError, host_and_port
from control.server.brokers import BROKER_PORT
from control.server.ca import DEFAULT_TTL_S, PASSPHRASE_FILE, ROOT_FILE, Authority, CaError
from control.server.enrolment import CERTIFICATES_PORT
from control.server.metrics import METRICS_PORT

if TYPE_CHECKING:
    from control.server.serve import Running

DEFAULT_DIR: Final = Path("/var/lib/uproxy-control")
CA_DIR: Final = "ca"
DEFAULT_TRUST_DOMAIN: Final = "cluster.local"

_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
# Documentation's own (RFC 5737): a UDP socket that is connected there sends nothing, and tells the way out.
_ELSEWHERE: Final = ("192.0.2.1", 9)

_UP_EXAMPLES: Final = """\
examples:
  meshctl up
  meshctl up --dir ./mesh --socket ./mesh/control.sock --host 192.0.2.10
  meshctl up --certificate-ttl 12h 2>> control.log &

Makes a CA and a store in --dir at the first start, then runs the control plane and nats-server until it is told to end
(SIGTERM, or Ctrl-C). A mesh goes on without it. Keep --dir safe, and in your backups: whoever has it has the mesh.
Exit status: 0 told to end, 1 refused or failed.
"""

_SERVE_EXAMPLES: Final = """\
examples:
  meshctl ca init --dir /etc/uproxy/ca --trust-domain cluster.local
  meshctl serve --ca /etc/uproxy/ca --broker mqtts://192.0.2.20:8883 --broker-pid-file /run/mosquitto.pid

As `up`, with a CA that is there already and a broker that somebody else runs. The broker's configuration is written to
broker/ in --dir and kept up to date: nats.conf for nats-server, mosquitto.conf and acl for Mosquitto, with the
certificate that it needs in broker/identity. It must read them again when they change: name its --broker-pid-file, and
it is sent SIGHUP. Exit status: 0 told to end, 1 refused or failed.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the parser."""
    up = commands.add_parser(
        "up",
        help="run the control plane and its broker on this machine",
        description="Run the control plane and its broker on this machine.",
        epilog=_UP_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_directory_option(up)
    up.add_argument(
        "--trust-domain",
        type=_trust_domain,
        metavar="NAME",
        help=f"of a new CA; default: {DEFAULT_TRUST_DOMAIN}",
    )
    up.add_argument("--broker-port", type=_port, default=BROKER_PORT, metavar="PORT", help=f"default: {BROKER_PORT}")
    _add_serving_options(up)
    up.set_defaults(run=_up)

    serve = commands.add_parser(
        "serve",
        help="run the control plane beside a broker that is there",
        description="Run the control plane beside a broker that is there.",
        epilog=_SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_directory_option(serve)
    serve.add_argument("--ca", type=Path, metavar="DIR", help="directory of the CA; default: ca in --dir")
    serve.add_argument(
        "--broker",
        dest="brokers",
        nargs="+",
        action="extend",
        type=_broker,
        required=True,
        metavar="URL",
        help="such as mqtts://192.0.2.20:8883; several are nodes of one cluster",
    )
    serve.add_argument(
        "--broker-pid-file", type=Path, metavar="FILE", help="of the broker, to be sent SIGHUP when its files change"
    )
    _add_serving_options(serve)
    serve.set_defaults(run=_serve)


def _add_directory_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir", type=Path, default=DEFAULT_DIR, metavar="DIR", help=f"keeps everything; default: {DEFAULT_DIR}"
    )


def _add_serving_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--passphrase-file",
        type=Path,
        metavar="FILE",
        help=f"holds the passphrase of the CA's keys; default: {PASSPHRASE_FILE} in the CA's directory",
    )
    parser.add_argument(
        "--host",
        type=_host,
        metavar="NAME",
        help="name or address of this machine, as workloads reach it; default: the address that it dials others from",
    )
    parser.add_argument("--listen", type=_address, default="0.0.0.0", metavar="IP", help="default: 0.0.0.0")
    parser.add_argument(
        "--port",
        type=_port,
        default=CERTIFICATES_PORT,
        metavar="PORT",
        help=f"of certificates over HTTPS; default: {CERTIFICATES_PORT}",
    )
    parser.add_argument(
        "--metrics-port",
        type=_metrics_port,
        default=METRICS_PORT,
        metavar="PORT",
        help=f"of Prometheus metrics over HTTP; 0: none; default: {METRICS_PORT}",
    )
    parser.add_argument(
        "--certificate-ttl",
        type=duration_s,
        default=DEFAULT_TTL_S,
        metavar="TIME",
        help="how long workloads' certificates live, such as 12h; default: 24h; they are renewed at half of it",
    )
    add_socket_option(parser)
    add_output_option(parser)


def _up(arguments: argparse.Namespace) -> int:
    ca, asked = arguments.dir / CA_DIR, arguments.trust_domain
    try:
        if (ca / ROOT_FILE).exists():
            there = Authority.open(ca, arguments.passphrase_file).trust_domain
            if asked not in (None, there):
                raise CommandError(f"the CA in {ca} is of {there}, not of {asked}; name another --dir for another mesh")
        else:
            arguments.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            made = Authority.create(ca, asked or DEFAULT_TRUST_DOMAIN, arguments.passphrase_file)
            print(f"made a CA in {ca}: whoever has it can issue any identity of {made.trust_domain}", file=sys.stderr)
    except OSError as error:
        raise CommandError(f"cannot make {arguments.dir}: {error.strerror}; name another with --dir") from None
    except CaError as error:
        raise CommandError(str(error)) from None
    return _run(arguments, ca, arguments.broker_port, (), None)


def _serve(arguments: argparse.Namespace) -> int:
    ca = arguments.ca or arguments.dir / CA_DIR
    _, port = host_and_port(arguments.brokers[0], BROKER_SCHEME)
    return _run(arguments, ca, port, tuple(arguments.brokers), arguments.broker_pid_file)


def _run(
    arguments: argparse.Namespace,
    ca: Path,
    broker_port: int,
    brokers: tuple[str, ...],
    broker_pid_file: Path | None,
) -> int:
    # Imported here: aiohttp doubles the time that every other command takes to start.
    from control.server.serve import REFUSALS, Settings, serve

    settings = Settings(
        directory=arguments.dir,
        ca=ca,
        passphrase_file=arguments.passphrase_file,
        socket=arguments.socket,
        host=arguments.host or _own_address(),
        listen=arguments.listen,
        port=arguments.port,
        broker_port=broker_port,
        brokers=brokers,
        broker_pid_file=broker_pid_file,
        certificate_ttl_s=arguments.certificate_ttl,
        metrics_port=arguments.metrics_port,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        asyncio.run(serve(settings, lambda running: _tell(running, arguments)))
    except REFUSALS as error:
        raise CommandError(str(error)) from None
    return 0


def _tell(running: Running, arguments: argparse.Namespace) -> None:
    """Say that the mesh is up, and what to do next."""
    show_fields(
        {
            "trust domain": running.trust_domain,
            "root sha256": running.root_sha256,
            "directory": str(arguments.dir),
            "certificates": running.doors.control,
            "brokers": ", ".join(running.doors.brokers),
            "socket": str(arguments.socket),
        },
        arguments.output,
    )
    sys.stdout.flush()
    print("ready: `meshctl apply -f FILE`, `meshctl token create WORKLOAD`, `meshctl status`", file=sys.stderr)


def _own_address() -> str:
    """The address that this machine dials others from; loopback when it can dial nobody."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_ELSEWHERE)
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _trust_domain(text: str) -> TrustDomain:
    try:
        return parse_trust_domain(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _broker(text: str) -> str:
    try:
        host_and_port(text, BROKER_SCHEME)
    except MembershipError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


def _metrics_port(text: str) -> int:
    return 0 if text == "0" else _port(text)


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address") from None


def _host(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if not _HOST.fullmatch(text):
            raise argparse.ArgumentTypeError(f"{text!r} is no host name and no IP address") from None
        return text
