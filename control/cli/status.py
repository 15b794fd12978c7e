"""`meshctl status`: which proxy runs which configuration, how old it is, and what is wrong."""

from __future__ import annotations

import argparse
from typing import Final

from control.cli.client import Answer, ControlPlane, add_socket_option
from control.cli.output import DIFFERS, add_output_option, printable, show_json, show_table

_EXAMPLES: Final = """\
examples:
  meshctl status
  meshctl status -o json

STATE of a proxy: current; behind (has not applied the newest configuration yet); waiting (lacks something it needs);
offline (went away); silent (no word for a minute); absent (declared, and never seen since the control plane started).
AGE is how long ago the control plane vouched for what the proxy has in force; CERTIFICATE how long its certificate
lives on. Exit status: 0 all current and the broker is connected, 3 not so, 4 no control plane.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    status = commands.add_parser(
        "status",
        help="show proxies, versions and problems",
        description="Show which proxy runs which configuration, and what is wrong.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_socket_option(status)
    add_output_option(status)
    status.set_defaults(run=_status)


def _status(arguments: argparse.Namespace) -> int:
    answer = ControlPlane(arguments.socket).get("status")
    if arguments.output == "json":
        show_json(answer)
    else:
        _show(answer)
    return 0 if answer["ok"] else DIFFERS


def _show(answer: Answer) -> None:
    epoch, version = answer["version"]
    broker = answer["broker"]
    connection = "connected" if broker["connected"] else f"not connected: {printable(broker['problem'])}"
    published = "all is published" if broker["published"] else "something waits to be published"
    print(f"mesh {answer['trust_domain']}: version {epoch}.{version}, {_resources(answer['resources'])}")
    print(f"broker {connection}; {published}" if broker["problem"] else f"broker {connection}, {published}")
    for problem in answer["problems"]:
        print(f"problem: {printable(problem)}")
    if not answer["proxies"]:
        return
    print()
    show_table(
        ("PROXY", "KIND", "STATE", "VERSION", "AGE", "CERTIFICATE", "SOFTWARE", "NOTE"),
        (
            (
                proxy["workload"],
                proxy["kind"] or "",
                proxy["state"],
                ".".join(map(str, proxy["version"] or ())),
                _time(proxy["age_s"]),
                _time(proxy["certificate"]["left_s"]) if proxy["certificate"] else "",
                proxy["software"] or "",
                "; ".join(proxy["notes"]),
            )
            for proxy in answer["proxies"]
        ),
    )


def _resources(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in sorted(numbers.items())) or "no resources"


def _time(seconds: float | None) -> str:
    """A time for people: its largest unit, and the next one where that is small."""
    if seconds is None:
        return ""
    if seconds < 0:
        return f"-{_time(-seconds)}"
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f}{unit}"
    return f"{seconds:.0f}s"
