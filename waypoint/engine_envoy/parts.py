"""Pieces of Envoy's configuration that several modules need. No I/O."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

Json = dict[str, Any]
"""A message of Envoy's API (v3), as JSON."""

PRINCIPAL: Final = "uproxy.principal"
"""Filter state of a caller's connection: its SPIFFE ID."""
CALLER: Final = "uproxy.caller"
"""Likewise: what `x-uproxy-caller` says of it. A connection to a backend is for one value of it (docs/hbone.md 4)."""
SERIAL: Final = "uproxy.serial"
"""Likewise: its certificate's serial number, in lower-case hex."""
REVOKED: Final = "revoked"
"""The filter that refuses callers whose certificates are revoked, and its resource."""
RBAC_DENY: Final = "rbac-deny"
RBAC_ALLOW: Final = "rbac-allow"
WOULD_DENY: Final = "would-deny"
WOULD_ALLOW: Final = "would-allow"
"""Filters that tell what would be decided if policies in dry run were enforced."""
TOKENS: Final = "tokens"
"""The filter that checks end users' tokens, and its resource."""
PAYLOAD: Final = "payload"
"""Where that filter leaves what a token says."""
JWT_METADATA: Final = "envoy.filters.http.jwt_authn"
RBAC: Final = "extensions.filters.http.rbac.v3.RBAC"
ORIGINAL_DST: Final = "envoy.filters.listener.original_dst"

_TYPES: Final = "type.googleapis.com/envoy."


def message(kind: str, **fields: Any) -> Json:
    """A message that says its own type, `kind`, as in `extensions.filters.http.router.v3.Router`."""
    return {"@type": _TYPES + kind, **fields}


def extension(name: str, kind: str, **fields: Any) -> Json:
    """An extension and its configuration."""
    return {"name": name, "typed_config": message(kind, **fields)}


def slot(name: str) -> Json:
    """A filter of requests that does nothing, until what holds at a place injects one here (`injected`)."""
    composite = extension("composite", "extensions.filters.http.composite.v3.Composite")
    return {
        **extension(name, "extensions.common.matching.v3.ExtensionWithMatcher", extension_config=composite),
        "disabled": True,
    }


def injected(inner: Json) -> Json:
    """What a slot holds, for all requests."""
    does = extension("inject", "extensions.filters.http.composite.v3.ExecuteFilterAction", typed_config=inner)
    kind = "extensions.common.matching.v3.ExtensionWithMatcherPerRoute"
    return message(kind, xds_matcher={"on_no_match": {"action": does}})


def digest(content: object) -> str:
    """The same for what is the same, and short enough for a name."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def seconds(milliseconds: int) -> str:
    """A duration."""
    return f"{milliseconds // 1000}.{milliseconds % 1000:03}s"


def literal(text: str) -> str:
    """A value of a header in which nothing is a command (Envoy's substitution format)."""
    return text.replace("%", "%%")


def source(path: str) -> Json:
    """Where a resource comes from: a file that is replaced by rename."""
    return {"path_config_source": {"path": path}, "resource_api_version": "V3"}


def header(name: str, value: str, *, append: bool = False) -> Json:
    """A HeaderValueOption whose value is a format."""
    action = "APPEND_IF_EXISTS_OR_ADD" if append else "OVERWRITE_IF_EXISTS_OR_ADD"
    return {"header": {"key": name, "value": value}, "append_action": action, "keep_empty_value": True}
