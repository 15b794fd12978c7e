"""Whom a waypoint asks for what its configuration does not have yet."""

from __future__ import annotations

from typing import Protocol

from control.api.address import IpAddress


class Directory(Protocol):
    """Where is asked for what the state does not have (`uproxy.demand.Demand`, or somebody who passes it on to one)."""

    async def destination(self, address: IpAddress) -> None:
        """Return when everything about an address is known, also that nobody lives there. Raises RefusedError."""

    async def followed(self, service_key: str) -> None:
        """Return when a service to which a route leads is known, also that there is none. Raises RefusedError."""

    async def introduce(self, caller: IpAddress, service_key: str) -> None:
        """Ask who calls; telemetry only."""
