"""`meshctl token create`: let one workload, or one node agent, into the mesh."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from control import durable
from control.cli.ca import duration_s
from control.cli.client import ControlPlane, add_socket_option
from control.cli.output import CommandError, add_output_option, show_json
from control.cli.references import add_namespace_option

_EXAMPLES: Final = """\
examples:
  meshctl token create web-1 -n shop > web-1.token
  meshctl token create web-1 -n shop --service-account web --address 10.97.0.1 --out web-1.token
  meshctl token create --node host-a --out node.token

The token is good for one certificate, of this workload, within ten minutes (--ttl). Service account and addresses are
those of its WorkloadEntry; for one that is not declared yet, both options are needed. Give it to `uproxy run --join`,
`uproxy exec --join` or `uproxy node --join`. It is a secret until it is used: prefer a file to an argument.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `token` and its command to the parser."""
    token = commands.add_parser("token", help="let workloads join the mesh", description=__doc__)
    actions = token.add_subparsers(metavar="COMMAND", required=True)
    create = actions.add_parser(
        "create",
        help="make a join token",
        description="Make a join token: the right to one certificate.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    create.add_argument("workload", nargs="?", default="", metavar="WORKLOAD", help="name of its WorkloadEntry")
    create.add_argument("--node", default="", metavar="NAME", help="for the node agent of this name instead")
    add_namespace_option(create)
    create.add_argument("--service-account", default="", metavar="NAME", help="of a workload that is not declared yet")
    create.add_argument(
        "--address", nargs="+", action="extend", default=[], metavar="IP", help="of a workload that is not declared yet"
    )
    create.add_argument("--ttl", type=duration_s, metavar="TIME", help="such as 90s, 5m; default 10m, at most 24h")
    create.add_argument("--out", type=Path, metavar="FILE", help="write the token there (mode 0600), not to stdout")
    add_socket_option(create)
    add_output_option(create)
    create.set_defaults(run=_create)


def _create(arguments: argparse.Namespace) -> int:
    if bool(arguments.workload) == bool(arguments.node):
        raise CommandError("name a workload, or a node agent with --node NAME")
    if arguments.node and (arguments.service_account or arguments.address):
        raise CommandError("a node agent has no service account to choose and no address; leave the options out")
    request: dict[str, object] = (
        {"node": arguments.node}
        if arguments.node
        else {
            "namespace": arguments.namespace,
            "workload": arguments.workload,
            "service_account": arguments.service_account,
            "addresses": arguments.address,
        }
    )
    if arguments.ttl is not None:
        request["ttl_s"] = arguments.ttl
    answer = ControlPlane(arguments.socket).post("tokens", request)
    if arguments.out is not None:
        try:
            durable.write(arguments.out, answer["token"].encode() + b"\n", 0o600)
        except OSError as error:
            raise CommandError(
                f"cannot write the token to {arguments.out}: {error.strerror}; it will end unused"
            ) from None
    if arguments.output == "json":
        show_json(answer if arguments.out is None else {**answer, "token": str(arguments.out)})
        return 0
    if arguments.out is None:
        print(answer["token"])
    whom = ", ".join([answer["identity"], answer["workload"], *answer["addresses"]])
    print(f"for {whom}; one use, until {answer['expires_at']}", file=sys.stderr)
    return 0
