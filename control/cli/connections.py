"""`meshctl connections`: who is connected to whom now, as the proxies of this host see it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from control.cli.output import REFUSED, add_output_option, printable, show_json, show_table
from control.cli.proxies import UnreachableError, add_proxy_options, get, proxies

_EXAMPLES: Final = """\
examples:
  meshctl connections                          of all workloads of this host
  meshctl connections web db
  meshctl connections --admin 127.0.1.1:15000  of a proxy without capture, or of a waypoint

Read from the proxies' admin ports, the youngest first, up to 1,000 of each. SENT and RECEIVED are bytes, as the proxy's
own workload sees them. Exit status: 1 when a proxy did not answer.
"""
_HEAD: Final = ("PROXY", "DIRECTION", "SOURCE", "DESTINATION", "PEER", "SENT", "RECEIVED", "AGE")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "connections",
        help="show who is connected to whom",
        description="Show who is connected to whom, as the proxies of this host see it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_proxy_options(command)
    add_output_option(command)
    command.set_defaults(run=_connections)


def _connections(arguments: argparse.Namespace) -> int:
    answers: list[dict[str, Any]] = []
    status = 0
    for proxy in proxies(arguments):
        try:
            answers.append({"proxy": proxy.name, **json.loads(get(proxy, "/connections"))})
        except UnreachableError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            status = REFUSED
    if arguments.output == "json":
        show_json(answers)
        return status
    show_table(_HEAD, _rows(answers))
    for answer in answers:
        left_out = answer["total"] - len(answer["connections"])
        if left_out > 0:
            print(f"{printable(answer['proxy'])}: {left_out} more, which began before these")
    return status


def source_of(line: Mapping[str, Any]) -> str:
    """The caller of a line of the access log, as people know it."""
    address = str(line.get("src.addr") or line.get("downstream_remote_address", ""))
    return _named(line, "src", address)


def destination_of(line: Mapping[str, Any]) -> str:
    """What was dialled, or else who answers."""
    if "method" in line:
        return f"{line.get('authority', '')}{line.get('path', '')}"
    address = str(line.get("dst.hbone_addr") or line.get("dst.addr", ""))
    service = line.get("dst.service")
    return f"{service} ({address})" if service else _named(line, "dst", address)


def peer_of(line: Mapping[str, Any]) -> str:
    """The identity that the other end proved, without its scheme; at a waypoint the caller's."""
    if "method" in line:
        identity = line.get("source_principal", "")
    else:
        identity = line.get("dst.identity" if line["direction"] == "outbound" else "src.identity", "")
    return str(identity).removeprefix("spiffe://")


def _named(line: Mapping[str, Any], side: str, address: str) -> str:
    name = line.get(f"{side}.workload")
    return f"{line.get(f'{side}.namespace')}/{name} ({address})" if name else address


def _rows(answers: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for answer in answers:
        for line in answer["connections"]:
            request = "method" in line
            yield (
                answer["proxy"],
                line["method"] if request else line["direction"],
                source_of(line),
                destination_of(line),
                peer_of(line),
                str(line["bytes_received"] if request else line["bytes_sent"]),
                str(line["bytes_sent"] if request else line["bytes_recv"]),
                _age(line["duration"]),
            )


def _age(duration: str | int) -> str:
    """Of milliseconds: `1.5s`, `12m`, `3h`."""
    seconds = int(re.sub(r"\D", "", str(duration))) / 1000
    if seconds < 120:
        return f"{seconds:.1f}s"
    return f"{seconds / 60:.0f}m" if seconds < 7200 else f"{seconds / 3600:.0f}h"
