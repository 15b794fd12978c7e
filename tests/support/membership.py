"""mesh.json as a control plane would have it written."""

from __future__ import annotations

from collections.abc import Sequence

from control.api.address import parse_address
from control.api.identity import SpiffeId
from control.client.membership import Membership
from tests.support.certificates import WEB


def membership(
    identity: SpiffeId = WEB,
    workload: str = "web",
    addresses: Sequence[str] = ("10.96.0.10",),
    control: str = "https://127.0.0.1:1",
    brokers: Sequence[str] = ("mqtts://127.0.0.1:1",),
) -> Membership:
    """By default a member whose control plane and broker do not answer."""
    return Membership(identity, workload, tuple(map(parse_address, addresses)), control, tuple(brokers))
