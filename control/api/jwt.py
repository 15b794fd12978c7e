"""RequestAuthentication, data only: which JSON Web Tokens of end users a waypoint takes (RFC 7519, RFC 7517).

The meaning is Istio's. A request whose token is not valid is refused; one without a token passes, and has no request
principal: an AuthorizationPolicy that asks for one refuses it.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import Final

from control.api.names import key
from control.api.policy import Target
from control.api.problems import shown

MAX_KEYS: Final = 32
"""Of one rule."""
MAX_JWKS: Final = 65_536
"""Characters of one rule's keys."""
MAX_RULES: Final = 16
"""Of one RequestAuthentication."""

_MIN_RSA_BYTES: Final = 256
_CURVE_BYTES: Final = {"P-256": 32, "P-384": 48, "P-521": 66}
_ED25519_BYTES: Final = 32
_PUBLIC: Final = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x")}
"""RFC 7518 section 6, RFC 8037 section 2."""
_ALGORITHMS: Final = {
    "RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    "P-256": ("ES256",),
    "P-384": ("ES384",),
    "P-521": ("ES512",),
    "Ed25519": ("EdDSA",),
}
_TEXT: Final = re.compile(r"[!-~]{1,1024}")
_HTTPS: Final = re.compile(r"https://[^/?#@]+(?:[/?]|$)")
_PREFIX: Final = re.compile(r"[!-~][ -~]{0,63}")
_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class TokenHeader:
    """A header in which a token may be."""

    name: str
    """In lower case."""
    prefix: str = ""
    """What stands before the token, as `Bearer `."""


@dataclass(frozen=True, slots=True)
class JwtRule:
    """The tokens of one issuer."""

    issuer: str
    jwks: str
    """`canonical_jwks`. Without keys, no token of this issuer is valid."""
    audiences: tuple[str, ...] = ()
    """One of which a token must be for; empty: it is not asked."""
    headers: tuple[TokenHeader, ...] = ()
    """Where tokens are looked for. Nowhere said: `Authorization: Bearer` and the parameter `access_token`."""
    parameters: tuple[str, ...] = ()
    """Of the query."""
    cookies: tuple[str, ...] = ()
    claim_headers: tuple[tuple[str, str], ...] = ()
    """Header, in lower case, and the claim whose value the application gets in it."""
    payload_header: str = ""
    """In which the application gets all claims, base64url; empty: in none."""
    forward: bool = False
    """Whether the application gets the token too."""

    @property
    def places(self) -> tuple[tuple[TokenHeader, ...], tuple[str, ...], tuple[str, ...]]:
        """Headers, parameters and cookies to look in."""
        if self.headers or self.parameters or self.cookies:
            return self.headers, self.parameters, self.cookies
        return (BEARER,), (ACCESS_TOKEN,), ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """Headers that only a verified token may fill."""
        named = tuple(name for name, _ in self.claim_headers)
        return (*named, self.payload_header) if self.payload_header else named


NO_KEYS: Final = '{"keys":[]}'
"""No token is valid."""
BEARER: Final = TokenHeader("authorization", "Bearer ")
ACCESS_TOKEN: Final = "access_token"


@dataclass(frozen=True, slots=True)
class RequestAuthentication:
    """Holds at the waypoints of what it targets."""

    namespace: str
    name: str
    targets: tuple[Target, ...]
    """In order, each once; at least one."""
    rules: tuple[JwtRule, ...]

    @property
    def key(self) -> str:
        return key(self.namespace, self.name)


def canonical_jwks(text: str) -> str:
    """A JSON Web Key Set (RFC 7517 section 5) with its public parts alone, in one form. Raises ValueError."""
    if len(text) > MAX_JWKS:
        raise ValueError(f"has {len(text)} characters; at most {MAX_JWKS} are taken")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError('is not JSON; write a JSON Web Key Set, as {"keys": [...]}') from None
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list) or not all(isinstance(one, dict) for one in keys):
        raise ValueError('is no JSON Web Key Set; write {"keys": [...]}')
    if len(keys) > MAX_KEYS:
        raise ValueError(f"has {len(keys)} keys; at most {MAX_KEYS} are taken")
    found = [_public_key(one, f"keys[{index}]") for index, one in enumerate(keys) if one.get("use", "sig") == "sig"]
    named = [one["kid"] for one in found if "kid" in one]
    if len(set(named)) != len(named):
        raise ValueError("has two keys of one kid; remove one")
    return json.dumps({"keys": found}, sort_keys=True, separators=(",", ":"))


def wrong_jwt_text(text: str) -> str:
    """An issuer, an audience or the name of a parameter: as the token or the query has it, character by character."""
    if _TEXT.fullmatch(text):
        return ""
    return f"{shown(text)} must be 1 to 1024 of printable ASCII, without white space"


def wrong_header_prefix(text: str) -> str:
    """What stands before a token in its header; empty for nothing."""
    if not text or _PREFIX.fullmatch(text):
        return ""
    return f"{shown(text)} must be up to 64 of printable ASCII, such as 'Bearer '"


def wrong_key_uri(text: str) -> str:
    """Where the keys of an issuer are published."""
    if _TEXT.fullmatch(text) and _HTTPS.match(text):
        return ""
    return f"{shown(text)} must begin with https:// and a host: whoever could alter the keys could sign tokens"


def algorithms_of(jwk: dict[str, str]) -> tuple[str, ...]:
    """The algorithms with which a key of `canonical_jwks` may have signed: by its type, so that none is mistaken."""
    every = _ALGORITHMS[jwk["kty"] if jwk["kty"] == "RSA" else jwk["crv"]]
    return (jwk["alg"],) if "alg" in jwk else every


def _public_key(jwk: dict[str, object], where: str) -> dict[str, str]:
    kind = jwk.get("kty")
    if not isinstance(kind, str) or kind not in _PUBLIC:
        wrong = "a symmetric key, with which whoever verifies can sign; " if kind == "oct" else ""
        raise ValueError(f"{where} has kty {shown(str(kind))}: {wrong}write an RSA, EC or OKP key")
    if "d" in jwk:
        raise ValueError(f"{where} holds a private key; write the public one, and replace this key")
    found = {"kty": kind}
    for name in (*_PUBLIC[kind], "kid", "alg"):
        value = jwk.get(name)
        if value is None and name in ("kid", "alg"):
            continue
        if not isinstance(value, str) or not value.isprintable():
            raise ValueError(f"{where} has no {name}, or one that is no text")
        found[name] = value
    _check_size(found, where)
    if "alg" in found and found["alg"] not in (allowed := _ALGORITHMS[found.get("crv", "RSA")]):
        raise ValueError(f"{where} has alg {shown(found['alg'])}; a key of its type has {' or '.join(allowed)}")
    return found


def _check_size(jwk: dict[str, str], where: str) -> None:
    if jwk["kty"] == "RSA":
        if len(_decoded(jwk["n"], f"{where}.n").lstrip(b"\0")) < _MIN_RSA_BYTES:
            raise ValueError(f"{where} is an RSA key of under {8 * _MIN_RSA_BYTES} bits; replace it")
        if not int.from_bytes(_decoded(jwk["e"], f"{where}.e"), "big") & 1:
            raise ValueError(f"{where}.e is no odd number")
        return
    curves = _CURVE_BYTES if jwk["kty"] == "EC" else {"Ed25519": _ED25519_BYTES}
    if jwk["crv"] not in curves:
        raise ValueError(f"{where} has crv {shown(jwk['crv'])}; known: {', '.join(curves)}")
    for name in _PUBLIC[jwk["kty"]][1:]:
        if len(_decoded(jwk[name], f"{where}.{name}")) != curves[jwk["crv"]]:
            raise ValueError(f"{where}.{name} must have {curves[jwk['crv']]} bytes for {jwk['crv']}")


def _decoded(text: str, where: str) -> bytes:
    try:
        if _BASE64URL.fullmatch(text):
            return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        pass
    raise ValueError(f"{where} is not base64url without padding")
