"""`meshctl check`: which capture this host gets, and why; and what an application holds that none of them sees."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from control.cli.output import DIFFERS, CommandError, add_output_option, printable, show_json, show_table

if TYPE_CHECKING:
    from uproxy.node.features import Feature

_EXAMPLES = """\
examples:
  meshctl check
  meshctl check -o json

Tries, as root, what each capture needs: loads and attaches the eBPF programs in a cgroup made for that, and redirects
connections in a network namespace made for that. `uproxy exec --capture auto` takes the capture that it names. Then it
looks, with the node agent's help, for sockets that the applications on this host were given from outside, which no eBPF
program sees. Exit status: 0 a capture works and sees everything, 3 not so.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    check = commands.add_parser(
        "check",
        help="say which capture this host gets, and why",
        description="Say which capture this host gets, and why.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument(
        "--node-socket", type=Path, metavar="PATH", help="of this host's node agent; default: /run/uproxy/node.sock"
    )
    add_output_option(check)
    check.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    # Imported here: libbpf comes with it, which no other command needs.
    from uproxy.node import features
    from uproxy.node.client import DEFAULT_SOCKET

    if os.geteuid() != 0:
        raise CommandError("needs root: it tries what capture needs, in a cgroup and a namespace that it makes")
    try:
        found = features.probe()
        sockets, agent = _uncaptured(arguments.node_socket or DEFAULT_SOCKET)
    except OSError as error:
        raise CommandError(f"not to be found out: {error}") from None
    verdict = features.verdict(found)
    if arguments.output == "json":
        show_json(
            {
                **asdict(verdict),
                "features": [asdict(one) for one in found],
                "agent": agent,
                "uncaptured": sockets,
            }
        )
    else:
        _show(found, sockets, agent)
        print(f"\ncapture: {verdict.capture}: {verdict.reason}")
    return 0 if verdict.capture != "none" and not sockets else DIFFERS


def _uncaptured(socket: Path) -> tuple[list[dict[str, Any]], str]:
    """The sockets, and what there is to say of the agent, who knows the workloads."""
    from uproxy.node.client import NodeClient, NodeError
    from uproxy.node.uncaptured import uncaptured

    if not socket.exists():
        return [], f"no node agent at {socket}: no workload of this host is known"
    try:
        status = NodeClient(socket).status()
    except NodeError as error:
        raise CommandError(str(error)) from None
    found: list[dict[str, Any]] = []
    for workload in status["workloads"]:
        try:
            sockets = uncaptured(workload["app_cgroup"], workload["netns"])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        found += [{"workload": workload["workload"], **asdict(one)} for one in sockets]
    return (
        found,
        f"node {status['node']}: {status['workload_count']} workloads, {status['error'] or 'nothing is wrong'}",
    )


def _show(features: Sequence[Feature], sockets: Sequence[dict[str, Any]], agent: str) -> None:
    show_table(
        ("CAPTURE", "NEEDS", "WORKS", "DETAIL"),
        (
            (one.capture, one.name, "yes" if one.ok else "NO", printable(" ".join(one.detail.split())))
            for one in features
        ),
    )
    print(f"\n{printable(agent)}")
    for one in sockets:
        ends = f" {one['local']} -> {one['remote']}" if one["local"] else ""
        print(
            f"uncaptured: workload {one['workload']}: {one['protocol']} socket{ends} of process {one['pid']} "
            f"({printable(one['command'])}) {one['origin']}; end and start the workload anew"
        )
