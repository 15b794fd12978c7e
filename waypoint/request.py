"""What of a request is judged, in the one form in which it is judged and forwarded. No I/O.

Paths are normalised before anybody compares them, and the normalised path is what goes on, so that no application can
read another path than the one that was routed and allowed:
- as Istio's default does (BASE): what need not be encoded is decoded (`%61` is `a`), the rest is `%2A` in upper case,
  dot segments go away (RFC 3986 section 5.2.4), `%00` is refused;
- and further, since a DENY must not be missed (Istio's MERGE_SLASHES, which its security practices recommend): `//` is
  one slash;
- refused, since applications differ on whether they are slashes: `%2F`, `%5C` and the backslash; and `..;` with any
  path parameters behind it, or `..%3B`, which is `..` to some.
Characters that must be encoded and were not (`{`, `|`, `"`, ...) are encoded. The query goes on as it came.
A host with an empty label (`shop.example..`) is refused: applications that drop the dots know a name that no rule saw.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from waypoint.messages import Fields
from waypoint.remembered import remembered

_PLAIN: Final = re.compile(r"(?:/[A-Za-z0-9_~!$&'()*+,;=:@-][A-Za-z0-9._~!$&'()*+,;=:@-]*)+/?|/")
"""Most paths: nothing to do."""
_VISIBLE: Final = re.compile(r"[!-~]+")
_ESCAPE: Final = re.compile(r"%(.{0,2})|[^A-Za-z0-9._~!$&'()*+,;=:@/-]", re.DOTALL)
_UNRESERVED: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._~-")
_HEX: Final = re.compile(r"[0-9A-Fa-f]{2}")
_REFUSED: Final = frozenset("\0/\\")
_SLASHES: Final = re.compile(r"/{2,}")
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::([0-9]*))?")


class RequestError(ValueError):
    """A request that is not judged, because it could be read in more than one way (400); says what is wrong."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as far as routes and policies look at it."""

    method: str
    path: str
    """Normalised, without the query."""
    query: str
    """With its `?`; empty when there is none."""
    host: str
    """As the Host field says it, in lower case; see `host_name` for the name alone. Empty when there is none."""
    fields: Fields

    @property
    def target(self) -> str:
        """What is forwarded."""
        return self.path + self.query

    def header(self, name: str) -> str | None:
        """The value of a field (name in lower case), its lines joined by commas. None when it is not there."""
        return _joined(self.fields, name.encode())


def read_request(method: str, target: str, fields: Fields) -> Request:
    """What is judged of a head that is well formed. Raises RequestError."""
    return _read(fields, method, target)


@remembered
def _read(fields: Fields, method: str, target: str) -> Request:
    path, query = _split(target)
    host = (_joined(fields, b"host") or "").lower()
    if host.startswith(".") or ".." in host:
        raise RequestError("the host has an empty label, which applications read in different ways")
    return Request(method, path, query, host, fields)


def host_name(host: str) -> str:
    """The name in a Host field, without a port and without the dot that ends a complete name."""
    found = _HOST.fullmatch(host)
    return (found[1] if found is not None else host).removesuffix(".")


def merged_slashes(path: str) -> str:
    """A path, or a pattern over paths, as it is compared: several slashes are one."""
    return _SLASHES.sub("/", path)


def _joined(fields: Fields, name: bytes) -> str | None:
    values = [value for field, value in fields if field == name]
    return b",".join(values).decode("latin-1") if values else None


def _split(target: str) -> tuple[str, str]:
    """The normalised path and the query of a target in origin form. Raises RequestError."""
    path, question, query = target.partition("?")
    if _PLAIN.fullmatch(path) is None:
        path = _normalised(path)
    if question and query and (_VISIBLE.fullmatch(query) is None or "#" in query):
        raise RequestError("the query has a character that must be encoded")
    return path, question + query


def _normalised(path: str) -> str:
    if not path.startswith("/"):
        raise RequestError("the target is no path that begins with '/'")
    if _VISIBLE.fullmatch(path) is None or "#" in path:
        raise RequestError("the path has a character that must be encoded")
    if "\\" in path:
        raise RequestError("the path has a backslash, which is a slash to some; write %-encoded what is none")
    path = _ESCAPE.sub(_escape, path)
    return merged_slashes("/".join(_without_dots(path.split("/"))))


def _escape(found: re.Match[str]) -> str:
    """The one way to write a character: as it is where that is unreserved, else encoded in upper case."""
    if found[1] is None:
        return f"%{ord(found[0]):02X}"
    if _HEX.fullmatch(found[1]) is None:
        raise RequestError("the path has '%' without two hexadecimal digits behind it")
    character = chr(int(found[1], 16))
    if character in _REFUSED:
        raise RequestError(f"the path has {found[0].upper()}, which applications read in different ways")
    return character if character in _UNRESERVED else found[0].upper()


def _without_dots(segments: Sequence[str]) -> Iterable[str]:
    """RFC 3986 section 5.2.4. `..` at the root stays at the root."""
    kept: list[str] = []
    last = len(segments) - 1
    for index, segment in enumerate(segments):
        if segment.startswith((".;", "..;", ".%3B", "..%3B")):
            raise RequestError("the path has a dot segment with parameters, which applications read in different ways")
        if segment not in (".", ".."):
            kept.append(segment)
            continue
        if segment == ".." and len(kept) > 1:
            kept.pop()
        if index == last:
            kept.append("")  # `/a/..` is `/`: what is named is still a directory
    return kept
