"""The `meshctl` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from control.api.problems import ResourceErrors
from control.cli import (
    apply,
    bench,
    ca,
    check,
    connections,
    demo,
    get,
    label,
    status,
    tap,
    token,
    up,
    validate,
    waypoint,
    why,
)
from control.cli.arguments import CommandParser
from control.cli.output import CommandError, show_refusal

_EXAMPLES = """\
examples:
  meshctl up                                   run the control plane and its broker on this machine
  meshctl apply -f mesh.yaml                   say what the mesh should be
  meshctl token create web-1 -n shop           let a workload in
  meshctl status                               see who runs which version
  meshctl why web-1 reviews:9080 -n shop       see who decides on a connection, and what
  meshctl tap                                  see connections of this host as they happen

`meshctl COMMAND --help` explains a command. Exit status: 0 done, 1 refused or failed, 2 not understood, 3 the answer is
not "all as it should be" (diff, status), 4 no control plane answered.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except ResourceErrors as refused:
        return show_refusal(refused, arguments.output)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:
        # Whoever read our output has seen enough (`meshctl get all | head`); the interpreter flushes once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meshctl",
        description="Operate a uProxy mesh.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"meshctl {version('uproxy-mesh')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)
    for command in (
        up,
        apply,
        get,
        label,
        token,
        status,
        waypoint,
        why,
        connections,
        tap,
        check,
        validate,
        ca,
        demo,
        bench,
    ):
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
