"""X-Forwarded-For: who was there before the callers that connect to a waypoint, as trusted proxies say. No I/O."""

from __future__ import annotations

import re
from typing import Final

from control.api.address import AddressError, IpAddress, parse_address

_ADDRESS: Final = re.compile(r"[ \t]*(?:\[([^\[\]]*)\](?::[0-9]+)?|([0-9.]+):[0-9]+|([^\[\] \t]+))[ \t]*")
"""As proxies write it into X-Forwarded-For: some with a port."""


def remote_address(forwarded_for: str | None, nearest: IpAddress, trusted: int) -> IpAddress | None:
    """The address that so many trusted proxies before a caller say they were called from; None: one said none.

    `forwarded_for`: the header. As in Envoy the last of them is believed, and when there are fewer, `nearest` is it,
    which connects to us.
    """
    said = _believed(forwarded_for, trusted)
    if not said:
        return nearest
    found = _ADDRESS.fullmatch(said[0])
    try:
        return parse_address(found[1] or found[2] or found[3]) if found is not None else None
    except AddressError:
        return None


def extended(forwarded_for: str | None, nearest: IpAddress, trusted: int) -> str:
    """The header as it goes on: what trusted proxies wrote, and who connects to us. Nobody else has a say in it."""
    return ", ".join((*(address.strip(" \t") for address in _believed(forwarded_for, trusted)), nearest))


def _believed(forwarded_for: str | None, trusted: int) -> list[str]:
    """What trusted proxies wrote, each the address that it was called from; nothing unless there is one of each."""
    said = forwarded_for.split(",") if forwarded_for is not None else []
    return said[-trusted:] if 0 < trusted <= len(said) else []
