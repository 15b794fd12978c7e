"""`meshctl label` and `annotate`: change one word of a resource without writing it out."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Final, Literal

from control.cli.changes import add_change_options
from control.cli.output import CommandError
from control.cli.references import add_namespace_option, parse_references
from control.cli.waypoint import add_wait_option, relabel

_EXAMPLES: Final = """\
examples:
  meshctl {command} service reviews {example} -n shop
  meshctl {command} workload/web-1 {example} other- -n shop --overwrite

KEY=VALUE sets one, KEY- removes one. One that has another value is only replaced with --overwrite. --wait returns when
every proxy concerned does what is asked for, or names those that do not. Exit status: 0 done, 1 refused, 3 done, and
--wait waited in vain, 4 no control plane.
"""

Pairs = Literal["labels", "annotations"]


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the parser."""
    _add(commands, "label", "labels", "version=v2")
    _add(commands, "annotate", "annotations", "example.com/team=shop")


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], command: str, pairs: Pairs, example: str
) -> None:
    parser = commands.add_parser(
        command,
        usage=f"meshctl {command} [option ...] KIND NAME KEY=VALUE ...",
        help=f"set or remove {pairs} of a resource",
        description=f"Set or remove {pairs} of a resource.",
        epilog=_EXAMPLES.format(command=command, example=example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="+", metavar="KIND NAME KEY=VALUE", help="or KIND/NAME; KEY- removes")
    add_namespace_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace values that are there")
    add_wait_option(parser)
    add_change_options(parser)
    parser.set_defaults(run=partial(_relabel, pairs))


def _relabel(pairs: Pairs, arguments: argparse.Namespace) -> int:
    # No resource's name ends in '-' or has a '=', so the pairs are known by their form.
    named = [word for word in arguments.words if "=" not in word and not word.endswith("-")]
    given = [word for word in arguments.words if word not in named]
    if arguments.words[: len(named)] != named:
        raise CommandError(f"{named[-1]!r} is no KEY=VALUE and no KEY-")
    if not named or not given:
        raise CommandError("name one resource, then what to set: KIND NAME KEY=VALUE")
    (reference, *more) = parse_references(named, arguments.namespace)
    if more:
        raise CommandError(f"{more[0]['name']!r} is a second resource; name one at a time")
    changes: dict[str, str | None] = {}
    for word in given:
        key, equals, value = word.partition("=")
        key = key if equals else word[:-1]
        if key in changes:
            raise CommandError(f"{key!r} is given twice")
        changes[key] = value if equals else None
    return relabel(arguments, reference, {pairs: changes}, overwrite=arguments.overwrite)
