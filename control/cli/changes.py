"""What a change of resources did, or would do, as `apply`, `diff`, `delete`, `label` and `annotate` show it."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Final

from control.cli.client import Answer, add_socket_option, problems_of
from control.cli.output import Format, add_output_option, printable, show_json, show_problems, show_table

_ORDER: Final = ("added", "changed", "removed", "unchanged")


def add_change_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that changes resources."""
    parser.add_argument("--dry-run", action="store_true", help="check and show everything, change nothing")
    parser.add_argument(
        "--release",
        action="store_true",
        help="let a change pass that takes away much of a namespace, or the last endpoint of a service",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="let something be bound to a waypoint that is not there; callers are refused meanwhile",
    )
    add_socket_option(parser)
    add_output_option(parser)


def show_changes(answer: Answer, output: Format, *, texts: bool = False) -> None:
    """Show a change set: what differs of each resource (`texts`: as a unified diff), then the sum."""
    if output == "json":
        show_json(answer)
        return
    show_problems("warning", problems_of(answer["warnings"]))
    differing = [entry for entry in answer["changes"] if entry["change"] != "unchanged"]
    if texts:
        for line in (line for entry in differing for line in entry["diff"].splitlines()):
            print(printable(line))
    elif differing:
        show_table(
            ("CHANGE", "KIND", "NAMESPACE", "NAME"),
            ((entry["change"], entry["kind"], entry["namespace"], entry["name"]) for entry in differing),
        )
    for one in answer["bindings"]:
        what = f"waypoint {one['gateway']}: {one['phase']}" if one["gateway"] else "bound to no waypoint any more"
        if one["canary"]:
            what += f"; canary {one['canary']['gateway']} ({one['canary']['percent']} %): {one['canary']['step']}"
        print(f"{one['kind']} {one['key']}: {what}")
    print(_sum(answer))


def _sum(answer: Answer) -> str:
    numbers = Counter(entry["change"] for entry in answer["changes"])
    told = ", ".join(f"{numbers[change]} {change}" for change in _ORDER if numbers[change]) or "nothing named"
    if answer["dry_run"]:
        return f"would be: {told} (dry run: nothing was changed)"
    if answer["version"] is None:
        return f"done: {told}"
    epoch, version = answer["version"]
    return f"done: {told}; version {epoch}.{version}"
