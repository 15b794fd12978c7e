"""Who may go direct on this host: what both uProxies of a pair agree on, and what this process has looked up itself.

A grant is to an instance: one app cgroup may dial one port of one namespace. The destination's uProxy names the tunnel
in which the caller proved who it is, and the kernel is asked whose socket that tunnel's other end is. Then the way
between the two is tried once, and looked at now and then. Whatever is unclear is no grant, and goes by the tunnel.

A grant lives for `LIFETIME_S` and is renewed while both uProxies go on saying so. Its end, however it comes, is the end
of its connections. An agent that dies grants nothing more: what it granted runs out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from bpf.arena import ArenaFullError, Backend
from bpf.libbpf import BpfError
from bpf.maps import Grant, Maps, Pair
from control.api.address import HBONE_PORT, IpAddress, from_packed, packed16
from control.api.identity import SpiffeId
from uproxy.node import channel, routes
from uproxy.node.channel import LIFETIME_S, Allowed, Choice, Said
from uproxy.node.destroy import Found, Sockets
from uproxy.node.flows import FlowTeller
from uproxy.node.peers import Peer
from uproxy.node.sync import stable_id
from uproxy.node.ways import RETRY_S, Ways, sources_of
from uproxy.node.workloads import Captured
from uproxy.resolve import backend_id

_log: Final = logging.getLogger(__name__)

TICK_S: Final = 0.25
LOOK_S: Final = 10.0
"""Between two looks at the ways in use."""
_SETTLE_S: Final = 3.0  # after a start: until uProxies are told who is here, so that a restart looks like no change
_RESERVED: Final = range(15000, 15091)  # the uProxy's own ports
_NS: Final = 1_000_000_000

Dialled = tuple[int, bytes, int]
"""By whom (app cgroup), and what: the key of `direct_services`."""


@dataclass(frozen=True, slots=True)
class _Granted:
    source: Captured
    target: Captured
    expiry_ns: int


@dataclass(slots=True)
class _Ending:
    """Connections that have to end. In two rounds, so that one that was just being made is met too."""

    pair: Pair
    source: Captured
    target: Captured
    rounds: int = 2


class Grants:
    """The one writer of `grants` and `direct_services`, and the one reader of `flows`."""

    def __init__(
        self,
        maps: Maps,
        captured: Callable[[], Sequence[Captured]],
        identity_at: Callable[[IpAddress], SpiffeId | None],
    ) -> None:
        """`captured`: the workloads of the moment; `identity_at`: who has an address, says the configuration.

        Takes over what an earlier agent granted: it lives on where it is renewed in time.
        """
        self._maps = maps
        self._captured = captured
        self._identity_at = identity_at
        self._peers: dict[str, Peer] = {}
        self._here: dict[Captured, float] = {}
        """Workloads that go direct, and when their uProxy was last heard of: it may be restarting."""
        self._sockets: dict[Captured, Sockets] = {}
        self._choices: dict[Dialled, tuple[Backend, ...]] = {}
        self._consents: dict[Captured, dict[tuple[IpAddress, int], SpiffeId]] = {}
        """Which backends a caller would dial directly, and as whom."""
        self._taken: dict[Captured, Said] = {}
        """What a caller has said last, as far as it is in `_choices` and `_consents`."""
        self._granted: dict[Pair, _Granted] = {}
        self._ending: list[_Ending] = []
        self._ways = Ways(maps)
        self._flows = FlowTeller(identity_at)
        self._started = self._look_at = time.monotonic()
        self._local: frozenset[IpAddress] = frozenset()  # what uProxies were told
        self._at: dict[IpAddress, Captured] = {}
        self._adopted = maps.grants.items()
        for dialled in maps.direct_services.items():
            maps.direct_services.delete(*dialled)
        self._look()

    def status(self) -> dict[str, int]:
        """For people."""
        return {"direct_uproxies": len(self._peers), "direct_grants": len(self._granted)}

    # -- what uProxies say (`peers.Listener`)

    def joined(self, peer: Peer) -> None:
        former = self._peers.get(peer.workload.name)
        if former is not None:
            former.hang_up()  # the newer one is the one that runs
        self._peers[peer.workload.name] = peer
        self._here[peer.workload] = time.monotonic()
        if peer.workload in self._sockets:
            self._sockets[peer.workload].close()
        self._sockets[peer.workload] = peer.sockets
        if self._local:
            peer.tell(channel.pack_local(sorted(self._local)))

    def heard(self, peer: Peer) -> None:
        if self._peers.get(peer.workload.name) is not peer:
            return
        self._look()
        if peer.said is not None and not peer.said.direct:
            self._take_back(peer.workload)
            return
        self._here[peer.workload] = time.monotonic()
        # What others allow this one may have waited for its consent.
        for one in list(self._peers.values()) if self._consent(peer) else [peer]:
            self._write_grants(one)

    def left(self, peer: Peer) -> None:
        if self._peers.get(peer.workload.name) is peer:
            del self._peers[peer.workload.name]

    def _take_back(self, workload: Captured) -> None:
        """It goes direct no more: what was granted to it, and by it, ends."""
        self._forget(workload)
        for pair, granted in list(self._granted.items()):
            if workload in (granted.source, granted.target):
                self._revoke(pair)
        for pair, grant in list(self._adopted.items()):
            if pair.source_cgroup == workload.app_cgroup or grant.target_netns == workload.netns_cookie:
                self._drop_adopted(pair)

    def changed(self) -> None:
        """The configuration, or the workloads of this host, are others now: whoever is not who they were ends."""
        self._look()
        captured = self._captured()
        for pair, granted in list(self._granted.items()):
            if granted.source not in captured or granted.target not in captured:
                self._revoke(pair)
        for peer in list(self._peers.values()):
            if peer.workload in captured:
                self._write_choices(peer)
                self._write_grants(peer)
            else:
                peer.hang_up()

    # -- of callers

    def _consent(self, peer: Peer) -> bool:
        """What a caller would dial directly; whether anything of that is new."""
        said = peer.said
        if said is None or self._taken.get(peer.workload) is said:
            return False
        consents = {
            (backend.address, backend.port): backend.identity
            for choice in said.choices
            for backend in choice.backends
            if backend.identity is not None
        }
        self._taken[peer.workload] = said
        new = self._write_choices(peer) or self._consents.get(peer.workload) != consents
        self._consents[peer.workload] = consents
        return new

    def _write_choices(self, peer: Peer) -> bool:
        """What a caller may dial directly; whether anything of that is new."""
        cgroup = peer.workload.app_cgroup
        if peer.said is None:
            return False
        wanted = {(cgroup, packed16(one.address), one.port): self._backends(one) for one in peer.said.choices}
        wanted = {dialled: backends for dialled, backends in wanted.items() if any(b.netns_cookie for b in backends)}
        self._forget_choices(dialled for dialled in self._choices if dialled[0] == cgroup and dialled not in wanted)
        changed = [dialled for dialled, backends in wanted.items() if self._choices.get(dialled) != backends]
        for dialled in changed:
            try:
                self._maps.direct_services.put(*dialled, wanted[dialled])
                self._choices[dialled] = wanted[dialled]
            except (ArenaFullError, BpfError, ValueError) as error:
                _log.error("workload %s goes by tunnels: %s", peer.workload.name, error)
                self._forget_choices([dialled] if dialled in self._choices else [])  # it is out of date
                self._taken.pop(peer.workload, None)  # there may be room when it is said again
        return bool(changed)

    def _forget(self, caller: Captured) -> None:
        for known in (self._here, self._consents, self._taken):
            known.pop(caller, None)
        self._forget_choices(dialled for dialled in self._choices if dialled[0] == caller.app_cgroup)

    def _forget_choices(self, gone: Iterable[Dialled]) -> None:
        for dialled in list(gone):
            self._maps.direct_services.delete(*dialled)
            del self._choices[dialled]

    def _backends(self, choice: Choice) -> tuple[Backend, ...]:
        return tuple(
            Backend(
                address=packed16(one.address),
                port=one.port,
                weight=one.weight,
                netns_cookie=self._cookie_at(one.address, one.identity),
                id=backend_id(one.address, one.port),
            )
            for one in choice.backends
        )

    def _cookie_at(self, address: IpAddress, expected: SpiffeId | None) -> int:
        """Of the namespace of a workload here that goes direct and is whom its caller expects; else 0."""
        workload = self._at.get(address)
        if workload is None or workload not in self._here or expected is None or self._identity_at(address) != expected:
            return 0
        return workload.netns_cookie

    def _look(self) -> None:
        """Who is at which address of this host now."""
        self._at = {address: one for one in self._captured() for address in one.addresses}

    # -- of destinations

    def _write_grants(self, target: Peer) -> None:
        """What a destination allows, as far as it is so; what it allows no more ends."""
        if target.said is None:
            return
        named: set[Pair] = set()
        for allowed in target.said.allowed:
            source = self._at.get(allowed.tunnel[0])
            if (
                source is not None
                and source != target.workload
                and allowed.address in target.workload.addresses
                and allowed.port not in _RESERVED
                and self._identity_at(allowed.tunnel[0]) == allowed.identity
            ):
                pair = Pair(source.app_cgroup, packed16(allowed.address), allowed.port)
                named.add(pair)
                self._grant(pair, source, target, allowed)
        for pair, granted in list(self._granted.items()):
            if granted.target == target.workload and pair not in named:
                self._revoke(pair)
        for pair, grant in list(self._adopted.items()):
            if grant.target_netns == target.workload.netns_cookie and pair not in named:
                self._drop_adopted(pair)

    def _grant(self, pair: Pair, source: Captured, target: Peer, allowed: Allowed) -> None:
        """Grants or renews, if everything is so that has to be."""
        caller = self._peers.get(source.name)
        if caller is None or caller.workload != source or source not in self._here:
            return
        if caller.said is None or not caller.said.direct or time.monotonic() - caller.heard_at > LIFETIME_S:
            return
        held = self._granted.get(pair)
        expected = self._consents.get(source, {}).get((allowed.address, allowed.port))
        consents = expected is not None and expected == self._identity_at(allowed.address)
        if held is None and not consents:
            return
        if held is None and any(ending.pair == pair for ending in self._ending):
            return  # what an earlier grant let in ends first, lest what this one lets in ends with it; it is said again
        if held is None and not self._was_granted(pair, target.workload):
            if not self._owns(caller, target, allowed):
                return
            if not self._ways.holds(caller, target, allowed.address, partial(self._write_grants, target)):
                return
        grant = Grant(
            expiry_ns=time.monotonic_ns() + int(LIFETIME_S * _NS),
            target_netns=target.workload.netns_cookie,
            source_id=stable_id(str(allowed.identity)),
            target_id=stable_id(str(self._identity_at(allowed.address))),
        )
        known = self._maps.grants.get(pair)
        suspended = known is not None and 0 < time.monotonic_ns() - RETRY_S * _NS < known.suspended_ns
        if not suspended and not consents:
            # It wants to come by a tunnel once more: its certificate is new, or somebody else is to be there.
            grant = replace(grant, suspended_ns=time.monotonic_ns())
        try:
            if not suspended or not self._maps.grants.renew(pair, grant.expiry_ns):
                self._maps.grants.put(pair, grant)
        except BpfError as error:
            _log.error("workload %s: a grant cannot be given: %s", target.workload.name, error)
            return
        self._adopted.pop(pair, None)
        self._granted[pair] = _Granted(source, target.workload, grant.expiry_ns)
        if held is None:
            _log.info("workload %s goes direct to %s, port %d", source.name, target.workload.name, pair.port)

    def _was_granted(self, pair: Pair, target: Captured) -> bool:
        """Whether an earlier agent has looked at exactly this pair, and its grant has not run out."""
        grant = self._adopted.get(pair)
        return grant is not None and grant.target_netns == target.netns_cookie

    def _owns(self, caller: Peer, target: Peer, allowed: Allowed) -> bool:
        """Whether the tunnel's ends are sockets of these two uProxies, and its caller's of nobody else on this host."""
        here = (allowed.address, HBONE_PORT)
        try:
            near = caller.sockets.established(allowed.tunnel, here)
            far = target.sockets.established(here, allowed.tunnel)
            if near is None or far is None:
                return False
            others = [one for one in self._peers.values() if one is not caller]
            alone = all(one.sockets.established(allowed.tunnel, here) is None for one in others)
        except OSError as error:
            _log.warning("workload %s: whose a tunnel is cannot be known: %s", target.workload.name, error)
            return False
        return alone and (near.cgroup, far.cgroup) == (caller.workload.proxy_cgroup, target.workload.proxy_cgroup)

    # -- the end

    def _revoke(self, pair: Pair) -> None:
        granted = self._granted.pop(pair)
        self._maps.grants.delete(pair)
        _log.info(
            "workload %s no longer goes direct to %s, port %d", granted.source.name, granted.target.name, pair.port
        )
        self._ending.append(_Ending(pair, granted.source, granted.target))
        self._end_connections()

    def _drop_adopted(self, pair: Pair) -> None:
        """What an earlier agent granted, and nobody has said again."""
        self._maps.grants.delete(pair)
        del self._adopted[pair]
        source = next((one for one in self._captured() if one.app_cgroup == pair.source_cgroup), None)
        target = self._at.get(from_packed(pair.address))
        if source is not None and target is not None:
            self._ending.append(_Ending(pair, source, target))
            self._end_connections()

    def _end_connections(self) -> None:
        for ending in self._ending:
            self._end(ending)
        self._ending = [ending for ending in self._ending if ending.rounds > 0]

    def _end(self, ending: _Ending) -> None:
        """At both ends: one of them may have closed its own already."""
        destination = from_packed(ending.pair.address), ending.pair.port

        def outgoing(found: Found) -> bool:
            return found.remote == destination

        def incoming(found: Found) -> bool:
            return found.local == destination and found.remote[0] in ending.source.addresses

        done = True
        for workload, is_direct in ((ending.source, outgoing), (ending.target, incoming)):
            if workload not in self._captured():
                continue  # it has ended itself
            try:
                sockets = self._sockets[workload]
                for found in list(filter(is_direct, sockets.live())):
                    sockets.destroy(found)
            except (KeyError, OSError) as error:  # KeyError: its uProxy has not come back yet
                done = False
                if isinstance(error, OSError):
                    _log.error("workload %s: connections cannot be ended yet: %s", workload.name, error)
        ending.rounds -= done

    def close(self) -> None:
        """Nothing ends by this: what is granted runs out."""
        for sockets in self._sockets.values():
            sockets.close()

    # -- time

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self.tick()
            except (BpfError, OSError) as error:
                _log.error("the direct path: %s", error)

    def tick(self) -> None:
        """Ends what has run out, tells who is here and what connections have ended."""
        self._look()
        now_ns = time.monotonic_ns()
        for pair in [pair for pair, granted in self._granted.items() if granted.expiry_ns <= now_ns]:
            self._revoke(pair)
        for pair in [pair for pair, grant in self._adopted.items() if grant.expiry_ns <= now_ns]:
            self._drop_adopted(pair)
        self._end_connections()
        self._look_at_ways()
        self._forget_the_gone()
        self._tell_who_is_here()
        self._flows.tell(self._maps.flows.drain(), self._peers)

    def _look_at_ways(self) -> None:
        """Whether somebody has come in between since a way was tried."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_S
        used: set[tuple[Captured, IpAddress]] = set()
        for pair, granted in self._granted.items():
            address = from_packed(pair.address)
            used.add((granted.target, address))
            used |= {(granted.source, one) for one in sources_of(granted.source.addresses, address)}
        for workload, address in used:
            peer = self._peers.get(workload.name)
            if peer is None or peer.workload != workload:
                continue  # nobody renews what it has
            try:
                problem = routes.shared(address, peer.netns_fd)
            except OSError as error:
                problem = str(error)
            if problem:
                _log.warning("workload %s goes by tunnels only: %s", workload.name, problem)
                self._ways.suspend(workload.app_cgroup)
                for pair, granted in list(self._granted.items()):
                    if workload in (granted.source, granted.target):
                        self._revoke(pair)

    def _forget_the_gone(self) -> None:
        captured = self._captured()
        present = {peer.workload for peer in self._peers.values()}
        silent = time.monotonic() - LIFETIME_S
        for workload in [one for one, heard in self._here.items() if one not in present and heard < silent] + [
            one for one in self._here if one not in captured
        ]:
            self._ways.forget(workload.app_cgroup)
            self._forget(workload)
        for workload in [one for one in self._sockets if one not in captured]:
            self._sockets.pop(workload).close()

    def _tell_who_is_here(self) -> None:
        local = frozenset(address for one in self._here for address in one.addresses)
        if local == self._local or time.monotonic() - self._started < _SETTLE_S:
            return
        self._local = local
        message = channel.pack_local(sorted(local))
        for peer in self._peers.values():
            peer.tell(message)
            self._write_choices(peer)
