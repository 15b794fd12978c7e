"""`waypoint upgrade`: has a waypoint start the process that takes over from it (docs/upgrades.md)."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from uproxy import handover
from uproxy.handover import HandoverError

_DESCRIPTION = """\
Replace a waypoint that runs by one of the software that is installed now, with the same options; what @FILE among them
holds is read again. The new one takes over its listening sockets, and no request fails. Returns when it serves."""


def main(argv: Sequence[str]) -> int:
    """Ask, and wait. Exit status 0 when the new one serves, 1 when the old one goes on."""
    parser = argparse.ArgumentParser("waypoint upgrade", description=_DESCRIPTION)
    parser.add_argument("--state", type=Path, required=True, metavar="DIR", help="that of its `waypoint run`")
    options = parser.parse_args(argv)
    try:
        pid = asyncio.run(handover.ask_for_upgrade(options.state))
    except HandoverError as error:
        print(f"waypoint upgrade: {options.state}: {error}", file=sys.stderr)
        return 1
    print(f"{options.state}: the waypoint is pid {pid} now; the one before drains")
    return 0
