"""What a uProxy says of the direct path: whom it has reached, and as whom."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgpack
import pytest

from control.api.address import IpAddress, parse_address
from control.api.gateway import Binding, Via
from control.api.identity import SpiffeId
from control.api.workload import Endpoint, Service, ServicePort, Workload
from control.client.state import State
from control.client.x509 import CertificateId, RevocationList
from tests.support.certificates import DB, WEB
from tests.support.pair import SERVICE_PORT, VIP, WEB_ADDRESS, published, workload
from uproxy.direct import DirectPath, _Caller, _Proof
from uproxy.outbound import Self
from uproxy.resolve import Resolver
from uproxy.telemetry import Telemetry
from uproxy.tls import Revocations
from uproxy.tunnel import Tunnel

FIRST, SECOND = parse_address("10.0.0.1"), parse_address("10.0.0.2")
OTHER = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/other")
_ISSUER = b"CN=ca"


def own(*, direct: bool) -> Workload:
    return dataclasses.replace(workload("web", WEB_ADDRESS, WEB), direct=direct)


def endpoint(name: str, address: IpAddress, identity: SpiffeId) -> Endpoint:
    return Endpoint("shop/db", f"shop/{name}", address, identity, {SERVICE_PORT: 7000}, 1, True, {})


def mesh() -> State:
    state = State("cluster.local")
    service = Service("shop", "db", (VIP,), (ServicePort("", SERVICE_PORT, 7000, ""),), {}, (DB, OTHER))
    endpoints = endpoint("db-1", FIRST, DB), endpoint("db-2", SECOND, DB)
    state.apply([published(record, 1) for record in (service, own(direct=True), *endpoints)])
    return state


def path_of(state: State) -> DirectPath:
    who = Self("shop/web", str(WEB), "cluster.local", (WEB_ADDRESS,))
    made = DirectPath(Path("/nowhere"), state, Telemetry("0"), who)
    made._local = frozenset((FIRST, SECOND))
    made.changed()
    return made


def reach(path: DirectPath, state: State, address: IpAddress) -> None:
    plan = Resolver(state, random.Random(1)).plan(VIP, SERVICE_PORT)
    path.reached(plan, next(hop for hop in plan.hops if hop.address == address))


def proved(path: DirectPath) -> dict[IpAddress, SpiffeId | None]:
    return {backend.address: backend.identity for choice in path._said().choices for backend in choice.backends}


def test_a_backend_is_near_as_whom_a_tunnel_has_proved_it() -> None:
    state = mesh()
    path = path_of(state)
    assert not proved(path)
    reach(path, state, FIRST)
    assert proved(path) == {FIRST: DB, SECOND: None}
    reach(path, state, SECOND)
    assert proved(path) == {FIRST: DB, SECOND: DB}


def test_a_backend_that_is_somebody_else_now_is_proved_anew() -> None:
    state = mesh()
    path = path_of(state)
    reach(path, state, FIRST)
    state.apply([published(endpoint("db-1", FIRST, OTHER), 2)])
    path.changed()
    assert proved(path) == {FIRST: None, SECOND: None}
    reach(path, state, FIRST)
    assert proved(path) == {FIRST: OTHER, SECOND: None}


@pytest.mark.parametrize("change", [{"ready": False}, {"ports": {}}], ids=str)
def test_a_backend_that_takes_no_connections_now_is_not_among_those_to_choose_from(change: dict[str, object]) -> None:
    state = mesh()
    path = path_of(state)
    reach(path, state, FIRST)
    reach(path, state, SECOND)
    state.apply([published(dataclasses.replace(endpoint("db-1", FIRST, DB), **change), 2)])
    path.changed()
    assert proved(path) == {SECOND: DB}


def test_nothing_is_said_of_what_may_not_go_direct() -> None:
    state = mesh()
    path = path_of(state)
    reach(path, state, FIRST)
    state.apply([published(own(direct=False), 2)])
    path.changed()
    reach(path, state, FIRST)
    assert not path._said().direct
    assert not proved(path)


def carrier(identity: SpiffeId = WEB, *, until: float = math.inf, serial: int = 1) -> Tunnel:
    """What is asked of a tunnel by which somebody came."""
    certificates = (CertificateId(_ISSUER, serial),)
    told = SimpleNamespace(
        peer=identity, peer_address=FIRST, peer_port=40_000, peer_expires_at=until, certificates=certificates
    )
    return cast("Tunnel", told)


def destination(state: State, *carriers: Tunnel) -> DirectPath:
    path = path_of(state)
    path.may_enter = lambda *_: True
    for one in carriers:
        path.let_in(one, WEB_ADDRESS, 7000)
    path.changed()
    return path


def allowed(path: DirectPath) -> set[SpiffeId]:
    return {one.identity for one in path._said().allowed}


def revoked(*serials: int) -> Revocations:
    return Revocations((RevocationList(_ISSUER, frozenset(serials)),))


def test_a_caller_that_was_let_in_is_allowed_until_it_would_not_be() -> None:
    state = mesh()
    path = destination(state, carrier(), carrier(OTHER, serial=2))
    assert allowed(path) == {WEB, OTHER}
    path.may_enter = lambda peer, *_: peer == WEB
    path.changed()
    assert allowed(path) == {WEB}
    path._local = frozenset()
    path.changed()
    assert allowed(path) == set()


def test_a_caller_is_allowed_for_as_long_as_its_certificate_holds() -> None:
    path = destination(mesh(), carrier(until=time.time() - 1), carrier(OTHER, until=time.time() + 60))
    assert allowed(path) == {OTHER}


def test_a_caller_whose_certificate_is_revoked_is_allowed_no_more() -> None:
    path = destination(mesh(), carrier(), carrier(OTHER, serial=2))
    path.renewed(revoked(3))
    assert allowed(path) == {WEB, OTHER}
    path.renewed(revoked(1, 3))
    assert allowed(path) == {OTHER}


def test_with_another_certificate_of_its_own_a_caller_goes_by_a_tunnel_once_more() -> None:
    state = mesh()
    path = path_of(state)
    reach(path, state, FIRST)
    path.renewed(Revocations())
    assert not proved(path)
    reach(path, state, FIRST)
    assert proved(path) == {FIRST: DB, SECOND: None}


def test_a_service_that_is_bound_to_a_waypoint_meanwhile_is_said_no_more() -> None:
    state = mesh()
    path = path_of(state)
    reach(path, state, FIRST)
    service = state.service("shop/db")
    assert service is not None
    state.apply([published(dataclasses.replace(service, binding=Binding("shop/wp", Via.WAYPOINT)), 2)])
    path.changed()
    assert not proved(path)


def test_another_process_goes_on_with_all_that_is_known() -> None:
    state = mesh()
    path = destination(state, carrier(until=2e9), carrier(OTHER, until=2e9, serial=2))
    reach(path, state, FIRST)
    next_one = path_of(state)
    next_one.may_enter = lambda *_: True
    next_one.go_on(msgpack.unpackb(msgpack.packb(path.describe())))
    next_one.changed()
    assert next_one._said() == path._said()
    assert (allowed(next_one), proved(next_one)) == ({WEB, OTHER}, {FIRST: DB, SECOND: None})
    next_one.renewed(revoked(2))
    assert allowed(next_one) == {WEB}


def test_another_process_goes_on_with_all_that_was_said() -> None:
    state = mesh()
    path = path_of(state)
    reach(path, state, FIRST)
    path.may_enter = lambda *_: True
    certificates = (CertificateId(b"issuer", 2**159 + 7), CertificateId(b"root", 1))
    for number in range(40):
        caller = _Caller(DB, FIRST, WEB_ADDRESS, 7000 + number)
        path._allowed[caller] = _Proof(4000 + number, 1e12, certificates)
    pieces = [msgpack.unpackb(msgpack.packb(piece)) for piece in path.describe()]
    assert len(pieces) > 2, "each is small"
    heir = path_of(state)
    heir._local = frozenset()
    heir.may_enter = path.may_enter
    heir.go_on(pieces)
    assert heir._said() == path._said()
    assert heir._allowed == path._allowed
    assert heir._local == path._local
    heir._forget_callers()
    assert heir._allowed == path._allowed
    heir.may_enter = lambda *_: False
    heir._forget_callers()
    assert not heir._allowed, "policy is asked again"


def test_what_cannot_be_read_is_an_error_and_what_may_not_go_direct_says_nothing() -> None:
    state = mesh()
    wrong = [{"dialled": [["nowhere", 1]]}, {"proven": [[FIRST, "db"]]}, {"allowed": [[1]]}, {"local": [7]}]
    for piece in wrong:
        with pytest.raises(ValueError, match="cannot be read"):
            path_of(state).go_on([piece])
    state.apply([published(own(direct=False), 2)])
    path = path_of(state)
    path.go_on([{"dialled": [[VIP, SERVICE_PORT]], "proven": [[FIRST, str(DB)]], "local": [FIRST]}])
    assert not path._said().choices
