"""What HTTP lets stand in a method, a header and a path, and the one way in which we write it.

Grammar: RFC 9110 sections 5 and 9, RFC 3986 section 3.3. Each check returns what is wrong, or an empty string.
"""

from __future__ import annotations

import re
from typing import Final

from control.api.problems import shown

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
_VALUE: Final = re.compile(r"[!-~]([ \t!-~]{0,4094}[!-~])?|")
_PATH: Final = re.compile(r"(?:[A-Za-z0-9/._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2}){1,1024}")
_COOKIE_PATH: Final = re.compile(r"/[!-:<-~]{0,1023}")
_ENCODED: Final = re.compile(r"%[0-9A-Fa-f]{2}")
_UNRESERVED: Final = re.compile(r"[A-Za-z0-9._~-]")


def wrong_token(text: str) -> str:
    """A cookie's name."""
    return "" if _TOKEN.fullmatch(text) else f"{shown(text)} is no cookie's name"


def wrong_cookie_path(text: str) -> str:
    """The path of a cookie (RFC 6265 section 4.1.1)."""
    if _COOKIE_PATH.fullmatch(text):
        return ""
    return f"{shown(text)} is no cookie's path: it begins with '/', and has up to 1024 of printable ASCII but ';'"


def wrong_header_name(text: str) -> str:
    """A header's name in lower case, which is how it is compared."""
    if _TOKEN.fullmatch(text) and text == text.lower():
        return ""
    return f"{shown(text)} is no header's name in lower case"


def wrong_field_value(text: str) -> str:
    """A header's value: printable ASCII, without white space at the ends."""
    if _VALUE.fullmatch(text):
        return ""
    return f"{shown(text)} is no header's value: up to 4096 of printable ASCII, with no white space at an end"


def wrong_method(text: str) -> str:
    """A method. Those in lower case are none that anybody uses, and methods are compared as they are."""
    if _TOKEN.fullmatch(text) and text == text.upper():
        return ""
    return f"{shown(text)} is no method; write it in upper case, as GET"


def normal_path(text: str) -> str:
    """A path, or a pattern over paths, as a waypoint compares it: what need not be encoded is not, the rest is `%2A`.

    Raises ValueError for what no path that a waypoint takes can hold: a query, dot segments, encoded slashes.
    """
    if not _PATH.fullmatch(text):
        raise ValueError(f"{shown(text)} is no path of up to 1024 characters, without query and fragment")
    path = _ENCODED.sub(_decoded, text)
    for segment in path.split("/"):
        if segment in (".", ".."):
            raise ValueError(f"{shown(text)} has the segment {segment!r}, which no normalised path has; write it out")
    for encoded in ("%2F", "%5C", "%00"):
        if encoded in path:
            raise ValueError(f"{shown(text)} has {encoded}; requests with it are refused, so nothing could match")
    return path


def _decoded(found: re.Match[str]) -> str:
    character = chr(int(found[0][1:], 16))
    return character if _UNRESERVED.fullmatch(character) else found[0].upper()
