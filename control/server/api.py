"""The control plane's own interface: JSON over HTTP on a Unix socket. Whoever may open the socket has the mesh.

    POST /v1/apply      {"documents": [{"file", "text"}], "dry_run", "release", "force"}               -> a change set
    POST /v1/delete     {"references": [{"kind", "namespace", "name"}], "dry_run", "release", "force"} -> a change set
    POST /v1/relabel    {"reference", "labels", "annotations", "overwrite", "dry_run", "release", "force"}
    POST /v1/bypass     {"namespace", "name", "for_s", "reason"}: a service goes round its waypoint; 0 ends it
    GET  /v1/bindings   what is bound to waypoints, how far that is, and which bypasses there are
    GET  /v1/processes  ?namespace=&gateway=; of one waypoint, with the software that each runs
    GET  /v1/resources  ?kind=&namespace=&name=; what is left out stands for all               -> {"resources": [...]}
    GET  /v1/records    what proxies that know everything were told, as it was published: {"records": [[topic, base64]]}
    POST /v1/tokens     {"namespace", "workload", "service_account", "addresses", "ttl_s"}, or {"node", "ttl_s"}
    GET  /v1/status     versions, broker, proxies and problems

A refusal is {"error": text}; one of resources has {"errors": [{"file", "line", "field", "problem"}]} beside it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import secrets
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from aiohttp import web

from control.api import index, messages, records
from control.api.address import IpAddress
from control.api.conditions import statuses_of
from control.api.declared import DeclaredRoute, Place
from control.api.gateway import Gateway
from control.api.identity import SpiffeId, TrustDomain
from control.api.messages import Body
from control.api.problems import ResourceErrors
from control.api.records import Record
from control.api.route import HTTPRoute
from control.api.route_api import ROUTES
from control.api.topics import (
    AddressesTopic,
    GatewayTopic,
    ManifestTopic,
    RecordTopic,
    RouteTopic,
    ServiceTopic,
    StatusTopic,
    WorkloadTopic,
    format_topic,
    parse_topic,
    subtree,
)
from control.api.workload import Service, key
from control.server import documents, proxies
from control.server.bindings import Trial
from control.server.core import Core
from control.server.enrolment import TOKEN_TTL_S, Enrolment, EnrolmentError
from control.server.members import Members
from control.server.metrics import Durations
from control.server.proxies import Row
from control.server.registry import Action, ChangeSet, Held, Loose, NotFound, named_place
from control.server.store import Store, StoreError

MAX_BODY_BYTES: Final = 256 * 1024 * 1024  # 100,000 workloads in YAML are 30 MB; only operators have the socket
_SOCKET_MODE: Final = 0o660
_SHUTDOWN_S: Final = 5.0
MAX_BYPASS_S: Final = 24 * 3600
_MAX_REASON: Final = 200
_MOST_QUESTIONS: Final = 2
"""Answered at once. The loop has six threads on two cores."""

_MOST_LOGGED: Final = 20
"""Resources of one change set that are named in the log."""
_PEERCRED: Final = struct.Struct("3i")  # struct ucred: process, user, group

_log = logging.getLogger(__name__)

Json = dict[str, Any]
_T = TypeVar("_T")


class RequestError(Exception):
    """A request that is refused as it stands; the text says why."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        """Of HTTP."""


class SocketError(Exception):
    """The socket cannot be made; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class BrokerState:
    """How the publisher stands with the broker."""

    connected: bool
    problem: str
    """Why it is not connected; empty when it is."""
    published: bool
    """Whether the broker has acknowledged all that there is to publish."""


class Api:
    """Answers operators, in threads. Changes are made one after the other, and so are tokens; whoever waits for a turn
    holds none of the threads, which the publisher needs too.
    """

    def __init__(
        self,
        core: Core,
        store: Store,
        enrolment: Enrolment,
        members: Members,
        trust_domain: TrustDomain,
        url: str,
        broker: Callable[[], BrokerState],
        on_identities: Callable[[], None],
        admit: Callable[[SpiffeId], None],
        issuers: Callable[[], list[str]],
        clock: Callable[[], float],
    ) -> None:
        """`url`: where workloads find the certificate server. `on_identities` is called in a thread when identities
        may have come or gone. So is `admit`, before a token for somebody is given out; it returns when the broker
        knows them. `issuers`: problems with the keys of issuers of tokens.
        """
        self._core = core
        self._store = store
        self._enrolment = enrolment
        self._members = members
        self._trust_domain = trust_domain
        self._url = url
        self._broker = broker
        self._on_identities = on_identities
        self._admit = admit
        self._issuers = issuers
        self._clock = clock
        self.answered: Counter[tuple[str, int]] = Counter()
        """(path, status) -> how many requests; a path that there is not is `other`."""
        self.changes = Durations()
        """Of changes that were made, and of dry runs."""
        changes, tokens, questions = asyncio.Lock(), asyncio.Lock(), asyncio.Semaphore(_MOST_QUESTIONS)
        self._routes: Mapping[tuple[str, str], tuple[Callable[[Json], Json], asyncio.Lock | asyncio.Semaphore]] = {
            ("POST", "/v1/apply"): (self._apply, changes),
            ("POST", "/v1/delete"): (self._delete, changes),
            ("POST", "/v1/relabel"): (self._relabel, changes),
            ("POST", "/v1/bypass"): (self._bypass, changes),
            ("GET", "/v1/bindings"): (self._bindings, questions),
            ("GET", "/v1/processes"): (self._processes, questions),
            ("POST", "/v1/tokens"): (self._token, tokens),
            ("GET", "/v1/resources"): (self._resources, questions),
            ("GET", "/v1/records"): (self._records, questions),
            ("GET", "/v1/status"): (self._status, questions),
        }

    async def run(self, listening: socket.socket) -> None:
        """Serve a listening socket until cancelled, then close it."""
        application = web.Application(client_max_size=MAX_BODY_BYTES)
        application.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=_SHUTDOWN_S)
        await runner.setup()
        try:
            await web.SockSite(runner, listening).start()
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        response = await self._response(request)
        known = (request.method, request.path) in self._routes
        self.answered[request.path if known else "other", response.status] += 1
        return response

    async def _response(self, request: web.Request) -> web.Response:
        try:
            route = self._routes.get((request.method, request.path))
            if route is None:
                raise RequestError(404, f"there is no {request.method} {request.path} in this release")
            answer, turn = route
            body = await request.read() if request.method == "POST" else b""
            asker = _asker(request)
            async with turn:
                began = time.monotonic()
                content = await asyncio.to_thread(_answered, answer, body, dict(request.query), asker)
                if request.method == "POST" and request.path != "/v1/tokens":
                    self.changes.add(time.monotonic() - began)
        except web.HTTPRequestEntityTooLarge:
            return _refusal(413, f"more than {MAX_BODY_BYTES} bytes; apply in parts")
        except (RequestError, EnrolmentError) as error:
            return _refusal(error.status, str(error))
        except NotFound as error:
            return _refusal(404, str(error))
        except StoreError as error:
            return _refusal(503, f"{error}. Nothing was changed")
        except (Held, Loose) as error:
            return _refusal(409, str(error))
        except ResourceErrors as error:
            return _refusal(422, str(error), errors=[asdict(one) for one in error.errors])
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            return _refusal(500, "the control plane failed at this; its log says where. Nothing was changed in part")
        return web.Response(body=content, content_type="application/json")

    def _apply(self, body: Json) -> Json:
        files = [_file(document) for document in _objects(_field(body, "documents", list))]
        dry_run, release = _field(body, "dry_run", bool, False), _field(body, "release", bool, False)
        force = _field(body, "force", bool, False)
        _finish(body)
        return self._changed(self._core.apply(files, dry_run=dry_run, release=release, force=force), dry_run)

    def _delete(self, body: Json) -> Json:
        places = [_place(reference) for reference in _objects(_field(body, "references", list))]
        dry_run, release = _field(body, "dry_run", bool, False), _field(body, "release", bool, False)
        force = _field(body, "force", bool, False)
        _finish(body)
        return self._changed(self._core.delete(places, dry_run=dry_run, release=release, force=force), dry_run)

    def _relabel(self, body: Json) -> Json:
        place = _place(_field(body, "reference", dict))
        labels = _pairs(_field(body, "labels", dict, {}))
        annotations = _pairs(_field(body, "annotations", dict, {}))
        overwrite = _field(body, "overwrite", bool, False)
        dry_run, release = _field(body, "dry_run", bool, False), _field(body, "release", bool, False)
        force = _field(body, "force", bool, False)
        _finish(body)
        if not overwrite:
            self._check_not_there(place, {"labels": labels, "annotations": annotations})
        change = self._core.relabel(
            place, labels=labels, annotations=annotations, dry_run=dry_run, release=release, force=force
        )
        return self._changed(change, dry_run)

    def _bypass(self, body: Json) -> Json:
        service = key(_field(body, "namespace", str), _field(body, "name", str))
        for_s, reason = _field(body, "for_s", int), _field(body, "reason", str, "")
        _finish(body)
        if not 0 <= for_s <= MAX_BYPASS_S:
            raise RequestError(400, f"a bypass lasts at most {MAX_BYPASS_S // 3600} hours; then ask again")
        if for_s and not (reason.strip() and reason.isprintable() and len(reason) <= _MAX_REASON):
            raise RequestError(400, f"say why, in at most {_MAX_REASON} printable characters")
        self._core.bypass(service, self._clock() + for_s, reason)
        return {"service": service, "for_s": for_s, "reason": reason}

    def _bindings(self, query: Json) -> Json:
        _finish(query)
        now = self._clock()
        return {
            "bindings": [
                {
                    "kind": one.subject[0],
                    "key": one.subject[1],
                    "gateway": one.state.gateway,
                    "previous": one.state.previous,
                    "phase": one.state.phase.value,
                    "optional": one.state.optional,
                    "canary": _canary(one.state.trial),
                    "since_s": max(0.0, now - one.state.since),
                    "settled": one.settled,
                    "waits_for": one.waits_for,
                }
                for one in self._core.progress()
            ],
            "bypasses": [
                {"service": service, "left_s": max(0.0, bypass.until - now), "reason": bypass.reason}
                for service, bypass in self._core.bypasses().items()
            ],
        }

    def _processes(self, query: Json) -> Json:
        namespace, name = _field(query, "namespace", str), _field(query, "gateway", str)
        _finish(query)
        gateway = self._record(GatewayTopic(namespace, name))
        instances = gateway.instances if isinstance(gateway, Gateway) else ()
        wanted = {instance.workload for instance in instances}
        rows = {row.workload: row for row in self.proxies() if row.workload in wanted}
        return {
            "processes": [
                {
                    "workload": instance.workload,
                    "node": instance.node,
                    "address": instance.address,
                    "state": row.state.value if (row := rows.get(instance.workload)) else None,
                    "software": row.status.version if row and row.status else None,
                    "notes": row.notes if row else (),
                }
                for instance in instances
            ]
        }

    def _check_not_there(self, place: Place, asked: Mapping[str, Mapping[str, str | None]]) -> None:
        """Raises RequestError for a value that would be replaced by another."""
        for _, text in self._core.get(*place):
            metadata = documents.values(text).get("metadata")
            for what, pairs in asked.items():
                there = metadata.get(what) if isinstance(metadata, dict) else None
                for name, value in pairs.items():
                    old = there.get(name) if isinstance(there, dict) else None
                    if old is not None and value is not None and old != value:
                        raise RequestError(
                            409, f"{named_place(place)} has {name}={old} already; --overwrite replaces it"
                        )

    def _changed(self, change: ChangeSet, dry_run: bool) -> Json:
        if not dry_run:
            self._on_identities()
        return {
            "changes": [
                {
                    "kind": one.place[0],
                    "namespace": one.place[1],
                    "name": one.place[2],
                    "change": one.action.value,
                    "diff": one.diff,
                }
                for one in change.resources
            ],
            "bindings": [
                {
                    "kind": kind,
                    "key": name,
                    "gateway": state.gateway if state else None,
                    "phase": state.phase.value if state else None,
                    "canary": _canary(state.trial) if state else None,
                }
                for (kind, name), state in sorted(change.bindings.items())
            ],
            "warnings": [asdict(warning) for warning in change.warnings],
            "messages": change.messages,
            "version": change.stamp,
            "dry_run": dry_run,
        }

    def _resources(self, query: Json) -> Json:
        asked = [_field(query, name, str, "") for name in ("kind", "namespace", "name")]
        _finish(query)
        return {"resources": [self._resource(place, text) for place, text in self._core.get(*asked)]}

    def _records(self, query: Json) -> Json:
        _finish(query)
        topics = [topic for topic in self._store.topics() if self._is_record(topic)]
        return {
            "trust_domain": self._trust_domain,
            "records": [
                (message.topic, base64.b64encode(message.payload).decode()) for message in self._store.messages(topics)
            ],
        }

    def _is_record(self, topic: str) -> bool:
        return isinstance(parse_topic(self._trust_domain, topic), RecordTopic | AddressesTopic)

    def _resource(self, place: Place, text: str) -> Json:
        kind, namespace, name = place
        found: Json = {"kind": kind, "namespace": namespace, "name": name, "document": text}
        if kind == "Service":
            found["vips"], found["endpoints"] = self._service(namespace, name)
        elif kind in ROUTES:
            found["parents"] = self._parents(namespace, name, text)
        return found

    def _service(self, namespace: str, name: str) -> tuple[list[IpAddress], int]:
        """What became of a service: its virtual addresses, and how many endpoints it has."""
        manifest = self._body(ManifestTopic(namespace, name))
        service = self._record(ServiceTopic(namespace, name))
        vips = service.vips if isinstance(service, Service) else ()
        return list(vips), index.read_manifest(manifest).count if manifest is not None else 0

    def _parents(self, namespace: str, name: str, text: str) -> list[Json]:
        """What became of a route, at each of its parents."""
        (document,) = documents.read(text, name)
        assert isinstance(document.resource, DeclaredRoute)
        abroad = [RouteTopic(other, f"{namespace}.{name}") for other in sorted(document.resource.abroad)]

        def service(key: str) -> Service | None:
            namespace, _, name = key.partition("/")
            found = self._record(ServiceTopic(namespace, name))
            return found if isinstance(found, Service) else None

        routes = [self._record(topic) for topic in (RouteTopic(namespace, name), *abroad)]
        return [asdict(one) for route in routes if isinstance(route, HTTPRoute) for one in statuses_of(route, service)]

    def _record(self, topic: ServiceTopic | RouteTopic | GatewayTopic) -> Record | None:
        """As it is published."""
        body = self._body(topic)
        return records.read(topic, body, self._trust_domain) if body is not None else None

    def _body(self, topic: ServiceTopic | RouteTopic | GatewayTopic | ManifestTopic) -> Body | None:
        message = self._store.message(format_topic(self._trust_domain, topic))
        return messages.decode(message.payload).body if message is not None else None

    def _token(self, body: Json) -> Json:
        ttl_s = _field(body, "ttl_s", int, TOKEN_TTL_S)
        if "node" in body:
            member = self._members.node(_field(body, "node", str))
        else:
            member = self._members.vouched(
                _field(body, "namespace", str),
                _field(body, "workload", str),
                _field(body, "service_account", str, ""),
                _texts(_field(body, "addresses", list, [])),
            )
        _finish(body)
        token = self._enrolment.create_token(self._url, member, ttl_s)
        expires_at = datetime.fromtimestamp(int(self._clock()) + ttl_s, UTC)
        self._admit(member.identity)
        return {
            "token": token.encode(),
            "identity": str(member.identity),
            "workload": member.workload,
            "addresses": list(member.addresses),
            "expires_at": expires_at.isoformat(),
        }

    def _status(self, query: Json) -> Json:
        _finish(query)
        now = self._clock()
        rows = self.proxies()
        broker, problems = self._broker(), self.problems()
        return {
            "ok": broker.connected and broker.published and proxies.all_well(rows),
            "trust_domain": self._trust_domain,
            "version": self._store.stamp(),
            "broker": asdict(broker),
            "resources": self._counts(),
            "problems": problems,
            "proxies": [_proxy(row, now) for row in rows],
        }

    def proxies(self) -> list[Row]:
        """What is to be said of every proxy."""
        reports = {
            topic: (report.status, report.received_at)
            for text, report in self._core.proxies().items()
            if isinstance(topic := parse_topic(self._trust_domain, text), StatusTopic)
        }
        return proxies.rows(reports, self._core.roots(), self._declared(), self._clock())

    def problems(self) -> list[str]:
        """What people should know of, of the mesh as a whole."""
        now = self._clock()
        return [
            *self._core.problems(),
            *self._issuers(),
            *(
                f"Service {service} goes round its waypoint for {bypass.until - now:.0f} s more: {bypass.reason}"
                for service, bypass in self._core.bypasses().items()
            ),
        ]

    def _counts(self) -> dict[str, int]:
        """Kind -> how many there are."""
        with self._store.transaction() as rows:
            return dict(rows.execute("SELECT kind, count(*) FROM resources GROUP BY kind ORDER BY kind").fetchall())

    def _declared(self) -> dict[str, str]:
        """Key of every declared workload -> proxy hash of its identity: its record's topic says both."""
        below = subtree(self._trust_domain, "wl").removesuffix("#")
        with self._store.transaction() as rows:
            found = rows.execute(
                "SELECT namespace, topic FROM records WHERE deleted_at = 0 AND topic > ? AND topic < ?",
                (below, below + "\U0010ffff"),
            ).fetchall()
        declared: dict[str, str] = {}
        for namespace, topic in found:
            workload = parse_topic(self._trust_domain, topic)
            if isinstance(workload, WorkloadTopic):
                declared[key(namespace, workload.instance)] = workload.proxy_hash
        return declared


def listen(path: Path) -> socket.socket:
    """A listening socket at a path, for its owner and group. Raises SocketError.

    It takes the path when it is complete, so that nobody meets it with other rights, and the remains of a crash go.
    """
    staging = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if path.exists() and not path.is_socket():
            raise SocketError(f"{path} exists and is no socket; name another place with --socket")
        if _answers(path):
            raise SocketError(f"another control plane listens on {path}; stop it, or name another place with --socket")
        found.bind(str(staging))
        os.chmod(staging, _SOCKET_MODE)
        found.listen()
        os.rename(staging, path)
    except OSError as error:
        found.close()
        raise SocketError(
            f"cannot listen on {path}: {error.strerror or error}; choose another place with --socket"
        ) from None
    except SocketError:
        found.close()
        raise
    finally:
        staging.unlink(missing_ok=True)
    found.setblocking(False)
    return found


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def _asker(request: web.Request) -> str:
    """Who is at the other end of the socket, for the log."""
    peer = request.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid, uid, _ = _PEERCRED.unpack(peer)
    return f"user {uid} (process {pid})"


def _answered(route: Callable[[Json], Json], body: bytes, query: Mapping[str, str], asker: str) -> bytes:
    """The JSON of an answer. Reading and writing it takes its time too, for a large mesh."""
    if not body:
        return json.dumps(route(dict(query))).encode()
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(400, "the request is not JSON") from None
    if type(request) is not dict:
        raise RequestError(400, "the request must be a JSON object")
    answer = route(request)
    if done := _done(answer):
        _log.info("%s %s", asker, done)
    return json.dumps(answer).encode()


def _done(answer: Json) -> str:
    """What a request did, for the log; empty when that is nothing."""
    if "token" in answer:
        return f"made a token for workload {answer['workload']} of {answer['identity']}"
    if "service" in answer:
        lasts = f"goes round its waypoint for {answer['for_s']} s: {answer['reason']}"
        return f"Service {answer['service']} {lasts if answer['for_s'] else 'goes round its waypoint no more'}"
    if answer["dry_run"]:
        return ""
    changes = [
        f"{one['change']} {named_place((one['kind'], one['namespace'], one['name']))}"
        for one in answer["changes"]
        if one["change"] != Action.UNCHANGED.value
    ]
    more = f" and {len(changes) - _MOST_LOGGED} more" if len(changes) > _MOST_LOGGED else ""
    return ", ".join(changes[:_MOST_LOGGED]) + more


def _refusal(status: int, text: str, **more: object) -> web.Response:
    return web.json_response({"error": text, **more}, status=status)


_MISSING: Final = object()


def _field(body: Json, name: str, kind: type[_T], default: Any = _MISSING) -> _T:
    """Takes a field out of a request. Raises RequestError."""
    value = body.pop(name, default)
    if value is _MISSING:
        raise RequestError(400, f"{name!r} is missing")
    if type(value) is not kind:
        raise RequestError(400, f"{name!r} must be of type {kind.__name__}")
    return value


def _finish(body: Json) -> None:
    """Raises RequestError for fields that nobody took: what is not understood is refused, not ignored."""
    for name in body:
        raise RequestError(400, f"{name!r} is not known to this control plane; is `meshctl` newer?")


def _objects(values: list[object]) -> list[Json]:
    if not all(type(value) is dict for value in values):
        raise RequestError(400, "a list must hold objects")
    return [value for value in values if isinstance(value, dict)]


def _texts(values: list[object]) -> list[str]:
    if not all(type(value) is str for value in values):
        raise RequestError(400, "a list must hold texts")
    return [value for value in values if isinstance(value, str)]


def _file(document: Json) -> tuple[str, str]:
    """Name and text."""
    file = _field(document, "file", str), _field(document, "text", str)
    _finish(document)
    return file


def _place(reference: Json) -> Place:
    place = (_field(reference, "kind", str), _field(reference, "namespace", str), _field(reference, "name", str))
    _finish(reference)
    return place


def _pairs(values: Json) -> dict[str, str | None]:
    if not all(value is None or type(value) is str for value in values.values()):
        raise RequestError(400, "labels and annotations are texts, or null to remove one")
    return values


def _proxy(row: Row, now: float) -> Json:
    status = row.status
    return {
        "workload": row.workload,
        "proxy_hash": row.proxy_hash,
        "state": row.state.value,
        "kind": status.kind.value if status else None,
        "software": status.version if status else None,
        "version": row.version,
        "age_s": row.age_s,
        "roots": dict(status.roots) if status else {},
        "applied_at": status.applied_at if status else None,
        "certificate": {"serial": status.serial, "left_s": status.not_after - now} if status else None,
        "notes": row.notes,
    }


def _canary(trial: Trial | None) -> Json | None:
    if trial is None:
        return None
    return {"gateway": trial.canary.gateway, "percent": trial.canary.percent, "step": trial.step.value}
