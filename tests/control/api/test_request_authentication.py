"""RequestAuthentication as people write it, and the keys in it."""

from __future__ import annotations

import base64
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.declared import DeclaredRequestAuthentication
from control.api.jwt import MAX_KEYS, JwtRule, RequestAuthentication, TokenHeader, canonical_jwks
from control.api.mesh import Mesh
from control.api.policy import Target
from control.api.problems import ResourceErrors
from control.api.resources import parse
from tests.support.desired import gateway, service


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


RSA = {"kty": "RSA", "n": encoded(b"\x80" + bytes(255)), "e": "AQAB", "kid": "1", "use": "sig"}
EC = {"kty": "EC", "crv": "P-256", "x": encoded(bytes(32)), "y": encoded(bytes(32)), "kid": "2"}
OKP = {"kty": "OKP", "crv": "Ed25519", "x": encoded(bytes(32)), "alg": "EdDSA"}
HEAD = "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: r, namespace: shop}\n"
TARGET = "  targetRefs: [{kind: Service, group: '', name: web}]\n"


def jwks(*keys):
    return json.dumps({"keys": list(keys)})


def read(spec):
    (found,) = parse(HEAD + spec, "f.yaml")
    assert isinstance(found, DeclaredRequestAuthentication)
    return found.request_authentication


def refusals(spec):
    with pytest.raises(ResourceErrors) as caught:
        read(spec)
    return [str(error).removeprefix("f.yaml:") for error in caught.value.errors]


def one_rule(text):
    return f"spec:\n{TARGET}  jwtRules: [{{issuer: accounts, jwks: '{jwks(OKP)}', {text}}}]\n"


def test_every_field():
    spec = f"""\
spec:
{TARGET}  jwtRules:
  - issuer: https://issuer.example
    jwks: '{jwks(RSA, EC)}'
    audiences: [reviews, https://shop.example/]
    fromHeaders: [{{name: X-Jwt, prefix: 'Token '}}, {{name: x-other}}]
    fromParams: [token]
    fromCookies: [Session]
    outputPayloadToHeader: X-Payload
    outputClaimToHeaders: [{{header: X-Sub, claim: sub}}, {{header: x-role, claim: 'a][b'}}]
    forwardOriginalToken: true
  - {{issuer: accounts, jwks: '{jwks()}'}}
"""
    assert read(spec) == RequestAuthentication(
        "shop",
        "r",
        (Target("Service", "shop/web"),),
        (
            JwtRule(
                issuer="https://issuer.example",
                jwks=canonical_jwks(jwks(RSA, EC)),
                audiences=("reviews", "https://shop.example/"),
                headers=(TokenHeader("x-jwt", "Token "), TokenHeader("x-other")),
                parameters=("token",),
                cookies=("Session",),
                claim_headers=(("x-sub", "sub"), ("x-role", "a][b")),
                payload_header="x-payload",
                forward=True,
            ),
            JwtRule("accounts", '{"keys":[]}'),
        ),
    )


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("spec: {}", "spec.targetRefs: is missing: this needs a waypoint; an L4 proxy cannot see it. Write targetRefs"),
        ("spec: {selector: {matchLabels: {a: b}}}", "spec.selector: is refused: needs a waypoint"),
        ("spec: {targetRef: {name: a}}", "spec.targetRef: is refused: write targetRefs"),
        (f"spec:\n{TARGET}  jwtRules: [{{issuer: a}}]", "jwtRules[0].jwks: is missing; it must be a JSON Web Key Set"),
        (f"spec:\n{TARGET}  jwtRules: [{{jwks: '{jwks()}'}}]", "jwtRules[0].issuer: is missing; it must be who issues"),
        (
            f"spec:\n{TARGET}  jwtRules: [{{issuer: a, jwksUri: http://a.example}}]",
            "jwtRules[0].jwksUri: 'http://a.example' must begin with https:// and a host",
        ),
        (one_rule("jwksUri: https://a.example"), "jwtRules[0].jwksUri: cannot stand beside jwks"),
        (
            f"spec:\n{TARGET}  jwtRules: [{{issuer: a, jwks: '{jwks()}'}}, {{issuer: a, jwks: '{jwks()}'}}]",
            "jwtRules[1].issuer: stands twice",
        ),
        (one_rule("audiences: ['a b']"), "audiences[0]: 'a b' must be 1 to 1024 of printable ASCII"),
        (one_rule("fromHeaders: [{name: 'a b'}]"), "fromHeaders[0].name: 'a b' is no header's name"),
        (one_rule("fromCookies: ['a;b']"), "fromCookies[0]: 'a;b' is no cookie's name"),
        (one_rule("outputPayloadToHeader: Host"), "outputPayloadToHeader: says how a message is read"),
        (one_rule("outputPayloadToHeader: ':path'"), "outputPayloadToHeader: says how a message is read"),
        (
            one_rule("outputClaimToHeaders: [{header: Transfer-Encoding, claim: a}]"),
            "outputClaimToHeaders[0].header: says how a message is read",
        ),
        (
            one_rule("outputClaimToHeaders: [{header: a, claim: b}, {header: A, claim: c}]"),
            "outputClaimToHeaders: fills a header twice",
        ),
        (one_rule("outputClaimToHeaders: [{header: a, claim: 'b[c]'}]"), "claim: 'b[c]' is no claim's name"),
        (one_rule("timeout: 1s"), "timeout: is refused: keys are fetched beside requests"),
    ],
)
def test_what_is_not_taken_is_refused_by_name(spec, expected):
    assert any(expected in text for text in refusals(spec)), refusals(spec)


class TestKeys:
    def test_one_form(self):
        found = canonical_jwks(jwks(RSA, EC, OKP))
        assert canonical_jwks(found) == found
        assert json.loads(found)["keys"][0] == {name: RSA[name] for name in ("kty", "n", "e", "kid")}
        assert canonical_jwks(jwks({**EC, "use": "enc"}, OKP)) == canonical_jwks(jwks(OKP)), "it is not for signing"

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("{", "is not JSON"),
            ("[" * 50_000, "is not JSON"),
            ("[]", "is no JSON Web Key Set"),
            ('{"keys": {}}', "is no JSON Web Key Set"),
            ('{"keys": [1]}', "is no JSON Web Key Set"),
            (jwks({"kty": "oct", "k": "AA"}), "a symmetric key, with which whoever verifies can sign"),
            (jwks({**EC, "d": "AA"}), "keys[0] holds a private key"),
            (jwks(RSA, {**EC, "kid": "1"}), "has two keys of one kid"),
            (jwks({**RSA, "n": encoded(bytes([255] * 255))}), "is an RSA key of under 2048 bits"),
            (jwks({**RSA, "e": "AA"}), "keys[0].e is no odd number"),
            (jwks({**RSA, "n": "a+b"}), "keys[0].n is not base64url"),
            (jwks({**RSA, "alg": "HS256"}), "has alg 'HS256'; a key of its type has RS256 or"),
            (jwks({**EC, "alg": "ES512"}), "has alg 'ES512'; a key of its type has ES256"),
            (jwks({**EC, "crv": "secp256k1"}), "has crv 'secp256k1'; known: P-256"),
            (jwks({**EC, "x": "AA"}), "keys[0].x must have 32 bytes for P-256"),
            (jwks({"kty": "EC"}), "keys[0] has no crv"),
            (jwks(*[{**OKP, "kid": str(n)} for n in range(MAX_KEYS + 1)]), f"at most {MAX_KEYS} are taken"),
            (" " * 70_000, "at most 65536 are taken"),
        ],
    )
    def test_what_is_no_public_key_is_refused_by_name(self, text, problem):
        with pytest.raises(ValueError, match=re.escape(problem)):
            canonical_jwks(text)

    @given(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.text(max_size=8)
            | st.sampled_from(["RSA", "EC", "OKP", "AQAB"]),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["keys", "kty", "n", "e", "crv", "x", "y", "d", "kid"]), inner, max_size=5
                )
            ),
            max_leaves=12,
        )
    )
    def test_whatever_it_is_it_is_taken_or_refused(self, document):
        for text in (json.dumps(document), json.dumps({"keys": [document]})):
            try:
                found = canonical_jwks(text)
            except ValueError:
                continue
            assert canonical_jwks(found) == found


def test_of_files_no_keys_are_fetched():
    found = parse(HEAD + f"spec:\n{TARGET}  jwtRules: [{{issuer: a, jwksUri: https://a.example/keys}}]\n", "f.yaml")
    with pytest.raises(ResourceErrors, match="jwksUri: is refused: only a control plane fetches keys"):
        Mesh.build(found, "cluster.local")


def test_one_that_nobody_enforces_is_told():
    text = HEAD + f"spec:\n{TARGET}  jwtRules: [{{issuer: a, jwks: '{jwks(OKP)}'}}]\n"
    alone = Mesh.build(parse(text, "f.yaml"), "cluster.local")
    assert any("there is no Service shop/web" in str(warning) for warning in alone.warnings)
    unbound = Mesh.build([*parse(text, "f.yaml"), *parse(service("web"), "g.yaml")], "cluster.local")
    assert any("nobody enforces this: Service shop/web is bound to no waypoint" in str(w) for w in unbound.warnings)
    bound = service("web", labels="istio.io/use-waypoint: wp")
    whole = Mesh.build(
        [*parse(text, "f.yaml"), *parse(bound, "g.yaml"), *parse(gateway("wp"), "h.yaml")], "cluster.local"
    )
    assert not any("f.yaml" in str(warning) for warning in whole.warnings)
    assert "mesh/v1/cluster.local/reqauth/shop/r" in whole.records()
    assert all(wish.guarded for wish in whole.wishes.values()), "going past the waypoint would miss it"
