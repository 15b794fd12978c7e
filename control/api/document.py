"""YAML documents with the line of every field, and a reader that takes them apart without missing anything.

We build our own nodes from PyYAML's events, for the lines, and to refuse what makes YAML dangerous or ambiguous:
aliases, tags, duplicate keys, deep nesting, and plain words that YAML 1.1 and 1.2 read differently (`on`, `010`).
Scalars follow the YAML 1.2 core schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import yaml

from control.api.problems import Near, Position, Report, ResourceError, shown

MAX_CHARACTERS: Final = 16 * 1024 * 1024  # of one file; 10,000 services with their endpoints take some 5 MB
MAX_DEPTH: Final = 20  # the deepest resource we know nests 10
MAX_NODES: Final = 100_000  # of one document: a policy that fills a message has a quarter of that
MAX_KEY: Final = 512  # characters; the longest label or annotation has 317

# libyaml's parser when PyYAML was built with it (ten times faster), else the same in Python.
_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_INTEGER: Final = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_AMBIGUOUS: Final = re.compile(
    r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF|y|Y|n|N"  # booleans in YAML 1.1, text in 1.2
    r"|[-+]?0[0-9]+|[-+]?0[xob][0-9a-fA-F_]+|[-+]?[0-9]+_[0-9_]*"  # numbers in one, other numbers in the other
)
_PLAIN_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Scalar:
    line: int
    value: bool | int | float | str | None
    text: str
    """As written, without quotes."""
    ambiguous: bool


@dataclass(frozen=True, slots=True)
class List:
    line: int
    items: list[Node]


@dataclass(frozen=True, slots=True)
class Map:
    line: int
    entries: dict[str, Node]
    key_lines: dict[str, int]


Node = Scalar | List | Map


class _Refused(Exception):
    """The rest of the file cannot be read."""


def read_documents(text: str, file: str, report: Report) -> Iterator[Map]:
    """The documents of a file that are mappings; whatever else it holds is reported. Never raises for its content.

    One at a time, so that only one is held as nodes.
    """
    if len(text) > MAX_CHARACTERS:
        report.add(ResourceError(file, 0, "", f"longer than {MAX_CHARACTERS} characters; split the file"))
        return
    try:
        text.encode()  # libyaml takes UTF-8, so a lone surrogate ends here
        builder = _Builder(text, file, report)
        for root in builder.roots():
            if isinstance(root, Map):
                yield root
            elif not (isinstance(root, Scalar) and root.value is None):
                report.add(
                    ResourceError(file, root.line, "", "a document must be a mapping that begins with apiVersion")
                )
    except _Refused:
        pass
    except UnicodeEncodeError:
        report.add(ResourceError(file, 0, "", "not valid Unicode text; save the file as UTF-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        context = f", {error.context}" if error.context else ""
        report.add(ResourceError(file, line, "", f"not valid YAML: {error.problem}{context}"))
    except yaml.YAMLError as error:
        report.add(ResourceError(file, 0, "", f"not valid YAML: {str(error).splitlines()[0]}"))


class _Builder:
    """Turns parser events into nodes."""

    def __init__(self, text: str, file: str, report: Report) -> None:
        self._events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
        self._file = file
        self._report = report
        self._nodes_left = 0

    def roots(self) -> Iterator[Node]:
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                self._nodes_left = MAX_NODES
                yield self._node(next(self._events), MAX_DEPTH)

    def _node(self, event: Any, depth: int) -> Node:
        line: int = event.start_mark.line + 1
        if depth == 0:
            self._refuse(line, f"nested deeper than {MAX_DEPTH} levels")
        if self._nodes_left == 0:
            self._refuse(line, f"more than {MAX_NODES} values in one document; split the resource")
        self._nodes_left -= 1
        if isinstance(event, yaml.AliasEvent):
            # Aliases of aliases make a small file huge ("billion laughs"); resources have no use for them.
            self._refuse(line, f"the alias *{event.anchor} is not taken: write the value out")
        if event.tag is not None and event.tag != "!":
            self._refuse(line, f"the tag {shown(event.tag)} is not taken: write the plain value")
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event.value, line, plain=event.implicit[0])
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(line, depth)
        return self._map(line, depth)

    def _list(self, line: int, depth: int) -> List:
        items: list[Node] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, depth - 1))
        return List(line, items)

    def _map(self, line: int, depth: int) -> Map:
        node = Map(line, {}, {})
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            name = self._node(event, depth - 1)
            value = self._node(next(self._events), depth - 1)
            problem = _wrong_key(name)
            if problem or not isinstance(name, Scalar):
                self._report.add(ResourceError(self._file, name.line, "", problem))
                continue
            key = name.text
            if key in node.entries:
                problem = f"the key {shown(key)} stands twice, first in line {node.key_lines[key]}: remove one"
                self._report.add(ResourceError(self._file, name.line, "", problem))
                continue
            node.entries[key] = value
            node.key_lines[key] = name.line
        return node

    def _refuse(self, line: int, problem: str) -> None:
        self._report.add(ResourceError(self._file, line, "", problem))
        raise _Refused


def _wrong_key(key: Node) -> str:
    if not isinstance(key, Scalar):
        return f"a key must be text, not {_kind_of(key)}"
    if len(key.text) > MAX_KEY:
        return f"the key {shown(key.text)} is longer than {MAX_KEY} characters"
    # A number is taken, since ports are keys too and nobody quotes them.
    if key.ambiguous or type(key.value) not in (str, int):
        return f"the key {shown(key.text)} is no text: write it in quotes"
    return ""


def _scalar(text: str, line: int, *, plain: bool) -> Scalar:
    if not plain:
        return Scalar(line, text, text, False)
    value: bool | int | float | str | None = text
    if text in ("", "~", "null", "Null", "NULL"):
        value = None
    elif text in ("true", "True", "TRUE"):
        value = True
    elif text in ("false", "False", "FALSE"):
        value = False
    elif _AMBIGUOUS.fullmatch(text):
        return Scalar(line, text, text, True)
    elif _INTEGER.fullmatch(text):
        value = int(text)
    elif _FLOAT.fullmatch(text):
        value = float(re.sub(r"\.(?=[a-zA-Z])", "", text))  # `.inf` and `.nan` are YAML's
    return Scalar(line, value, text, False)


def position_of(document: Map, file: str) -> Position:
    """Where each field of a document stands."""
    lines: dict[str, int] = {}
    pending: list[tuple[str, Node]] = [("", document)]
    while pending:
        path, node = pending.pop()
        if isinstance(node, Map):
            for name, value in node.entries.items():
                lines[join(path, name)] = node.key_lines[name]
                pending.append((join(path, name), value))
        elif isinstance(node, List):
            for index, item in enumerate(node.items):
                lines[f"{path}[{index}]"] = item.line
                pending.append((f"{path}[{index}]", item))
    return Position(file, document.line, lines)


def join(path: str, name: str) -> str:
    """The path of a field within another."""
    if not _PLAIN_KEY.fullmatch(name):
        return f"{path}[{name!r}]"
    return f"{path}.{name}" if path else name


def _kind_of(node: Node) -> str:
    match node:
        case Map():
            return "a mapping"
        case List():
            return "a list"
        case Scalar(value=None):
            return "empty"
        case Scalar(value=bool()):
            return f"the boolean {node.text}"
        case Scalar(value=int() | float()):
            return f"the number {shown(node.text)[1:-1]}"
        case Scalar():
            return f"the text {shown(node.text)}"


_T = TypeVar("_T")
Wrong = Callable[[str], str]
"""What is wrong with a text, or an empty string."""


class Reader:
    """A mapping, read field by field; `finish` refuses every field that was never asked for.

    Errors go to the report and a harmless value comes back, so that one reading finds all errors; what has been read
    may be used only when the report stayed empty.
    """

    def __init__(self, node: Map | None, path: str, position: Position, report: Report) -> None:
        self._entries = node.entries if node is not None else {}
        self._lost = node is None
        self._path = path
        self._asked: set[str] = set()
        self._refused: set[str] = set()
        self.position = position
        self._report = report

    def has(self, name: str) -> bool:
        """Whether the field is written, even if empty."""
        self._asked.add(name)
        return name in self._entries

    @property
    def names(self) -> list[str]:
        """All keys, where the keys are data; reading them is up to the caller."""
        self._asked.update(self._entries)
        return list(self._entries)

    @property
    def lost(self) -> bool:
        """Whether this mapping was itself wrong or missing, which has been said already."""
        return self._lost

    @property
    def empty(self) -> bool:
        """Whether a mapping is there and has no field."""
        return not self._lost and not self._entries

    def path(self, name: str) -> str:
        return join(self._path, name)

    def error(self, name: str, problem: str, near: Near | None = None) -> None:
        """Reports a problem at a field; an empty name means this mapping."""
        self._report.add(self.position.error(self.path(name) if name else self._path, problem), near)

    def error_at(self, path: str, problem: str) -> None:
        """Reports a problem anywhere in this document."""
        self._report.add(self.position.error(path, problem))

    def text(self, name: str, wrong: Wrong | None = None, *, required: str = "", default: str = "") -> str:
        """Text that `wrong` finds right. `required` says what the field would hold, for the error when it lacks."""
        node = self._scalar(name, required, "text")
        if node is None:
            return default
        text = self._text_of(node, self.path(name))
        if text is not None and wrong is not None and (problem := wrong(text)):
            self.error(name, problem)
            return default
        return default if text is None else text

    def parsed(self, name: str, parse: Callable[[str], _T], *, required: str = "") -> _T | None:
        """What `parse` makes of a text; None when the field is absent or wrong. `parse` raises ValueError."""
        node = self._scalar(name, required, "text")
        return None if node is None else self._parsed(node, self.path(name), parse)

    def parsed_list(self, name: str, parse: Callable[[str], _T]) -> tuple[_T, ...]:
        """What `parse` makes of each text of a list; absent is empty, but a written list has at least one item."""
        found: list[_T] = []
        for path, item in self._items(name):
            if not isinstance(item, Scalar):
                self._wrong_type(path, item, "text")
            elif (value := self._parsed(item, path, parse)) is not None:
                found.append(value)
        return tuple(found)

    def pairs(self, name: str, wrong_key: Wrong, wrong_value: Wrong, *, most: int) -> dict[str, str]:
        """A mapping of texts, as labels; empty when absent."""
        reader = self.child(name)
        names = reader.names
        if self.has(name) and len(names) > most:
            self.error(name, f"has {len(names)} entries; at most {most} are taken")
        for key in names:
            if problem := wrong_key(key):
                reader.error(key, problem)
        return {key: reader.text(key, wrong_value) for key in names}

    def integer_or_text(self, name: str, low: int, high: int, wrong: Wrong, *, default: int) -> int | str:
        """A number in a range or a text that `wrong` finds right."""
        node = self._entries.get(name)
        if isinstance(node, Scalar) and type(node.value) is str:
            return self.text(name, wrong) or default
        return self.integer(name, low, high, default=default)

    def integer(self, name: str, low: int, high: int, *, required: str = "", default: int = 0) -> int:
        node = self._scalar(name, required, f"a number from {low} to {high}")
        if node is None:
            return default
        if type(node.value) is not int or node.ambiguous:
            self._wrong_type(self.path(name), node, f"a number from {low} to {high}")
            return default
        if not low <= node.value <= high:
            self.error(name, f"{node.value} is out of range: {low} to {high}")
            return default
        return node.value

    def hundredths(self, name: str, low: int, high: int, *, default: int) -> int:
        """A number with up to two decimals, and its range, in hundredths."""
        expected = f"a number from {low / 100:g} to {high / 100:g}, with up to two decimals"
        node = self._scalar(name, "", expected)
        if node is None:
            return default
        if node.ambiguous or isinstance(node.value, (bool, str)) or node.value is None:
            self._wrong_type(self.path(name), node, expected)
            return default
        if not low / 100 <= node.value <= high / 100 or round(node.value, 2) != node.value:
            self.error(name, f"{node.text} must be {expected}")
            return default
        return round(node.value * 100)

    def integers(self, name: str, low: int, high: int) -> tuple[int, ...]:
        """Numbers of a list; absent is empty, but a written list has at least one item."""
        found: list[int] = []
        for path, item in self._items(name):
            if not isinstance(item, Scalar) or type(item.value) is not int or not low <= item.value <= high:
                self._wrong_type(path, item, f"a number from {low} to {high}")
            else:
                found.append(item.value)
        return tuple(found)

    def boolean(self, name: str, *, default: bool) -> bool:
        node = self._scalar(name, "", "true or false")
        if node is None:
            return default
        if type(node.value) is not bool:
            self._wrong_type(self.path(name), node, "true or false")
            return default
        return node.value

    def choice(self, name: str, choices: Sequence[str], *, default: str, others: dict[str, str] | None = None) -> str:
        """One of `choices`; `others` are known words that are refused, each with the reason."""
        text = self.parsed(name, str)
        if text is None or text in choices:
            return default if text is None else text
        if others and text in others:
            self.error(name, f"{text} is refused: {others[text]}")
        else:
            known = " or ".join(choices)
            self.error(name, f"{shown(text)} must be {known}", (text, choices))
        return default

    def child(self, name: str, *, required: str = "") -> Reader:
        """A mapping; an empty one when it is absent."""
        node = self._take(name, required)
        if isinstance(node, Map):
            return Reader(node, self.path(name), self.position, self._report)
        if node is not None:
            self._wrong_type(self.path(name), node, "a mapping")
        lost = self._lost or bool(required) or name in self._entries
        return Reader(None if lost else Map(0, {}, {}), self.path(name), self.position, self._report)

    def children(self, name: str) -> list[Reader]:
        """A list of mappings; absent is empty, but a list that is written has at least one item."""
        found: list[Reader] = []
        for path, item in self._items(name):
            if isinstance(item, Map):
                found.append(Reader(item, path, self.position, self._report))
            else:
                self._wrong_type(path, item, "a mapping")
        return found

    def refuse(self, reasons: dict[str, str]) -> None:
        """Fields that others know and we do not implement, each with the reason and the mend."""
        self._refused.update(reasons)
        for name, reason in reasons.items():
            if name in self._entries:
                self.error(name, f"is refused: {reason}")

    def finish(self) -> None:
        """Reports every field that nobody asked for."""
        known = f"known here: {', '.join(sorted(self._asked))}" if self._asked else "none is known here"
        for name in self._entries:
            if name not in self._asked and name not in self._refused:
                self.error(name, f"unknown field; {known}", (name, self._asked))

    def _take(self, name: str, required: str) -> Node | None:
        """The node of a field, or None when it is absent (reported when required) or empty (reported)."""
        self._asked.add(name)
        node = self._entries.get(name)
        if node is None:
            if required and not self._lost:
                self.error(name, f"is missing; it must be {required}")
            return None
        if isinstance(node, Scalar) and node.value is None:
            # An empty field would mean the same as none, and in a policy that is "everything".
            self.error(name, "is empty; give it a value or remove it")
            return None
        return node

    def _scalar(self, name: str, required: str, expected: str) -> Scalar | None:
        node = self._take(name, required)
        if node is None or isinstance(node, Scalar):
            return node
        self._wrong_type(self.path(name), node, expected)
        return None

    def _items(self, name: str) -> list[tuple[str, Node]]:
        node = self._take(name, "")
        if node is None:
            return []
        if not isinstance(node, List):
            self._wrong_type(self.path(name), node, "a list")
            return []
        if not node.items:
            self.error(name, "is an empty list; give it an item or remove the field")
        return [(f"{self.path(name)}[{index}]", item) for index, item in enumerate(node.items)]

    def _text_of(self, node: Scalar, path: str) -> str | None:
        if node.ambiguous:
            problem = f'YAML versions read {shown(node.text)} differently; write it in quotes: "{node.text}"'
        elif type(node.value) is str:
            return node.value
        elif node.value is None:
            problem = "is empty; it must be text"
        else:
            problem = f'must be text, not {_kind_of(node)}; write it in quotes: "{node.text}"'
        self._report.add(self.position.error(path, problem))
        return None

    def _parsed(self, node: Scalar, path: str, parse: Callable[[str], _T]) -> _T | None:
        text = self._text_of(node, path)
        if text is None:
            return None
        try:
            return parse(text)
        except ValueError as error:
            self._report.add(self.position.error(path, str(error)))
            return None

    def _wrong_type(self, path: str, node: Node, expected: str) -> None:
        self._report.add(self.position.error(path, f"must be {expected}, not {_kind_of(node)}"))
