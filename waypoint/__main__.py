"""The `waypoint` command: `run`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import uproxy


def main(argv: Sequence[str] | None = None) -> int:
    """Hand over to the command, which has options and --help of its own. Returns the exit status."""
    parser = argparse.ArgumentParser("waypoint", description="The L7 proxy that a label puts before a service.")
    parser.add_argument("--version", action="version", version=f"waypoint {uproxy.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("run", help="run one process of a waypoint", add_help=False)
    arguments = sys.argv[1:] if argv is None else list(argv)
    # Only the first word is ours: what follows belongs to the command.
    parser.parse_args(arguments[:1])
    from waypoint import run  # once it is known that it is wanted: --help and --version are quick

    return run.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
