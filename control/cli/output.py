"""How `meshctl` answers: tables for people, JSON for programs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Final, Literal

from control.api.problems import ResourceError, ResourceErrors

Format = Literal["table", "json"]

REFUSED: Final = 1
"""Exit status: refused or failed, and nothing was changed."""
DIFFERS: Final = 3
"""Exit status: the question was answered, and the answer is not `all as it should be`."""
UNREACHABLE: Final = 4
"""Exit status: no control plane answered."""


class CommandError(Exception):
    """A command was refused or failed: this text on stderr, and an exit status that is not 0."""

    def __init__(self, text: str, status: int = REFUSED) -> None:
        super().__init__(text)
        self.status = status


def add_output_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        choices=("table", "json"),
        default="table",
        help="tables for people (default), JSON for programs",
    )


def show_fields(fields: Mapping[str, object], output: Format) -> None:
    """Print one object: a line per field, or a JSON object whose keys have underscores."""
    if output == "json":
        show_json({name.replace(" ", "_"): value for name, value in fields.items()})
        return
    width = max(map(len, fields))
    for name, value in fields.items():
        print(f"{name:<{width}}  {value}")


def show_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns as wide as their widest cell; an empty cell is a dash."""
    lines = [tuple(head), *(tuple(printable(cell) or "-" for cell in row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def show_problems(kind: Literal["error", "warning"], problems: Iterable[ResourceError]) -> None:
    """A line on stderr for each, as `error: FILE:LINE: FIELD: PROBLEM`."""
    for problem in problems:
        print(f"{kind}: {printable(str(problem))}", file=sys.stderr)


def show_refusal(refused: ResourceErrors, output: str) -> int:
    """Show everything that is wrong with resources; return the exit status."""
    if output == "json":
        show_json({"error": str(refused), "errors": [asdict(error) for error in refused.errors]})
    else:
        show_problems("error", refused.errors)
        print(f"refused: {counted(len(refused.errors), 'error')}; nothing was changed")
    return REFUSED


def printable(text: str) -> str:
    """Text from elsewhere, which must not steer the terminal that it is shown on."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def show_json(value: object) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def counted(number: int, noun: str) -> str:
    """`1 resource`, `2 resources`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
