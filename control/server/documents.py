"""Resources as documents: what people wrote, taken apart one by one, kept and shown in one form.

The form is plain YAML in block style: every value on its line, so that a diff of two documents is a diff of values.
Comments are not kept. `read(write(value))` gives the value back.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from control.api.declared import Place, Resource, place_of
from control.api.document import List, Map, Node, Scalar, read_documents
from control.api.problems import Report
from control.api.resources import read_resource

Value = None | bool | int | float | str | list["Value"] | dict[str, "Value"]

# What no version of YAML reads as anything but text: begins with a letter, and is no word with a meaning.
_PLAIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_WORDS: Final = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})

_ESCAPES: Final = {"\n": "\\n", "\t": "\\t"}


@dataclass(frozen=True, slots=True)
class Document:
    """One resource."""

    place: Place
    text: str
    """In the one form."""
    resource: Resource


def read(text: str, file: str) -> list[Document]:
    """The resources of one file. Raises ResourceErrors with everything that is wrong in it."""
    report = Report()
    found: list[Document] = []
    for node in read_documents(text, file, report):
        resource = read_resource(node, file, report)
        if report.full:
            break
        if resource is not None and not report.errors:
            found.append(Document(place_of(resource), write(_plain(node)), resource))
    report.raise_errors()
    return found


def values(text: str) -> dict[str, Value]:
    """What a document in the one form says."""
    report = Report()
    (node,) = read_documents(text, "", report)
    report.raise_errors()
    plain = _plain(node)
    if not isinstance(plain, dict):
        raise TypeError("a document is a mapping")
    return plain


def with_metadata(text: str, changes: Mapping[str, Mapping[str, str | None]]) -> str:
    """A document with other labels or annotations (field of metadata -> key -> value); None removes one."""
    document = values(text)
    metadata = document["metadata"]
    if not isinstance(metadata, dict):
        raise TypeError("metadata is a mapping")
    for field, changed in changes.items():
        old = metadata.get(field)
        pairs = {**(old if isinstance(old, dict) else {}), **changed}
        metadata[field] = {name: value for name, value in pairs.items() if value is not None}
        if not metadata[field]:
            del metadata[field]
    return write(document)


def write(value: Value) -> str:
    """A value in the one form."""
    return "".join(f"{line}\n" for line in _lines(value))


def difference(old: str, new: str, name: str) -> str:
    """A unified diff of two documents; empty when they are equal."""
    lines = difflib.unified_diff(
        old.splitlines(keepends=True), new.splitlines(keepends=True), f"{name} (now)", f"{name} (new)"
    )
    return "".join(lines)


def _plain(node: Node) -> Value:
    match node:
        case Map():
            return {name: _plain(entry) for name, entry in node.entries.items()}
        case List():
            return [_plain(item) for item in node.items]
        case Scalar():
            return node.value


def _lines(value: Value) -> Iterator[str]:
    """The lines of a value, without the indentation of whatever holds it."""
    match value:
        case dict() if value:
            for name, item in value.items():
                if isinstance(item, dict | list) and item:
                    yield f"{_scalar(name)}:"
                    indent = "  " if isinstance(item, dict) else ""
                    yield from (indent + line for line in _lines(item))
                else:
                    yield f"{_scalar(name)}: {next(_lines(item))}"
        case list() if value:
            for item in value:
                mark = "- "
                for line in _lines(item):
                    yield mark + line
                    mark = "  "
        case dict():
            yield "{}"
        case list():
            yield "[]"
        case _:
            yield _scalar(value)


def _scalar(value: bool | int | float | str | None) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
                return value
            return f'"{"".join(map(_escaped, value))}"'
        case _:
            return repr(value)


def _escaped(character: str) -> str:
    """As it stands in double quotes (YAML 1.2 section 5.7)."""
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    return _ESCAPES.get(character) or f"\\U{ord(character):08x}"
