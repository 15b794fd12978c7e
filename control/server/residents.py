"""Who lives at which address, over all namespaces: what the address shards say, and what no second one may claim."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from control.api.address import IpAddress
from control.api.identity import SpiffeId, TrustDomain, make_id
from control.api.index import AddressShard, Resident, ResidentService
from control.api.topics import ADDRESS_SHARDS, address_shard

Claim = tuple[str, str]
"""Namespace, and who of it, as `named` writes it."""


class Residents:
    """All addresses that are taken. Changes only by `replace`."""

    def __init__(self, trust_domain: TrustDomain, shards: Iterable[AddressShard]) -> None:
        self._trust_domain = trust_domain
        self._at: dict[IpAddress, Resident] = {}
        self._of: dict[str, dict[IpAddress, Resident]] = {}
        self._identities: dict[str, dict[str, SpiffeId]] = {}
        """Namespace -> principal -> identity, kept since a change of one namespace is held against all others."""
        self._shards: list[set[IpAddress]] = [set() for _ in range(ADDRESS_SHARDS)]
        found: dict[str, dict[IpAddress, Resident]] = {}
        for shard in shards:
            for address, resident in shard.residents.items():
                found.setdefault(resident.namespace, {})[address] = resident
        self.replace(found)

    def identities(self) -> frozenset[SpiffeId]:
        """Those of all workloads."""
        return frozenset(identity for known in self._identities.values() for identity in known.values())

    def principals(self, without: Collection[str]) -> frozenset[str]:
        """Those of the workloads of all namespaces but some."""
        return frozenset().union(*(known for name, known in self._identities.items() if name not in without))

    def shards_with(self, changed: Mapping[str, Mapping[IpAddress, Resident]]) -> dict[int, dict[IpAddress, Resident]]:
        """The shards that change when these namespaces (namespace -> residents) are replaced: shard -> residents."""
        moved: dict[int, dict[IpAddress, Resident | None]] = {}
        for address, resident in self._moves(changed).items():
            moved.setdefault(address_shard(address), {})[address] = resident
        found: dict[int, dict[IpAddress, Resident]] = {}
        for shard, changes in moved.items():
            merged: dict[IpAddress, Resident | None] = {address: self._at[address] for address in self._shards[shard]}
            merged |= changes
            found[shard] = {address: resident for address, resident in merged.items() if resident is not None}
        return found

    def replace(self, changed: Mapping[str, Mapping[IpAddress, Resident]]) -> None:
        """Gives namespaces other residents."""
        for address, resident in self._moves(changed).items():
            shard = self._shards[address_shard(address)]
            if resident is None:
                del self._at[address]
                shard.remove(address)
            else:
                self._at[address] = resident
                shard.add(address)
        for namespace, residents in changed.items():
            self._of[namespace] = dict(residents)
            accounts = {one.service_account for one in residents.values() if not isinstance(one, ResidentService)}
            identities = [make_id(self._trust_domain, namespace, account) for account in accounts]
            self._identities[namespace] = {identity.principal: identity for identity in identities}

    def holder(self, address: IpAddress) -> Resident | None:
        return self._at.get(address)

    def __iter__(self) -> Iterator[IpAddress]:
        return iter(self._at)

    def _moves(self, changed: Mapping[str, Mapping[IpAddress, Resident]]) -> dict[IpAddress, Resident | None]:
        """Address -> whoever lives there instead, or None, of those that change."""
        moves: dict[IpAddress, Resident | None] = {}
        for namespace, residents in changed.items():
            moves |= dict.fromkeys(self._of.get(namespace, {}).keys() - residents.keys())
        for residents in changed.values():
            # After the above: an address may go from one of these namespaces to another.
            moves |= {address: new for address, new in residents.items() if self._at.get(address) != new}
        return moves


class Others(Mapping[IpAddress, str]):
    """Address -> who holds it, outside of one of the namespaces that are being built."""

    def __init__(
        self, namespace: str, building: Collection[str], claims: Mapping[IpAddress, Claim], residents: Residents
    ) -> None:
        """`claims`: of all namespaces that are being built. In the others, whoever lives at an address holds it."""
        self._namespace = namespace
        self._building = building
        self._claims = claims
        self._residents = residents

    def __contains__(self, address: object) -> bool:
        return isinstance(address, str) and self._holder(IpAddress(address)) is not None

    def __getitem__(self, address: IpAddress) -> str:
        holder = self._holder(address)
        if holder is None:
            raise KeyError(address)
        return holder

    def _holder(self, address: IpAddress) -> str | None:
        claim = self._claims.get(address)
        if claim is not None and claim[0] != self._namespace:
            return claim[1]
        resident = self._residents.holder(address)
        if resident is not None and resident.namespace not in self._building:
            return named(resident)
        return None

    def __iter__(self) -> Iterator[IpAddress]:
        every = dict.fromkeys([*self._claims, *self._residents])
        return (address for address in every if address in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def named(resident: Resident) -> str:
    """How a resident is called in messages to people."""
    kind = "Service" if isinstance(resident, ResidentService) else "WorkloadEntry"
    return f"{kind} {resident.key}"
