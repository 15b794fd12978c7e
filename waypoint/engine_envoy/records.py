"""What Envoy writes of each request, as the waypoint records it: the same metrics, access log and watchers."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from control.api.address import AddressError, parse_address
from control.client.state import State
from uproxy.rehearsal import Rehearsals
from uproxy.resolve import host_port
from uproxy.rules import Decision
from uproxy.telemetry import Peer
from waypoint import telemetry as flags
from waypoint.engine_envoy import checks
from waypoint.engine_envoy.parts import WOULD_ALLOW, WOULD_DENY
from waypoint.grpc_messages import MessageCounter
from waypoint.telemetry import Exchange

_POLICY: Final = re.compile(r"rbac_access_denied_matched_policy\[(.*)\]")
_UPSTREAM: Final = re.compile(r"envoy://(?P<identity>spiffe://[^/]+/ns/[^/]+/sa/[^/?]+)[?][0-9]+/(?P<authority>.+)")
_ANSWERED: Final = "via_upstream"


class Records:
    """Reads them."""

    def __init__(self, state: State, rehearsals: Rehearsals) -> None:
        self._state = state
        self._rehearsals = rehearsals

    def read(self, line: bytes, now: float) -> Exchange | None:
        """One line. `now`: monotonic seconds. None: it is no record."""
        try:
            said = json.loads(line)
        except ValueError:
            return None
        return self._exchange(said, now) if isinstance(said, dict) and "method" in said else None

    def _exchange(self, said: dict[str, Any], now: float) -> Exchange:
        upstream = _UPSTREAM.fullmatch(said.get("upstream", ""))
        details = str(said.get("details", ""))
        flag = str(said.get("flags", "")).partition(",")[0] or flags.NO_FLAG
        exchange = Exchange(
            source=self._peer(said.get("caller", ""), said.get("identity", "")),
            destination=Peer("") if upstream is None else self._backend(upstream["authority"], upstream["identity"]),
            started=now - said.get("took_ms", 0) / 1000,
            request_id=said.get("request_id", ""),
            destination_service=said.get("service", ""),
            method=said["method"],
            path=said.get("path", ""),
            authority=said.get("authority", ""),
            protocol=said.get("protocol", ""),
            user_agent=said.get("user_agent", ""),
            grpc=str(said.get("kind", "")).startswith("application/grpc"),
            grpc_status=str(said.get("grpc", "")),
            audit=said.get("audit", ""),
            route=said.get("rule", ""),
            backend_service=said.get("backend", ""),
            hbone_address="" if upstream is None else upstream["authority"],
            status=said.get("status", 0),
            flag=flag,
            details="" if details == _ANSWERED else details,
            received=said.get("received", 0),
            sent=said.get("sent", 0),
            attempts=said.get("attempts", 0),
        )
        if exchange.grpc:
            asked, _, answered = said.get("grpc_messages", "").partition(",")
            exchange.request_messages = MessageCounter(int(asked or 0))
            exchange.response_messages = MessageCounter(int(answered or 0))
        if denied := _POLICY.fullmatch(details):
            exchange.policy = "" if denied[1] == "none" else denied[1]
        if refused_by := said.get("refused_by"):  # a filter has failed
            exchange.policy = refused_by
        if details.startswith("ext_authz_"):  # by the last one that was asked
            exchange.policy = next(filter(None, map(said.get, reversed(checks.marks()))), "")
        if details.startswith("rbac_access_denied"):
            exchange.details = "rbac_access_denied"
        if WOULD_DENY in said or WOULD_ALLOW in said:
            decision = Decision(exchange.details != "rbac_access_denied", exchange.policy, "")
            exchange.dry_run = self._rehearsals.note(decision, _would(said))
        return exchange

    def _peer(self, address: str, identity: str) -> Peer:
        """As `Caller.peer`."""
        workload = self._workload(address)
        return Peer(
            address, workload if workload is not None and str(workload.identity) == identity else None, identity
        )

    def _backend(self, authority: str, identity: str) -> Peer:
        workload = self._workload(authority)
        address = authority.rpartition(":")[0].strip("[]")
        return Peer(host_port(parse_address(address), 15008), workload, identity)

    def _workload(self, address: str) -> Any:
        try:
            return self._state.workload_at(parse_address(address.rpartition(":")[0].strip("[]")))
        except AddressError:
            return None


def _would(said: dict[str, Any]) -> Decision:
    """What is decided if policies in dry run are enforced."""
    if said.get(WOULD_DENY) == "denied":
        rule = said.get(f"{WOULD_DENY}-rule", "")
        return Decision(False, rule, f"denied by {rule}")
    if said.get(WOULD_ALLOW) == "denied":
        return Decision(False, "", "no ALLOW policy matched")
    rule = said.get(f"{WOULD_ALLOW}-rule", "")
    return Decision(True, rule, f"allowed by {rule}" if rule else "no ALLOW policy selects what was asked for")
