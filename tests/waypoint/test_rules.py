"""The rules of a waypoint's destinations are kept for one configuration, and within bounds."""

from control.api.gateway import Gateway, Traffic
from control.api.policy import Action, AuthorizationPolicy, Target
from control.client.state import State
from tests.support.certificates import DB
from tests.support.pair import DB_ADDRESS, published, workload
from uproxy.listener import asked_for
from waypoint.destination import Destination, Destinations
from waypoint.rules import MAX_KEPT, RuleBook

NOBODY = AuthorizationPolicy("shop", "nobody", Action.ALLOW, None, (), (Target("Gateway", "shop/wp"),))


def bound_workload() -> State:
    state = State("cluster.local")
    gateway = Gateway("shop", "wp", Traffic.WORKLOAD, (), (), ("shop/db",))
    state.apply([published(record, 1) for record in (gateway, workload("db", DB_ADDRESS, DB))])
    return state


def at_port(destinations: Destinations, port: int) -> Destination:
    authority = f"{DB_ADDRESS}:{port}".encode()
    return destinations.find(asked_for({b":method": b"CONNECT", b":authority": authority}))


def test_a_caller_that_dials_every_port_does_not_fill_the_memory() -> None:
    state = bound_workload()
    destinations, book = Destinations(state, "shop/wp"), RuleBook(state, "shop/wp")
    most = 0
    for port in range(1, MAX_KEPT + 100):
        book.at(at_port(destinations, port))
        most = max(most, len(book))
    assert most == MAX_KEPT


def test_rules_are_kept_until_the_configuration_changes() -> None:
    state = bound_workload()
    destinations, book = Destinations(state, "shop/wp"), RuleBook(state, "shop/wp")
    before = book.at(at_port(destinations, 80))
    assert book.at(at_port(destinations, 80)) is before
    state.apply([published(NOBODY, 2)])
    after = book.at(at_port(destinations, 80))
    assert before.policies.decide(DB, DB_ADDRESS, DB_ADDRESS, 80, None).allowed
    assert not after.policies.decide(DB, DB_ADDRESS, DB_ADDRESS, 80, None).allowed
