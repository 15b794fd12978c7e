"""Who may come to a port that a waypoint stands before, and whom a waypoint may speak for."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.address import parse_address
from control.api.gateway import Bound, Process
from control.api.identity import SpiffeId
from control.api.plaintext import Plaintext
from control.api.policy import Action, AuthorizationPolicy, Rule, Source
from control.api.workload import Workload
from tests.support.certificates import DB, WEB
from uproxy.admission import CALLER, Admission, Caller, Passage
from uproxy.errors import Flag, RefusedError

WAYPOINT = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/wp")
OTHER_WAYPOINT = SpiffeId.parse("spiffe://cluster.local/ns/infra/sa/wp")
PROMETHEUS = SpiffeId.parse("spiffe://cluster.local/ns/ops/sa/prometheus")
A, B = parse_address("10.0.0.1"), parse_address("10.0.0.2")
SAYS_WEB = (CALLER, f"{WEB};10.0.0.1:4711".encode())
WORKLOAD = Workload("shop", "db", "db", DB, (B,), {}, {}, "", 1)
BOUND = Bound(80, ("shop/wp",), (PROMETHEUS,), enforced=True)


def admission(*bounds: Bound, policies: tuple[AuthorizationPolicy, ...] = ()) -> Admission:
    return Admission(dataclasses.replace(WORKLOAD, bounds=bounds), policies, WORKLOAD.identity.trust_domain)


def refusal(one: Admission, peer: SpiffeId, port: int, *headers: tuple[bytes, bytes]) -> RefusedError:
    with pytest.raises(RefusedError) as refused:
        one.enter(peer, port, headers)
    return refused.value


def test_an_enforced_port_takes_its_waypoint_and_who_is_exempt_and_nobody_else() -> None:
    one = admission(BOUND)
    assert one.enter(WAYPOINT, 80, [SAYS_WEB]) == Passage(Caller(WEB, A, 4711))
    assert one.enter(PROMETHEUS, 80, [SAYS_WEB]) is None, "who is exempt speaks for itself"
    for peer in (WEB, OTHER_WAYPOINT, DB):
        refused = refusal(one, peer, 80, SAYS_WEB)
        assert (refused.reason, refused.status, refused.flag) == ("waypoint-required", 401, Flag.WAYPOINT)
        assert not refused.retriable
        assert not refused.policy, "it is no policy that refuses"


def test_nobody_gets_past_a_waypoint_in_plaintext() -> None:
    everybody = dataclasses.replace(BOUND, exempt=(), gateways=(), guarded=True)
    for one in (admission(BOUND), admission(everybody)):
        with pytest.raises(RefusedError, match="waypoint-required: a caller in plaintext connects directly") as refused:
            one.enter(None, 80, ())
        assert refused.value.flag is Flag.WAYPOINT
        assert one.enter(None, 81, ()) is None
    assert "waypoint-required" in admission(everybody).overtaken(None, 80)
    assert admission(BOUND).overtaken(None, 80) == ""


@pytest.mark.parametrize(
    ("source", "action", "allowed"),
    [
        (Source(principals=("*",)), Action.ALLOW, False),
        (Source(not_principals=(WEB.principal,)), Action.ALLOW, True),
        (Source(namespaces=("*",)), Action.ALLOW, False),
        (Source(ip_blocks=("10.0.0.1/32",)), Action.ALLOW, True),
        (Source(ip_blocks=("10.0.0.3/32",)), Action.ALLOW, False),
        (Source(principals=("*",)), Action.DENY, True),
        (Source(not_namespaces=("shop",)), Action.DENY, False),
        (Source(not_principals=("*",)), Action.DENY, False),
    ],
)
def test_plaintext_is_nobodys_and_only_for_ports_that_take_it(source: Source, action: Action, allowed: bool) -> None:
    policy = AuthorizationPolicy("shop", "p", action, None, (Rule(sources=(source,)),))
    one = Admission(
        dataclasses.replace(WORKLOAD, plaintext=Plaintext(True, (90,))), (policy,), WORKLOAD.identity.trust_domain
    )
    assert one.decide_plaintext(A, B, 80).allowed is allowed
    assert one.decide_plaintext(A, B, 90).reason == "port 90 takes mTLS only"
    strict = Admission(WORKLOAD, (), WORKLOAD.identity.trust_domain)
    assert strict.decide_plaintext(A, B, 80).reason == "port 80 takes mTLS only"
    gone = Admission(None, (), WORKLOAD.identity.trust_domain)
    assert not gone.decide_plaintext(A, B, 80).allowed


def test_other_ports_are_no_business_of_a_bound() -> None:
    for peer in (WAYPOINT, WEB):
        assert admission(BOUND).enter(peer, 81, [SAYS_WEB]) is None
        assert admission().enter(peer, 80, [SAYS_WEB]) is None


def test_while_nothing_is_enforced_both_ways_are_open() -> None:
    one = admission(dataclasses.replace(BOUND, enforced=False))
    assert one.enter(WAYPOINT, 80, [SAYS_WEB]) == Passage(Caller(WEB, A, 4711))
    assert one.enter(WEB, 80, [SAYS_WEB]) is None


def test_two_bindings_admit_both_waypoints() -> None:
    one = admission(dataclasses.replace(BOUND, gateways=("infra/wp", "shop/wp")))
    assert one.enter(WAYPOINT, 80, []) == one.enter(OTHER_WAYPOINT, 80, []) == Passage(None)
    assert "infra/wp or shop/wp" in refusal(one, WEB, 80).detail


def test_a_gateway_that_is_not_there_is_believed_by_nobody_and_shuts_the_port() -> None:
    gone = admission(dataclasses.replace(BOUND, gateways=()))
    assert "not there" in refusal(gone, WAYPOINT, 80, SAYS_WEB).detail
    assert gone.enter(PROMETHEUS, 80, []) is None
    open_still = admission(dataclasses.replace(BOUND, gateways=(), enforced=False))
    assert open_still.enter(WAYPOINT, 80, [SAYS_WEB]) is None, "it speaks for itself"


def test_a_bound_of_all_ports_gives_way_to_one_of_a_port() -> None:
    one = admission(Bound(0, ("infra/wp",), (), enforced=True), BOUND)
    assert one.enter(OTHER_WAYPOINT, 4000, []) == Passage(None)
    assert refusal(one, OTHER_WAYPOINT, 80).reason == "waypoint-required"
    assert one.enter(WAYPOINT, 80, []) == Passage(None)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b";",
        str(WEB).encode(),
        f"{WEB};".encode(),
        f"{WEB};10.0.0.1".encode(),
        f"{WEB};10.0.0.1:".encode(),
        f"{WEB};10.0.0.1:65536".encode(),
        f"{WEB};10.0.0.1:-1".encode(),
        f"{WEB};10.0.0.01:80".encode(),
        f"{WEB};10.0.0.1:80;".encode(),
        f"{WEB};10.0.0.1:80, {WEB};10.0.0.1:80".encode(),
        f" {WEB};10.0.0.1:80".encode(),
        f"{WEB};10.0.0.1:80\n".encode(),
        f"{WEB};fd00::1:80".encode(),
        f"{WEB};[10.0.0.1]:80".encode()[:-3],
        f"{WEB};[fd00::1%eth0]:80".encode(),
        f"{WEB};name:80".encode(),
        b"spiffe://cluster.local/ns/shop;10.0.0.1:80",
        b"spiffe://other.domain/ns/shop/sa/web;10.0.0.1:80",
        b"cluster.local/ns/shop/sa/web;10.0.0.1:80",
        f"{WEB};10.0.0.1:\xb2".encode("latin-1"),
        f"{WEB};10.0.0.1:8\u0660".encode(),
    ],
)
def test_a_caller_in_no_form_that_is_known_is_a_bad_request(said: bytes) -> None:
    refused = refusal(admission(BOUND), WAYPOINT, 80, (CALLER, said))
    assert (refused.reason, refused.status) == ("bad-request", 400)


def test_two_callers_are_a_bad_request_even_when_they_are_the_same() -> None:
    assert refusal(admission(BOUND), WAYPOINT, 80, SAYS_WEB, SAYS_WEB).status == 400


@given(st.binary(max_size=80) | st.text("spife:/nsa;[]0189.clutero", max_size=60).map(str.encode))
def test_whatever_a_waypoint_says_is_read_or_refused(said: bytes) -> None:
    with contextlib.suppress(RefusedError):
        admission(BOUND).enter(WAYPOINT, 80, [(CALLER, said)])


@given(st.sampled_from([WEB, DB]), st.ip_addresses(), st.integers(0, 65535))
def test_what_is_written_is_read(identity: SpiffeId, ip: object, port: int) -> None:
    address = parse_address(str(ip))
    text = f"{identity};[{address}]:{port}" if ":" in address else f"{identity};{address}:{port}"
    passage = admission(BOUND).enter(WAYPOINT, 80, [(CALLER, text.encode())])
    assert passage == Passage(Caller(identity, address, port))


def test_policy_is_asked_about_the_caller_and_the_waypoint() -> None:
    allow_web = AuthorizationPolicy("shop", "a", Action.ALLOW, None, (Rule((Source(principals=(WEB.principal,)),)),))
    one = admission(BOUND, policies=(allow_web,))
    assert one.decide(WAYPOINT, A, Passage(Caller(WEB, A, 1)), B, 80).allowed
    assert not one.decide(WAYPOINT, A, Passage(Caller(DB, A, 1)), B, 80).allowed
    assert not one.decide(WAYPOINT, A, Passage(None), B, 80).allowed
    assert one.decide(WEB, A, None, B, 80).allowed
    assert not one.decide(WAYPOINT, A, None, B, 80).allowed


def test_nobody_may_come_to_a_workload_that_is_gone() -> None:
    gone = Admission(None, (), WORKLOAD.identity.trust_domain)
    for passage in (None, Passage(None)):
        assert not gone.decide(WEB, A, passage, B, 80).allowed


def test_a_process_is_believed_at_its_own_addresses_only() -> None:
    process = Process(DB, (A, parse_address("fd00::9")))
    one = admission(dataclasses.replace(BOUND, gateways=(), processes=(process,)))
    for source in process.addresses:
        assert one.enter(DB, 80, [SAYS_WEB], source) == Passage(Caller(WEB, A, 4711))
    for peer, source in ((DB, B), (DB, None), (WEB, A), (WAYPOINT, A)):
        with pytest.raises(RefusedError, match=r"reached through spiffe://cluster.local/ns/shop/sa/db at 10.0.0.1"):
            one.enter(peer, 80, [SAYS_WEB], source)
    assert one.enter(PROMETHEUS, 80, [SAYS_WEB], A) is None


def test_without_a_process_nobody_comes() -> None:
    nobody = admission(dataclasses.replace(BOUND, gateways=()))
    assert "no process serves this workload" in refusal(nobody, WAYPOINT, 80).detail
