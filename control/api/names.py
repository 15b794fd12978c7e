"""Syntax of resource names, as Kubernetes checks it. Each check returns what is wrong, or an empty string."""

from __future__ import annotations

import re
from typing import Final

from control.api.problems import shown

_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SERVICE: Final = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_SUBDOMAIN: Final = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
_MAX_SUBDOMAIN: Final = 253
_PORT: Final = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


def key(namespace: str, name: str) -> str:
    """How services, workloads, Gateways and routes are referred to: `namespace/name`."""
    return f"{namespace}/{name}"


def wrong_dns_label(text: str) -> str:
    """RFC 1123 label: a namespace."""
    if _LABEL.fullmatch(text):
        return ""
    return f"{shown(text)} must be 1-63 of a-z, 0-9 and '-', with a letter or digit at both ends"


def wrong_service_name(text: str) -> str:
    """RFC 1035 label: a Service, whose name is a host name."""
    if _SERVICE.fullmatch(text):
        return ""
    return f"{shown(text)} must be 1-63 of a-z, 0-9 and '-', beginning with a letter and not ending with '-'"


def wrong_subdomain(text: str) -> str:
    """RFC 1123 subdomain: every other resource, and a service account."""
    if len(text) <= _MAX_SUBDOMAIN and _SUBDOMAIN.fullmatch(text):
        return ""
    return f"{shown(text)} must be 1-253 of a-z, 0-9, '-' and '.', each part with a letter or digit at both ends"


def wrong_port_name(text: str) -> str:
    """IANA service name (RFC 6335 section 5.1), as a named target port."""
    if len(text) <= 15 and _PORT.fullmatch(text) and "--" not in text and not text.isdigit():
        return ""
    return f"{shown(text)} must be 1-15 of a-z, 0-9 and '-', with at least one letter, no '--', no '-' at an end"
