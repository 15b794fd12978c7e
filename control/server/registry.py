"""Desired state: resources in, what every namespace should publish out.

A change set is planned whole, against what is stored, and only then accepted. Only the namespaces that it touches are
read from the store (once) and built again. Two rules keep a control plane that is alive and wrong from taking the mesh
down: what removes most of a namespace is held until it is released, and a service that would lose its last ready
endpoint keeps the last ones it had.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Final

from control.api import messages, records, vips
from control.api.address import IpAddress
from control.api.bindings import Standings, Subject, Wish
from control.api.declared import (
    DeclaredExtension,
    DeclaredGateway,
    DeclaredGrant,
    DeclaredPeerAuthentication,
    DeclaredPolicy,
    DeclaredRequestAuthentication,
    DeclaredRoute,
    DeclaredService,
    DeclaredTraffic,
    DeclaredWorkload,
    Family,
    Place,
    Resource,
)
from control.api.gateway import Gateway, Instance, Placement
from control.api.identity import SpiffeId, TrustDomain, make_id, parse_trust_domain, proxy_hash
from control.api.index import Resident
from control.api.jwt import RequestAuthentication
from control.api.labels import GATEWAY_NAME, USE_WAYPOINT, Labels, selects
from control.api.mesh import Elsewhere, Mesh
from control.api.messages import Body, Stamp
from control.api.placements import STARTED
from control.api.policy import AuthorizationPolicy, PeerAuthentication
from control.api.problems import Findings, Position, ResourceError, ResourceErrors
from control.api.records import Record
from control.api.revocations import Revocations
from control.api.route import HTTPRoute
from control.api.route_api import ROUTES
from control.api.topics import EndpointTopic, format_topic
from control.api.traffic import TrafficPolicy
from control.api.waypoints import processes_of
from control.api.workload import Endpoint, Service, Workload, key
from control.server import documents
from control.server.bindings import Phase, State
from control.server.documents import Document
from control.server.publication import Message
from control.server.residents import Claim, Others, Residents, named
from control.server.store import Store

HELD_SHARE: Final = 0.5
"""A change that removes more than this share of a namespace's services and workloads is held (DESIGN invariant 9)."""
HELD_LEAST: Final = 4
"""... but not when it removes fewer than this many: a namespace of two is half gone with one."""

_MAX_FORMS: Final = 8  # namespaces; of 1,000 workloads each, they take 20 MB

_GUARDED: Final = ("Service", "WorkloadEntry")
_HEARD_OF_ELSEWHERE: Final = ("Gateway", "AuthorizationPolicy", "RequestAuthentication")
"""What says something about services and workloads of other namespaces that a Gateway of this one serves."""


class Action(Enum):
    """What a change set does to one resource."""

    ADDED = "added"
    CHANGED = "changed"
    UNCHANGED = "unchanged"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class ResourceChange:
    place: Place
    action: Action
    diff: str
    """Unified, of the documents; empty when unchanged."""


@dataclass(frozen=True, slots=True)
class ChangeSet:
    """What was done, or would be."""

    resources: tuple[ResourceChange, ...]
    """In the order they were given."""
    warnings: tuple[ResourceError, ...]
    messages: int
    """How many messages are published for it."""
    stamp: Stamp | None
    """(epoch, version) of these messages; None when there are none, and for a dry run."""
    bindings: Mapping[Subject, State | None]
    """The bindings to waypoints that it begins, changes or ends; None: not bound any more."""


class NotFound(Exception):
    """A resource that is not there; the text names it."""


class Held(Exception):
    """A change that takes so much away that an operator must release it. The text says what it removes."""


class Loose(Exception):
    """A change that binds something to a Gateway that is not there, or takes it away. The text names both."""


@dataclass(frozen=True, slots=True)
class _Form:
    """A record as it is published."""

    record: Record
    topic: str
    body: Body


@dataclass(frozen=True, slots=True)
class Bound:
    """What one namespace has to do with waypoints."""

    wishes: Mapping[Subject, Wish]
    """What its labels ask for."""
    served: Mapping[Subject, frozenset[str]]
    """Keys of the workloads behind whatever is bound or asks to be; what is not there any more is not in it."""
    instances: Mapping[str, Mapping[str, str]]
    """Key of each of its Gateways -> key of each workload that is a process of it -> proxy hash of its identity."""
    needed: frozenset[str]
    """Those of its Gateways whose processes each serve a part, so that none of them can stand for another."""
    beside: Mapping[str, frozenset[SpiffeId]]
    """Key of each of its Gateways whose processes uProxies start -> the identities of these: they read for them."""


@dataclass(frozen=True, slots=True)
class Built:
    """One namespace as it should be."""

    resources: Mapping[Place, Resource]
    warnings: tuple[ResourceError, ...]
    forms: Mapping[Hashable, _Form]
    bodies: Mapping[str, Body]
    """Topic -> body of every record."""
    unchanged: frozenset[str]
    """Topics of those that are known to be published as they are."""
    residents: Mapping[IpAddress, Resident]
    vips: Mapping[tuple[str, Family], IpAddress]
    bound: Bound
    old: Mapping[str, Message]
    """What is published of it now, by topic."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A change set that holds together and is not in force yet."""

    changes: tuple[ResourceChange, ...]
    warnings: tuple[ResourceError, ...]
    documents: Mapping[Place, str | None]
    """Those that change; None: removed."""
    namespaces: Mapping[str, Built]
    vips: Mapping[tuple[str, Family], IpAddress | None]
    """Those that change; None: given back."""
    fetched: Mapping[str, str]
    """Keys of issuers, by where they are published."""

    @property
    def bound(self) -> dict[str, Bound]:
        return {name: built.bound for name, built in self.namespaces.items()}


@dataclass(frozen=True, slots=True)
class _Namespace:
    """What is in force in one namespace."""

    resources: dict[Place, Resource]
    warnings: frozenset[tuple[str, str]]
    """Field and problem of those that were told already."""


class Registry:
    """The desired state of one store. Not for several threads at once."""

    def __init__(self, store: Store, trust_domain: TrustDomain, root_namespace: str, residents: Residents) -> None:
        """`residents`: as published, since those are the addresses that are taken."""
        self._store = store
        self._trust_domain = trust_domain
        self._root_namespace = root_namespace
        self.residents = residents
        self._held: dict[str, _Namespace] = {}
        self.bound: dict[str, Bound] = {}
        """By namespace, of those that were built since the start."""
        self._forms: dict[str, Mapping[Hashable, _Form]] = {}
        """Of the namespaces that changed last, so that a change of one record does not cost all of them."""
        self.fetched: Mapping[str, str] = store.fetched_keys()
        """Keys of issuers, by where they are published."""
        self._declared = frozenset(name for (_, _, name), _ in store.documents(kind="Namespace"))
        self._abroad: dict[Place, frozenset[str]] = {}
        """Routes with parents in other namespaces, and those namespaces."""
        for place, text in (found for kind in ROUTES for found in store.documents(kind=kind)):
            if text.count("namespace:") > 1:  # its own, and one more
                (document,) = documents.read(text, named_place(place))
                self._note_abroad(place, document.resource)
        self._vips: dict[str, dict[tuple[str, Family], IpAddress]] = {}
        for (service, family), address in store.vips().items():
            self._vips.setdefault(_namespace_of(service), {})[service, family] = address

    def plan(
        self,
        given: Sequence[Document],
        removed: Iterable[Place] = (),
        *,
        release: bool = False,
        standings: Standings = MappingProxyType({}),
        again: Collection[str] = (),
        fetched: Mapping[str, str] | None = None,
    ) -> Plan:
        """The change set that adds or replaces some resources and removes others.

        `standings`: what is bound to waypoints; `again`: namespaces to build again, since that has changed; `fetched`:
        keys of issuers, when they have. Raises ResourceErrors, NotFound and Held.
        """
        _check_distinct(given)
        texts: dict[Place, str | None] = {}
        changes: list[ResourceChange] = []
        for document in given:
            change = self._change(document)
            changes.append(change)
            if change.action is not Action.UNCHANGED:
                texts[document.place] = document.text
        for place in removed:
            changes.append(self._removal(place))
            texts[place] = None
        touched = {_group(place) for place in texts} | (set(again) & self._store.namespaces())
        if any(kind in _HEARD_OF_ELSEWHERE for kind, _, _ in texts) or self._changes_processes(texts, given):
            touched |= {
                _namespace_of(subject[1])
                for subject, standing in standings.items()
                if any(_namespace_of(gateway) in touched for gateway in standing.gateways)
            }
        if release:
            # What was kept back goes now, though no document says anything new.
            touched |= {_group(document.place) for document in given}
        declared = self._declared_after(texts)
        if declared and not self._declared:
            touched |= self._store.namespaces()
        released = frozenset(touched) if release else frozenset()
        if any(kind == "PeerAuthentication" and name == self._root_namespace for kind, name, _ in texts):
            touched |= self._store.namespaces()  # it may let plaintext in everywhere, and says nothing of endpoints
        if any(kind == "Extension" and name == self._root_namespace for kind, name, _ in texts):
            kinds = ("AuthorizationPolicy", "TrafficPolicy")
            touched |= {place[1] for kind in kinds for place, _ in self._store.documents(kind=kind)}
        if any(kind == "ReferenceGrant" for kind, _, _ in texts):
            touched |= {place[1] for kind in ROUTES for place, _ in self._store.documents(kind=kind)}
        parents = {name for place in texts for name in self._abroad.get(place, ())}
        for document in given:
            if document.place in texts and isinstance(document.resource, DeclaredRoute):
                parents |= document.resource.abroad
        touched |= parents & self._store.namespaces()
        resources = {name: dict(self._resources_of(name)) for name in touched}
        for place in texts:
            resources[_group(place)].pop(place, None)
        for document in given:
            if document.place in texts:
                resources[_group(document.place)][document.place] = document.resource
        if not release:
            self._check_removals(resources)
        keys = self.fetched if fetched is None else fetched
        built = self._build(resources, declared, standings, released, keys)
        files = {document.resource.position.file for document in given}
        return Plan(
            changes=tuple(changes),
            warnings=tuple(warning for name, one in built.items() for warning in self._untold(name, one, files)),
            documents=texts,
            namespaces=built,
            vips=self._vip_changes(built),
            fetched=keys,
        )

    def _changes_processes(self, changed: Collection[Place], given: Sequence[Document]) -> bool:
        """Whether what changes is a process of a Gateway, before or after: workloads elsewhere may believe it."""
        places = [place for place in changed if place[0] == "WorkloadEntry"]
        after = {document.place: document.resource for document in given}
        for place in places:
            before = self._resources_of(_group(place)).get(place)
            for one in (before, after.get(place)):
                if isinstance(one, DeclaredWorkload) and GATEWAY_NAME in one.labels:
                    return True
        return False

    def check_gateways(self, plan: Plan, old: Mapping[Subject, State], new: Mapping[Subject, State]) -> None:
        """Raises Loose when a plan takes away a Gateway that something is bound to, or binds something to none.

        `old`, `new`: the bindings, as they are and as they would be.
        """
        there = {key(namespace, name) for (_, namespace, name), _ in self._store.documents(kind="Gateway")}
        named = {
            key(namespace, name): text for (kind, namespace, name), text in plan.documents.items() if kind == "Gateway"
        }
        gone = {gateway for gateway, text in named.items() if text is None}
        moved = {gateway for gateway, text in named.items() if text is not None and self._moves(plan, gateway)}
        for subject, state in new.items():
            if state.phase is not Phase.LINGERING and (lost := gone & state.gateways):
                raise Loose(
                    f"Gateway {min(lost)} serves {' '.join(subject)}, whose callers would be refused. Take the label "
                    f"{USE_WAYPOINT} away first, or insist with --force"
                )
            if state.phase is not Phase.LINGERING and (torn := moved & state.gateways):
                raise Loose(
                    f"Gateway {min(torn)} serves {' '.join(subject)}, and would stand elsewhere: some calls fail until "
                    f"every proxy knows. Make another Gateway, and move the label {USE_WAYPOINT}, or insist with "
                    "--force"
                )
        there = (there | named.keys()) - gone
        for bound in plan.bound.values():
            for subject, wish in bound.wishes.items():
                named_before = old[subject].gateways if subject in old else frozenset()
                wanted = {wish.gateway} if wish.canary is None else {wish.gateway, wish.canary.gateway}
                if lacking := wanted - there - named_before:
                    raise Loose(
                        f"{' '.join(subject)} would be bound to Gateway {min(lacking)}, and there is none. Make it "
                        "with `meshctl waypoint apply`, or insist with --force"
                    )

    def accept(self, plan: Plan) -> None:
        """Takes a plan for what is in force, after the store has it."""
        self._declared = self._declared_after(plan.documents)
        self.fetched = plan.fetched
        self.residents.replace({name: built.residents for name, built in plan.namespaces.items()})
        for name, built in plan.namespaces.items():
            self._vips[name] = dict(built.vips)
            self.bound[name] = built.bound
            told = frozenset((warning.field, warning.problem) for warning in built.warnings)
            self._held[name] = _Namespace(dict(built.resources), told)
            self._forms.pop(name, None)
            self._forms[name] = built.forms
        for name in list(self._forms)[:-_MAX_FORMS]:
            del self._forms[name]
        for place, text in plan.documents.items():
            self._abroad.pop(place, None)
            if text is not None:
                resources = self._held[_group(place)].resources
                self._note_abroad(place, resources[place])
                resources[place] = _stored(place, resources[place])

    def key_uris(self) -> dict[str, frozenset[str]]:
        """Where keys of issuers are published -> the namespaces that ask for them."""
        found: dict[str, set[str]] = {}
        for namespace in {place[1] for place, _ in self._store.documents(kind="RequestAuthentication")}:
            for resource in self._resources_of(namespace).values():
                if isinstance(resource, DeclaredRequestAuthentication):
                    for uri in filter(None, resource.key_uris):
                        found.setdefault(uri, set()).add(namespace)
        return {uri: frozenset(namespaces) for uri, namespaces in found.items()}

    def _moves(self, plan: Plan, gateway_key: str) -> bool:
        """Whether a plan gives a Gateway that is there another placement."""
        namespace, _, name = gateway_key.partition("/")
        place: Place = ("Gateway", namespace, name)
        old, new = self._resources_of(namespace).get(place), plan.namespaces[namespace].resources.get(place)
        return (
            isinstance(old, DeclaredGateway) and isinstance(new, DeclaredGateway) and old.placement is not new.placement
        )

    def _change(self, document: Document) -> ResourceChange:
        old = self._store.document(document.place)
        if old is None:
            action = Action.ADDED
        elif old == document.text or documents.values(old) == documents.values(document.text):
            return ResourceChange(document.place, Action.UNCHANGED, "")
        else:
            action = Action.CHANGED
        diff = documents.difference(old or "", document.text, named_place(document.place))
        return ResourceChange(document.place, action, diff)

    def _removal(self, place: Place) -> ResourceChange:
        old = self._store.document(place)
        if old is None:
            raise NotFound(f"there is no {named_place(place)}")
        return ResourceChange(place, Action.REMOVED, documents.difference(old, "", named_place(place)))

    def _declared_after(self, texts: Mapping[Place, str | None]) -> frozenset[str]:
        names = {name: text for (kind, _, name), text in texts.items() if kind == "Namespace"}
        gone = {name for name, text in names.items() if text is None}
        return (self._declared | names.keys()) - gone

    def _resources_of(self, namespace: str) -> Mapping[Place, Resource]:
        """Those in force; read from the store at the first time."""
        if namespace not in self._held:
            found: dict[Place, Resource] = {}
            stored = self._store.documents(namespace=namespace)
            stored += self._store.documents(kind="Namespace", name=namespace)
            for place, text in stored:
                (document,) = documents.read(text, named_place(place))
                found[place] = _stored(place, document.resource)
            self._held[namespace] = _Namespace(found, frozenset())
        return self._held[namespace].resources

    def _check_removals(self, resources: Mapping[str, Mapping[Place, Resource]]) -> None:
        """Raises Held."""
        for namespace, after in sorted(resources.items()):
            before = [place for place in self._resources_of(namespace) if place[0] in _GUARDED]
            gone = [place for place in before if place not in after]
            if len(gone) >= HELD_LEAST and len(gone) > HELD_SHARE * len(before):
                examples = ", ".join(map(named_place, sorted(gone)[:HELD_LEAST]))
                raise Held(
                    f"this removes {len(gone)} of the {len(before)} services and workloads of namespace {namespace} "
                    f"({examples}, ...). If that is meant, do it again with --release"
                )

    def _build(
        self,
        resources: Mapping[str, Mapping[Place, Resource]],
        declared: frozenset[str],
        standings: Standings,
        released: Collection[str],
        fetched: Mapping[str, str],
    ) -> dict[str, Built]:
        """The touched namespaces, each by itself, against what the others hold. Raises ResourceErrors with all errors.

        The root namespace comes last, since its policies may select workloads of all others. `released`: those whose
        services may lose their last endpoint.
        """
        # Whoever comes first holds an address, but no allocation may take what another namespace asks for.
        claims: dict[IpAddress, Claim] = {}
        order = sorted(resources, key=lambda name: (name == self._root_namespace, name))
        for name in order:
            for address, holder in self._claims(name, resources[name].values()):
                claims.setdefault(address, (name, holder))
        principals = self._principals(resources)
        gateways, guarded = self._gateways(resources)
        placed = self._placed(gateways.values(), resources)
        of_mesh = self._peer_authentications(resources)
        extensions = self._extensions(resources)
        grants = self._grants(resources)
        trust_domain = parse_trust_domain(self._trust_domain)
        built: dict[str, Built] = {}
        errors: list[ResourceError] = []
        for name in order:
            old = {message.topic: message for message in self._store.messages_of(name)}
            elsewhere = Elsewhere(
                addresses=Others(name, resources, claims, self.residents),
                namespaces=declared,
                principals=principals,
                vips=self._vips.get(name, {}),
                gateways={key: one for key, one in gateways.items() if one.namespace != name},
                processes={key: found for key, found in placed.items() if _namespace_of(key) != name},
                guarded=frozenset(key for key in guarded if _namespace_of(key) != name),
                selects=partial(self._selected_elsewhere, name, resources),
                grants=[grant for grant in grants if grant.namespace != name],
                routes=self._routes_to(name, resources),
                service=partial(self._service, resources),
                last=partial(_ready_endpoints, trust_domain, {} if name in released else old),
                fetched=fetched,
                peer_authentications=() if name == self._root_namespace else of_mesh,
                extensions=() if name == self._root_namespace else extensions,
            )
            try:
                built[name] = self._build_one(name, resources[name], elsewhere, standings, old)
            except ResourceErrors as problem:
                errors += problem.errors
            else:
                for address, resident in built[name].residents.items():
                    claims.setdefault(address, (name, named(resident)))
        if errors:
            raise ResourceErrors(errors)
        return built

    def _build_one(
        self,
        name: str,
        resources: Mapping[Place, Resource],
        elsewhere: Elsewhere,
        standings: Standings,
        old: Mapping[str, Message],
    ) -> Built:
        mesh = Mesh.build(
            resources.values(), self._trust_domain, self._root_namespace, elsewhere=elsewhere, standings=standings
        )
        before = self._forms.get(name, {})
        forms = _forms_of(mesh, before)
        return Built(
            resources=resources,
            warnings=mesh.warnings,
            forms=forms,
            bodies={form.topic: form.body for form in forms.values()},
            unchanged=frozenset(form.topic for key, form in forms.items() if before.get(key) is form),
            residents=mesh.residents(),
            vips=mesh.vips,
            bound=_bound(name, mesh, standings),
            old=old,
        )

    def _principals(self, resources: Mapping[str, Mapping[Place, Resource]]) -> frozenset[str]:
        """Those of all workloads, when one of the namespaces that are being built has policies to hold against them."""
        every = [resource for found in resources.values() for resource in found.values()]
        if not any(isinstance(resource, DeclaredPolicy) for resource in every):
            return frozenset()
        accounts = {
            (resource.namespace, resource.service_account)
            for resource in every
            if isinstance(resource, DeclaredWorkload)
        }
        return self.residents.principals(without=resources).union(
            make_id(self._trust_domain, *account).principal for account in accounts
        )

    def _gateways(
        self, resources: Mapping[str, Mapping[Place, Resource]]
    ) -> tuple[dict[str, DeclaredGateway], frozenset[str]]:
        """All Gateways by key, and the keys of those that policies target, when some namespaces are as given."""
        having = {namespace for (_, namespace, _), _ in self._store.documents(kind="Gateway")}
        gateways: dict[str, DeclaredGateway] = {}
        guarded: set[str] = set()
        for name in {*having, *resources}:
            found = resources[name] if name in resources else self._resources_of(name)
            for resource in found.values():
                match resource:
                    case DeclaredGateway():
                        gateways[resource.key] = resource
                    case DeclaredPolicy() | DeclaredRequestAuthentication() | DeclaredTraffic():
                        guarded |= {target.key for target in resource.guards if target.kind == "Gateway"}
        return gateways, frozenset(guarded)

    def _placed(
        self, gateways: Iterable[DeclaredGateway], resources: Mapping[str, Mapping[Place, Resource]]
    ) -> dict[str, list[Instance]]:
        """The processes of Gateways that are not remote, by the Gateways' keys, when some namespaces are as given."""
        placed = [gateway for gateway in gateways if gateway.placement in STARTED]
        found: dict[str, list[Instance]] = {}
        for name in {gateway.namespace for gateway in placed}:
            held = resources[name] if name in resources else self._resources_of(name)
            workloads = [resource for resource in held.values() if isinstance(resource, DeclaredWorkload)]
            found |= processes_of([one for one in placed if one.namespace == name], workloads, Findings())
        return found

    def _note_abroad(self, place: Place, resource: Resource) -> None:
        if isinstance(resource, DeclaredRoute) and resource.abroad:
            self._abroad[place] = resource.abroad

    def _routes_to(self, name: str, resources: Mapping[str, Mapping[Place, Resource]]) -> list[DeclaredRoute]:
        """The routes of other namespaces with parents in this one, when some namespaces are as given."""
        held = (
            self._resources_of(place[1])[place]
            for place, namespaces in self._abroad.items()
            if name in namespaces and place[1] not in resources
        )
        given = (one for namespace, found in resources.items() if namespace != name for one in found.values())
        return [one for one in chain(held, given) if isinstance(one, DeclaredRoute) and name in one.abroad]

    def _grants(self, resources: Mapping[str, Mapping[Place, Resource]]) -> list[DeclaredGrant]:
        """All ReferenceGrants, when some namespaces are as given."""
        having = {namespace for (_, namespace, _), _ in self._store.documents(kind="ReferenceGrant")}
        every = (resources[name] if name in resources else self._resources_of(name) for name in {*having, *resources})
        return [one for found in every for one in found.values() if isinstance(one, DeclaredGrant)]

    def _service(self, resources: Mapping[str, Mapping[Place, Resource]], service_key: str) -> DeclaredService | None:
        """A Service of any namespace, when some are as given."""
        namespace, _, name = service_key.partition("/")
        found = resources[namespace] if namespace in resources else self._resources_of(namespace)
        service = found.get(("Service", namespace, name))
        return service if isinstance(service, DeclaredService) else None

    def _peer_authentications(self, resources: Mapping[str, Mapping[Place, Resource]]) -> list[PeerAuthentication]:
        """Those of the root namespace, which hold in all others too, when some namespaces are as given."""
        root = self._root_namespace
        found = resources[root] if root in resources else self._resources_of(root)
        return [one.peer_authentication for one in found.values() if isinstance(one, DeclaredPeerAuthentication)]

    def _extensions(self, resources: Mapping[str, Mapping[Place, Resource]]) -> list[DeclaredExtension]:
        """Those of the root namespace, which policies of all others may name too, when some namespaces are as given."""
        root = self._root_namespace
        found = resources[root] if root in resources else self._resources_of(root)
        return [one for one in found.values() if isinstance(one, DeclaredExtension)]

    def _selected_elsewhere(
        self, name: str, resources: Mapping[str, Mapping[Place, Resource]], selector: Labels
    ) -> bool:
        """Whether a workload of another namespace has these labels."""
        building = (found for other, found in resources.items() if other != name)
        untouched = (self._resources_of(other) for other in self._store.namespaces() - resources.keys())
        return any(_selects_any(selector, found) for found in chain(building, untouched))

    def _claims(self, namespace: str, resources: Iterable[Resource]) -> Iterator[tuple[IpAddress, str]]:
        """The addresses that a namespace's resources ask for, or were given earlier and keep; and who does."""
        earlier = self._vips.get(namespace, {})
        for resource in resources:
            match resource:
                case DeclaredWorkload():
                    yield from ((address, f"WorkloadEntry {resource.key}") for address in resource.addresses)
                case DeclaredService():
                    for family in resource.families:
                        address = vips.asked(resource, family) or earlier.get((resource.key, family))
                        if address is not None:
                            yield address, vips.holder(resource)

    def _vip_changes(self, built: Mapping[str, Built]) -> dict[tuple[str, Family], IpAddress | None]:
        changes: dict[tuple[str, Family], IpAddress | None] = {}
        for name, one in built.items():
            old = self._vips.get(name, {})
            changes |= {service: None for service in old if service not in one.vips}
            changes |= {service: address for service, address in one.vips.items() if old.get(service) != address}
        return changes

    def _untold(self, name: str, built: Built, files: Collection[str]) -> list[ResourceError]:
        """The warnings about what was given now, and those that are new."""
        told = self._held[name].warnings
        return [
            warning
            for warning in built.warnings
            if warning.file in files or (warning.field, warning.problem) not in told
        ]


def named_place(place: Place) -> str:
    """How a resource is called in messages to people: `Service shop/web`."""
    kind, namespace, name = place
    return f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"


def _group(place: Place) -> str:
    """The namespace that a resource is built with."""
    kind, namespace, name = place
    return name if kind == "Namespace" else namespace


def _namespace_of(service_key: str) -> str:
    return service_key.partition("/")[0]


def _stored(place: Place, resource: Resource) -> Resource:
    """A resource without the lines of the file it came from, which is another's and takes more memory than the rest."""
    return replace(resource, position=Position(named_place(place), 0, {}))


def _forms_of(mesh: Mesh, before: Mapping[Hashable, _Form]) -> dict[Hashable, _Form]:
    """All records of a namespace; those that are as they were `before` are the very same."""
    forms: dict[Hashable, _Form] = {}
    every: Iterable[Record] = (
        *mesh.services,
        *mesh.workloads,
        *mesh.endpoints,
        *mesh.policies,
        *mesh.gateways,
        *mesh.request_authentications,
        *mesh.traffic,
        *mesh.routes,
    )
    for record in every:
        key = _key_of(record)
        form = before.get(key)
        if form is None or form.record != record:
            topic = format_topic(mesh.trust_domain, records.topic_of(record))
            form = _Form(record, topic, records.write(record))
        forms[key] = form
    return forms


def _bound(namespace: str, mesh: Mesh, standings: Standings) -> Bound:
    concerned = {*mesh.wishes, *(subject for subject in standings if _namespace_of(subject[1]) == namespace)}
    served: dict[Subject, frozenset[str]] = {}
    if concerned:
        behind: dict[str, set[str]] = {service.key: set() for service in mesh.services}
        for endpoint in mesh.endpoints:
            behind[endpoint.service].add(endpoint.workload)
        workloads = {workload.key for workload in mesh.workloads}
        for subject in concerned:
            kind, key = subject
            if kind == "Service" and key in behind:
                served[subject] = frozenset(behind[key])
            elif kind == "WorkloadEntry" and key in workloads:
                served[subject] = frozenset({key})
    instances = {
        gateway.key: {
            one.workload: proxy_hash(gateway.identity_of(mesh.trust_domain, one)) for one in gateway.instances
        }
        for gateway in mesh.gateways
    }
    beside = _beside(mesh, standings, served)
    for gateway_key, workloads_beside in beside.items():
        instances[gateway_key] = {one.key: proxy_hash(one.identity) for one in workloads_beside}
    needed = frozenset(gateway.key for gateway in mesh.gateways if gateway.placement in STARTED)
    identities = {key: frozenset(one.identity for one in workloads) for key, workloads in beside.items()}
    return Bound(mesh.wishes, served, instances, needed, identities)


def _beside(
    mesh: Mesh, standings: Standings, served: Mapping[Subject, frozenset[str]]
) -> dict[str, tuple[Workload, ...]]:
    """Key of each Gateway of placement sidecar -> the workloads beside which its processes stand, or are about to."""
    found: dict[str, set[str]] = {one.key: set() for one in mesh.gateways if one.placement is Placement.SIDECAR}
    for subject, keys in served.items() if found else ():
        wish, standing = mesh.wishes.get(subject), standings.get(subject)
        asked = {wish.gateway} if wish is not None else set()
        for gateway_key in asked.union(standing.gateways if standing is not None else ()) & found.keys():
            found[gateway_key] |= keys
    return {key: tuple(one for one in mesh.workloads if one.key in keys) for key, keys in found.items()}


def _key_of(record: Record) -> Hashable:
    """What tells a record from all others of its namespace, and is cheaper to make than its topic."""
    match record:
        case Service():
            return "svc", record.name
        case Workload():
            return "wl", record.name
        case Endpoint():
            return "ep", record.service, record.workload
        case AuthorizationPolicy():
            return "policy", record.name
        case RequestAuthentication():
            return "reqauth", record.name
        case TrafficPolicy():
            return "traffic", record.name
        case Gateway():
            return "gw", record.name
        case HTTPRoute():
            return "route", record.name
        case Revocations():  # of no resource, but there is one in a namespace
            return ("crl",)


def _selects_any(selector: Labels, resources: Mapping[Place, Resource]) -> bool:
    return any(
        isinstance(resource, DeclaredWorkload) and selects(selector, resource.labels) for resource in resources.values()
    )


def _check_distinct(given: Iterable[Document]) -> None:
    """Raises ResourceErrors when a resource is given twice: which of the two is meant?"""
    first: dict[Place, Position] = {}
    errors: list[ResourceError] = []
    for document in given:
        position = document.resource.position
        other = first.setdefault(document.place, position)
        if other is not position:
            problem = f"{named_place(document.place)} stands in {other.file}:{other.line} too; remove one"
            errors.append(position.error("metadata.name", problem))
    if errors:
        raise ResourceErrors(errors)


def _ready_endpoints(trust_domain: TrustDomain, old: Mapping[str, Message], service: DeclaredService) -> list[Endpoint]:
    """Those of a service that are published now."""
    prefix = format_topic(trust_domain, EndpointTopic(service.namespace, service.name, ""))
    found: list[Endpoint] = []
    for name, message in old.items():
        body = messages.decode(message.payload).body if name.startswith(prefix) else None
        if body is not None:
            topic = EndpointTopic(service.namespace, service.name, name.removeprefix(prefix))
            record = records.read(topic, body, trust_domain)
            if isinstance(record, Endpoint) and record.ready:
                found.append(record)
    return found
