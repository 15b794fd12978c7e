"""`meshctl apply`, `diff` and `delete`: change what the mesh should be, all of it or nothing."""

from __future__ import annotations

import argparse

from control.api.problems import ResourceErrors
from control.api.resources import parse, place_of
from control.cli.changes import add_change_options, show_changes
from control.cli.client import Answer, ControlPlane, add_socket_option
from control.cli.documents import add_files_option, read_documents
from control.cli.output import DIFFERS, CommandError, add_output_option
from control.cli.references import add_namespace_option, parse_references

_APPLY_EXAMPLES = """\
examples:
  meshctl apply -f mesh.yaml
  meshctl apply -f services/ policies/ --dry-run
  kustomize build shop/ | meshctl apply -f -

All files are one change: if one resource is wrong, nothing is changed, and every error is named with file and line.
Resources that are not in the files stay as they are. A change that would take away much of a namespace at a stroke is
held back; --release lets it pass. Exit status: 0 applied, 1 refused, 4 no control plane.
"""

_DIFF_EXAMPLES = """\
examples:
  meshctl diff -f mesh.yaml
  meshctl diff -f mesh.yaml -o json || echo 'not what is applied'

Shows what `apply` would change, and changes nothing. Exit status: 0 no difference, 3 differences, 1 refused (as `apply`
would refuse it), 4 no control plane.
"""

_DELETE_EXAMPLES = """\
examples:
  meshctl delete service reviews -n shop
  meshctl delete workload/web-1 policy/only-web -n shop
  meshctl delete -f old.yaml --dry-run

All that is named goes together, or nothing does; a resource that does not exist is an error. With -f, what the files
declare is deleted. Taking away much of a namespace at a stroke needs --release.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the parser."""
    apply = _command(commands, "apply", "put resources into force", _APPLY_EXAMPLES)
    add_files_option(apply)
    add_change_options(apply)
    apply.set_defaults(run=_apply)

    diff = _command(commands, "diff", "show what apply would change", _DIFF_EXAMPLES)
    add_files_option(diff)
    add_socket_option(diff)
    add_output_option(diff)
    diff.set_defaults(run=_diff)

    delete = _command(commands, "delete", "remove resources", _DELETE_EXAMPLES)
    delete.add_argument("words", nargs="*", metavar="KIND NAME", help="or KIND/NAME; several may be named")
    add_namespace_option(delete)
    add_files_option(delete, required=False)
    add_change_options(delete)
    delete.set_defaults(run=_delete)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, description: str, examples: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=description,
        description=f"{description[0].upper()}{description[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _apply(arguments: argparse.Namespace) -> int:
    answer = _apply_documents(arguments, dry_run=arguments.dry_run, release=arguments.release, force=arguments.force)
    show_changes(answer, arguments.output)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    answer = _apply_documents(arguments, dry_run=True, release=False, force=True)
    show_changes(answer, arguments.output, texts=True)
    return DIFFERS if any(entry["change"] != "unchanged" for entry in answer["changes"]) else 0


def _apply_documents(arguments: argparse.Namespace, *, dry_run: bool, release: bool, force: bool) -> Answer:
    documents, errors = read_documents(arguments.files)
    if errors:
        raise ResourceErrors(errors)
    return ControlPlane(arguments.socket).post(
        "apply",
        {
            "documents": [{"file": name, "text": text} for name, text in documents],
            "dry_run": dry_run,
            "release": release,
            "force": force,
        },
    )


def _delete(arguments: argparse.Namespace) -> int:
    if bool(arguments.words) == bool(arguments.files):
        raise CommandError("name what to delete, as KIND NAME, or with -f the files that declare it")
    if arguments.files:
        documents, errors = read_documents(arguments.files)
        if errors:
            raise ResourceErrors(errors)
        places = [place_of(resource) for name, text in documents for resource in parse(text, name)]
        references = [{"kind": kind, "namespace": namespace, "name": name} for kind, namespace, name in places]
    else:
        references = parse_references(arguments.words, arguments.namespace)
    answer = ControlPlane(arguments.socket).post(
        "delete",
        {
            "references": references,
            "dry_run": arguments.dry_run,
            "release": arguments.release,
            "force": arguments.force,
        },
    )
    show_changes(answer, arguments.output)
    return 0
