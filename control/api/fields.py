"""Takes message bodies apart: strict, canonical, and every error says which field."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from typing import TypeVar

from control.api import labels as label
from control.api.address import AddressError, IpAddress, parse_address
from control.api.gateway import Binding, Via
from control.api.identity import IdentityError, SpiffeId, TrustDomain
from control.api.messages import Value
from control.api.names import key, wrong_dns_label, wrong_service_name, wrong_subdomain
from control.api.policy import Target, TargetKind

_T = TypeVar("_T")
_E = TypeVar("_E", bound=Enum)
_Ordered = TypeVar("_Ordered", int, str, tuple[str, str], SpiffeId, tuple[SpiffeId, tuple[IpAddress, ...]])


class RecordError(ValueError):
    """A message whose content is not what its topic is for; the text names the field."""


class Fields:
    """Takes a body apart field by field, so that none is missed, missing or of the wrong type."""

    def __init__(self, body: Value, where: str = "body") -> None:
        if type(body) is not dict:
            raise RecordError(f"{where} must be a mapping")
        self._rest = dict(body)
        self._where = where

    def take(self, name: str, kind: type[_T]) -> _T:
        """The value of a field that must be there."""
        try:
            value = self._rest.pop(name)
        except KeyError:
            raise RecordError(f"{self._where} lacks {name!r}") from None
        return typed(value, kind, name)

    def number(self, name: str, low: int, high: int) -> int:
        return number_in(self.take(name, int), low, high, name)

    def has(self, name: str) -> bool:
        """Whether a field that may be absent is there."""
        return name in self._rest

    def optional_list(self, name: str, check: Callable[[Value, str], _T]) -> tuple[_T, ...]:
        """An absent field is empty, and an empty one is not written: a policy has one encoding."""
        if name not in self._rest:
            return ()
        items = self.take(name, list)
        if not items:
            raise RecordError(f"{name} is empty; it must then be absent")
        return tuple(check(item, name) for item in items)

    def addresses(self, name: str) -> tuple[IpAddress, ...]:
        found = tuple(read_address(item, name) for item in self.take(name, list))
        check_distinct(found, name)
        return found

    def labels(self, name: str) -> dict[str, str]:
        return read_labels(self.take(name, dict), name)

    def selector(self, name: str) -> dict[str, str] | None:
        """Labels, or None where everything is meant."""
        if name in self._rest and self._rest[name] is None:
            del self._rest[name]
            return None
        return self.labels(name)

    def finish(self) -> None:
        if self._rest:
            raise RecordError(f"{self._where} has unknown fields: {', '.join(sorted(self._rest))[:200]}")


def typed(value: Value, kind: type[_T], name: str) -> _T:
    """A value of exactly this type."""
    if type(value) is not kind:  # exact: a bool is no number here
        raise RecordError(f"{name} must be {kind.__name__}, not {type(value).__name__}")
    return value


def number_in(value: Value, low: int, high: int, name: str) -> int:
    number = typed(value, int, name)
    if not low <= number <= high:
        raise RecordError(f"{name} is {number}; it must be from {low} to {high}")
    return number


def read_port(value: Value, name: str) -> int:
    return number_in(value, 1, 65535, name)


def read_key(value: Value, name: str, wrong: Callable[[str], str] = wrong_subdomain) -> str:
    """A key; `wrong` finds what is wrong with its name."""
    text = typed(value, str, name)
    namespace, slash, resource = text.partition("/")
    if not slash:
        raise RecordError(f"{name}: {text[:80]!r} must be namespace/name")
    checked(namespace, wrong_dns_label, name)
    checked(resource, wrong, name)
    return text


def read_binding(value: Value, name: str) -> Binding:
    match value:
        case [gateway, via, *more] if len(more) < 4:
            node = checked(typed(more.pop(0), str, name), label.wrong_value, name) if len(more) % 2 else None
            if node == "":
                raise RecordError(f"{name}: the node is empty; it must then be absent")
            found = Binding(read_key(gateway, name), read_member(via, Via, name), node or "")
            return _with_canary(found, more, name) if more else found
    raise RecordError(f"{name} must be [gateway, via], with a node behind it or not, then [canary, percent] or not")


def _with_canary(binding: Binding, more: list[Value], name: str) -> Binding:
    canary = read_key(more[0], name)
    if canary == binding.gateway:
        raise RecordError(f"{name}: {canary} is its own canary")
    return replace(binding, canary=canary, percent=number_in(more[1], 0, 100, name))


def write_binding(binding: Binding) -> list[Value]:
    node: list[Value] = [binding.node] if binding.node else []
    canary: list[Value] = [binding.canary, binding.percent] if binding.canary else []
    return [binding.gateway, binding.via.value, *node, *canary]


def read_target(value: Value, name: str, namespace: str) -> Target:
    """Of a policy of this namespace."""
    kind: TargetKind
    match value:
        case ["Gateway" as kind, target]:
            wrong = wrong_subdomain
        case ["Service" as kind, target]:
            wrong = wrong_service_name
        case _:
            raise RecordError(f"{name}: each must be [Gateway or Service, name]")
    return Target(kind, key(namespace, checked(typed(target, str, name), wrong, name)))


def read_targets(fields: Fields, namespace: str) -> tuple[Target, ...]:
    """What a policy of this namespace is about: at least one."""
    targets = tuple(read_target(item, "targets", namespace) for item in fields.take("targets", list))
    if not targets:
        raise RecordError("targets is empty")
    check_ordered([(target.kind, target.key) for target in targets], "targets")
    return targets


def write_target(target: Target) -> list[Value]:
    return [target.kind, target.key.partition("/")[2]]


def read_member(value: Value, kind: type[_E], name: str) -> _E:
    """The member of an enumeration that has this text."""
    text = typed(value, str, name)
    try:
        return kind(text)
    except ValueError:
        known = ", ".join(str(member.value) for member in kind)
        raise RecordError(f"{name} is {text[:40]!r}; it must be one of {known}") from None


def read_address(value: Value, name: str) -> IpAddress:
    """An address in its canonical form."""
    text = typed(value, str, name)
    try:
        address = parse_address(text)
    except AddressError as error:
        raise RecordError(f"{name}: {error}") from None
    if address != text:
        raise RecordError(f"{name}: {text!r} must be written {address!r}")
    return address


def read_flag(fields: Fields, name: str) -> bool:
    """True, or absent."""
    if not fields.has(name):
        return False
    if not fields.take(name, bool):
        raise RecordError(f"{name} is false; it must then be absent")
    return True


def check_distinct(items: Sequence[object], name: str) -> None:
    if len(set(items)) != len(items):
        raise RecordError(f"{name} names one twice")


def check_ordered(items: Sequence[_Ordered], name: str) -> None:
    if any(first >= second for first, second in itertools.pairwise(items)):
        raise RecordError(f"{name} must be in order, each once")


def checked(text: str, wrong: Callable[[str], str], name: str) -> str:
    """Text that `wrong` finds right."""
    problem = wrong(text)
    if problem:
        raise RecordError(f"{name}: {problem}")
    return text


def read_labels(value: Value, name: str) -> dict[str, str]:
    pairs = typed(value, dict, name)
    if len(pairs) > label.MAX_LABELS:
        raise RecordError(f"{name} has {len(pairs)} labels; at most {label.MAX_LABELS}")
    return {
        checked(k, label.wrong_key, name): checked(typed(v, str, name), label.wrong_value, name)
        for k, v in pairs.items()
    }


def read_any_identity(text: str, trust_domain: TrustDomain) -> SpiffeId:
    """An identity of this trust domain."""
    try:
        found = SpiffeId.parse(text)
    except IdentityError as error:
        raise RecordError(f"identity: {error}") from None
    if found.trust_domain != trust_domain:
        raise RecordError(f"identity: {text} is of another trust domain than {trust_domain}")
    return found


def read_identity(text: str, trust_domain: TrustDomain, namespace: str) -> SpiffeId:
    """An identity of this trust domain and namespace."""
    found = read_any_identity(text, trust_domain)
    if found.namespace != namespace:
        raise RecordError(f"identity: {text} is of another namespace than {namespace}")
    return found
