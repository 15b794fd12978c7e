"""Labels and the selectors that match them (`matchLabels`: every pair must be there)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from control.api.names import wrong_subdomain
from control.api.problems import shown

Labels = Mapping[str, str]

CANONICAL_NAME: Final = ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")
"""Labels that name a workload's canonical service, first found wins."""
CANONICAL_REVISION: Final = ("service.istio.io/canonical-revision", "app.kubernetes.io/version", "version")
APP: Final = ("app", "app.kubernetes.io/name")
VERSION: Final = ("version", "app.kubernetes.io/version")
NODE: Final = "kubernetes.io/hostname"
SERVICE_NAME: Final = "kubernetes.io/service-name"
"""On an EndpointSlice: the Service it belongs to."""
USE_WAYPOINT: Final = "istio.io/use-waypoint"
"""On a Service, WorkloadEntry or Namespace: the name of a Gateway, or `none`."""
USE_WAYPOINT_NAMESPACE: Final = "istio.io/use-waypoint-namespace"
"""The Gateway's namespace, where it is another."""
WAYPOINT_FOR: Final = "istio.io/waypoint-for"
"""On a Gateway: which traffic it takes."""
GATEWAY_NAME: Final = "gateway.networking.k8s.io/gateway-name"
"""On a WorkloadEntry: the Gateway that it is a process of."""
NAMESPACE_NAME: Final = "kubernetes.io/metadata.name"
"""Each namespace has it, with its own name."""

MAX_LABELS: Final = 64  # of one object; Kubernetes objects rarely have 20, and each is matched by each selector

_TELEMETRY: Final = frozenset((*CANONICAL_NAME, *CANONICAL_REVISION, *APP, *VERSION))
_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def wrong_key(key: str) -> str:
    """What is wrong with a label key (`[prefix/]name`), or an empty string."""
    prefix, slash, name = key.rpartition("/")
    if slash and wrong_subdomain(prefix):
        return f"{shown(key)}: the part before '/' must be a DNS name in lower case"
    if not _NAME.fullmatch(name):
        return f"{shown(key)}: a label's name must be 1-63 of letters, digits, '-', '_', '.', not at the ends"
    return ""


def wrong_value(value: str) -> str:
    """What is wrong with a label value, or an empty string."""
    if not value or _NAME.fullmatch(value):
        return ""
    return f"{shown(value)}: a label's value must be 0-63 of letters, digits, '-', '_', '.', not at the ends"


def telemetry(labels: Labels) -> dict[str, str]:
    """Those labels of a workload that its peers' metrics and logs show, in the order of their keys."""
    return {key: labels[key] for key in sorted(_TELEMETRY & labels.keys()) if labels[key]}


def selects(selector: Labels, labels: Labels) -> bool:
    """Whether every pair of the selector is in the labels. An empty selector selects everything."""
    return all(labels.get(key) == value for key, value in selector.items())


def first_of(keys: tuple[str, ...], labels: Labels, default: str) -> str:
    """The value of the first of these labels that is present and not empty."""
    return next((labels[key] for key in keys if labels.get(key)), default)
