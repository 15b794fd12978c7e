"""Tokens of end users at a waypoint (`waypoint.tokens`), beside PyJWT's own checks; and none that nobody signed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from control.api.jwt import JwtRule, RequestAuthentication, canonical_jwks
from control.api.policy import Target
from waypoint.request import read_request
from waypoint.tokens import LEEWAY_S, Token, TokenError, Tokens

MAX_BYTES = 1024
WORDS = (
    b'{"alg":"EdDSA"}', b'"kid":"one"', b'"crit":["b64"]', b'"alg":"none"', b'"alg":"HS256"', b'"iss":', b'"sub":',
    b'"exp":', b'"nbf":', b'"aud":', b"1e400", b"NaN", b"Infinity", b"null", b"true", b'["a"]', b'{"a":1}', b"[[[[",
    b'"\\ud800"', b"\xff", b'"https://issuer.example"', b'"scope":"a b"', b'"\\r\\n"',
)  # fmt: skip
_NOW: Final = 1_900_000_000.0
_ISSUER: Final = "https://issuer.example"
_KEY: Final = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))  # whose signatures are the same each time
_JWK: Final = {**jwt.algorithms.OKPAlgorithm.to_jwk(_KEY.public_key(), as_dict=True), "kid": "one"}
_RULE: Final = JwtRule(
    _ISSUER,
    canonical_jwks(json.dumps({"keys": [{name: _JWK[name] for name in ("kty", "crv", "x", "kid")}]})),
    claim_headers=(("x-sub", "sub"), ("x-scope", "scope"), ("x-deep", "a][b")),
    payload_header="x-claims",
)
_TARGETS: Final = (Target("Service", "shop/reviews"),)
_SIGNED, _IN_QUERY, _AS_IT_IS = 1, 2, 4


def seeds() -> Iterable[bytes]:
    header = b'{"alg":"EdDSA","kid":"one"}'
    good = (
        b'{"iss":"https://issuer.example","sub":"ann","exp":1900000600,"nbf":1800000000,"aud":["a","b"],"scope":"a b"}'
    )
    for payload in (
        good,
        b'{"iss":"https://issuer.example"}',
        b'{"iss":"x"}',
        b"[]",
        b'{"iss":1,"sub":2,"exp":"soon"}',
    ):
        for how in range(4):
            yield bytes((how,)) + header + b"\n" + payload
    yield b"\x01" + b'{"alg":"EdDSA"}' + b"\n" + good
    yield b"\x00" + b'{"alg":"none"}' + b"\n" + good
    yield bytes((_AS_IT_IS,)) + _token(header, good, signed=True).encode()


def check(data: bytes) -> None:
    """A byte that says how; a header, a line feed and a payload; or the token as it is."""
    how = data[0] if data else 0
    header, _, payload = data[1:].partition(b"\n")
    text = data[1:].decode("latin-1") if how & _AS_IT_IS else _token(header, payload, signed=bool(how & _SIGNED))
    if not text.isascii() or not text.isprintable() or " " in text:  # what http1 and `read_request` let through
        return
    in_query = f"?a=b&access_token={text}" if how & _IN_QUERY and not set("&+#%=") & set(text) else ""
    fields = [(b"host", b"reviews"), (b"x-sub", b"forged")]
    if not in_query:
        fields.append((b"authorization", b"Bearer " + text.encode()))
    tokens = Tokens([RequestAuthentication("shop", "tokens", _TARGETS, (_RULE,))], lambda: _NOW)
    try:
        token, request = tokens.verify(read_request("GET", f"/{in_query}", fields))
    except TokenError:
        return
    assert (b"x-sub", b"forged") not in request.fields
    if token is None:
        assert not text
        return
    assert b"authorization" not in dict(request.fields)
    assert "access_token" not in request.query
    assert text.encode() not in b"".join(value for _, value in request.fields)
    _check_claims(text, token)
    again, _ = tokens.verify(read_request("GET", f"/{in_query}", fields))  # known to be right by now
    assert again == token


def _check_claims(text: str, token: Token) -> None:
    options: Any = {"verify_aud": False, "verify_exp": False, "verify_nbf": False, "verify_iat": False}
    second = jwt.decode(text, _KEY.public_key(), ["EdDSA"], options=options, issuer=_ISSUER)
    assert repr(second) == repr(dict(token.claims))
    assert token.principal == f"{_ISSUER}/{second.get('sub', '')}"
    assert second.get("exp", _NOW) > _NOW - LEEWAY_S
    assert second.get("nbf", _NOW) <= _NOW + LEEWAY_S


def _token(header: bytes, payload: bytes, *, signed: bool) -> str:
    said = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in (header, payload))
    signature = _KEY.sign(said) if signed else bytes(64)
    return (said + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()
