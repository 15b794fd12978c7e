"""How `meshctl` answers: tables for people, JSON for programs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Literal

Format = Literal["table", "json"]


class CommandError(Exception):
    """A command was refused or failed: exit status 1, and this text on stderr."""


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


def show_json(value: object) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
