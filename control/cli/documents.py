"""The resource files that a command is given: files, directories of them, or standard input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from control.api.document import MAX_CHARACTERS
from control.api.problems import ResourceError, ResourceErrors

_SUFFIXES: Final = frozenset({".yaml", ".yml"})
# A character of UTF-8 has at most four bytes.
_MAX_FILE_BYTES: Final = 4 * MAX_CHARACTERS


def add_files_option(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "-f",
        "--file",
        dest="files",
        nargs="+",
        action="extend",
        required=required,
        default=[],
        metavar="FILE",
        help="resources in YAML, or a directory of *.yaml and *.yml; - for stdin",
    )


def read_documents(files: Sequence[str]) -> tuple[list[tuple[str, str]], list[ResourceError]]:
    """Name and text of each file, and what is wrong with those that cannot be read."""
    documents: list[tuple[str, str]] = []
    errors: list[ResourceError] = []
    for file in files:
        try:
            documents += [(name, _read(name)) for name in _expanded(file)]
        except ResourceErrors as refused:
            errors += refused.errors
    return documents, errors


def _expanded(file: str) -> Iterator[str]:
    """The file itself, or the YAML files in a directory, by name."""
    path = Path(file)
    if file == "-" or not path.is_dir():
        yield file
        return
    try:
        found = sorted(str(entry) for entry in path.iterdir() if entry.suffix in _SUFFIXES and entry.is_file())
    except OSError as error:
        raise ResourceErrors([ResourceError(file, 0, "", f"cannot be read: {error.strerror}")]) from None
    if not found:
        raise ResourceErrors([ResourceError(file, 0, "", "holds no *.yaml or *.yml file; name another directory")])
    yield from found


def _read(file: str) -> str:
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
