"""Whose token comes with this request? JSON Web Tokens, checked as RequestAuthentications ask (`control.api.jwt`).

The meaning is Istio's. Each place in which a rule looks may hold a token; each token that is there must be valid for a
rule that looks there, or the request is refused. Signatures are PyJWT's business, over `cryptography`: both are
imported when the first keys come, so that a waypoint without RequestAuthentications is as small as it was.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, unquote_plus

from control.api.http_text import wrong_field_value
from control.api.jwt import JwtRule, RequestAuthentication, TokenHeader, algorithms_of
from waypoint.messages import Fields
from waypoint.request import Request

if TYPE_CHECKING:
    from jwt.algorithms import AllowedPublicKeys

MAX_TOKEN: Final = 8192
"""Characters."""
MAX_CHECKED: Final = 1024
"""Tokens of one configuration whose signatures are known to be right."""
LEEWAY_S: Final = 60
"""That clocks may differ by: Envoy's."""

_SPACED: Final = ("scope", "permission")
"""Claims that are a list in one text, as Istio reads them (RFC 8693 section 4.2)."""
_COMPACT: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
"""RFC 7515 section 3.1."""

Claims = Mapping[str, Any]


class TokenError(Exception):
    """A token that is not taken; the text says why."""


@dataclass(frozen=True, slots=True)
class Token:
    """What a valid token says."""

    claims: Claims
    principal: str
    """`<issuer>/<subject>`."""

    def claim(self, name: str) -> tuple[str, ...]:
        """The texts of a claim (`outer][inner` for a nested one), or of what it lists; none when it is not there."""
        found: object = self.claims
        for part in name.split("]["):
            found = found.get(part) if isinstance(found, dict) else None
        if isinstance(found, str) and name in _SPACED:
            return (found, *found.split(" "))
        return _texts(found)


class Tokens:
    """The rules at one destination. Made once per configuration; what changes is only what it remembers."""

    def __init__(self, authentications: Iterable[RequestAuthentication], clock: Callable[[], float]) -> None:
        """`clock`: seconds since 1970."""
        rules = [rule for one in authentications for rule in one.rules]
        self._clock = clock
        self._rules = tuple(_Compiled(rule, _keys_of(rule.jwks)) for rule in rules)
        self._outputs = frozenset(name.encode() for rule in rules for name in rule.outputs)
        self._checked: dict[tuple[int, str], Claims] = {}
        """Rule and token -> what it says."""

    def verify(self, request: Request) -> tuple[Token | None, Request]:
        """The token of a request, if there is one, and the request as it goes on: without the tokens that only the
        waypoint is to see, and with what is said in their place. Raises TokenError for one that is not valid.
        """
        if not self._rules:
            return None, request
        token: Token | None = None
        fields: Fields = [field for field in request.fields if field[0] not in self._outputs]
        query = request.query
        found = [(rule, place, text) for rule in self._rules for place, text in _tokens_of(rule.rule, request)]
        for place, text in dict.fromkeys((place, text) for _, place, text in found):
            looking = [rule for rule, its, its_text in found if (its, its_text) == (place, text)]
            rule, claims = self._check(text, looking)
            if token is None:
                token = Token(claims, f"{claims['iss']}/{claims.get('sub', '')}")
                fields = [*fields, *_outputs(rule.rule, token, text)]
            if not rule.rule.forward:
                fields, query = place.without(fields, query)
        return token, replace(request, fields=fields, query=query)

    def _check(self, text: str, rules: Sequence[_Compiled]) -> tuple[_Compiled, Claims]:
        """The rule for which a token is valid, and its claims. Raises TokenError."""
        if len(text) > MAX_TOKEN or _COMPACT.fullmatch(text) is None:
            raise TokenError("Jwt is not in the form of Header.Payload.Signature")
        issuer = _issuer(text)
        for number, rule in enumerate(self._rules):
            if rule in rules and rule.rule.issuer == issuer:
                claims = self._checked.get((number, text))
                if claims is None:
                    claims = rule.signed(text)
                    if len(self._checked) >= MAX_CHECKED:
                        self._checked.clear()
                    self._checked[number, text] = claims
                _check_time(claims, self._clock())
                _check_audience(claims, rule.rule.audiences)
                return rule, claims
        raise TokenError("Jwt issuer is not configured")


@dataclass(frozen=True, slots=True)
class _Key:
    id: str
    """Empty: it has none."""
    algorithms: tuple[str, ...]
    public: AllowedPublicKeys


@dataclass(frozen=True, slots=True, eq=False)
class _Compiled:
    rule: JwtRule
    keys: tuple[_Key, ...]

    def signed(self, text: str) -> Claims:
        """What a token says that one of the keys has signed. Raises TokenError."""
        import jwt  # see the module

        header = _part(text, 0)
        name, algorithm = header.get("kid", ""), header.get("alg", "")
        if "crit" in header:
            raise TokenError("Jwt header has critical extensions")  # RFC 7515 section 4.1.11
        candidates = [key for key in self.keys if algorithm in key.algorithms and (not name or key.id in (name, ""))]
        if not candidates:
            raise TokenError("Jwks doesn't have key to match kid or alg from Jwt")
        for key in candidates:
            try:
                jwt.PyJWS().decode(text, key.public, algorithms=[algorithm])
            except jwt.InvalidTokenError:
                continue
            claims = _part(text, 1)
            if isinstance(claims.get("sub", ""), str):
                return claims
            raise TokenError("Jwt payload has a sub that is no text")
        raise TokenError("Jwt verification fails")


@lru_cache(maxsize=256)
def _keys_of(jwks: str) -> tuple[_Key, ...]:
    """Kept from one configuration to the next: each compiles all rules anew, and keys seldom change."""
    import jwt  # see the module

    found = []
    for one in json.loads(jwks)["keys"]:
        algorithms = algorithms_of(one)
        try:
            found.append(_Key(one.get("kid", ""), algorithms, jwt.PyJWK(one, algorithms[0]).key))
        except (jwt.InvalidKeyError, jwt.PyJWKError, ValueError):
            continue  # a point off its curve: nobody can have signed with it
    return tuple(found)


# -- Where tokens are


@dataclass(frozen=True, slots=True)
class _InHeader:
    header: TokenHeader

    def without(self, fields: Fields, query: str) -> tuple[Fields, str]:
        name = self.header.name.encode()
        return [field for field in fields if field[0] != name], query


@dataclass(frozen=True, slots=True)
class _InQuery:
    name: str

    def without(self, fields: Fields, query: str) -> tuple[Fields, str]:
        parts = [part for part in query[1:].split("&") if unquote_plus(part.partition("=")[0]) != self.name]
        return fields, f"?{'&'.join(parts)}" if parts else ""


@dataclass(frozen=True, slots=True)
class _InCookie:
    name: str

    def without(self, fields: Fields, query: str) -> tuple[Fields, str]:
        return [field for field in map(self._left, fields) if field[1] or field[0] != b"cookie"], query

    def _left(self, field: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        if field[0] != b"cookie":
            return field
        pairs = [pair for pair in field[1].split(b";") if pair.partition(b"=")[0].strip() != self.name.encode()]
        return b"cookie", b";".join(pairs).strip()


_Place = _InHeader | _InQuery | _InCookie


def _tokens_of(rule: JwtRule, request: Request) -> Iterable[tuple[_Place, str]]:
    headers, parameters, cookies = rule.places
    for header in headers:
        value = request.header(header.name)
        if value is not None and value.startswith(header.prefix):
            yield _InHeader(header), value[len(header.prefix) :].strip(" ")
    if request.query:
        for name, value in parse_qsl(request.query[1:]):
            if name in parameters:
                yield _InQuery(name), value
    for name in cookies:
        for pair in (request.header("cookie") or "").replace(",", ";").split(";"):
            its, _, value = pair.strip(" ").partition("=")
            if its == name and value:
                yield _InCookie(name), value


# -- What they say


def _issuer(text: str) -> str:
    issuer = _part(text, 1).get("iss", "")
    return issuer if isinstance(issuer, str) else ""


def _part(text: str, index: int) -> dict[str, Any]:
    """The header (0) or the payload (1). Raises TokenError."""
    encoded = text.split(".")[index]
    try:
        found = json.loads(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise TokenError(f"Jwt {'payload' if index else 'header'} is not JSON")
    return found


def _check_time(claims: Claims, now: float) -> None:
    expires, begins = (_number(claims, name) for name in ("exp", "nbf"))
    if expires is not None and now >= expires + LEEWAY_S:
        raise TokenError("Jwt is expired")
    if begins is not None and now < begins - LEEWAY_S:
        raise TokenError("Jwt not yet valid")


def _number(claims: Claims, name: str) -> float | None:
    """RFC 7519 section 2, NumericDate. None: the claim is not there. Raises TokenError."""
    if name not in claims:
        return None
    value = claims[name]
    if type(value) in (int, float) and math.isfinite(value):
        return float(value)
    raise TokenError(f"Jwt payload has an {name} that is no number")


def _check_audience(claims: Claims, audiences: Sequence[str]) -> None:
    if audiences and not set(audiences).intersection(_texts(claims.get("aud"))):
        raise TokenError("Audiences in Jwt are not allowed")


def _texts(value: object) -> tuple[str, ...]:
    match value:
        case bool():
            return ("true" if value else "false",)
        case str() | int() | float():
            return (str(value),)
        case list():
            return tuple(text for item in value if not isinstance(item, list) for text in _texts(item))
    return ()


def _outputs(rule: JwtRule, token: Token, text: str) -> Iterable[tuple[bytes, bytes]]:
    """What the application gets. A claim that no header can hold is left out."""
    for header, claim in rule.claim_headers:
        values = ",".join(token.claim(claim)[:1] if claim in _SPACED else token.claim(claim))
        if values and not wrong_field_value(values):
            yield header.encode(), values.encode()
    if rule.payload_header:
        yield rule.payload_header.encode(), text.split(".")[1].encode()
