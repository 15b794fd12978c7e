"""`security.istio.io` RequestAuthentication, read from documents.

It holds at waypoints, which see requests: what selects workloads is refused by name.
"""

from __future__ import annotations

from typing import Final

from control.api.declared import DeclaredRequestAuthentication
from control.api.document import Reader
from control.api.http_text import wrong_header_name
from control.api.jwt import (
    MAX_RULES,
    NO_KEYS,
    JwtRule,
    RequestAuthentication,
    TokenHeader,
    canonical_jwks,
    wrong_header_prefix,
    wrong_jwt_text,
    wrong_key_uri,
)
from control.api.metadata import read_metadata
from control.api.names import wrong_subdomain
from control.api.policy import wrong_claim_name
from control.api.security import NEEDS_WAYPOINT, read_targets

_CONNECTION: Final = frozenset(
    ("host", "connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "expect")
)
"""Fields that say how a message is read: no claim may."""


def read_request_authentication(document: Reader) -> DeclaredRequestAuthentication:
    """Reads a RequestAuthentication."""
    metadata = read_metadata(document, wrong_subdomain)
    spec = document.child("spec", required="a mapping with targetRefs and jwtRules")
    spec.refuse({"selector": NEEDS_WAYPOINT, "targetRef": "write targetRefs, a list"})
    targets = read_targets(spec, metadata.namespace)
    if not targets and not spec.lost and not spec.has("selector"):
        spec.error("targetRefs", f"is missing: this {NEEDS_WAYPOINT}")
    readers = spec.children("jwtRules")
    if len(readers) > MAX_RULES:
        spec.error("jwtRules", f"has {len(readers)}; at most {MAX_RULES} are taken")
    read = [_read_rule(reader) for reader in readers[:MAX_RULES]]
    rules = tuple(rule for rule, _ in read)
    issuers = [rule.issuer for rule in rules]
    for index, issuer in enumerate(issuers):
        if issuer and issuer in issuers[:index]:
            readers[index].error("issuer", "stands twice; write its audiences and keys in one rule")
    spec.finish()
    declared = RequestAuthentication(metadata.namespace, metadata.name, targets, rules)
    return DeclaredRequestAuthentication(declared, tuple(uri for _, uri in read), document.position)


def _read_rule(reader: Reader) -> tuple[JwtRule, str]:
    """The rule, and where its keys are fetched."""
    reader.refuse({"jwks_uri": "write jwksUri", "timeout": "keys are fetched beside requests; remove it"})
    jwks = reader.parsed("jwks", canonical_jwks)
    uri = reader.text("jwksUri", wrong_key_uri)
    if reader.has("jwks") and reader.has("jwksUri"):
        reader.error("jwksUri", "cannot stand beside jwks; remove one")
    elif not reader.has("jwks") and not reader.has("jwksUri") and not reader.lost:
        problem = 'is missing; it must be a JSON Web Key Set, as {"keys": [...]}, in quotes, or write jwksUri'
        reader.error("jwks", problem)
    rule = JwtRule(
        issuer=reader.text("issuer", wrong_jwt_text, required="who issues the tokens, as their `iss` says"),
        jwks=jwks or NO_KEYS,
        audiences=reader.parsed_list("audiences", _jwt_text),
        headers=tuple(_read_header(item) for item in reader.children("fromHeaders")),
        parameters=reader.parsed_list("fromParams", _jwt_text),
        cookies=reader.parsed_list("fromCookies", _cookie_name),
        claim_headers=tuple(_read_claim_header(item) for item in reader.children("outputClaimToHeaders")),
        payload_header=reader.text("outputPayloadToHeader", _wrong_output).lower(),
        forward=reader.boolean("forwardOriginalToken", default=False),
    )
    if len(set(rule.outputs)) != len(rule.outputs):
        reader.error("outputClaimToHeaders", "fills a header twice; name another")
    reader.finish()
    return rule, uri


def _read_header(reader: Reader) -> TokenHeader:
    name = reader.text("name", lambda text: wrong_header_name(text.lower()), required="the name of a header")
    header = TokenHeader(name.lower(), reader.text("prefix", wrong_header_prefix))
    reader.finish()
    return header


def _read_claim_header(reader: Reader) -> tuple[str, str]:
    header = reader.text("header", _wrong_output, required="the header that the application gets")
    claim = reader.text("claim", wrong_claim_name, required="the claim whose value goes into it")
    reader.finish()
    return header.lower(), claim


def _wrong_output(text: str) -> str:
    if text.lower() in _CONNECTION or text.startswith(":"):
        return "says how a message is read, and cannot be filled; name another header"
    return wrong_header_name(text.lower())


def _jwt_text(text: str) -> str:
    if problem := wrong_jwt_text(text):
        raise ValueError(problem)
    return text


def _cookie_name(text: str) -> str:
    if problem := wrong_header_name(text.lower()):
        raise ValueError(problem.replace("header's name in lower case", "cookie's name"))
    return text
