"""`meshctl get`: what is declared, and what became of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import groupby
from typing import Final

from control.api.declared import (
    DeclaredEndpoints,
    DeclaredPeerAuthentication,
    DeclaredPolicy,
    DeclaredRequestAuthentication,
    DeclaredRoute,
    DeclaredService,
    DeclaredWorkload,
)
from control.api.labels import Labels
from control.api.resources import parse
from control.cli.client import Answer, ControlPlane, add_socket_option
from control.cli.output import CommandError, show_json, show_table
from control.cli.references import KINDS_HELP, add_namespace_option, parse_kind

_EXAMPLES: Final = f"""\
examples:
  meshctl get services -n shop
  meshctl get service reviews -n shop -o yaml
  meshctl get all -A

{KINDS_HELP}

`-o yaml` prints what `apply` takes. Exit status: 0 found, 1 there is no such resource, 4 no control plane.
"""

_ROUTE_HEADS: Final = ("PARENTS", "ACCEPTED", "RESOLVED REFS", "ENFORCED")
_HEADS: Final = {
    "Service": ("ADDRESSES", "PORTS", "ENDPOINTS"),
    "WorkloadEntry": ("ADDRESSES", "SERVICE ACCOUNT", "NODE"),
    "EndpointSlice": ("SERVICE", "ENDPOINTS"),
    "AuthorizationPolicy": ("ACTION", "RULES", "SELECTS"),
    "PeerAuthentication": ("MODE", "SELECTS"),
    "RequestAuthentication": ("ISSUERS",),
    "HTTPRoute": _ROUTE_HEADS,
    "GRPCRoute": _ROUTE_HEADS,
}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    get = commands.add_parser(
        "get",
        help="list resources",
        description="List resources, or show one.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    get.add_argument("kind", metavar="KIND", help="or KIND/NAME, or all")
    get.add_argument("name", nargs="?", default="", metavar="NAME", help="default: all of the kind")
    add_namespace_option(get)
    get.add_argument("-A", "--all-namespaces", action="store_true", help="of every namespace")
    add_socket_option(get)
    get.add_argument(
        "-o",
        "--output",
        choices=("table", "json", "yaml"),
        default="table",
        help="tables for people (default), JSON for programs, YAML as applied",
    )
    get.set_defaults(run=_get)


def _get(arguments: argparse.Namespace) -> int:
    word, slash, name = arguments.kind.partition("/")
    if slash and arguments.name:
        raise CommandError(f"{arguments.kind!r} names a resource already; leave {arguments.name!r} out")
    name = name or arguments.name
    kind = "" if word == "all" and not name else parse_kind(word)
    namespace = "" if arguments.all_namespaces or kind == "Namespace" else arguments.namespace
    found = ControlPlane(arguments.socket).get("resources", kind=kind, namespace=namespace, name=name)["resources"]
    if arguments.output == "json":
        show_json({"resources": found})
    elif arguments.output == "yaml":
        print("---\n".join(resource["document"] for resource in found), end="")
    else:
        _show_tables(found)
    where = f" in namespace {namespace}" if namespace else ""
    if name and not found:
        raise CommandError(f"there is no {kind} {name}{where}")
    if not found and arguments.output == "table":
        print(f"nothing{where}")
    return 0


def _show_tables(found: list[Answer]) -> None:
    """A table for each kind, since each has columns of its own."""
    found = sorted(found, key=lambda resource: (resource["kind"], resource["namespace"], resource["name"]))
    for number, (kind, resources) in enumerate(groupby(found, key=lambda resource: str(resource["kind"]))):
        if number:
            print()
        show_table(
            (kind.upper(), *(() if kind == "Namespace" else ("NAMESPACE",)), *_HEADS.get(kind, ())),
            (
                (
                    resource["name"],
                    *(() if kind == "Namespace" else (resource["namespace"],)),
                    *_cells(resource),
                )
                for resource in resources
            ),
        )


def _cells(resource: Answer) -> tuple[str, ...]:
    """What stands in the columns of its kind."""
    (declared,) = parse(resource["document"], resource["name"])
    match declared:
        case DeclaredService():
            tcp, udp = [str(port.port) for port in declared.ports], declared.datagrams.values()
            ports = ",".join([*tcp, *(f"{port.port}/UDP" for port in udp)])
            return ",".join(resource["vips"]), ports, str(resource["endpoints"])
        case DeclaredWorkload():
            return ",".join(declared.addresses), declared.service_account, declared.node
        case DeclaredEndpoints():
            return declared.service, str(len(declared.endpoints))
        case DeclaredPolicy():
            return declared.policy.action.value, str(len(declared.policy.rules)), _selector(declared.policy.selector)
        case DeclaredPeerAuthentication():
            return declared.peer_authentication.mode.value, _selector(declared.peer_authentication.selector)
        case DeclaredRequestAuthentication():
            return (",".join(rule.issuer for rule in declared.request_authentication.rules),)
        case DeclaredRoute():
            parents = resource["parents"]
            named = ",".join(f"{parent['service']}:{parent['port'] or '*'}" for parent in parents)
            return named, *(_condition(parents, number) for number in range(3))
    return ()


def _condition(parents: Sequence[Answer], number: int) -> str:
    """`True`, or the reason of the first parent for which it does not hold."""
    conditions = [parent["conditions"][number] for parent in parents]
    return next((str(one["reason"]) for one in conditions if not one["status"]), "True")


def _selector(selector: Labels | None) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted((selector or {}).items())) or "all"
