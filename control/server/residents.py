"""Who lives at which address, over all namespaces: what the address shards say, and what no second one may claim."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from control.api.address import IpAddress
from control.api.index import AddressShard, Resident, ResidentService
from control.api.topics import ADDRESS_SHARDS, address_shard


class Residents:
    """All addresses that are taken. Changes only by `replace`."""

    def __init__(self, shards: Iterable[AddressShard]) -> None:
        self._at: dict[IpAddress, Resident] = {}
        self._of: dict[str, set[IpAddress]] = {}
        self._shards: list[set[IpAddress]] = [set() for _ in range(ADDRESS_SHARDS)]
        for shard in shards:
            for address, resident in shard.residents.items():
                self._add(address, resident)

    def principals(self, trust_domain: str, without: frozenset[str]) -> frozenset[str]:
        """Those of the workloads of all namespaces but some."""
        return frozenset(f"{trust_domain}/ns/{namespace}/sa/{account}" for namespace, account in self.accounts(without))

    def accounts(self, without: frozenset[str] = frozenset()) -> frozenset[tuple[str, str]]:
        """(namespace, service account) of the workloads of all namespaces but some."""
        return frozenset(
            (resident.namespace, resident.service_account)
            for resident in self._at.values()
            if not isinstance(resident, ResidentService) and resident.namespace not in without
        )

    def shards_with(self, changed: Mapping[str, Mapping[IpAddress, Resident]]) -> dict[int, dict[IpAddress, Resident]]:
        """The shards that change when these namespaces (namespace -> residents) are replaced: shard -> residents."""
        moved: dict[int, dict[IpAddress, Resident | None]] = {}
        for namespace, residents in changed.items():
            for address in self._of.get(namespace, ()):
                if address not in residents:
                    # Another of the changed namespaces may have it now, which must then win.
                    moved.setdefault(address_shard(address), {}).setdefault(address, None)
            for address, resident in residents.items():
                if self._at.get(address) != resident:
                    moved.setdefault(address_shard(address), {})[address] = resident
        found: dict[int, dict[IpAddress, Resident]] = {}
        for shard, changes in moved.items():
            merged: dict[IpAddress, Resident | None] = {address: self._at[address] for address in self._shards[shard]}
            merged |= changes
            found[shard] = {address: resident for address, resident in merged.items() if resident is not None}
        return found

    def replace(self, changed: Mapping[str, Mapping[IpAddress, Resident]]) -> None:
        """Gives namespaces other residents."""
        for namespace in changed:
            for address in self._of.pop(namespace, ()):
                del self._at[address]
                self._shards[address_shard(address)].discard(address)
        for residents in changed.values():
            for address, resident in residents.items():
                self._add(address, resident)

    def holder(self, address: IpAddress) -> Resident | None:
        return self._at.get(address)

    def __iter__(self) -> Iterator[IpAddress]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)

    def _add(self, address: IpAddress, resident: Resident) -> None:
        self._at[address] = resident
        self._of.setdefault(resident.namespace, set()).add(address)
        self._shards[address_shard(address)].add(address)


class Others(Mapping[IpAddress, str]):
    """Address -> who holds it, of all namespaces but some, and of whatever else is claimed."""

    def __init__(self, residents: Residents, without: frozenset[str], claimed: Mapping[IpAddress, str]) -> None:
        self._residents = residents
        self._without = without
        self._claimed = claimed

    def __getitem__(self, address: IpAddress) -> str:
        if address in self._claimed:
            return self._claimed[address]
        resident = self._residents.holder(address)
        if resident is None or resident.namespace in self._without:
            raise KeyError(address)
        return named(resident)

    def __iter__(self) -> Iterator[IpAddress]:
        yield from self._claimed
        for address in self._residents:
            if address not in self._claimed and address in self:
                yield address

    def __len__(self) -> int:
        return sum(1 for _ in self)


def named(resident: Resident) -> str:
    """How a resident is called in messages to people."""
    kind = "Service" if isinstance(resident, ResidentService) else "WorkloadEntry"
    return f"{kind} {resident.key}"
