"""The body of a RequestAuthentication's message, and back: part of `records`."""

from __future__ import annotations

from control.api.fields import Fields, RecordError, checked, read_flag, read_targets, typed, write_target
from control.api.http_text import wrong_header_name
from control.api.jwt import (
    MAX_RULES,
    JwtRule,
    RequestAuthentication,
    TokenHeader,
    canonical_jwks,
    wrong_header_prefix,
    wrong_jwt_text,
)
from control.api.messages import Body, Value
from control.api.policy import wrong_claim_name
from control.api.topics import RequestAuthenticationTopic


def write_request_authentication(record: RequestAuthentication) -> Body:
    """The body."""
    return {
        "targets": [write_target(target) for target in record.targets],
        "rules": [_write_rule(rule) for rule in record.rules],
    }


def read_request_authentication(topic: RequestAuthenticationTopic, fields: Fields) -> RequestAuthentication:
    """The RequestAuthentication in a body, whose rest the caller looks at. Raises RecordError."""
    targets = read_targets(fields, topic.namespace)
    rules = tuple(_read_rule(item) for item in fields.take("rules", list))
    if len(rules) > MAX_RULES:
        raise RecordError(f"rules has {len(rules)}; at most {MAX_RULES}")
    return RequestAuthentication(topic.namespace, topic.name, targets, rules)


def _write_rule(rule: JwtRule) -> Body:
    lists: dict[str, list[Value]] = {
        "audiences": list(rule.audiences),
        "headers": [[header.name, header.prefix] for header in rule.headers],
        "parameters": list(rule.parameters),
        "cookies": list(rule.cookies),
        "claim_headers": [list(pair) for pair in rule.claim_headers],
    }
    return {
        "issuer": rule.issuer,
        "jwks": rule.jwks,
        **{name: items for name, items in lists.items() if items},
        **({"payload_header": rule.payload_header} if rule.payload_header else {}),
        **({"forward": True} if rule.forward else {}),
    }


def _read_rule(value: Value) -> JwtRule:
    fields = Fields(value, "rules")
    jwks = fields.take("jwks", str)
    try:
        canonical = canonical_jwks(jwks)
    except ValueError as error:
        raise RecordError(f"jwks {error}") from None
    if canonical != jwks:
        raise RecordError("jwks is not in its canonical form")
    rule = JwtRule(
        issuer=_text(fields.take("issuer", str), "issuer"),
        jwks=jwks,
        audiences=fields.optional_list("audiences", _text),
        headers=fields.optional_list("headers", _read_header),
        parameters=fields.optional_list("parameters", _text),
        cookies=fields.optional_list("cookies", _header_name_in_any_case),
        claim_headers=fields.optional_list("claim_headers", _read_claim_header),
        payload_header=checked(fields.take("payload_header", str), wrong_header_name, "payload_header")
        if fields.has("payload_header")
        else "",
        forward=read_flag(fields, "forward"),
    )
    fields.finish()
    return rule


def _text(value: Value, name: str) -> str:
    return checked(typed(value, str, name), wrong_jwt_text, name)


def _header_name_in_any_case(value: Value, name: str) -> str:
    text = typed(value, str, name)
    checked(text.lower(), wrong_header_name, name)
    return text


def _read_header(value: Value, name: str) -> TokenHeader:
    match value:
        case [str(header), str(prefix)]:
            return TokenHeader(checked(header, wrong_header_name, name), checked(prefix, wrong_header_prefix, name))
    raise RecordError(f"{name}: each must be [name, prefix]")


def _read_claim_header(value: Value, name: str) -> tuple[str, str]:
    match value:
        case [str(header), str(claim)]:
            return checked(header, wrong_header_name, name), checked(claim, wrong_claim_name, name)
    raise RecordError(f"{name}: each must be [header, claim]")
