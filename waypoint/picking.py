"""Where a request may go: one of its rule's backends, and the endpoints of that, best first."""

from __future__ import annotations

import random

from control.api.route import Backend, RouteRule
from control.client.state import State
from uproxy.directory import Directory
from uproxy.errors import RefusedError
from uproxy.plane import Plane, Waiter
from uproxy.resolve import Hop
from waypoint import telemetry as flags
from waypoint.course import Course
from waypoint.destination import Destination, Destinations
from waypoint.refusal import RefusalError
from waypoint.routing import choose_backend
from waypoint.turn import Hops, Turn


class Picker:
    """Chooses for each request."""

    def __init__(
        self, data_plane: Plane, state: State, destinations: Destinations, directory: Directory | None
    ) -> None:
        """`directory`: where what is not known is asked for, if anywhere."""
        self._plane = data_plane
        self._state = state
        self._destinations = destinations
        self._directory = directory
        self._random = random.Random()

    async def pick(
        self, rule: RouteRule | None, destination: Destination, course: Course
    ) -> tuple[Backend | None, Hops]:
        """Where a request may go, best first. Raises RefusalError when nobody is there."""
        if rule is None:
            assert destination.backend is not None
            return None, (destination.backend,)
        exchange = course.exchange
        exchange.route = rule.name
        backend = choose_backend(rule, self._random)
        if backend is None:
            raise RefusalError(500, "no-backend", "the route that matches has no backend", flag=flags.NO_ROUTE)
        exchange.backend_service = backend.service
        if backend.refused:
            unasked = f"no ReferenceGrant lets this route send to Service {backend.service}"
            raise RefusalError(500, "no-backend", unasked, flag=flags.NO_ROUTE)
        try:
            try:
                return backend, self._hops(backend, course)
            except RefusedError:
                if self._directory is None:
                    raise
            # A route comes as soon as it is there, and what it leads to is asked for then.
            await self._follow(self._directory, backend.service, course)
            return backend, self._hops(backend, course)
        except RefusedError as error:
            if error.reason == "shutting-down":
                raise
            if self._state.service(backend.service) is None and error.reason == "no-endpoint":
                raise RefusalError(500, "no-backend", error.detail, flag=flags.NO_ROUTE) from None
            raise RefusalError(503, error.reason, error.detail, flag=flags.NO_BACKEND) from None

    async def of_service(self, service_key: str, port: int, course: Course) -> tuple[Hop, ...]:
        """Where somebody may be asked about a request, best first. Raises RefusedError, RefusalError."""
        try:
            return self._destinations.backends(service_key, port)
        except RefusedError:
            if self._directory is None:
                raise
        await self._follow(self._directory, service_key, course)  # as above
        return self._destinations.backends(service_key, port)

    def again(self, backend: Backend, course: Course) -> Hops:
        """Where another attempt may go, elsewhere than the one before if it can. Raises RefusalError."""
        try:
            hops = self._hops(backend, course)
        except RefusedError as error:
            raise RefusalError(503, error.reason, error.detail, flag=flags.NO_BACKEND) from None
        if isinstance(hops, Turn):
            return hops
        before = course.exchange.hbone_address.encode()
        return tuple(sorted(hops, key=lambda hop: hop.authority == before))

    def _hops(self, backend: Backend, course: Course) -> Hops:
        """Raises RefusedError."""
        before, course.turn = course.turn, None
        if before is not None:
            before.leave()
        hops = self._destinations.hops(
            backend.service,
            backend.port,
            course.caller,
            course.permitted,
            grpc=course.exchange.grpc,
            tried=before.tried if before is not None else (),
        )
        if isinstance(hops, Turn):
            course.turn = hops
        return hops

    async def _follow(self, directory: Directory, service_key: str, course: Course) -> None:
        """Wait for what a route leads to. Raises RefusedError when it does not come in time, RefusalError."""
        claim: Waiter[None] = Waiter(self._plane)
        course.claim = claim
        self._plane.spawn(_followed(directory, service_key, claim))
        try:
            await claim
        except ConnectionResetError as error:
            raise course.broken(error) from None
        finally:
            course.claim = None
        if course.cause is not None:  # in the turn in which the answer came
            raise course.cause


async def _followed(directory: Directory, service_key: str, claim: Waiter[None]) -> None:
    try:
        await directory.followed(service_key)
        claim.set(None)
    except RefusedError as error:
        claim.fail(error)
    finally:
        # Nothing, if it was settled; whoever waits must learn of a bug, too.
        claim.fail(RefusedError("no-config", "a bug of this proxy; its log has the traceback"))
