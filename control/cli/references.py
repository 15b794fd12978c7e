"""How people name resources on a command line: `service reviews`, `svc/reviews`, `policy only-web`."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import Final

from control.api.metadata import DEFAULT_NAMESPACE
from control.cli.output import CommandError

KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "Namespace": ("namespace", "ns"),
    "Service": ("service", "svc"),
    "WorkloadEntry": ("workloadentry", "we", "workload"),
    "EndpointSlice": ("endpointslice",),
    "AuthorizationPolicy": ("authorizationpolicy", "ap", "policy"),
    "PeerAuthentication": ("peerauthentication", "pa"),
    "RequestAuthentication": ("requestauthentication", "ra"),
    "TrafficPolicy": ("trafficpolicy", "tp"),
    "Extension": ("extension", "ext"),
    "Gateway": ("gateway", "gtw"),
    "HTTPRoute": ("httproute",),
    "GRPCRoute": ("grpcroute",),
    "ReferenceGrant": ("referencegrant", "refgrant"),
}
"""Kind -> what people may call it, as with kubectl and istioctl; the plural of each word will do too."""

KINDS_HELP: Final = "kinds, with other names for them:\n" + "\n".join(
    f"  {first:<20} {', '.join(other)}".rstrip() for first, *other in KINDS.values()
)


def _plural(word: str) -> str:
    return f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"


_KIND_OF: Final = {form: kind for kind, words in KINDS.items() for word in words for form in (word, _plural(word))}


def add_namespace_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-n",
        "--namespace",
        default=DEFAULT_NAMESPACE,
        metavar="NS",
        help=f"of the resources that are named; default: {DEFAULT_NAMESPACE}",
    )


def parse_kind(word: str) -> str:
    """The kind that a word means. Raises CommandError."""
    kind = _KIND_OF.get(word.lower())
    if kind is None:
        near = difflib.get_close_matches(word.lower(), _KIND_OF, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise CommandError(f"no kind {word!r}{hint}; there are {', '.join(words[0] for words in KINDS.values())}")
    return kind


def parse_references(words: Sequence[str], namespace: str) -> list[dict[str, str]]:
    """`KIND NAME…` or `KIND/NAME…` as kind, namespace and name. Raises CommandError."""
    pairs: list[tuple[str, str]] = []
    if "/" in words[0]:
        for word in words:
            kind, slash, name = word.partition("/")
            if not slash or not name:
                raise CommandError(f"{word!r} must be KIND/NAME, as the others are")
            pairs.append((parse_kind(kind), name))
    else:
        kind = parse_kind(words[0])
        if len(words) == 1:
            raise CommandError(f"which {words[0]}? write its name after it")
        pairs = [(kind, name) for name in words[1:]]
    return [{"kind": kind, "namespace": "" if kind == "Namespace" else namespace, "name": name} for kind, name in pairs]
