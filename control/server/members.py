"""Whom a certificate may be for: declared workloads, node agents, and workloads that somebody vouches for."""

from __future__ import annotations

from collections.abc import Sequence

from control.api.address import AddressError, IpAddress, parse_address
from control.api.declared import DeclaredWorkload
from control.api.identity import TrustDomain, make_id
from control.api.index import ResidentWorkload
from control.api.names import key, wrong_dns_label, wrong_subdomain
from control.api.policy import DEFAULT_ROOT_NAMESPACE
from control.api.resources import parse
from control.server.core import Core
from control.server.enrolment import EnrolmentError, Member
from control.server.rights import NODE_PREFIX


class Members:
    """Looks workloads up in the desired state."""

    def __init__(self, core: Core, trust_domain: TrustDomain) -> None:
        self._core = core
        self._trust_domain = trust_domain

    def declared(self, namespace: str, name: str) -> Member | None:
        """A workload that a WorkloadEntry declares, or a node agent, which none needs to."""
        if namespace == DEFAULT_ROOT_NAMESPACE and name.startswith(NODE_PREFIX) and not wrong_subdomain(name):
            return self.node(name.removeprefix(NODE_PREFIX))
        for place, document in self._core.get("WorkloadEntry", namespace, name) if namespace and name else ():
            for declared in parse(document, "/".join(place)):
                if isinstance(declared, DeclaredWorkload):
                    identity = make_id(self._trust_domain, namespace, declared.service_account)
                    return Member(identity, name, declared.addresses)
        return None

    def node(self, name: str) -> Member:
        """The node agent of a host. Raises EnrolmentError for a name that is none."""
        account = f"{NODE_PREFIX}{name}"
        _check(wrong_subdomain(account))
        return Member(make_id(self._trust_domain, DEFAULT_ROOT_NAMESPACE, account), account, ())

    def placed(self, node: str, namespace: str, name: str) -> Member | None:
        """A process of a waypoint that is declared for this node, whose agent starts it."""
        member = self.declared(namespace, name)
        if member is None or not member.addresses:
            return None
        resident = self._core.resident(member.addresses[0])
        if not isinstance(resident, ResidentWorkload) or resident.key != key(namespace, name):
            return None
        return member if resident.placed is not None and resident.placed.node == node else None

    def vouched(self, namespace: str, name: str, service_account: str, addresses: Sequence[str]) -> Member:
        """A workload as an operator names it, which must not differ from what is declared. Raises EnrolmentError.

        An empty service account or no address stands for what is declared.
        """
        _check(wrong_dns_label(namespace), wrong_subdomain(name), service_account and wrong_subdomain(service_account))
        asked = _addresses(addresses)
        declared = self.declared(namespace, name)
        if declared is None:
            if not service_account or not asked:
                raise EnrolmentError(
                    404,
                    f"there is no WorkloadEntry {namespace}/{name}; apply it, or give --service-account and --address",
                )
            return Member(make_id(self._trust_domain, namespace, service_account), name, asked)
        for what, given, known in (
            ("service account", service_account, declared.identity.service_account),
            ("addresses", ", ".join(sorted(asked)), ", ".join(sorted(declared.addresses))),
        ):
            if given and given != known:
                raise EnrolmentError(
                    409, f"WorkloadEntry {namespace}/{name} has {what} {known}, not {given}; leave it out"
                )
        return declared


def _addresses(texts: Sequence[str]) -> tuple[IpAddress, ...]:
    try:
        return tuple(parse_address(text) for text in texts)
    except AddressError as error:
        raise EnrolmentError(400, str(error)) from None


def _check(*problems: str) -> None:
    for problem in problems:
        if problem:
            raise EnrolmentError(400, problem)
