"""`meshctl validate`: read resources as the mesh would, and say everything that is wrong with them."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from control.api.declared import Resource
from control.api.identity import TrustDomain, parse_trust_domain
from control.api.mesh import Mesh
from control.api.problems import ResourceError, ResourceErrors
from control.api.resources import parse
from control.cli.documents import add_files_option, read_documents
from control.cli.output import add_output_option, counted, show_json, show_problems

_EXAMPLES = """\
examples:
  meshctl validate -f mesh.yaml
  meshctl validate -f services.yaml policies.yaml -o json

All files are checked together: a reference from one into another is followed. Exit status 0 when the mesh would take
them (warnings allowed), 1 when it would not.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `validate` to the parser."""
    validate = commands.add_parser(
        "validate",
        help="check resource files",
        description="Check resource files (YAML) without applying them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_files_option(validate)
    validate.add_argument(
        "--trust-domain", type=_trust_domain, default="cluster.local", metavar="NAME", help="default: cluster.local"
    )
    add_output_option(validate)
    validate.set_defaults(run=_validate)


def _validate(arguments: argparse.Namespace) -> int:
    resources: list[Resource] = []
    warnings: tuple[ResourceError, ...] = ()
    documents, errors = read_documents(arguments.files)
    for file, text in documents:
        try:
            resources += parse(text, file)
        except ResourceErrors as refused:
            errors += refused.errors
    errors.sort(key=lambda error: error.file)
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
                "errors": [asdict(error) for error in errors],
                "warnings": [asdict(warning) for warning in warnings],
            }
        )
    else:
        show_problems("error", errors)
        show_problems("warning", warnings)
        print(_summary(len(resources), len(errors), len(warnings)))
    return 1 if errors else 0


def _summary(resources: int, errors: int, warnings: int) -> str:
    if errors:
        return f"refused: {counted(errors, 'error')}"
    return f"ok: {counted(resources, 'resource')}, {counted(warnings, 'warning')}"


def _trust_domain(text: str) -> TrustDomain:
    try:
        return parse_trust_domain(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
