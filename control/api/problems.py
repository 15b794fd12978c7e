"""What is wrong with a resource, said so that somebody can mend it: file, line, field, and what would be right."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

MAX_PROBLEMS: Final = 100  # of one file or mesh: more than anybody reads, little enough to keep
_MAX_WORDS: Final = 1000  # to look for a near one: some 20 ms


@dataclass(frozen=True, slots=True, order=True)
class ResourceError:
    """One thing that is wrong, or (as a warning) that will not do what it seems to."""

    file: str
    line: int
    """From 1; 0 when it is about the whole file."""
    field: str
    """Path from the top of the document, as `spec.ports[0].port`; empty when it is about all of it."""
    problem: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.field}: {self.problem}" if self.field else f"{place}: {self.problem}"


Near = tuple[str, Iterable[str]]
"""A word that is not known, and those that are."""


class ResourceErrors(ValueError):
    """All errors of the resources at once; nothing of them may be used."""

    def __init__(self, errors: Iterable[ResourceError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(map(str, self.errors)))


class Report:
    """Collects the errors of one reading, up to a bound."""

    def __init__(self) -> None:
        self.errors: list[ResourceError] = []
        self.dropped = 0
        """Errors beyond the bound."""

    @property
    def full(self) -> bool:
        """Whether more would be dropped, so that looking on is in vain."""
        return len(self.errors) >= MAX_PROBLEMS

    def add(self, error: ResourceError, near: Near | None = None) -> None:
        """Adds an error, with the known word that was probably meant, if one is near."""
        if self.full:
            self.dropped += 1
        else:
            self.errors.append(_with_suggestion(error, near))

    def raise_errors(self) -> None:
        """Raises ResourceErrors when there are any, in the order of their places."""
        if not self.errors:
            return
        errors = sorted(self.errors, key=lambda error: (error.file, error.line))
        if self.dropped:
            errors.append(ResourceError(errors[-1].file, 0, "", f"{self.dropped} more errors; mend these first"))
        raise ResourceErrors(errors)


@dataclass(frozen=True, slots=True)
class Position:
    """Where a resource and each of its fields stand."""

    file: str
    line: int
    lines: Mapping[str, int]
    """Field path -> line."""

    def error(self, field: str, problem: str) -> ResourceError:
        """An error at a field, or at the nearest field around it that is written."""
        path = field
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return ResourceError(self.file, self.lines.get(path, self.line), field, problem)


class Findings:
    """What the checks of a whole mesh find: errors, which refuse it, and warnings, which do not."""

    def __init__(self) -> None:
        self.report = Report()
        self.warnings: list[ResourceError] = []

    def error(self, position: Position, field: str, problem: str, near: Near | None = None) -> None:
        self.report.add(position.error(field, problem), near)

    def warn(self, position: Position, field: str, problem: str, near: Near | None = None) -> None:
        if len(self.warnings) < MAX_PROBLEMS:
            self.warnings.append(_with_suggestion(position.error(field, problem), near))


def shown(text: str) -> str:
    """Text from a file, quoted and short enough for a message."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _with_suggestion(error: ResourceError, near: Near | None) -> ResourceError:
    """Costs time, so it is done for errors that are kept only, and against a bounded number of words."""
    if near is None:
        return error
    word, known = near
    import difflib  # here, as a uProxy that runs needs nothing of it

    found = difflib.get_close_matches(word[:100], itertools.islice(known, _MAX_WORDS), n=1, cutoff=0.6)
    if not found:
        return error
    return replace(error, problem=f"{error.problem} (did you mean {found[0]!r}?)")
