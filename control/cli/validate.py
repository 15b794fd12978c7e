"""`meshctl validate`: read resources as the mesh would, and say everything that is wrong with them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from control.api.declared import Resource
from control.api.document import MAX_CHARACTERS
from control.api.identity import TrustDomain, parse_trust_domain
from control.api.mesh import Mesh
from control.api.problems import ResourceError, ResourceErrors
from control.api.resources import parse
from control.cli.output import add_output_option, show_json

_EXAMPLES = """\
examples:
  meshctl validate -f mesh.yaml
  meshctl validate -f services.yaml policies.yaml -o json

All files are checked together: a reference from one into another is followed. Exit status 0 when the mesh would take
them (warnings allowed), 1 when it would not.
"""
# A character of UTF-8 has at most four bytes.
_MAX_FILE_BYTES = 4 * MAX_CHARACTERS


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `validate` to the parser."""
    validate = commands.add_parser(
        "validate",
        help="check resource files",
        description="Check resource files (YAML) without applying them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    validate.add_argument(
        "-f",
        "--file",
        dest="files",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="resources; - for stdin",
    )
    validate.add_argument(
        "--trust-domain", type=_trust_domain, default="cluster.local", metavar="NAME", help="default: cluster.local"
    )
    add_output_option(validate)
    validate.set_defaults(run=_validate)


def _validate(arguments: argparse.Namespace) -> int:
    resources: list[Resource] = []
    errors: list[ResourceError] = []
    warnings: tuple[ResourceError, ...] = ()
    for file in arguments.files:
        try:
            resources += parse(_read(file), file)
        except ResourceErrors as refused:
            errors += refused.errors
    # A reference into a file that was refused would only repeat its errors in other words.
    if not errors:
        try:
            warnings = tuple(Mesh.build(resources, arguments.trust_domain).warnings)
        except ResourceErrors as refused:
            errors += refused.errors
    if arguments.output == "json":
        show_json(
            {
                "ok": not errors,
                "resources": len(resources),
                "errors": list(_as_json(errors)),
                "warnings": list(_as_json(warnings)),
            }
        )
    else:
        for kind, problems in (("error", errors), ("warning", warnings)):
            for problem in problems:
                print(f"{kind}: {problem}", file=sys.stderr)
        print(_summary(len(resources), len(errors), len(warnings)))
    return 1 if errors else 0


def _summary(resources: int, errors: int, warnings: int) -> str:
    if errors:
        return f"refused: {errors} error{'s' * (errors != 1)}"
    counted = f"{resources} resource{'s' * (resources != 1)}"
    return f"ok: {counted}, {warnings} warning{'s' * (warnings != 1)}"


def _as_json(problems: Iterable[ResourceError]) -> Iterable[dict[str, object]]:
    for problem in problems:
        yield {"file": problem.file, "line": problem.line, "field": problem.field, "problem": problem.problem}


def _read(file: str) -> str:
    """Text of a file. Raises ResourceErrors, so that one bad file does not hide the errors of the others."""
    try:
        if file == "-":
            content = sys.stdin.buffer.read(_MAX_FILE_BYTES + 1)
        else:
            with Path(file).open("rb") as opened:
                content = opened.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ResourceErrors([ResourceError(file, 0, "", f"cannot be read: {error.strerror}")]) from None
    if len(content) > _MAX_FILE_BYTES:
        raise ResourceErrors([ResourceError(file, 0, "", f"longer than {_MAX_FILE_BYTES} bytes; split the file")])
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ResourceErrors([ResourceError(file, line, "", "is not UTF-8; save it as UTF-8 text")]) from None


def _trust_domain(text: str) -> TrustDomain:
    try:
        return parse_trust_domain(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
