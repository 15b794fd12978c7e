"""What a connection needs and this proxy does not know yet: asked for once, waited for, bounded.

A proxy subscribes to what it dials. The first connection to a destination asks who lives at the address (its shard),
then for the service there and its endpoints, and for the Gateways that the service or the workload is bound to; whoever
dials it meanwhile waits for the same answer. A destination that is known never comes here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Final

from control.api.address import IpAddress
from control.api.index import ResidentService, ResidentWorkload
from control.api.topics import address_shard
from control.client.replica import Replica, Status
from control.client.state import State
from uproxy.errors import Flag, RefusedError
from uproxy.plane import Plane, Waiter

PATIENCE_S: Final = 5.0
"""How long one connection waits, over all that it needs."""
MAX_SERVICES: Final = 1000
"""Services subscribed to because they were dialled. Beyond, one makes room for the next: one that did not come, else
the one that was unused for longest, which costs its next caller another wait."""
MAX_GATEWAYS: Final = 100
"""Gateways subscribed to because workloads were dialled that are bound to them; the oldest makes room. Those that
services are bound to come and go with the services."""
MAX_SERVED: Final = 32
"""Services subscribed to because callers say that this workload serves them; the oldest makes room."""
MAX_CALLER_BYTES: Final = 1024 * 1024
"""Of addresses, beyond which no more are subscribed to for a caller's name: all of 10,000, a tenth of 100,000."""
NAME_PATIENCE_S: Final = 3.0
"""How long a name query waits: less than the 5 s after which glibc and musl ask again."""
COURTESY_S: Final = 0.1
"""How long a caller waits to be known by name, the first time that anybody comes from its shard of addresses."""
SWEEP_S: Final = 60.0

_MAX_STRANGERS: Final = 8  # shards that are asked for at once for callers


@dataclass(frozen=True, slots=True)
class _Base:
    """What this workload cannot be without: its own record and the policies that may select it."""


@dataclass(frozen=True, slots=True)
class _Address:
    ip: IpAddress


@dataclass(frozen=True, slots=True)
class _Service:
    key: str


@dataclass(frozen=True, slots=True)
class _Gateway:
    key: str


@dataclass(frozen=True, slots=True)
class _Namespaces:
    """Which namespaces have services."""


_Need = _Base | _Address | _Service | _Gateway | _Namespaces


class Demand:
    """Asks the replica on behalf of connections. One thread: the data plane's."""

    def __init__(
        self, data_plane: Plane, state: State, replica: Replica, interests_changed: Callable[[], None]
    ) -> None:
        """`interests_changed` is called after the replica was asked for more, or for less."""
        self.used: set[str] = set()
        """Keys of the services dialled since the last sweep; `outbound` fills it."""
        self.timeouts = 0
        """Connections that were refused because what they needed did not come."""
        self._plane = data_plane
        self._state = state
        self._replica = replica
        self._interests_changed = interests_changed
        self._dialled: dict[str, None] = {}  # the one unused for longest comes first
        self._unanswered: frozenset[str] = frozenset()  # of these, what had not come at the last sweep
        self._served: dict[str, None] = {}  # the oldest comes first
        self._gateways: dict[str, None] = {}  # likewise
        self._strangers: dict[int, IpAddress] = {}
        """Shard that has not come -> the caller it was asked for, since the last sweep."""
        self._waiting: dict[_Need, set[Waiter[None]]] = {}
        self._sweep_at = monotonic() + SWEEP_S

    def take_over(self) -> None:
        """Count the services and Gateways that the replica has from an earlier process."""
        self._dialled = dict.fromkeys(self._replica.services())
        self._gateways = dict.fromkeys(self._replica.gateways())

    @property
    def services(self) -> int:
        """How many services are subscribed to because they were dialled."""
        return len(self._dialled)

    async def destination(self, address: IpAddress) -> None:
        """Return when everything about an address is known, also that nobody lives there. Raises RefusedError."""
        deadline = monotonic() + PATIENCE_S
        await self._until(_Base(), deadline)
        if not self._is_answered(_Address(address)):
            self._want_address(address)
        await self._until(_Address(address), deadline)
        match self._state.resident_at(address):
            case ResidentService() as service:
                self._want_service(service.key, self._dialled, MAX_SERVICES)
                await self._until(_Service(service.key), deadline)
            case ResidentWorkload() as workload:
                for gateway in (one for _, binding in workload.bindings for one in binding.gateways):
                    self._want_gateway(gateway)
                    await self._until(_Gateway(gateway), deadline)

    async def service(self, service_key: str) -> None:
        """As `destination`, for a service that was dialled by its name."""
        deadline = monotonic() + PATIENCE_S
        await self._until(_Base(), deadline)
        self._want_service(service_key, self._dialled, MAX_SERVICES)
        await self._until(_Service(service_key), deadline)

    async def name(self, namespace: str, service_key: str) -> None:
        """Return when it is known whether there is such a namespace, and such a service of it: what a name query needs.

        Either may be empty. Raises RefusedError, after less time than `service`.
        """
        if service_key and self._is_known(service_key):
            return
        deadline = monotonic() + NAME_PATIENCE_S
        await self._until(_Base(), deadline)
        await self._until(_Namespaces(), deadline)
        if service_key and self.has_namespace(namespace):
            self._want_service(service_key, self._dialled, MAX_SERVICES)
            await self._until(_Service(service_key), deadline)

    def has_namespace(self, namespace: str) -> bool:
        """Whether a namespace has services, as far as it is known."""
        return self._replica.namespace_status(namespace) is Status.KNOWN

    async def followed(self, service_key: str) -> None:
        """Return when a service is known, or known not to be there, to which what is known leads: nothing is asked for.

        Raises RefusedError.
        """
        await self._until(_Service(service_key), monotonic() + PATIENCE_S)

    async def served(self, service_key: str) -> None:
        """As `service`, for one that a caller dialled and this workload may serve."""
        deadline = monotonic() + PATIENCE_S
        self._want_service(service_key, self._served, MAX_SERVED)
        await self._until(_Service(service_key), deadline)

    async def introduce(self, caller: IpAddress | None, service_key: str) -> None:
        """Ask who calls (None: it is known) and for the service that it says we serve (may be empty).

        Telemetry only: waits a moment, the first time, and does without the answer.
        """
        needs: list[_Need] = []
        if caller is not None and self._asks_for(caller):
            needs.append(_Address(caller))
        if service_key and service_key not in self._served:
            self._want_service(service_key, self._served, MAX_SERVED)
            needs.append(_Service(service_key))
        deadline = monotonic() + COURTESY_S
        with suppress(TimeoutError):
            for need in needs:
                await self._wait(need, deadline)

    def progress(self) -> None:
        """The replica may know more: call it on the plane, after the state was brought up to date."""
        for need in [need for need in self._waiting if self._is_answered(need)]:
            for waiter in self._waiting.pop(need):
                waiter.set(None)
        for shard in [shard for shard, caller in self._strangers.items() if self._is_answered(_Address(caller))]:
            del self._strangers[shard]

    def tick(self, now: float) -> None:
        """Called every few seconds: forget what was asked for and never came, and note which services are in use."""
        if now < self._sweep_at:
            return
        self._sweep_at = now + SWEEP_S
        for service_key in self.used & self._dialled.keys():
            self._dialled[service_key] = self._dialled.pop(service_key)
        self.used.clear()
        unanswered = frozenset(one for one in self._dialled if not self._is_known(one))
        for service_key in unanswered & self._unanswered:
            if _Service(service_key) not in self._waiting:
                self._drop(service_key, self._dialled)
        self._unanswered = unanswered
        self._strangers.clear()

    async def _until(self, need: _Need, deadline: float) -> None:
        """Raises RefusedError when it does not come in time."""
        try:
            await self._wait(need, deadline)
        except TimeoutError:
            self.timeouts += 1
            raise RefusedError(
                "no-config",
                f"{_described(need)} did not come from the control plane in time",
                flag=Flag.NO_CONFIG,
            ) from None

    async def _wait(self, need: _Need, deadline: float) -> None:
        """Raises TimeoutError."""
        if self._is_answered(need):
            return
        waiters = self._waiting.setdefault(need, set())
        waiter: Waiter[None] = Waiter(self._plane)
        waiters.add(waiter)
        try:
            await self._plane.wait(waiter, deadline - monotonic())
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiting.get(need) is waiters:
                del self._waiting[need]

    def _asks_for(self, caller: IpAddress) -> bool:
        """Asks for a caller's shard of addresses, within bounds. Whether it did."""
        shard = address_shard(caller)
        if (
            shard in self._strangers
            or len(self._strangers) >= _MAX_STRANGERS
            or self._state.address_bytes >= MAX_CALLER_BYTES
            or self._is_answered(_Address(caller))
        ):
            return False
        self._strangers[shard] = caller
        self._want_address(caller)
        return True

    def _is_answered(self, need: _Need) -> bool:
        match need:
            case _Base():
                return self._replica.based
            case _Address(ip):
                return self._state.covers(ip)
            case _Service(service_key):
                return self._replica.service_status(service_key) is not Status.WAITING
            case _Gateway(gateway_key):
                return self._replica.gateway_status(gateway_key) is not Status.WAITING
            case _Namespaces():
                return self._replica.namespace_status("") is not Status.WAITING

    def _is_known(self, service_key: str) -> bool:
        return self._replica.service_status(service_key) is Status.KNOWN

    def _want_address(self, address: IpAddress) -> None:
        self._replica.want_address(address)
        self._interests_changed()

    def _want_service(self, service_key: str, among: dict[str, None], limit: int) -> None:
        if service_key in among:
            return
        if len(among) >= limit:
            self._drop(next((one for one in among if not self._is_known(one)), next(iter(among))), among)
        among[service_key] = None
        self._replica.want_service(service_key)
        self._interests_changed()

    def _want_gateway(self, gateway_key: str) -> None:
        if gateway_key in self._gateways:
            return
        while len(self._gateways) >= MAX_GATEWAYS:  # services may have led an earlier process to more
            oldest = next(iter(self._gateways))
            del self._gateways[oldest]
            self._replica.drop_gateway(oldest)
        self._gateways[gateway_key] = None
        self._replica.want_gateway(gateway_key)
        self._interests_changed()

    def _drop(self, service_key: str, among: dict[str, None]) -> None:
        del among[service_key]
        if service_key not in self._dialled and service_key not in self._served:
            self._replica.drop_service(service_key)
            self._interests_changed()


def _described(need: _Need) -> str:
    match need:
        case _Base():
            return "this workload's own configuration"
        case _Address(ip):
            return f"who lives at {ip}"
        case _Service(service_key):
            return f"the configuration of service {service_key}"
        case _Gateway(gateway_key):
            return f"the Gateway {gateway_key}"
        case _Namespaces():
            return "the list of namespaces"
