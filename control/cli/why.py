"""`meshctl why`: may A reach B, by which way, and who decides? Answered by the data plane's own code."""

from __future__ import annotations

import argparse
import base64
from dataclasses import asdict
from pathlib import Path

from control.api.bindings import Subject
from control.api.identity import TrustDomain, parse_trust_domain
from control.api.records import RecordError
from control.cli.client import ControlPlane, add_socket_option
from control.cli.output import CommandError, add_output_option, printable, show_json, show_table
from control.cli.references import add_namespace_option
from control.client.files import Batch, ConfigError, FileSource
from control.client.state import State

_EXAMPLES = """\
examples:
  meshctl why web-1 reviews:9080 -n shop
  meshctl why shop/web-1 reviews.shop:9080 --method DELETE --path /v2/items
  meshctl why shop/web-1 10.1.0.5:9080 --header 'x-team: blue' -f mesh.yaml

A is a workload, B a service, a workload or an address. Asks the control plane what proxies were told, or files (-f).
It is the configuration's answer: whether processes run and applications listen is not tried. Exit status: 0 allowed,
1 refused, by any of the places where it may end, or not to be answered, 4 no control plane.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    why = commands.add_parser(
        "why",
        help="explain why a connection gets through, or does not",
        description="Explain why a connection or request gets through, or does not.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    why.add_argument("caller", metavar="A", help="a workload, as NAME or NAMESPACE/NAME")
    why.add_argument("destination", metavar="B:PORT", help="a service, workload or address, and the port that A dials")
    why.add_argument("--method", default="GET", metavar="METHOD", help="of the HTTP request; default: GET")
    why.add_argument("--path", default="/", metavar="PATH", help="of the request, with its query; default: /")
    why.add_argument(
        "--header",
        action="append",
        default=[],
        type=_header,
        metavar="'NAME: VALUE'",
        help="of the request; repeatable",
    )
    why.add_argument(
        "-f",
        "--file",
        nargs="+",
        default=[],
        type=Path,
        dest="files",
        metavar="FILE",
        help="resources, instead of live",
    )
    why.add_argument("--trust-domain", type=_trust_domain, metavar="NAME", help="with -f; default: cluster.local")
    add_namespace_option(why)
    add_socket_option(why)
    add_output_option(why)
    why.set_defaults(run=_why)


def _why(arguments: argparse.Namespace) -> int:
    # Imported here: the data plane comes with it, which no other command needs.
    from waypoint.why import Question, QuestionError, explain

    host, port = _destination(arguments.destination)
    caller = arguments.caller if "/" in arguments.caller else f"{arguments.namespace}/{arguments.caller}"
    question = Question(caller, host, port, arguments.method, arguments.path, tuple(arguments.header))
    try:
        steps = explain(
            _state(arguments), question, {} if arguments.files else _under_way(ControlPlane(arguments.socket))
        )
    except QuestionError as error:
        raise CommandError(str(error)) from None
    allowed = all(step.ok for step in steps)
    if arguments.output == "json":
        show_json({"allowed": allowed, "steps": [asdict(step) for step in steps]})
    else:
        rows = [(step.stage, "ok" if step.ok else step.reason, printable(step.detail)) for step in steps]
        show_table(("STEP", "ANSWER", "WHY"), rows)
        print("allowed" if allowed else "refused")
    return 0 if allowed else 1


def _state(arguments: argparse.Namespace) -> State:
    """What a proxy that knows everything would know. Raises CommandError."""
    if arguments.files:
        trust_domain = arguments.trust_domain or "cluster.local"
        try:
            batch = FileSource(arguments.files, trust_domain).load()
        except ConfigError as error:
            raise CommandError(str(error)) from None
    elif arguments.trust_domain:
        raise CommandError("--trust-domain goes with -f; the control plane knows its own")
    else:
        trust_domain, batch = _live(ControlPlane(arguments.socket))
    state = State(trust_domain)
    try:
        state.apply(batch)
    except RecordError as error:
        raise CommandError(f"the control plane's records are not those of this meshctl: {error}") from None
    return state


def _live(plane: ControlPlane) -> tuple[str, Batch]:
    answer = plane.get("records")
    return answer["trust_domain"], [(topic, base64.b64decode(payload)) for topic, payload in answer["records"]]


def _under_way(plane: ControlPlane) -> dict[Subject, str]:
    """How far the bindings to waypoints are that are on their way."""
    return {
        (one["kind"], one["key"]): f"its binding to waypoint {one['gateway']} is {one['phase']}"
        + (f", and waits for {', '.join(one['waits_for'])}" if one["waits_for"] else "")
        for one in plane.get("bindings")["bindings"]
        if one["phase"] != "enforced"
    }


def _destination(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        raise CommandError(f"{text!r} is no destination; write B:PORT, as reviews:9080 or [fd00::1]:9080")
    return host, int(port)


def _header(text: str) -> tuple[bytes, bytes]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no header; write 'NAME: VALUE'")
    try:
        return name.strip().lower().encode("ascii"), value.strip().encode("latin-1")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} has characters that no header has") from None


def _trust_domain(text: str) -> TrustDomain:
    try:
        return parse_trust_domain(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
