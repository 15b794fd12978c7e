"""`meshctl waypoint`: make waypoints, see what goes through them, and go round one in an emergency."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from typing import Final

from control.api.gateway import Placement
from control.api.labels import NODE, USE_WAYPOINT, WAYPOINT_FOR
from control.api.metadata import PLACEMENT, WAYPOINT_CANARY
from control.cli.ca import duration_s
from control.cli.changes import add_change_options, show_changes
from control.cli.client import Answer, ControlPlane, add_socket_option
from control.cli.output import DIFFERS, CommandError, add_output_option, printable, show_json, show_table
from control.cli.references import add_namespace_option
from control.server import documents

WAIT_S: Final = 30

_POLL_S: Final = 0.05

_EXAMPLES: Final = """\
examples:
  meshctl waypoint apply wp -n shop --instance wp-1=10.97.0.9
  meshctl waypoint apply wp -n shop --placement sidecar
  meshctl waypoint apply wp -n shop --placement node --instance wp-a=10.97.1.9@host-a wp-b=10.97.2.9@host-b
  meshctl label service reviews istio.io/use-waypoint=wp -n shop --wait
  meshctl waypoint list
  meshctl waypoint canary reviews wp-v2=10 -n shop --wait
  meshctl waypoint canary reviews --end -n shop
  meshctl waypoint bypass reviews -n shop --for 30m --reason 'the waypoint refuses everything'

`apply` makes a Gateway, and a WorkloadEntry for each --instance, and prints how each is started. A binding is pending
(until a process of the waypoint has its configuration), switching, enforced, then, when its label is gone, releasing,
leaving and lingering; or refused, when an L7 policy must not be missed until the waypoint is ready. A canary is
preparing, sharing (so many of the callers go through it, always the same ones), then leaving. A bypass ends by itself;
it is in the control plane's log, and `meshctl status` shows it. Exit status of `list` and `status`: 3 when a binding
waits for somebody or a service goes round its waypoint.
"""

_GATEWAY: Final = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  name: {name}
  namespace: {namespace}
  labels:
    istio.io/waypoint-for: {takes}
  annotations:
    mesh.uproxy.dev/placement: {placement}
spec:
  gatewayClassName: istio-waypoint
  listeners:
  - name: mesh
    port: 15008
    protocol: HBONE
    allowedRoutes:
      namespaces:
        from: {admits}
"""

_INSTANCE: Final = """\
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: {instance}
  namespace: {namespace}
  labels:
    gateway.networking.k8s.io/gateway-name: {name}
{labels}spec:
  address: {address}
  serviceAccount: {account}
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `waypoint` and its commands to the parser."""
    waypoint = commands.add_parser(
        "waypoint",
        help="make waypoints, and see what is bound to them",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = waypoint.add_subparsers(metavar="COMMAND", required=True)

    apply = actions.add_parser("apply", help="make or change a waypoint")
    apply.add_argument("name", metavar="NAME", help="of the Gateway, and of its processes' service account")
    apply.add_argument(
        "--for",
        dest="takes",
        choices=("service", "workload", "all"),
        help="which traffic it takes; default: as it is, service for a new one",
    )
    apply.add_argument(
        "--admit",
        choices=("Same", "All"),
        help="whose services may be bound to it: those of its own namespace, or of all; default: as it is, Same for a "
        "new one",
    )
    apply.add_argument(
        "--placement",
        choices=[placement.value for placement in Placement],
        help="where its processes stand, which docs/placements.md explains; default: as it is, remote for a new one",
    )
    apply.add_argument(
        "--instance",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=ADDRESS[@NODE[/ACCOUNT]]",
        help="a process of it, and the mesh address of that; with placement node also its node, and with "
        "service-account that and the service account whose workloads it serves",
    )
    add_namespace_option(apply)
    add_change_options(apply)
    apply.set_defaults(run=_apply)

    delete = actions.add_parser("delete", help="delete a waypoint that serves nothing any more")
    delete.add_argument("name", metavar="NAME")
    add_namespace_option(delete)
    add_change_options(delete)
    delete.set_defaults(run=_delete)

    for command, told in (
        ("list", "show all bindings"),
        ("status", "show a waypoint's processes, and what is bound to it"),
    ):
        shown = actions.add_parser(command, help=told)
        if command == "status":
            shown.add_argument("name", metavar="NAME")
            add_namespace_option(shown)
        add_socket_option(shown)
        add_output_option(shown)
        shown.set_defaults(run=_show)

    canary = actions.add_parser("canary", help="let a second waypoint serve a share of a service's callers")
    canary.add_argument("service", metavar="SERVICE")
    canary.add_argument("share", nargs="?", metavar="GATEWAY=PERCENT", help="such as wp-v2=10; NAMESPACE/GATEWAY too")
    canary.add_argument("--end", action="store_true", help="let all callers go through the waypoint again")
    add_namespace_option(canary)
    add_wait_option(canary)
    add_change_options(canary)
    canary.set_defaults(run=_canary)

    bypass = actions.add_parser("bypass", help="let a service be reached directly for a while")
    bypass.add_argument("service", metavar="SERVICE")
    lasts = bypass.add_mutually_exclusive_group(required=True)
    lasts.add_argument("--for", dest="for_s", type=duration_s, metavar="TIME", help="such as 30m; at most 24h")
    lasts.add_argument("--end", dest="for_s", action="store_const", const=0, help="end it now")
    bypass.add_argument("--reason", default="", metavar="TEXT", help="for the log, and for whoever looks at the status")
    add_namespace_option(bypass)
    add_socket_option(bypass)
    bypass.set_defaults(run=_bypass)


def add_wait_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wait",
        nargs="?",
        type=duration_s,
        const=WAIT_S,
        metavar="TIME",
        help=f"until every proxy concerned has it, at most so long; {WAIT_S}s if no time is given",
    )


def relabel(
    arguments: argparse.Namespace,
    reference: dict[str, str],
    changes: dict[str, dict[str, str | None]],
    *,
    overwrite: bool,
) -> int:
    """Change `labels` or `annotations` of a resource, and wait if that is asked for; the exit status."""
    plane = ControlPlane(arguments.socket)
    answer = plane.post(
        "relabel",
        {
            "reference": reference,
            **changes,
            "overwrite": overwrite,
            "dry_run": arguments.dry_run,
            "release": arguments.release,
            "force": arguments.force,
        },
    )
    show_changes(answer, arguments.output)
    if arguments.wait is None or arguments.dry_run:
        return 0
    return await_settled(plane, reference, answer["version"], arguments.wait)


def await_settled(plane: ControlPlane, reference: dict[str, str], version: Sequence[int] | None, wait_s: int) -> int:
    """Wait until every proxy concerned does what a label asks for; the exit status. Stragglers are told."""
    stop = time.monotonic() + wait_s
    while True:
        waiting = _unsettled(plane, reference) + _behind(plane, reference, version)
        if not waiting:
            return 0
        if time.monotonic() >= stop:
            break
        time.sleep(_POLL_S)
    for text in waiting:
        print(f"waits for {printable(text)}")
    print(f"not enforced everywhere after {wait_s} s; it goes on by itself (`meshctl waypoint list`)")
    return DIFFERS


def _unsettled(plane: ControlPlane, reference: dict[str, str]) -> list[str]:
    """What bindings wait for, of a service or workload, or of all in a namespace."""
    kind, namespace, name = reference["kind"], reference["namespace"], reference["name"]

    def concerned(binding: Answer) -> bool:
        if kind == "Namespace":
            return bool(binding["key"].startswith(f"{name}/"))
        return (binding["kind"], binding["key"]) == (kind, f"{namespace}/{name}")

    return [
        f"{binding['key']} ({binding['phase']}): {', '.join(binding['waits_for']) or 'a moment'}"
        for binding in plane.get("bindings")["bindings"]
        if concerned(binding) and not binding["settled"]
    ]


def _behind(plane: ControlPlane, reference: dict[str, str], version: Sequence[int] | None) -> list[str]:
    """Live proxies that know of the namespace, and have not applied a version of it."""
    namespace = reference["namespace"] or reference["name"]
    if version is None:
        return []
    return [
        proxy["workload"]
        for proxy in plane.get("status")["proxies"]
        if proxy["state"] in ("behind", "waiting")
        and namespace in proxy["roots"]
        and proxy["roots"][namespace][:2] < list(version)
    ]


def _apply(arguments: argparse.Namespace) -> int:
    name, namespace = arguments.name, arguments.namespace
    plane = ControlPlane(arguments.socket)
    text = _gateway(plane, name, namespace, arguments)
    instances: dict[str, tuple[str, str]] = {}
    if arguments.instance and arguments.placement == Placement.SIDECAR.value:
        raise CommandError("--instance: uProxies start the processes of placement sidecar themselves; leave it out")
    for word in arguments.instance:
        instance, equals, where = word.partition("=")
        address, at, node = where.partition("@")
        node, slash, account = node.partition("/")
        if not (equals and instance and address) or (at and not node) or (slash and not account):
            raise CommandError(f"{word!r} must be NAME=ADDRESS[@NODE[/ACCOUNT]], such as {name}-1=10.97.0.9")
        instances[instance] = node, account
        text += _INSTANCE.format(
            instance=_text(instance),
            namespace=_text(namespace),
            name=_text(name),
            address=_text(address),
            labels=f"    {NODE}: {_text(node)}\n" if node else "",
            account=_text(account or name),
        )
    answer = plane.post(
        "apply",
        {
            "documents": [{"file": "waypoint apply", "text": text}],
            "dry_run": arguments.dry_run,
            "release": arguments.release,
            "force": arguments.force,
        },
    )
    show_changes(answer, arguments.output)
    if arguments.output == "table" and not arguments.dry_run:
        for instance, (node, account) in instances.items():
            token = shlex.quote(f"{instance}.token")
            if node:
                print(f"\nThe node agent of {node} starts {instance}, if it runs with --waypoints. Else:")
            else:
                print(f"\nTo start {instance}:")
            print(f"  meshctl token create {shlex.quote(instance)} -n {shlex.quote(namespace)} --out {token}")
            of = f" --gateway {shlex.quote(name)}" if account else ""
            print(f"  waypoint run --join {token} --state {shlex.quote(instance)}{of}")
        if arguments.placement == Placement.SIDECAR.value:
            print("\nNothing to start: each workload's uProxy starts a process beside it. To bind a service to it:")
            bind = f"{USE_WAYPOINT}={shlex.quote(name)} -n {shlex.quote(namespace)}"
            print(f"  meshctl label service SERVICE {bind} --wait")
    return 0


def _gateway(plane: ControlPlane, name: str, namespace: str, arguments: argparse.Namespace) -> str:
    """The document of a Gateway: what is there with what is asked for changed, else a new one."""
    takes, admits, placement = arguments.takes, arguments.admit, arguments.placement
    found = plane.get("resources", kind="Gateway", namespace=namespace, name=name)["resources"]
    if not found:
        return _GATEWAY.format(
            name=_text(name),
            namespace=_text(namespace),
            takes=takes or "service",
            placement=placement or Placement.REMOTE.value,
            admits=admits or "Same",
        )
    text: str = found[0]["document"]
    if takes is not None:
        text = documents.with_metadata(text, {"labels": {WAYPOINT_FOR: takes}})
    if placement is not None:
        text = documents.with_metadata(text, {"annotations": {PLACEMENT: placement}})
    if admits is not None:
        document: Answer = dict(documents.values(text))
        document["spec"]["listeners"][0]["allowedRoutes"] = {"namespaces": {"from": admits}}
        text = documents.write(document)
    return text


def _text(value: str) -> str:
    """A word as a text of YAML, whatever is in it: the control plane says what is wrong with it."""
    if not value.isprintable() or "'" in value:
        raise CommandError(f"{value!r} is no name and no address")
    return f"'{value}'"


def _delete(arguments: argparse.Namespace) -> int:
    answer = ControlPlane(arguments.socket).post(
        "delete",
        {
            "references": [{"kind": "Gateway", "namespace": arguments.namespace, "name": arguments.name}],
            "dry_run": arguments.dry_run,
            "release": arguments.release,
            "force": arguments.force,
        },
    )
    show_changes(answer, arguments.output)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    plane = ControlPlane(arguments.socket)
    answer = plane.get("bindings")
    if "name" in arguments:
        gateway = f"{arguments.namespace}/{arguments.name}"
        answer["bindings"] = [one for one in answer["bindings"] if gateway in _gateways(one)]
        bound = {one["key"] for one in answer["bindings"]}
        answer["bypasses"] = [one for one in answer["bypasses"] if one["service"] in bound]
        # And of those that share its callers, so that versions can be compared.
        others = {name for one in answer["bindings"] for name in _gateways(one) if name} - {gateway}
        answer["processes"] = [one for name in (gateway, *sorted(others)) for one in _processes(plane, name)]
    if arguments.output == "json":
        show_json(answer)
    else:
        _show_tables(answer)
    return DIFFERS if answer["bypasses"] or not all(one["settled"] for one in answer["bindings"]) else 0


def _processes(plane: ControlPlane, gateway: str) -> list[Answer]:
    """Of a Gateway, whose key they are told with."""
    namespace, _, name = gateway.partition("/")
    found = plane.get("processes", namespace=namespace, gateway=name)["processes"]
    return [{"gateway": gateway, **one} for one in found]


def _gateways(binding: Answer) -> tuple[str, ...]:
    canary = (binding["canary"]["gateway"],) if binding["canary"] else ()
    return binding["gateway"], binding["previous"], *canary


def _waypoint(binding: Answer) -> str:
    found = f"{binding['previous']} -> {binding['gateway']}" if binding["previous"] else str(binding["gateway"])
    canary = binding["canary"]
    return f"{found}, canary {canary['gateway']} ({canary['percent']} %, {canary['step']})" if canary else found


def _show_tables(answer: Answer) -> None:
    if not answer["bindings"]:
        print("nothing is bound to a waypoint")
    else:
        show_table(
            ("KIND", "NAME", "WAYPOINT", "PHASE", "WAITS FOR"),
            (
                (
                    one["kind"],
                    one["key"],
                    _waypoint(one),
                    f"{one['phase']} (optional)" if one["optional"] else one["phase"],
                    "" if one["settled"] else ", ".join(one["waits_for"]),
                )
                for one in answer["bindings"]
            ),
        )
    if "processes" in answer:
        print()
        show_table(
            ("PROCESS", "WAYPOINT", "NODE", "ADDRESS", "SOFTWARE", "STATE", "NOTES"),
            (
                (
                    one["workload"],
                    one["gateway"],
                    one["node"],
                    one["address"],
                    one["software"] or "",
                    one["state"] or "",
                    printable(one["notes"][0]) if one["notes"] else "",
                )
                for one in answer["processes"]
            ),
        )
    for one in answer["bypasses"]:
        left = f"{one['left_s']:.0f} s"
        print(f"Service {one['service']} goes round its waypoint for {left} more: {printable(one['reason'])}")


def _canary(arguments: argparse.Namespace) -> int:
    if (arguments.share is None) != arguments.end:
        raise CommandError("write GATEWAY=PERCENT, such as wp-v2=10, or --end")
    reference = {"kind": "Service", "namespace": arguments.namespace, "name": arguments.service}
    return relabel(arguments, reference, {"annotations": {WAYPOINT_CANARY: arguments.share}}, overwrite=True)


def _bypass(arguments: argparse.Namespace) -> int:
    answer = ControlPlane(arguments.socket).post(
        "bypass",
        {
            "namespace": arguments.namespace,
            "name": arguments.service,
            "for_s": arguments.for_s,
            "reason": arguments.reason,
        },
    )
    if answer["for_s"]:
        print(f"Service {answer['service']} is reached directly for {answer['for_s']} s, as soon as every proxy knows")
    else:
        print(f"Service {answer['service']} goes through its waypoint again, as soon as that is ready")
    return 0
