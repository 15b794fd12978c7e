"""Proves of a placement that stands: it routes by path, refuses what policy denies, and knows who calls."""

from __future__ import annotations

from benchmarks.lab.evidence import ask
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Workload
from benchmarks.suites.placements.application import (
    BUSY,
    DENIED,
    HTTP_PORT,
    INSTANCES,
    LIMITED,
    SERVICES,
    Service,
    identity,
    member_name,
    version,
)
from benchmarks.suites.placements.mesh import BESIDE, GATEWAYS
from benchmarks.suites.placements.placement import ONE_PASS, PLAIN, Answer, Caller
from benchmarks.suites.placements.standing import Site


def prove(site: Site, name: str) -> None:
    """Raises LabError with what was answered instead."""
    for caller in site.placements[name].callers:
        account = caller.member.account
        called = next(one for one in SERVICES if one.caller == account)
        other = next(one for one in SERVICES if one.caller != account)
        if name == PLAIN:
            _expect(caller, called, "/", "")
        elif name == "remote-l4":
            told = _expect(caller, called, "/", "").told
            _expect_caller(site.workloads[member_name(called.name, int(told["version"][1:]))], account)
            _expect_status(caller, other, "/", 0)
        else:
            for path, chosen in _routes():
                answer = _expect(caller, called, path, str(identity(account)))
                # What is read at the callee alone has reached an instance by then.
                if name not in (ONE_PASS, BESIDE) and chosen not in ("", answer.told["version"]):
                    raise LabError(f"{name}: {path} went to {answer.told['version']} of {called.name}")
            for path in (LIMITED, BUSY):
                _expect(caller, called, path, str(identity(account)))
            _expect_status(caller, called, f"{DENIED}/all", 403)
            _expect_status(caller, other, "/", 403)
        if name != PLAIN:
            _expect_l4(caller, called, other)
        if name == "remote" or (name in GATEWAYS and name != BESIDE):
            _expect_no_way_around(site.workloads[caller.member.name], site.workloads[member_name(called.name, 1)])


def _routes() -> list[tuple[str, str]]:
    """A path, and the instance that must answer; any for the last."""
    return [(f"/{version(number + 1)}/all", version(number + 1)) for number in range(INSTANCES)] + [("/", "")]


def _expect(caller: Caller, service: Service, path: str, told: str) -> Answer:
    """An answer of this service, whose application was told this of its caller."""
    answer = _expect_status(caller, service, path, 200)
    if (answer.told["service"], _named(answer.told["caller"])) != (service.name, told):
        raise LabError(f"{caller.member.name} asked {service.name} for {path}: {answer}, where the caller is {told!r}")
    return answer


def _named(header: str) -> str:
    """Who calls, by an x-forwarded-client-cert header of one element; empty where none came."""
    return next((part.removeprefix("URI=") for part in header.split(";") if part.startswith("URI=")), "")


def _expect_status(caller: Caller, service: Service, path: str, status: int) -> Answer:
    answer = caller.ask(service.name, path)
    if answer.status != status:
        raise LabError(f"{caller.member.name} asked {service.name} for {path}: {answer} instead of {status}")
    return answer


def _expect_l4(caller: Caller, called: Service, other: Service) -> None:
    """What needs no L7 gets through, untouched, to the service that lets this caller in, and to no other."""
    answers = [caller.ask(service.name, "/", l7=False) for service in (called, other)]
    if [one.status for one in answers] != [200, 0] or answers[0].told["caller"]:
        raise LabError(f"{caller.member.name} asked {called.name} and {other.name} without L7: {answers}")


def _expect_caller(workload: Workload, account: str) -> None:
    """The callee's own log: the tunnel's certificate was this account's."""
    workload.await_access(
        lambda entry: entry["direction"] == "inbound" and entry.get("src.identity") == str(identity(account))
    )


def _expect_no_way_around(caller: Workload, callee: Workload) -> None:
    """The callee takes its HTTP port's requests from the waypoint alone: so they were its."""
    answer = ask(caller, callee, HTTP_PORT)
    if (answer.status, answer.reason) != (401, "waypoint-required"):
        raise LabError(f"{caller.name} got around the waypoint to {callee.name}: {answer.status} {answer.reason}")
