"""TCP cubic for everybody in a network namespace, whatever the machine's default is.

A namespace may not choose an algorithm that the machine does not allow (tcp_allowed_congestion_control), a route may:
`congctl` applies to the sockets that connect along it and to those that answer along it (ip-route(8)).
"""

from __future__ import annotations

import subprocess

from benchmarks.lab.sources import LabError
from uproxy import sandbox

ALGORITHM = "cubic"
_TIMEOUT_S = 60.0
# What no TCP connection goes along.
_OTHERS = ("broadcast", "multicast", "anycast", "unreachable", "blackhole", "prohibit")


class CongestionError(LabError):
    """Cubic cannot be had here: the kernel is without it."""


def use_cubic() -> None:
    """On every route that is in the calling thread's network namespace now. Raises CongestionError."""
    for family in ("-4", "-6") if sandbox.has_ipv6() else ("-4",):
        shown = _ip([family, "route", "show", "table", "all"], "")
        # IPv6's routes to oneself have metric 0, which no command can name: they keep the machine's default.
        routes = [one for one in shown.splitlines() if one.split()[0] not in _OTHERS and " metric 0 " not in one]
        _ip([family, "-batch", "-"], "".join(f"route change {_named(route)}\n" for route in routes))


def _named(route: str) -> str:
    # The flags of a link that is down are shown and not taken back.
    kept = [word for word in route.split() if word not in ("linkdown", "dead")]
    if "congctl" in kept:
        at = kept.index("congctl")
        del kept[at : at + 2]
    return " ".join([*kept, "congctl", ALGORITHM])


def _ip(arguments: list[str], commands: str) -> str:
    done = subprocess.run(
        ["ip", *arguments], input=commands, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise CongestionError(f"`ip {' '.join(arguments)}` for TCP {ALGORITHM} failed: {done.stderr.strip()}")
    return done.stdout
