"""RequestAuthentications as Envoy's JWT filter. No I/O.

One resource has the rules of all places, each under a name that is its content, and a place names the one that holds
for it: so places change from one rule to another without a moment in between.
"""

from __future__ import annotations

from collections.abc import Iterable

from control.api.jwt import JwtRule, RequestAuthentication
from waypoint.engine_envoy.parts import PAYLOAD, TOKENS, Json, digest, message
from waypoint.tokens import LEEWAY_S

_SPACED = ["scope", "permission"]


class TokenBook:
    """Collects what places ask for."""

    def __init__(self) -> None:
        self._providers: dict[str, Json] = {}
        self._requirements: dict[str, Json] = {}

    def name(self, authentications: Iterable[RequestAuthentication]) -> str:
        """Under which their rules are found; empty where there are none."""
        rules = [rule for one in sorted(authentications, key=lambda one: one.key) for rule in one.rules]
        if not rules:
            return ""
        providers = [self._provider(rule) for rule in rules]
        # A request without a token passes, one with a token that is not valid does not.
        requirements = [*({"provider_name": name} for name in providers), {"allow_missing": {}}]
        name = digest(requirements)
        self._requirements[name] = {"requires_any": {"requirements": requirements}}
        return name

    def _provider(self, rule: JwtRule) -> str:
        headers, parameters, cookies = rule.places
        provider: Json = {
            "issuer": rule.issuer,
            "audiences": list(rule.audiences),
            "local_jwks": {"inline_string": rule.jwks},
            "forward": rule.forward,
            "from_headers": [{"name": one.name, "value_prefix": one.prefix} for one in headers],
            "from_params": list(parameters),
            "from_cookies": list(cookies),
            "clock_skew_seconds": LEEWAY_S,
            "payload_in_metadata": PAYLOAD,
            "normalize_payload_in_metadata": {"space_delimited_claims": _SPACED},
            "forward_payload_header": rule.payload_header,
            "claim_to_headers": [
                {"header_name": name, "claim_name": claim.replace("][", ".")} for name, claim in rule.claim_headers
            ],
        }
        name = digest(provider)
        self._providers[name] = provider
        return name

    def resource(self) -> Json:
        """The filter, for all places."""
        return {
            "name": TOKENS,
            "typed_config": message(
                "extensions.filters.http.jwt_authn.v3.JwtAuthentication",
                providers=self._providers,
                requirement_map=self._requirements,
            ),
        }


def both(one: Json, other: Json) -> Json:
    """The filter with the rules of two."""
    first, second = one["typed_config"], other["typed_config"]
    merged = {field: {**first[field], **second[field]} for field in ("providers", "requirement_map")}
    return {**one, "typed_config": {**first, **merged}}
