"""The `meshctl` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from control.cli import ca, demo, validate
from control.cli.output import CommandError

_EXAMPLES = """\
examples:
  meshctl ca init --dir /etc/uproxy/ca --trust-domain cluster.local
  meshctl validate -f mesh.yaml
  meshctl demo

`meshctl COMMAND --help` explains a command. Exit status: 0 done, 1 refused or failed, 2 not understood.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meshctl",
        description="Operate a uProxy mesh.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"meshctl {version('uproxy-mesh')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (ca, validate, demo):
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
