"""Answers the application's name queries: names of the mesh from what the mesh knows, all others from the nameserver
that was asked.

The kernel sends a captured query here, to the port that stands for its nameserver, and shows the application an answer
of that nameserver. One query's life, top to bottom: read -> whose name is it? -> from the mesh: ask the control plane
for what is not known, answer -> from outside: ask the nameserver, once, hand on what it says.

A name that may be the mesh's is never asked for outside before the mesh has said that it has none: an address from
there would be dialled in plaintext. So without configuration such a query fails.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import socket
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Final

from dns.rcode import Rcode

from control.api.address import IpAddress
from control.client.state import State
from uproxy import dns_messages, plane
from uproxy.dns_messages import Kind, MeshName, Question, UnansweredError
from uproxy.errors import RefusedError
from uproxy.listener import Inherited
from uproxy.plane import Plane
from uproxy.redirect import OriginalDestination, Route, original_destination
from uproxy.telemetry import Telemetry

if TYPE_CHECKING:
    from uproxy.demand import Demand

FIRST_PORT: Final = 15053
PORTS: Final = 8
"""One for each nameserver that an application may ask at a time (bpf/mesh.h)."""
MAX_QUERY_BYTES: Final = 4096
MAX_FORWARDED: Final = 256
"""Queries that wait for a nameserver, each with a socket of its own. Beyond, a query fails at once, and those for names
of the mesh are served all the same."""
MAX_WAITING: Final = 256
"""Queries that wait for the control plane."""
FORWARD_TIMEOUT_S: Final = 5.0
"""After which glibc and musl have asked again."""
QUERIES_PER_TURN: Final = 2
"""Of one port: a query takes a quarter of a millisecond, and traffic waits."""

_MAX_ANSWER_BYTES: Final = 65535
_MAX_STRAYS: Final = 16  # datagrams from the nameserver that are no answer, before a query is given up

log = logging.getLogger(__name__)


class Responder:
    """The name service of one workload. One thread: the data plane's."""

    def __init__(
        self,
        data_plane: Plane,
        state: State,
        telemetry: Telemetry,
        demand: Demand | None = None,
        inherited: Inherited | None = None,
    ) -> None:
        """`demand`: where names that are not known are asked for; None when there is nobody to ask. `inherited`: as for
        `Listeners`.
        """
        self._plane = data_plane
        self._state = state
        self._demand = demand
        self._inherited = inherited or Inherited()
        self.sockets: list[socket.socket] = []
        self._forwarding = 0
        self._waiting = 0
        self._answered = self._forwarded = self._failed = 0
        telemetry.counter("uproxy_dns_answered_total", "Name queries answered by the mesh", lambda: self._answered)
        telemetry.counter(
            "uproxy_dns_forwarded_total", "Name queries answered by their nameserver", lambda: self._forwarded
        )
        telemetry.counter(
            "uproxy_dns_failed_total", "Name queries without an answer, or with an error of ours", lambda: self._failed
        )

    def listen(self) -> None:
        """Raises OSError."""
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            for port in range(FIRST_PORT, FIRST_PORT + PORTS):
                try:
                    listener = self._inherited.take(socket.SOCK_DGRAM, address, port) or _bound(family, address, port)
                except OSError as error:
                    if family == socket.AF_INET6 and error.errno == errno.EADDRNOTAVAIL:
                        return  # no IPv6 here, so no query comes over it either
                    raise
                self.sockets.append(listener)
                self._plane.watch(listener.fileno(), plane.READ, partial(self._receive, listener))

    def leave(self) -> None:
        """Take no more queries; those that were taken are answered yet."""
        for listener in self.sockets:
            self._plane.unwatch(listener.fileno())

    def close(self) -> None:
        self.leave()
        for listener in self.sockets:
            listener.close()
        self.sockets.clear()

    def _receive(self, listener: socket.socket, _events: int) -> None:
        for _ in range(QUERIES_PER_TURN):
            try:
                query, app = listener.recvfrom(MAX_QUERY_BYTES)
            except OSError:
                return  # all read, or an answer could not be delivered
            self._plane.spawn(self._serve(listener, query, app))

    async def _serve(self, listener: socket.socket, query: bytes, app: tuple[str, int]) -> None:
        """One query, from here to its answer. Never raises."""
        try:
            answer = await self._answer(listener, query)
        except RefusedError as error:
            log.info("a name query failed: %s", error)
            answer = dns_messages.failure(query, Rcode.SERVFAIL)
            self._failed += 1
        except UnansweredError as error:
            log.info("a name query was refused: %s", error)
            answer = dns_messages.failure(query, error.rcode)
            self._failed += 1
        if answer is not None:
            with contextlib.suppress(OSError):  # the application is gone, or this proxy is
                listener.sendto(answer, app)

    async def _answer(self, listener: socket.socket, query: bytes) -> bytes | None:
        """None: none came in time. Raises RefusedError and UnansweredError."""
        question = dns_messages.read_question(query)
        name = dns_messages.mesh_name(question)
        if name is not None and await self._is_ours(name):
            answer = dns_messages.answer(query, name.zone, self._addresses(name))
            self._answered += 1
            return answer
        return await self._forward(original_destination(listener), query, question)

    async def _is_ours(self, name: MeshName) -> bool:
        """Whether a name is the mesh's, as soon as all is known of it. Raises RefusedError when that does not come."""
        if self._demand is not None and name.namespace:
            if self._waiting >= MAX_WAITING:
                raise RefusedError("no-config", f"{MAX_WAITING} queries wait for the control plane already")
            self._waiting += 1
            try:
                await self._demand.name(name.namespace, name.service)
            finally:
                self._waiting -= 1
        if not self._state.whole:
            raise RefusedError("no-config", "this uProxy has no configuration yet")
        return not name.is_short or self._state.service(name.service) is not None

    def _addresses(self, name: MeshName) -> list[IpAddress] | None:
        """None: there is no such name."""
        match name.kind:
            case Kind.ZONE:
                return []
            case Kind.NAMESPACE:
                return [] if self._has_namespace(name.namespace) else None
            case Kind.NOTHING:
                return None
        service = self._state.service(name.service)
        if service is None:
            return None
        if self._demand is not None:
            self._demand.used.add(name.service)
        if service.vips:
            return list(service.vips)
        # Headless: whoever serves it, in another order each time.
        ready = [endpoint.address for endpoint in self._state.endpoints(name.service) if endpoint.ready]
        return random.sample(ready, len(ready))

    def _has_namespace(self, namespace: str) -> bool:
        if self._demand is not None:
            return self._demand.has_namespace(namespace)
        return any(service.namespace == namespace for service in self._state.services())

    async def _forward(self, nameserver: OriginalDestination, query: bytes, question: Question) -> bytes | None:
        """The nameserver's answer. Each query has a port and a number of its own, which nobody else can guess."""
        if nameserver.route is Route.TUNNEL:
            raise RefusedError(
                "dns-in-plaintext",
                f"nameserver {nameserver.address} is in the mesh, and the query would go there in plaintext",
            )
        if self._forwarding >= MAX_FORWARDED:
            raise RefusedError("dns-full", f"{MAX_FORWARDED} queries wait for nameservers already")
        number = os.urandom(2)
        family = socket.AF_INET6 if ":" in nameserver.address else socket.AF_INET
        self._forwarding += 1
        try:
            with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as upstream:
                upstream.connect((nameserver.address, nameserver.port))  # so that nobody else is heard
                upstream.send(number + query[2:])
                answer = await self._heard(upstream, number, question)
        except TimeoutError:
            self._failed += 1
            return None  # the application has given up, too
        except OSError as error:
            raise RefusedError("dns-unreachable", f"nameserver {nameserver.address}: {error.strerror}") from error
        finally:
            self._forwarding -= 1
        self._forwarded += 1
        return query[:2] + answer[2:]

    async def _heard(self, upstream: socket.socket, number: bytes, question: Question) -> bytes:
        """Raises OSError, TimeoutError among them."""
        deadline = monotonic() + FORWARD_TIMEOUT_S
        for _ in range(_MAX_STRAYS):
            await self._plane.ready(upstream, plane.READ, deadline - monotonic())
            answer = upstream.recv(_MAX_ANSWER_BYTES)
            if answer[:2] == number and dns_messages.answers(answer, question):
                return answer
        raise TimeoutError


def _bound(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    """Raises OSError."""
    listener = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        listener.bind((address, port))
    except OSError:
        listener.close()
        raise
    return listener
