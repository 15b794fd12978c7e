"""The errors of a connection's journey: each knows its HTTP status, its access-log flag and its reason.

A refusal is an ordinary result: it is answered once, logged once, and changes nothing else.
"""

from __future__ import annotations

from enum import Enum


class Flag(Enum):
    """`response_flags` of Istio's TCP metrics (ztunnel's set, then ours)."""

    NONE = "-"
    DENY = "DENY"
    CONNECT = "CONNECT"
    TLS_FAILURE = "TLS_FAILURE"
    IDENTITY = "IDENTITY_ERROR"
    REVOKED = "CERT_REVOKED"
    NO_CONFIG = "NO_CONFIG"
    WAYPOINT = "WAYPOINT_REQUIRED"
    RESET = "RESET"


class RefusedError(Exception):
    """A connection that is not made. `status` goes on the wire (docs/hbone.md 2.4), `reason` is machine readable.

    `detail` is for the operator: what was refused and how to mend it. `policy` names the rule, if one decided.
    `retriable`: no application byte was sent and another endpoint may answer (docs/hbone.md 4).
    """

    def __init__(
        self,
        reason: str,
        detail: str,
        *,
        status: int = 503,
        flag: Flag = Flag.CONNECT,
        policy: str = "",
        retriable: bool = False,
    ) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.status = status
        self.flag = flag
        self.policy = policy
        self.retriable = retriable
