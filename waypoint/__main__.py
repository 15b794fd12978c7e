"""The `waypoint` command: `run`, and `upgrade`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

import uproxy

_COMMANDS = {
    "run": ("waypoint.run", "run one process of a waypoint"),
    "upgrade": ("waypoint.upgrade", "replace a waypoint that runs by one of the software that is installed now"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand over to the command, which has options and --help of its own. Returns the exit status."""
    parser = argparse.ArgumentParser("waypoint", description="The L7 proxy that a label puts before a service.")
    parser.add_argument("--version", action="version", version=f"waypoint {uproxy.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, text) in _COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    arguments = sys.argv[1:] if argv is None else list(argv)
    # Only the first word is ours: what follows belongs to the command.
    options = parser.parse_args(arguments[:1])
    module, _ = _COMMANDS[options.command]
    # Once it is known that it is wanted: --help and --version are quick.
    status: int = import_module(module).main(arguments[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
