"""Tokens of end users: which are taken, what they say, and what the application gets of them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import replace
from functools import cache
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from control.api.jwt import JwtRule, RequestAuthentication, TokenHeader, algorithms_of, canonical_jwks
from control.api.policy import Target
from waypoint.request import Request, read_request
from waypoint.tokens import LEEWAY_S, MAX_TOKEN, Token, TokenError, Tokens

NOW = 1_900_000_000
ISSUER = "https://issuer.example"
OF_SHOP = (Target("Service", "shop/reviews"),)


@cache
def private_key(kind: str) -> Any:
    match kind:
        case "RSA":
            return rsa.generate_private_key(65537, 2048)
        case "OKP":
            return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key({"P-256": ec.SECP256R1, "P-384": ec.SECP384R1, "P-521": ec.SECP521R1}[kind]())


def public_jwk(kind: str = "RSA", **more: str) -> dict[str, Any]:
    family = {"RSA": jwt.algorithms.RSAAlgorithm, "OKP": jwt.algorithms.OKPAlgorithm}.get(
        kind, jwt.algorithms.ECAlgorithm
    )
    found = family.to_jwk(private_key(kind).public_key(), as_dict=True)
    found.pop("key_ops", None)
    return {**found, **more}


def keys(*jwks: dict[str, Any]) -> str:
    return canonical_jwks(json.dumps({"keys": jwks or (public_jwk(),)}))


def signed(claims: dict[str, Any] | None = None, kind: str = "RSA", alg: str = "RS256", **headers: Any) -> str:
    said = {"iss": ISSUER, "sub": "ann", "exp": NOW + 600} if claims is None else claims
    return jwt.encode(said, private_key(kind), alg, headers=headers)


def checker(*rules: JwtRule, now: list[float] | None = None) -> Tokens:
    at = now or [NOW]
    return Tokens([RequestAuthentication("shop", "tokens", OF_SHOP, rules)], lambda: at[0])


def rule(**more: Any) -> JwtRule:
    return JwtRule(**{"issuer": ISSUER, "jwks": keys(), **more})


def request(token: str = "", *more: tuple[bytes, bytes], target: str = "/") -> Request:
    bearer = [(b"authorization", b"Bearer " + token.encode())] if token else []
    return read_request("GET", target, [(b"host", b"reviews"), *bearer, *more])


def same(one: Request, other: Request) -> bool:
    return replace(one, fields=tuple(one.fields)) == replace(other, fields=tuple(other.fields))


def said(token: Token | None) -> dict[str, Any]:
    assert token is not None
    return dict(token.claims)


class TestWhatIsTaken:
    def test_without_a_token_a_request_passes_and_is_nobodys(self):
        assert same(checker(rule()).verify(request())[1], request())
        assert checker(rule()).verify(request())[0] is None

    def test_without_rules_nobody_looks(self):
        assert checker().verify(request("nonsense")) == (None, request("nonsense"))

    @pytest.mark.parametrize(
        ("kind", "alg"),
        [
            *[("RSA", f"{family}{bits}") for family in ("RS", "PS") for bits in (256, 384, 512)],
            *[("P-256", "ES256"), ("P-384", "ES384"), ("P-521", "ES512"), ("OKP", "EdDSA")],
        ],
    )
    def test_each_algorithm(self, kind, alg):
        found, _ = checker(rule(jwks=keys(public_jwk(kind)))).verify(request(signed(kind=kind, alg=alg)))
        assert found is not None
        assert found.principal == f"{ISSUER}/ann"

    def test_the_key_of_the_tokens_kid(self):
        of_two = rule(jwks=keys(public_jwk("P-256", kid="old"), public_jwk("OKP", kid="new")))
        assert checker(of_two).verify(request(signed(kind="OKP", alg="EdDSA", kid="new")))[0]
        assert checker(of_two).verify(request(signed(kind="P-256", alg="ES256")))[0], "it names no key: each is tried"
        with pytest.raises(TokenError, match="doesn't have key"):
            checker(of_two).verify(request(signed(kind="OKP", alg="EdDSA", kid="other")))
        with pytest.raises(TokenError, match="doesn't have key"):
            checker(of_two).verify(request(signed(kind="OKP", alg="EdDSA", kid="old")))

    def test_one_of_its_audiences(self):
        asking = checker(rule(audiences=("reviews", "ratings")))
        for aud in ("reviews", ["other", "ratings"]):
            assert asking.verify(request(signed({"iss": ISSUER, "aud": aud})))[0]
        for aud in ("other", ["other"], None, 1, {}):
            with pytest.raises(TokenError, match="Audiences"):
                asking.verify(request(signed({"iss": ISSUER, **({} if aud is None else {"aud": aud})})))

    def test_each_issuer_has_its_own_keys(self):
        other = "https://other.example"
        both = checker(rule(), rule(issuer=other, jwks=keys(public_jwk("OKP"))))
        assert both.verify(request(signed({"iss": other}, "OKP", "EdDSA")))[0]
        with pytest.raises(TokenError, match="doesn't have key"):
            both.verify(request(signed({"iss": other})))
        with pytest.raises(TokenError, match="issuer is not configured"):
            both.verify(request(signed({"iss": "https://nobody.example"})))


class TestWhatIsRefused:
    def refused(self, token: str, match: str, **more: Any) -> None:
        with pytest.raises(TokenError, match=match):
            checker(rule(**more)).verify(request(token))

    @pytest.mark.parametrize("token", ["nonsense", "a.b", "a.b.c.d", "..", "a.b.c=", "a.b. c", "\xfc.b.c"])
    def test_what_is_no_token(self, token):
        with pytest.raises(TokenError):
            checker(rule()).verify(request("", (b"authorization", b"Bearer " + token.encode("latin-1"))))

    def test_a_token_that_is_not_signed(self):
        payload = signed().split(".")[1]
        for alg in ("none", "None", "NONE", "nOnE"):
            header = base64.urlsafe_b64encode(json.dumps({"alg": alg}).encode()).decode().rstrip("=")
            self.refused(f"{header}.{payload}.", "not in the form")
            self.refused(f"{header}.{payload}.AA", "doesn't have key")

    def test_a_token_whose_secret_is_the_public_key(self):
        """CVE-2015-9235: the verifier takes the RSA key's text for the secret of an HMAC."""
        pem = (
            private_key("RSA")
            .public_key()
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
        header = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').decode().rstrip("=")
        signing = f"{header}.{signed().split('.')[1]}"
        mac = base64.urlsafe_b64encode(hmac.new(pem, signing.encode(), hashlib.sha256).digest()).decode().rstrip("=")
        self.refused(f"{signing}.{mac}", "doesn't have key")

    def test_a_key_of_ones_own_in_the_header(self):
        """CVE-2018-0114: `jwk`, `jku` and `x5u` say where to find the key; nobody looks."""
        token = signed(kind="P-256", alg="ES256", jwk=public_jwk("P-256"), jku="https://attacker.example", kid="x")
        self.refused(token, "doesn't have key")

    @pytest.mark.parametrize("part", [0, 1, 2])
    def test_a_changed_byte(self, part):
        parts = signed().split(".")
        at = len(parts[part]) // 2
        parts[part] = parts[part][:at] + ("A" if parts[part][at] != "A" else "B") + parts[part][at + 1 :]
        self.refused(".".join(parts), "Jwt")

    def test_an_all_zero_signature(self):
        """CVE-2022-21449."""
        token = signed(kind="P-256", alg="ES256").rpartition(".")[0] + "." + "A" * 86
        self.refused(token, "verification fails", jwks=keys(public_jwk("P-256")))

    @pytest.mark.parametrize("exp", ["tomorrow", True, None, [], float("inf"), float("nan")])
    def test_an_end_that_is_no_number(self, exp):
        self.refused(signed_raw({"iss": ISSUER, "exp": exp}), "no number")

    def test_time(self):
        now = [float(NOW)]
        taken = checker(rule(), now=now)
        token = signed({"iss": ISSUER, "exp": NOW + 10, "nbf": NOW - 10})
        for at in (NOW - 10 - LEEWAY_S, NOW, NOW + 9.9 + LEEWAY_S):
            now[0] = at
            assert taken.verify(request(token))[0]
        now[0] = NOW + 10 + LEEWAY_S
        with pytest.raises(TokenError, match="expired"):
            taken.verify(request(token))
        now[0] = NOW - 10.1 - LEEWAY_S
        with pytest.raises(TokenError, match="not yet"):
            taken.verify(request(token))

    def test_without_keys_none_is_valid(self):
        self.refused(signed(), "doesn't have key", jwks='{"keys":[]}')

    def test_a_point_that_is_not_on_its_curve_is_no_key(self):
        broken = {**public_jwk("P-256"), "y": public_jwk("P-256")["x"]}
        self.refused(signed(kind="P-256", alg="ES256"), "doesn't have key", jwks=keys(broken))

    def test_critical_extensions(self):
        self.refused(signed(crit=["exp"]), "critical")

    def test_what_is_too_long_or_too_deep(self):
        self.refused(signed({"iss": ISSUER, "x": "y" * MAX_TOKEN}), "not in the form")
        deep = base64.urlsafe_b64encode(b"[" * 6000).decode().rstrip("=")
        self.refused(f"e30.{deep}.AA", "not JSON")
        self.refused(signed_raw({"iss": ISSUER, "sub": 7}), "sub that is no text")

    def test_two_lines_of_one_header(self):
        line = (b"authorization", b"Bearer " + signed().encode())
        with pytest.raises(TokenError):
            checker(rule()).verify(request("", line, line))

    def test_one_valid_token_does_not_excuse_another(self):
        with pytest.raises(TokenError, match="verification fails"):
            checker(rule()).verify(request(signed(), target=f"/?access_token={signed()[:-8]}AAAAAAAA"))


def signed_raw(claims: dict[str, Any]) -> str:
    """What the library would not write."""
    return jwt.PyJWS().encode(json.dumps(claims).encode(), private_key("RSA"), "RS256")


class TestPlaces:
    @pytest.mark.parametrize(
        ("given_rule", "asked", "left"),
        [
            (rule(), request("TOKEN"), request()),
            (rule(), request(target="/a?x=1&access_token=TOKEN&y=%20"), request(target="/a?x=1&y=%20")),
            (rule(), request(target="/a?access%5Ftoken=TOKEN"), request(target="/a")),
            (rule(headers=(TokenHeader("x-jwt"),)), request("", (b"x-jwt", b"TOKEN")), request()),
            (
                rule(headers=(TokenHeader("x-jwt", "of "),)),
                request("", (b"x-jwt", b"of TOKEN"), (b"x-a", b"b")),
                request("", (b"x-a", b"b")),
            ),
            (rule(parameters=("t",)), request(target="/?t=TOKEN"), request(target="/")),
            (
                rule(cookies=("session",)),
                request("", (b"cookie", b"a=b; session=TOKEN; c=d"), (b"cookie", b"e=f")),
                request("", (b"cookie", b"a=b; c=d"), (b"cookie", b"e=f")),
            ),
            (rule(cookies=("session",)), request("", (b"cookie", b"session=TOKEN")), request()),
        ],
    )
    def test_it_is_found_and_does_not_go_on(self, given_rule, asked, left):
        found = with_token(asked)
        token, onward = checker(given_rule).verify(found)
        assert said(token)["sub"] == "ann"
        assert same(onward, left)
        assert same(checker(replace(given_rule, forward=True)).verify(found)[1], found)

    def test_elsewhere_nobody_looks(self):
        for looking, asked in (
            (rule(headers=(TokenHeader("x-jwt"),)), request("nonsense")),
            (rule(parameters=("t",)), request(target="/?access_token=nonsense")),
            (rule(), request("", (b"authorization", b"Basic dXNlcjpwYXNz"))),
            (rule(cookies=("session",)), request("", (b"cookie", b"other=nonsense"))),
        ):
            assert checker(looking).verify(asked)[0] is None


def with_token(asked: Request) -> Request:
    fields = [(name, value.replace(b"TOKEN", signed().encode())) for name, value in asked.fields]
    return replace(asked, fields=fields, query=asked.query.replace("TOKEN", signed()))


class TestOutputs:
    def test_claims_in_headers(self):
        filled = rule(
            claim_headers=(("x-sub", "sub"), ("x-groups", "groups"), ("x-role", "a][b"), ("x-none", "none")),
            payload_header="x-payload",
        )
        claims = {"iss": ISSUER, "sub": "ann", "groups": ["one", "two", 3], "a": {"b": True}}
        token = signed(claims)
        _, onward = checker(filled).verify(request(token))
        assert onward.header("x-sub") == "ann"
        assert onward.header("x-groups") == "one,two,3"
        assert onward.header("x-role") == "true"
        assert onward.header("x-none") is None
        assert onward.header("x-payload") == token.split(".")[1]

    def test_nobody_else_fills_them(self):
        filled = checker(rule(claim_headers=(("x-sub", "sub"),), payload_header="x-payload"))
        forged = ((b"x-sub", b"root"), (b"x-payload", b"e30"))
        for asked in (request("", *forged), request(signed({"iss": ISSUER}), *forged)):
            _, onward = filled.verify(asked)
            assert onward.header("x-sub") is None
            assert onward.header("x-payload") in (None, signed({"iss": ISSUER}).split(".")[1])

    def test_what_no_header_holds_is_left_out(self):
        filled = checker(rule(claim_headers=(("x-sub", "sub"),)))
        for sub in ("a\r\nx-root: 1", "\u00fc", ""):
            assert filled.verify(request(signed({"iss": ISSUER, "sub": sub})))[1].header("x-sub") is None


class TestClaims:
    def test_texts(self):
        token = Token({"scope": "read write", "n": 1.5, "l": ["a", ["b"], True], "o": {"i": "x"}}, "")
        assert token.claim("scope") == ("read write", "read", "write")
        assert token.claim("n") == ("1.5",)
        assert token.claim("l") == ("a", "true")
        assert token.claim("o][i") == ("x",)
        assert token.claim("o") == token.claim("i") == token.claim("o][i][j") == ()

    def test_a_known_signature_is_not_checked_again_and_does_not_outlive_its_configuration(self):
        taken = checker(rule())
        token = signed()
        assert taken.verify(request(token)) == taken.verify(request(token))
        assert len(taken._checked) == 1


@given(st.text(alphabet="AQaz09_-.=", max_size=60), st.binary(max_size=40))
def test_nothing_but_a_token_is_one(text, payload):
    """Whatever comes, it is refused by name."""
    encoded = base64.urlsafe_b64encode(payload).decode().rstrip("=") or "A"
    for token in (text or ".", f"{signed().split('.')[0]}.{encoded}.AAAA"):
        with pytest.raises(TokenError):
            checker(rule()).verify(request(token))


def test_algorithms_follow_from_the_key():
    assert algorithms_of(public_jwk("P-384")) == ("ES384",)
    assert algorithms_of(public_jwk(alg="RS512")) == ("RS512",)
