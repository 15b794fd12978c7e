"""The `waypoint` command, which so far only says that there is no waypoint yet."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

_ABSENT = """\
error: the waypoint is not part of this release, so that nothing was started.
Run the mesh without one: uProxies connect workloads directly, with mTLS from instance to instance and authorization
by identity, address and port (`uproxy run --help`). Give no service, workload or namespace a label
istio.io/use-waypoint, and keep AuthorizationPolicies to what an L4 proxy sees (`meshctl validate` tells)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="waypoint",
        description="The L7 proxy of a uProxy mesh. It is not part of this release.",
        epilog="Exit status: 2 for `run`, until there is a waypoint to run.",
    )
    parser.add_argument("--version", action="version", version=f"waypoint {version('uproxy-mesh')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("run", help="says that the waypoint is not part of this release, and what to do instead")
    # Whatever options somebody gives to `run`, the answer is the same.
    parser.parse_known_args(argv)
    print(_ABSENT, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
