"""`meshctl demo`: a mesh of real network namespaces on this machine, shown step by step."""

from __future__ import annotations

import argparse

from control.cli.output import add_output_option

_EXAMPLES = """\
examples:
  meshctl demo
  meshctl demo -o json

Needs root, and takes under two minutes. Builds two hosts with four workloads, shows what is encrypted, what is refused
and what a crash does, measures the paths, and removes everything it made. Exit status 1 if a step fails.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo` to the parser."""
    demo = commands.add_parser(
        "demo",
        help="run the demonstration on this machine",
        description="Run the demonstration on this machine (needs root).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_output_option(demo)
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    # Imported here: the lab brings the data plane with it, which no other command needs.
    from benchmarks.lab.demo import main

    return main(["--output", arguments.output])
