"""What the filters of a route do with requests beside changing headers; data only, `waypoint` acts on it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from control.api.http_text import normal_path, wrong_header_name
from control.api.names import wrong_subdomain
from control.api.problems import shown

REDIRECTS: Final = (301, 302, 303, 307, 308)
SCHEMES: Final = ("http", "https")
ANY: Final = "*"
MAX_MIRRORS: Final = 4
"""Of one rule, its backends' included: each sends the whole request once more."""
MAX_LISTED: Final = 64
"""Origins, methods or headers of one CORS filter: Gateway API's."""
MAX_AGE_S: Final = 86_400  # no browser keeps an answer for longer
MAX_FRACTION: Final = 1_000_000

_ORIGIN: Final = re.compile(r"https?://(\*|(?:\*\.)?[a-z0-9.-]{1,253})(?::([0-9]{1,5}))?")


class Replaced(Enum):
    """Which part of a path is replaced."""

    ALL = "ReplaceFullPath"
    PREFIX = "ReplacePrefixMatch"
    """That by which the rule's match holds."""


@dataclass(frozen=True, slots=True)
class PathChange:
    kind: Replaced
    value: str
    """Normalised; without a slash at its end where it replaces a prefix, so that `/` is empty."""


@dataclass(frozen=True, slots=True)
class Redirect:
    """An answer that sends the caller elsewhere. An empty field: as the request has it."""

    scheme: str = ""
    hostname: str = ""
    path: PathChange | None = None
    port: int = 0
    """0: the scheme's own, or without a scheme that which was dialled."""
    status: int = 302


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What the backend is asked for instead. At least one of both."""

    hostname: str = ""
    path: PathChange | None = None


@dataclass(frozen=True, slots=True)
class Mirror:
    """Where copies of requests go, whose answers nobody gets."""

    service: str
    """Key of a service."""
    port: int
    numerator: int
    """Of `denominator` requests, so many are copied."""
    denominator: int


@dataclass(frozen=True, slots=True)
class Cors:
    """What browsers let pages of other origins do (https://fetch.spec.whatwg.org/#http-cors-protocol)."""

    origins: tuple[str, ...]
    """`*`, or `scheme://host` with a port perhaps, where the host is a name, `*.name` or `*`; in lower case."""
    methods: tuple[str, ...]
    """`*`, or some."""
    headers: tuple[str, ...]
    """`*`, or names in lower case, which requests may have."""
    exposed: tuple[str, ...]
    """Likewise, which pages may read of responses."""
    credentials: bool
    max_age_s: int
    """For how long a browser may believe the answer."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Of a rule or of a backend."""

    redirect: Redirect | None = None
    rewrite: Rewrite | None = None
    mirrors: tuple[Mirror, ...] = ()
    cors: Cors | None = None

    @property
    def paths(self) -> tuple[PathChange, ...]:
        """What is made of paths."""
        changes = (one.path for one in (self.redirect, self.rewrite) if one is not None)
        return tuple(change for change in changes if change is not None)


NO_FILTERS: Final = Filters()


def canonical_replacement(kind: Replaced, text: str) -> str:
    """The one form of what replaces a path. Raises ValueError for what is no path."""
    if not text:
        text = "/"
    if not text.startswith("/"):
        raise ValueError(f"{shown(text)} must begin with '/'")
    if "//" in text:
        raise ValueError(f"{shown(text)} has an empty element, '//'; write one '/'")
    path = normal_path(text)
    return path.rstrip("/") if kind is Replaced.PREFIX else path


def wrong_origin(text: str) -> str:
    """What is wrong with an origin in lower case, or an empty string."""
    if text == ANY:
        return ""
    found = _ORIGIN.fullmatch(text)
    if found is None or (found[2] is not None and not 1 <= int(found[2]) <= 65535):
        return f"{shown(text)} is no origin, such as https://example.com, https://*.example.com:8443 or *"
    name = found[1].removeprefix("*.")
    return "" if name == ANY else wrong_subdomain(name)


def wrong_listed_header(text: str) -> str:
    """What is wrong with a header's name in lower case, or `*`, or an empty string."""
    return "" if text == ANY else wrong_header_name(text)
